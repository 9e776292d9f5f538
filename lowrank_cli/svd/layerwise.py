"""The second moments of `calibration`, a layer at a time: once forward through the model and once back.

The moments of one layer of a 7B model are 4 GB, so those of all linears are never held together; and passing the text
through the whole model once for each group that fits would repeat nearly all of the work. Here every layer's input is
kept instead (tokens x width, a fraction of that), and the gradient at every layer's output comes from the layer after:

    forward      h_0 = embeddings, h_l+1 = layer_l(h_l); every h_l is kept
    head         labels are drawn from the logits of h_L, and give the gradient g_L at h_L
    backward     for the last layer first: layer_l(h_l) again, watched; backward from g_l+1 gives g_l

One-sided moments need no way back: each layer passes its inputs on, watched, and only one layer's are kept.

A layer whose experts have more moments than a budget is passed several times before the text goes on.

It needs a model whose layers pass on one tensor and nothing else that depends on it, which `chain_of` finds out by
watching one pass, and whose logits come of the last one's. What layers are given besides (masks, rotary angles) is
what the model itself gives them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_cli.models.layers import layers_of
from lowrank_cli.models.lowrank_linear import shape_of
from lowrank_cli.svd.calibration import Moments, Target, frozen, groups, moment_bytes, watching
from lowrank_cli.svd.shelf import Shelf

# tokens that a model is watched on
PROBE = 8


class _Reached(Exception):
    """Ends a forward pass where it is no longer needed."""


@dataclass
class Chain:
    """A model as layers one after the other.

    Attributes:
        model: all of it.
        layers: in their order.
        tails: what each returns beside its tensor, which nobody reads; None where it returns the tensor alone.
    """

    model: nn.Module
    layers: list[nn.Module]
    tails: list[tuple | None]

    @contextmanager
    def replaced(self, stand_in: Callable[[int, Tensor, tuple, dict], Tensor]) -> Iterator[None]:
        """Every layer computes `stand_in(index, hidden, other arguments)` instead; its hooks and attributes stay."""

        def install(index: int, layer: nn.Module) -> None:
            def forward(*args, **kwargs):
                hidden, args, kwargs = split(args, kwargs)
                out = stand_in(index, hidden, args, kwargs)
                return out if self.tails[index] is None else (out, *self.tails[index])

            layer.forward = forward

        for index, layer in enumerate(self.layers):
            install(index, layer)
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.forward

    def apply(self, index: int, hidden: Tensor, args: tuple, kwargs: dict) -> Tensor:
        """One layer."""
        out = self.layers[index](hidden, *args, **kwargs)
        return out if self.tails[index] is None else out[0]

    def inputs(self, ids: Tensor) -> tuple[Tensor, list[tuple[tuple, dict]]]:
        """Return the first layer's input for (B, T) token ids, and what each layer gets besides its input."""
        arguments: list[tuple[tuple, dict]] = []
        first: list[Tensor] = []

        def record(index: int, hidden: Tensor, args: tuple, kwargs: dict) -> Tensor:
            first.append(hidden)
            arguments.append((args, kwargs))
            if len(arguments) == len(self.layers):
                raise _Reached
            return hidden

        with self.replaced(record), torch.no_grad(), suppress(_Reached):
            self.model(input_ids=ids, use_cache=False)
        return first[0], arguments

    def logits(self, ids: Tensor, last: Tensor) -> Tensor:
        """The model's logits, (B, T, V), for the last layer's output."""
        with self.replaced(lambda index, hidden, args, kwargs: last if index == len(self.layers) - 1 else hidden):
            return self.model(input_ids=ids, use_cache=False).logits


def split(args: tuple, kwargs: dict) -> tuple[Any, tuple, dict]:
    """The tensor that a layer transforms, and its other arguments."""
    if args:
        return args[0], args[1:], kwargs
    return kwargs["hidden_states"], (), {k: v for k, v in kwargs.items() if k != "hidden_states"}


