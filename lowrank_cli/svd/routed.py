"""Measure the second moments of experts: what the tokens routed to each of them say.

Shapes: E experts in one parameter, (E, m, n) as the architecture stores it; x (N_e, d), the inputs of expert e, and
g (N_e, d') the gradients of the loss at what the code gets by multiplying them.

A moment of few tokens is noise, and experts are seldom told apart by more than some directions. So it is taken
together with the mean over the tokens of all experts, which counts as much as d tokens of its own, d being its side:

    M_e = (sum over its tokens of x x^T  +  d * mean over all experts' tokens)  /  (N_e + d)

An expert that saw no token has that mean. A text of N tokens loses N_e / N as much by an error in expert e as by the
same one in a linear that every token goes through: `share`, by which errors of all weights can be compared.

The architecture's own code runs; a stand-in for the parameter sees what it multiplies by which expert.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowrank_cli.errors import LowrankError
from lowrank_cli.models.lowrank_experts import StandIn
from lowrank_cli.models.targets import Matrix


def key_of(name: str, expert: int) -> str:
    """The name of one expert's matrix."""
    return f"{name}.{expert}"


class Experts:
    """Adds up the moments of some experts of a parameter, and of all others together.

    Args:
        stack: the parameter and its module.
        wanted: experts.
        two_sided: also of the gradients.
    """

    def __init__(self, stack: Matrix, wanted: range, two_sided: bool):
        self.stack, self.wanted, self.two_sided = stack, wanted, two_sided
        # by expert, and the others' under -1
        self.inputs: dict[int, Tensor] = {}
        self.outputs: dict[int, Tensor] = {}
        self.tokens: dict[int, int] = {}
        self.transposed = False

    def watch(self) -> None:
        """Put the stand-in before the parameter, which stays where it is."""
        weight = self.stack.weight
        vars(self.stack.module)[self._leaf] = _Watched(
            weight, torch.arange(len(weight), device=weight.device), False, self
        )

    def leave(self) -> None:
        """Take it away."""
        del vars(self.stack.module)[self._leaf]

    @property
    def _leaf(self) -> str:
        return self.stack.name.rpartition(".")[2]

    def seen(self, x: Tensor, experts: Tensor) -> None:
        """Take inputs (N, d), and the expert of each (N,)."""
        for slot, rows in self._parts(x, experts):
            self.inputs[slot] = added(self.inputs.get(slot), rows)
            self.tokens[slot] = self.tokens.get(slot, 0) + len(rows)

    def felt(self, grads: Tensor, experts: Tensor) -> None:
        """Take the gradients at their outputs, (N, d')."""
        for slot, rows in self._parts(grads, experts):
            self.outputs[slot] = added(self.outputs.get(slot), rows)

    def _parts(self, rows: Tensor, experts: Tensor):
        slots = torch.where((experts >= self.wanted.start) & (experts < self.wanted.stop), experts, -1)
        return [(slot, rows[slots == slot]) for slot in slots.unique().tolist()]

    def moments(self, name: str, tokens: int) -> dict[int, dict[str, Any]]:
        """The fields of each wanted expert's `Moments`, for a text of so many tokens; the sums are used up.

        Raises:
            LowrankError: no expert saw a token.
        """
        if not self.tokens:
            raise LowrankError(f"{name} saw no input on the calibration text", "take no weighting by text")
        seen = sum(self.tokens.values())
        means = [sum(sums.values()) / seen if sums else None for sums in (self.inputs, self.outputs)]
        found = {}
        for e in self.wanted:
            count = self.tokens.get(e, 0)
            own = [
                None if mean is None else _shrunk(sums.pop(e, None), mean, count)
                for sums, mean in zip((self.inputs, self.outputs), means, strict=True)
            ]
            share = max(count, 1) / tokens
            found[e] = {"input": own[0], "output": own[1], "share": share, "transposed": self.transposed}
        return found


class _Watched(StandIn):
    """Stands for some experts of a weight, shows `Experts` what is multiplied by it, and multiplies.

    Args:
        weight: (m, n) or (E, m, n).
        experts: () or (E,), their numbers.
        is_flipped: the weight is the transpose of what is stored.
        watcher: is shown.
    """

    def __init__(self, weight: Tensor, experts: Tensor, is_flipped: bool, watcher: Experts):
        self.weight, self.experts, self.is_flipped, self.watcher = weight, experts, is_flipped, watcher

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape

    def whole(self) -> Tensor:
        return self.weight

    def picked(self, index: Any) -> _Watched:
        return _Watched(self.weight[index], self.experts[index], self.is_flipped, self.watcher)

    def flipped(self) -> _Watched:
        return _Watched(self.weight.mT, self.experts, not self.is_flipped, self.watcher)

    def product(self, func, place: int, args: tuple, kwargs: dict) -> Tensor:
        factors = (self.weight, *args[1:]) if place == 0 else (args[0], self.weight, *args[2:])
        y = func(*factors, **kwargs)
        if "grouped" in func.__name__:
            offs = kwargs["offs"] if "offs" in kwargs else args[2]
            experts = self.experts.repeat_interleave(offs.diff(prepend=offs.new_zeros(1)))
        else:
            # a stack multiplies as many matrices as it has
            experts = self.experts.unflatten(0, (-1, 1)) if self.weight.dim() == 3 else self.experts
            experts = experts.expand((args[1].mT if place == 0 else args[0]).shape[:-1]).flatten()

        count = len(experts)

        def rows_of(tensor: Tensor) -> Tensor:
            # those after the last group are of no expert
            return (tensor.mT if place == 0 else tensor).flatten(0, -2)[:count]

        x = rows_of(args[1 - place].detach())
        # some architectures give every expert all tokens, those of others as zeros
        used = x.ne(0).any(-1)
        experts = experts[used]
        reads_rows = place == 1 and func.__name__ != "linear"  # x W, and not W x or x W^T
        self.watcher.transposed = reads_rows != self.is_flipped
        self.watcher.seen(x[used], experts)
        if self.watcher.two_sided:
            y.register_hook(lambda grad: self.watcher.felt(rows_of(grad)[used], experts))
        return y

    def __getattr__(self, name: str):
        return getattr(self.weight, name)


def _shrunk(total: Tensor | None, mean: Tensor, count: int) -> Tensor:
    """The mean of `count` tokens whose sum is given, taken together with another mean; in place."""
    if total is None:
        return mean
    side = len(mean)
    return total.add_(mean, alpha=side).div_(count + side)


def added(total: Tensor | None, rows: Tensor) -> Tensor:
    """total + rows^T rows: a product in float32 for the tokens of one window, summed in float64."""
    rows = rows.detach().flatten(0, -2).float()  # (N, d)
    product = rows.mT @ rows
    return product.double() if total is None else total.add_(product)
