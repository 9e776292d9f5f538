"""Measure on text what an error in a weight costs: second moments of a linear's input and of its output's gradient.

Shapes: N tokens; x is (N, n), the input of a linear, and g (N, m) the gradient of the loss at its output.

    A = E[x x^T]    (n, n)        B = E[g g^T]    (m, m)

An expert has those of the N_e tokens that were routed to it, `routed.py`.

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
from lowrank_cli.models.targets import Matrix
from lowrank_cli.svd.routed import Experts, added, key_of

Target = nn.Module | Matrix


@dataclass
class Moments:
    """The second moments at one matrix, float64; linears that read the same tensor share `input`.

    Attributes:
        input: A, (n, n), or None.
        output: B, (m, m), or None.
        share: of the text's tokens that the matrix saw; of an expert less than 1.
        transposed: the weight is stored as (in, out).
    """

    input: Tensor | None = None
    output: Tensor | None = None
    share: float = 1.0
    transposed: bool = False

    @property
    def sides(self) -> tuple[Tensor | None, Tensor | None]:
        """The moments that belong to the columns of the weight as it is stored, and to its rows."""
        return (self.output, self.input) if self.transposed else (self.input, self.output)


def moment_bytes(shape: tuple[int, ...], two_sided: bool) -> int:
    """Bytes of the moments at one matrix of a weight, (m, n) or (E, m, n); of experts the larger side is the input
    if there is but one: which it is shows when they run."""
    m, n = shape[-2:]
    one = n if len(shape) == 2 else max(m, n)
    return 8 * (m * m + n * n if two_sided else one * one)


def groups(shapes: Mapping[str, tuple[int, ...]], budget_bytes: float, two_sided: bool) -> list[dict[str, range]]:
    """The weights in the model's order, cut so that the moments of a group take at most the budget.

    One pass over the text is made for each group; a matrix that is too large alone is a group of its own. Experts
    may be cut apart: a group that has some of a weight's holds one moment more, for all others.

    Returns:
        Of each group its weights, and which experts of them; a linear counts as one.
    """
    cut: list[dict[str, range]] = []
    held = 0
    for name, shape in shapes.items():
        size = moment_bytes(shape, two_sided)
        for expert in range(shape[0] if len(shape) == 3 else 1):
            new = not cut or held + size > budget_bytes
            if new:
                cut.append({})
                held = 0
            if new and expert:
                held += size
            cut[-1][name] = range(cut[-1][name].start if name in cut[-1] else expert, expert + 1)
            held += size
    return cut


def collect(
    model: nn.Module,
    linears: Mapping[str, Target],
    windows: Sequence[Tensor],
    *,
    two_sided: bool,
    experts: Mapping[str, range] | None = None,
    seed: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Moments]:
    """The moments at some of a model's linears and experts, over windows of text.

    Parameters get no gradient and the model is left in the mode it was in. The same windows and seed draw the same
    labels, whichever linears are asked for.

    Args:
        model: a causal language model.
        linears: by name, some of the model's; parameters of experts too.
        windows: token ids, (B, T) each.
        experts: which of them, by name; all of those that are not named.
        two_sided: also the output's, which takes a backward pass.
        seed: of the labels.
        advance: called after every window.
    Returns:
        By name; of experts by `key_of` the name and the expert.
    Raises:
        LowrankError: an activation or a gradient was not finite.
    """
    watcher = watching(linears, two_sided, experts)
    with watcher, frozen(model):
        generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
        tokens = 0
        for ids in windows:
            ids = ids.to(next(model.parameters()).device)
            tokens += ids.numel()
            one_pass(model, ids, two_sided, generator)
            advance()
    return watcher.finished(tokens)


def finished(found: dict[str, Moments], owners: Mapping[str, str], tokens: int, two_sided: bool) -> dict[str, Moments]:
    """Sums over tokens made into means, in place; `owners` share the input of another linear.

    Raises:
        LowrankError: a linear saw nothing.
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
    """Adds up x x^T and g g^T of some linears and experts while it is entered.

    Args:
        linears: by name.
        two_sided: also g g^T.
        experts: which of them, by name; all of those that are not named.
    """

    def __init__(self, linears: Mapping[str, Target], two_sided: bool, experts: Mapping[str, range] | None = None):
        self.linears = {name: m for name, m in linears.items() if not isinstance(m, Matrix)}
        self.stacks = {
            name: Experts(m, (experts or {}).get(name, range(len(m.weight))), two_sided)
            for name, m in linears.items()
            if isinstance(m, Matrix)
        }
        self.found = {name: Moments() for name in self.linears}
        self.owners: dict[str, str] = {}
        self.two_sided = two_sided
        self.last: tuple[Tensor, str] | None = None
        self.handles: list = []

    def __enter__(self) -> None:
        for name, module in self.linears.items():
            self.handles.append(module.register_forward_hook(lambda m, x, y, name=name: self.seen(name, x[0], y)))
        for stack in self.stacks.values():
            stack.watch()

    def __exit__(self, *_) -> None:
        for handle in self.handles:
            handle.remove()
        for stack in self.stacks.values():
            stack.leave()

    def finished(self, tokens: int) -> dict[str, Moments]:
        """The moments, checked, after `tokens` of text.

        Raises:
            LowrankError: something saw nothing, or a mean is not finite.
        """
        found = finished(self.found, self.owners, tokens, self.two_sided)
        for name, stack in self.stacks.items():
            found |= {key_of(name, e): Moments(**own) for e, own in stack.moments(name, tokens).items()}
        for name, moments in found.items():
            for moment in (moments.input, moments.output):
                if moment is not None and not bool(torch.isfinite(moment).all()):
                    raise LowrankError(
                        f"the statistics of {name} are not finite", "use --dtype float32, or another text"
                    )
        return found

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
