"""Find out what a causal language model does to the logits of its head, by calling its own forward.

The logits of nearly every architecture are f(W h + b), where f changes each logit by itself: nothing at all (LLaMA), a
scale (Granite, Cohere) or a soft cap, c tanh(s z / c) (Gemma 2). Which one is not asked of a list of architectures:
the model's forward runs with stand-ins for its body and its head. The head's gives known logits, and what comes out of
the model is compared with them. No value of a weight takes part, so that the answer is the same on the meta device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

# logits where f is linear whatever the cap, and where every cap is reached
SMALL, LARGE = 2**-6, 2.0**40
# what a forward may raise that needs more of its body than hidden states
NEEDS_MORE = (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError)


@dataclass(frozen=True)
class Tail:
    """A Tail is f, cap tanh(scale z / cap), or scale z without a cap, and the name of the head before it."""

    head: str
    scale: float = 1.0
    cap: float | None = None


_FOUND: WeakKeyDictionary[nn.Module, Tail | None] = WeakKeyDictionary()


def tail_of(model: nn.Module) -> Tail | None:
    """The function f of a model whose logits are f(W h + b), with W and b of its linear head; None for any other.

    It is found out once for each model. Whether the head has since been replaced is not looked at.

    Args:
        model: any model, on any device.
    """
    if model not in _FOUND:
        _FOUND[model] = _find(model)
    return _FOUND[model]


def head_input(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """The input of the head of a model that has a tail, (B, T, D), by the model's own forward without its logits.

    Args:
        model: a model that `tail_of` knows.
        inputs: of its forward; without labels.
    """
    with _exchanged(model, tail_of(model).head, _one_logit) as head:
        model.forward(**inputs, use_cache=False)
    (((hidden,), _),) = head.calls
    return hidden


def _find(model: nn.Module) -> Tail | None:
    # one that wraps another may have no way to its head, and an instance's own forward may do anything
    if not isinstance(model, PreTrainedModel) or "forward" in vars(model):
        return None
    names = {module: name for name, module in model.named_modules()}
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head not in names or head.out_features < 2:
        return None
    # OPT's forward calls the decoder in its base model, Llama 4's a whole language model
    likely = (model.base_model, model.get_decoder(), *(m for m in names if isinstance(m, PreTrainedModel)))
    bodies = [m for m in dict.fromkeys(likely) if all(part is not head for part in m.modules())]
    with _alone(model):
        for body, width in product(bodies, _widths(model, head)):
            if (found := _measure(model, names[body], names[head], head, width)) is not None:
                return Tail(names[head], *found)
    return None


def _measure(
    model: PreTrainedModel, body_name: str, head_name: str, head: nn.Linear, width: int
) -> tuple[float, float | None] | None:
    """Scale and cap, if the forward goes once through this body, once through its head, and ends with a tail."""
    given = _values(head.out_features)  # (1, 2, V)
    hidden = head.weight.new_zeros(1, 2, width)
    ids = torch.zeros(1, 2, dtype=torch.long, device=head.weight.device)
    found = []
    with _exchanged(model, body_name, lambda *_, **__: _Outputs(last_hidden_state=hidden)) as body:
        for answer in (lambda _: given, _one_logit):
            body.calls.clear()
            with _exchanged(model, head_name, answer) as stand_in:
                try:
                    found.append(model.forward(input_ids=ids, use_cache=False)[0])
                except NEEDS_MORE:
                    return None
            if len(body.calls) != 1 or len(stand_in.calls) != 1:
                return None
            args, kwargs = stand_in.calls[0]
            if len(args) != 1 or kwargs or args[0].shape != (1, 2, head.in_features):
                return None
    logits = found[0]
    if not isinstance(logits, Tensor) or logits.device != given.device or logits.shape != given.shape:
        return None
    return _fit(given.flatten(), logits.double().flatten(), 64 * torch.finfo(logits.dtype).eps)


def _fit(given: Tensor, found: Tensor, tolerance: float) -> tuple[float, float | None] | None:
    """Scale and cap that make the one of the other, to a relative tolerance at every entry; None if there is none."""
    small, large = found[0].item(), found[1].item()
    if not (math.isfinite(small) and math.isfinite(large)) or small == 0:
        return None
    scale = small / SMALL
    if _is_close(scale * given, found, tolerance):
        return scale, None
    if abs(small) >= large:
        return None
    scale = large * math.atanh(small / large) / SMALL
    # rounding is no scale
    scale = 1.0 if abs(scale - 1) < tolerance else scale
    return (scale, large) if _is_close(large * torch.tanh(scale / large * given), found, tolerance) else None


def _is_close(made: Tensor, found: Tensor, tolerance: float) -> bool:
    return bool(((made - found).abs() <= tolerance * found.abs()).all())


def _values(vocabulary: int) -> Tensor:
    """Logits for two tokens, (1, 2, V): of every size and both signs, no two alike."""
    size = torch.logspace(-3, 3, 2 * vocabulary, dtype=torch.float64, device="cpu").view(1, 2, vocabulary)
    size[0, 0, 0], size[0, 0, 1] = SMALL, LARGE
    return torch.where(torch.arange(vocabulary, device="cpu") % 3 == 2, -size, size)


def _widths(model: PreTrainedModel, head: nn.Linear) -> list[int]:
    """Return the widths a body may have: the head's, or the layers' where a projection follows them."""
    of_layers = getattr(model.config.get_text_config(), "hidden_size", None)
    return list(dict.fromkeys(width for width in (head.in_features, of_layers) if isinstance(width, int)))


def _one_logit(hidden: Tensor) -> Tensor:
    return hidden.new_zeros(*hidden.shape[:-1], 1)


@dataclass
class _Outputs(ModelOutput):
    """A body's outputs: hidden states, and None for whatever else is looked for."""

    last_hidden_state: Tensor | None = None

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return None


class _StandIn(nn.Module):
    """Answers calls and remembers them; it has the attributes of the module in whose place it is."""

    def __init__(self, real: nn.Module, answer: Callable):
        super().__init__()
        # not as a submodule
        vars(self).update(real=real, answer=answer, calls=[])

    def __getattr__(self, name: str):
        return getattr(vars(self)["real"], name)

    def forward(self, *args, **kwargs):
        self.calls.append((args, kwargs))
        return self.answer(*args, **kwargs)


@contextmanager
def _exchanged(model: nn.Module, name: str, answer: Callable) -> Iterator[_StandIn]:
    """A stand-in in the place of a module; hooks of the module see nothing of it."""
    parent, _, own_name = name.rpartition(".")
    modules = model.get_submodule(parent)._modules
    real = modules[own_name]
    modules[own_name] = stand_in = _StandIn(real, answer)
    try:
        yield stand_in
    finally:
        modules[own_name] = real


@contextmanager
def _alone(model: nn.Module) -> Iterator[None]:
    """In train mode, which a run may come to, with nobody watching and the caller's random state as it was."""
    training = [(module, module.training) for module in model.modules()]
    with _disable_current_modes(), torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            for module, _ in training:
                module.training = True
            yield
        finally:
            for module, was in training:
                module.training = was
