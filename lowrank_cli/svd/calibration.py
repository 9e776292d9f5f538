"""Measure on text what an error in a weight costs: second moments of a linear's input and of its output's gradient.

Shapes: N tokens; x is (N, n), the input of a linear, and g (N, m) the gradient of the loss at its output.

    A = E[x x^T]    (n, n)        B = E[g g^T]    (m, m)

The loss is the negative log-likelihood of labels drawn from the model itself, which makes A (x) B the
Kronecker-factored Fisher matrix and not the empirical one (Martens and Grosse, arXiv:1503.05671, sec. 5).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_cli.errors import LowrankError


@dataclass
class Moments:
    """The second moments at one linear, float64; linears that read the same tensor share `input`.

    Attributes:
        input: A, (n, n), or None.
        output: B, (m, m), or None.
    """

    input: Tensor | None = None
    output: Tensor | None = None


def groups(shapes: Mapping[str, tuple[int, int]], budget_bytes: int, two_sided: bool) -> list[list[str]]:
    """The linears in the model's order, cut so that the moments of a group take at most the budget.

    One pass over the text is made for each group; a linear that is too large alone is a group of its own.
    """
    cut: list[list[str]] = []
    held = 0
    for name, (m, n) in shapes.items():
        size = 8 * (n * n + (m * m if two_sided else 0))
        if not cut or held + size > budget_bytes:
            cut.append([])
            held = 0
        cut[-1].append(name)
        held += size
    return cut


def collect(
    model: nn.Module,
    linears: Mapping[str, nn.Module],
    windows: Sequence[Tensor],
    *,
    two_sided: bool,
    seed: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Moments]:
    """The moments at some of a model's linears, over windows of text.

    Parameters get no gradient and the model is left in the mode it was in. The same windows and seed draw the same
    labels, whichever linears are asked for.

    Args:
        model: a causal language model.
        linears: by name, some of the model's.
        windows: token ids, (B, T) each.
        two_sided: also the output's, which takes a backward pass.
        seed: of the labels.
        advance: called after every window.
    Raises:
        LowrankError: an activation or a gradient was not finite.
    """
    found = {name: Moments() for name in linears}
    owners: dict[str, str] = {}
    with watching(linears, found, owners, two_sided), frozen(model):
        generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
        tokens = 0
        for ids in windows:
            ids = ids.to(next(model.parameters()).device)
            tokens += ids.numel()
            one_pass(model, ids, two_sided, generator)
            advance()
    return finished(found, owners, tokens, two_sided)


def finished(found: dict[str, Moments], owners: Mapping[str, str], tokens: int, two_sided: bool) -> dict[str, Moments]:
    """Sums over tokens made into means, in place, and checked; `owners` share the input of another linear.

    Raises:
        LowrankError: a linear saw nothing, or a mean is not finite.
    """
    for name, moments in found.items():
        if owners.get(name, name) == name:
            if moments.input is None:
                raise LowrankError(
                    f"{name} saw no input on the calibration text", "take no weighting by text for this model"
                )
            moments.input /= tokens
        if two_sided:
            moments.output /= tokens
        for moment in (moments.input, moments.output):
            if moment is not None and not bool(torch.isfinite(moment).all()):
                raise LowrankError(f"the statistics of {name} are not finite", "use --dtype float32, or another text")
    for name, owner in owners.items():
        found[name].input = found[owner].input
    return found


def one_pass(model: nn.Module, ids: Tensor, two_sided: bool, generator: torch.Generator) -> None:
    """A forward pass over a window, and a backward one from labels that the model draws."""
    with torch.set_grad_enabled(two_sided):
        if not two_sided:
            model(input_ids=ids, use_cache=False)
            return
        # without a trained parameter the graph has to begin at the embeddings
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False).logits[:, :-1].flatten(0, 1).float()  # (N, V)
        with torch.no_grad():
            labels = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
        F.cross_entropy(logits, labels, reduction="sum").backward()


class watching:
    """Adds up x x^T and g g^T of some linears while it is entered."""

    def __init__(self, linears: Mapping[str, nn.Module], found: dict[str, Moments], owners: dict, two_sided: bool):
        self.linears, self.found, self.owners, self.two_sided = linears, found, owners, two_sided
        self.last: tuple[Tensor, str] | None = None
        self.handles: list = []

    def __enter__(self) -> None:
        for name, module in self.linears.items():
            self.handles.append(module.register_forward_hook(lambda m, x, y, name=name: self.seen(name, x[0], y)))

    def __exit__(self, *_) -> None:
        for handle in self.handles:
            handle.remove()

    def seen(self, name: str, x: Tensor, y: Tensor) -> None:
        """The forward hook of a linear."""
        # q, k and v, or gate and up, are called one after the other with the same tensor
        if self.last is not None and self.last[0] is x:
            self.owners[name] = self.last[1]
        else:
            self.last = (x, name)
            self.found[name].input = added(self.found[name].input, x)
        if self.two_sided:
            y.register_hook(lambda grad: self.felt(name, grad))

    def felt(self, name: str, grad: Tensor) -> None:
        """The hook of a linear's output, in backward."""
        self.found[name].output = added(self.found[name].output, grad)


def added(total: Tensor | None, rows: Tensor) -> Tensor:
    """total + rows^T rows: a product in float32 for the tokens of one window, summed in float64."""
    rows = rows.detach().flatten(0, -2).float()  # (N, d)
    product = rows.mT @ rows
    return product.double() if total is None else total.add_(product)


class frozen:
    """No parameter asks for a gradient, and the model is in eval mode, while it is entered."""

    def __init__(self, model: nn.Module):
        self.model = model

    def __enter__(self) -> None:
        self.training = self.model.training
        self.asked = [p for p in self.model.parameters() if p.requires_grad]
        self.model.eval()
        for p in self.asked:
            p.requires_grad_(False)

    def __exit__(self, *_) -> None:
        self.model.train(self.training)
        for p in self.asked:
            p.requires_grad_(True)


def windows_of(ids: Tensor, length: int, count: int | None = None) -> Iterator[Tensor]:
    """(1, length) windows of a text's tokens, one after the other; what is left over is dropped."""
    whole = ids.numel() // length
    for i in range(whole if count is None else min(whole, count)):
        yield ids[i * length : (i + 1) * length].unsqueeze(0)