def chain_of(model: nn.Module) -> Chain | None:
    """The model as a chain of layers, or None if it is not one.

    One pass over a few tokens is watched: each layer is called once, in order, with the very tensor that the one
    before returned, and is given nothing else that depends on it. Layer by layer the logits are then the same.
    """
    layers = layers_of(model)
    if not layers or getattr(model.config, "is_encoder_decoder", False):
        return None
    calls: list[tuple[nn.Module, Any, tuple, dict, Any]] = []

    def watch(layer: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        # a layer that gets its tensor by another name is no link of a chain
        given = split(args, kwargs) if args or "hidden_states" in kwargs else (None, (), {})
        calls.append((layer, *given, out))

    handles = [layer.register_forward_hook(watch, with_kwargs=True) for layer in layers]
    ids = torch.arange(PROBE, device=next(model.parameters()).device)[None] % model.config.get_text_config().vocab_size
    try:
        with frozen(model), torch.enable_grad():
            embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
            expected = model(inputs_embeds=embedded, use_cache=False).logits.detach()
    finally:
        for handle in handles:
            handle.remove()
    tails = linked(calls) if [layer for layer, *_ in calls] == layers else None
    if tails is None:
        return None
    chain = Chain(model, layers, tails)
    with frozen(model), torch.no_grad():
        hidden, arguments = chain.inputs(ids)
        for index, (args, kwargs) in enumerate(arguments):
            hidden = chain.apply(index, hidden, args, kwargs)
        found = chain.logits(ids, hidden)
    scale = float(expected.abs().max())
    return chain if torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * scale) else None


def linked(calls: list[tuple[nn.Module, Any, tuple, dict, Any]]) -> list[tuple | None] | None:
    """Return what layers returned beside their tensors; None unless each call got the tensor of the one before and
    nothing else that depends on it.

    Args:
        calls: layer, tensor, other arguments and output of each, in order.
    """
    before, tails = None, []
    seen: list[Tensor] = []
    for _, hidden, args, kwargs, out in calls:
        others = [x for x in nested([args, kwargs]) if isinstance(x, Tensor)]
        tail = out[1:] if isinstance(out, tuple) else None
        if not isinstance(hidden, Tensor) or (before is not None and hidden is not before):
            return None
        if any(x.requires_grad or any(x is t for t in seen) for x in others):
            return None
        before = out if tail is None else out[0]
        seen += [x for x in nested(list(tail or ())) if isinstance(x, Tensor)]
        tails.append(tail)
    return tails


def nested(value: Any) -> Iterator[Any]:
    """The leaves of lists, tuples and dictionaries."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from nested(item)
    else:
        yield value


def of_layers(chain: Chain, linears: Mapping[str, Target]) -> list[dict[str, Target]] | None:
    """The linears and experts of each layer by their full names; None if one is in no layer."""
    holders = {name: m if isinstance(m, nn.Module) else m.module for name, m in linears.items()}
    found = []
    for layer in chain.layers:
        inside = set(layer.modules())
        found.append({name: linears[name] for name, holder in holders.items() if holder in inside})
    return found if sum(map(len, found)) == len(linears) else None


class LayerMoments:
    """The moments of one layer's linears after the other's, by one pass through the model.

    Args:
        chain: the model.
        linears: of each layer, by name; experts too.
        windows: token ids, (B, T) each.
        two_sided: also the gradients' moments, which takes a way back.
        shelf: for the layers' inputs.
        budget: bytes of the moments of a layer's experts that are held together.
        seed: of the labels; they are those that `calibration.collect` draws.
    """

    def __init__(
        self,
        chain: Chain,
        linears: Sequence[Mapping[str, Target]],
        windows: Sequence[Tensor],
        *,
        two_sided: bool,
        shelf: Shelf,
        budget: float = math.inf,
        seed: int = 0,
    ):
        device = next(chain.model.parameters()).device
        self.chain, self.linears, self.two_sided, self.shelf = chain, linears, two_sided, shelf
        self.parts = [parts_of(of_one, budget, two_sided) for of_one in linears]
        self.windows = [ids.to(device) for ids in windows]
        self.tokens = sum(ids.numel() for ids in self.windows)
        self.generator = torch.Generator(device).manual_seed(seed)

    @torch.no_grad()
    def forward(self, advance: Callable[[], None] = lambda: None) -> None:
        """Pass the text to where `moments` begins; `advance` is called after every window.

        Two-sided, that is the last layer's output and the loss, and all layers' inputs are kept; else the embeddings.
        """
        with frozen(self.chain.model):
            for w, ids in enumerate(self.windows):
                hidden, arguments = self.chain.inputs(ids)
                if self.two_sided:
                    for index, (args, kwargs) in enumerate(arguments):
                        self.shelf.put(key(index, w), {"hidden": hidden})
                        hidden = self.chain.apply(index, hidden, args, kwargs)
                    hidden = self.gradient(ids, hidden)
                self.shelf.put(key("passing", w), {"hidden": hidden})
                advance()

    def gradient(self, ids: Tensor, last: Tensor) -> Tensor:
        """Of the loss at the last layer's output, for labels that the model draws."""
        with torch.enable_grad():
            last = last.detach().requires_grad_()
            logits = self.chain.logits(ids, last)[:, :-1].flatten(0, 1).float()  # (N, V)
            with torch.no_grad():
                labels = torch.multinomial(logits.softmax(-1), 1, generator=self.generator).squeeze(1)
            F.cross_entropy(logits, labels, reduction="sum").backward()
        return last.grad

    def moments(self) -> Iterator[dict[str, Moments]]:
        """After `forward`: the moments of each part of `parts`; two-sided, those of the last layer first."""
        order = range(len(self.chain.layers))
        for index in reversed(order) if self.two_sided else order:
            # a layer that has nothing to watch passes the text on as well
            parts = self.parts[index] or [{}]
            for part in parts:
                linears = {name: self.linears[index][name] for name in part}
                watcher = watching(linears, self.two_sided, part)
                with watcher, frozen(self.chain.model):
                    for w in range(len(self.windows)):
                        self.step(index, w, is_last=part is parts[-1])
                if part:
                    yield watcher.finished(self.tokens)
        for w in range(len(self.windows)):
            self.shelf.pop(key("passing", w))

    def step(self, index: int, w: int, *, is_last: bool) -> None:
        """Pass one window through a layer: its inputs forward, or the gradients at its outputs back; what comes out
        is kept if it is the last time."""
        take = self.shelf.pop if is_last else self.shelf.get
        # made anew each time: masks of all windows would be held for long
        args, kwargs = self.chain.inputs(self.windows[w])[1][index]
        passing = take(key("passing", w))["hidden"]
        if not self.two_sided:
            with torch.no_grad():
                passed = self.chain.apply(index, passing, args, kwargs)
        else:
            hidden = take(key(index, w))["hidden"]
            with torch.enable_grad():
                hidden = hidden.detach().requires_grad_()
                self.chain.apply(index, hidden, args, kwargs).backward(passing)
            passed = hidden.grad
        if is_last:
            self.shelf.put(key("passing", w), {"hidden": passed})


def parts_of(linears: Mapping[str, Target], budget: float, two_sided: bool) -> list[dict[str, range]]:
    """A layer's linears, always together, and its experts as they fit beside them, in groups as of `groups`."""
    shapes = {name: shape_of(m) for name, m in linears.items()}
    matrices = sum(moment_bytes(shape, two_sided) for shape in shapes.values() if len(shape) == 2)
    # linears first: they are few, and their order is nothing to anyone
    ordered = dict(sorted(shapes.items(), key=lambda pair: len(pair[1])))
    return groups(ordered, max(budget, matrices), two_sided)


def key(what: int | str, window: int) -> str:
    """Of a layer's input, or of what is passed from layer to layer, on the shelf."""
    return f"{what}-{window}"
