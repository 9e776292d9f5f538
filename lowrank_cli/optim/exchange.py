"""Exchange the gradients of one model between the processes that train it: not at all, as sums, or as rows of sums.

Only what the optimizer works on is summed (an all-reduce), once an update, after its last micro-batch: the small
gradient of a tensor whose basis stays, (r, n) or (m, r) instead of (m, n), and `.grad` of all others. The sum of
projections is the projection of the sum, so this is exact, up to rounding.

A basis that is due is found by one rank alone, from the full gradient that only this rank gets. It sends the basis and
the projected gradient to the others, so every replica has the same bits, whatever its own SVD would have given.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lowrank_cli import console
from lowrank_cli.ops.precision import wide
from lowrank_cli.optim.projected import Projected
from lowrank_cli.optim.space import Space
from lowrank_cli.parallel.replicas import Replicas, balanced
from lowrank_cli.parallel.shards import Stack, layout

if TYPE_CHECKING:
    from lowrank_cli.optim.gradients import Gradients

# how a refresh ended, as the rank that did it tells the others
FOUND, KEPT, NOT_FINITE = 0, 1, 2


class Exchange:
    """A process that is alone: there is nobody to tell."""

    gradients: Gradients

    def enter(self, gradients: Gradients) -> None:
        """Serve these gradients from now on."""
        self.gradients = gradients

    def start(self, model: nn.Module) -> None:
        """The model's layers are attached and the hooks are there."""

    def leave(self) -> None:
        """They are not any longer."""

    def begin(self) -> None:
        """An update begins."""

    def complete(self, space: Space) -> None:
        """A tensor has all of its gradient, per layer: step it, now or when its turn comes."""
        self.gradients.take(space)

    def reduce(self) -> None:
        """Sum over all processes what has not been summed yet."""

    def held(self, weight: Tensor) -> Tensor:
        """Return what the optimizer has of a module's weight: the weight itself, or this process's rows of it."""
        return weight

    def square(self, p: Tensor, part: Tensor) -> Tensor:
        """Return what a part of a tensor's gradient adds to the square of the norm."""
        return part.to(wide(part.dtype)).square().sum()

    def total_norm(self, left: list[tuple[Tensor, Tensor]], squares: list[Tensor]) -> Tensor:
        """Return the norm of parts of gradients, with their tensors, and of squares that were seen already."""
        norm = nn.utils.get_total_norm([part for _, part in left])
        return (norm.to(wide(norm.dtype)).square() + sum(squares)).sqrt()


class Replicated(Exchange):
    """Several processes with a replica each.

    Per layer, a tensor is summed and updated as soon as its turn has come. The turns are the same on every rank: those
    in which rank 0's first backward pass gave the tensors their gradients. A basis that is due waits until as many are
    due as there are ranks, so that each rank holds one full gradient and the decompositions run side by side.

    With clipping the norm is that of the gradients as one process would hold them, so full ones that are in `.grad`
    are summed whole.

    Args:
        replicas: the processes.
    """

    def __init__(self, replicas: Replicas):
        self.replicas = replicas
        self._turns: list[Tensor] = []
        self._turns_are_known = False
        self._arrivals: list[Tensor] = []
        self._present: set[Tensor] = set()
        self._next = 0
        self._window: list[Projected] = []

    def start(self, model: nn.Module) -> None:
        # backward goes roughly from the model's last tensor to its first; the first update shows how exactly
        trained = set(self.gradients.parameters)
        self._turns = [p for p in reversed(list(model.parameters())) if p in trained]

    def begin(self) -> None:
        self._arrivals.clear()
        self._present.clear()
        self._window.clear()
        self._next = 0
        # of groups that were added later
        known = set(self._turns)
        self._turns += [p for p in self.gradients.parameters if p not in known and not layout(p).is_cut]

    def reduce(self) -> None:
        if self.gradients.per_layer and not self.gradients.clipping:
            self._proceed(to_the_end=True)
            self._learn_turns()
            return
        summed = [space for space in self._spaces() if not space.layout.is_cut]
        if not summed:
            return
        # a tensor may have a gradient on some ranks only, such as an expert that got no token elsewhere
        counts = self.replicas.numbers(*(float(space.has_gradient) for space in summed))
        present = [space for space, count in zip(summed, counts, strict=True) if count]
        due = [space for space in present if isinstance(space, Projected) and space.is_due]
        self._refresh_together(due)
        settled = set(due)
        self.replicas.sum_([part for space in present if space not in settled for part in self._parts(space)])

    def complete(self, space: Space) -> None:
        self._arrivals.append(space.weight)
        self._present.add(space.weight)
        self._proceed()

    def _spaces(self) -> list[Space]:
        """The tensors, each with its space; those of an optimizer that is not ours have plain ones."""
        known, optimizer = self.gradients.spaces, self.gradients.optimizer
        return [known.get(p) or Space(p, {}, optimizer) for p in self.gradients.parameters]

    # ---- per layer: one tensor after the other, in the same order everywhere

    def _proceed(self, to_the_end: bool = False) -> None:
        """Sum and step the tensors whose turn has come; at the end also those that got no gradient on this rank."""
        while self._next < len(self._turns) and (to_the_end or self._turns[self._next] in self._present):
            space = self.gradients.spaces[self._turns[self._next]]
            self._next += 1
            if isinstance(space, Projected) and space.is_due:
                self._window.append(space)
                if len(self._window) == self.replicas.world_size:
                    self._close_window()
            else:
                self.replicas.sum_(self._parts(space))
                self.gradients.take(space)
        if to_the_end:
            self._close_window()

    def _close_window(self) -> None:
        self._refresh_together(self._window)
        for space in self._window:
            self.gradients.take(space)
        self._window.clear()

    def _learn_turns(self) -> None:
        """After the first update: the order in which rank 0 has had the gradients."""
        if self._turns_are_known or not self._turns:
            return
        places = {p: i for i, p in enumerate(self._turns)}
        mine = [places[p] for p in self._arrivals]
        mine += sorted(set(range(len(self._turns))) - set(mine))
        self._turns = [self._turns[i] for i in self.replicas.chosen(mine)]
        self._turns_are_known = True

    # ---- what is summed

    def _parts(self, space: Space) -> list[Tensor]:
        """Return the tensors to sum for a tensor; zeros where this rank has none."""
        p = space.weight
        if space.wants_full_gradient or self._is_full(space):
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            return [p.grad]
        if p.grad is not None:
            space.collect(p.grad)
            p.grad = None
        if not space.small:
            space.small = space.zeros()
        return space.small

    def _is_full(self, space: Space) -> bool:
        """Say whether one process would hold the whole gradient until the step, for its norm: the same on every rank,
        with or without a gradient there."""
        gradients = self.gradients
        return bool(gradients.clipping) and not gradients.per_layer and not space.is_attached

    # ---- refreshing

    def _refresh_together(self, due: list[Projected]) -> None:
        """Find new bases for some tensors, each on one rank; their gradients are sums over all ranks afterwards."""
        replicas, clipping = self.replicas, self.gradients.clipping
        owners = balanced([s.weight.numel() * min(s.weight.shape[-2:]) for s in due], replicas.world_size)
        for space, owner in zip(due, owners, strict=True):
            p = space.weight
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            if clipping or space.always_full:
                replicas.sum_([p.grad])
                continue
            p.grad = p.grad.contiguous()
            replicas.sum_to_(p.grad, owner)
            if replicas.rank != owner:
                p.grad = None
        found = {s: self._find(s) for s, owner in zip(due, owners, strict=True) if owner == replicas.rank}
        self._adopt(due, owners, found)
        for space, owner in zip(due, owners, strict=True):
            if clipping or space.always_full:
                continue
            if replicas.rank == owner:
                space.collect(space.weight.grad)
                space.weight.grad = None
            else:
                space.small = space.zeros()
            replicas.broadcast_(space.small, owner)

    def _adopt(self, due: list[Projected], owners: list[int], found: dict[Projected, tuple]) -> None:
        """Take, on every rank, the bases that their owners have found."""
        # what happened to all of them, at once: each rank has the numbers of its own tensors, and zeros for the rest
        told = self.replicas.numbers(*(number for s in due for number in found.get(s, ({}, (0, 0, 0)))[1]))
        for i, (space, owner) in enumerate(zip(due, owners, strict=True)):
            self._check(space, told[3 * i])
            bases = found.pop(space)[0] if space in found else space.empty_bases()
            self.replicas.broadcast_(list(bases.values()), owner)
            space.adopt(bases, bool(told[3 * i + 1]), bool(told[3 * i + 2]))

    def _find(self, space: Projected, *whole: object) -> tuple[dict[str, Tensor], tuple[int, int, int]]:
        """Return what a refresh finds, and its outcome as numbers: how it ended, whether alive, whether calm; `whole`
        is for `find_bases`."""
        warnings: list[str] = []
        try:
            bases, alive, calm = space.find_bases(warnings.append, *whole)
        except FloatingPointError:
            return {}, (NOT_FINITE, 0, 0)
        return bases, (KEPT if warnings else FOUND, int(alive), int(calm))

    def _check(self, space: Projected, ended: float) -> None:
        """Say, or raise, on every rank what the one that refreshed a basis met."""
        if ended == NOT_FINITE:
            raise FloatingPointError(f"the gradient of {space.name} is not finite at a refresh")
        if ended == KEPT:
            console.warn(f"{space.engine} found no basis for {space.name}: the old one stays")


class Sharded(Replicated):
    """Processes that hold rows of the weights: what FSDP2 (`torch.distributed.fsdp.fully_shard`) does not do itself.

    FSDP2 gives each rank its own rows of a tensor's summed gradient, after every micro-batch. They are made small as
    they are (parallel/shards.py), per layer as soon as they arrive. What never becomes a full gradient, from a layer
    that gives it small, is summed and cut in the same way: r / n of the exchange.

    A basis that is due is found by one rank, which gathers that gradient alone; or from the Gram matrix, to which each
    rank adds that of its rows (the engine `gram`, on the right). Tensors that every rank holds whole, such as
    adapters, go the way of `Replicated`.

    Args:
        replicas: the processes; the model has been through `parallel.sharding.shard`, the optimizer has this rank's
            parts of the parameters.
    """

    def enter(self, gradients: Gradients) -> None:
        super().enter(gradients)
        self._part_of = {layout(p).source: p for p in gradients.parameters if layout(p).is_cut}
        self._hooks: list = []

    def start(self, model: nn.Module) -> None:
        super().start(model)
        self._hooks = [source.register_post_accumulate_grad_hook(self._cut) for source in self._part_of]

    def leave(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def reduce(self) -> None:
        if not self.gradients.per_layer or self.gradients.clipping:
            cut = [s for s in self._spaces() if s.layout.is_cut and s.weight.grad is not None]
            due = [space for space in cut if _gathers(space)]
            for some in _chunks(due, self.replicas.world_size):
                self._refresh_together(some)
        super().reduce()

    @torch.no_grad()
    def _cut(self, source: Tensor) -> None:
        """The hook of every tensor: FSDP2 has summed a micro-batch's gradient and cut it."""
        p, grad = self._part_of[source], source.grad.to_local()
        source.grad = None
        p.grad = grad if p.grad is None else p.grad.add_(grad)
        if self.gradients.per_layer:
            self.gradients.arrived(p)

    def complete(self, space: Space) -> None:
        if not space.layout.is_cut:
            super().complete(space)
        # the order is FSDP2's, and the same on every rank
        elif _gathers(space):
            self._window.append(space)
            if len(self._window) == self.replicas.world_size:
                self._close_window()
        else:
            self.gradients.take(space)

    def _refresh_together(self, due: list[Projected]) -> None:
        cut = [space for space in due if space.layout.is_cut]
        if len(cut) < len(due):
            super()._refresh_together([space for space in due if not space.layout.is_cut])
        replicas = self.replicas
        # as many as there are ranks at most: none holds more than one full gradient
        shapes = [space.layout.shape for space in cut]
        owners = balanced([shape.numel() * min(shape) for shape in shapes], replicas.world_size)
        mine = {}
        for space, owner in zip(cut, owners, strict=True):
            old, grad = space.whole_bases(), space.dense_grad()
            if self._by_gram(space):
                whole, engine = grad.double().mT @ grad.double(), "of_gram"
                replicas.sum_to_(whole, owner)
            else:
                whole, engine = replicas.gathered_at(grad, space.layout.shape[0], owner), None
            if owner == replicas.rank:
                mine[space] = (whole, old, engine)
        # all has been exchanged: the ranks decompose side by side
        self._adopt(cut, owners, {space: self._find(space, *given) for space, given in mine.items()})

    def _by_gram(self, space: Projected) -> bool:
        """Say whether the Gram matrix is what the engine decomposes, and no larger than the gradient."""
        m, n = space.layout.shape
        return space.engine == "gram" and space.sides == ("right",) and m >= n

    def held(self, weight: Tensor) -> Tensor:
        return self._part_of.get(weight, weight)

    def square(self, p: Tensor, part: Tensor) -> Tensor:
        # every rank has the whole of what is not cut, and counts its share of it
        return super().square(p, part) / (1 if layout(p).is_cut else self.replicas.world_size)

    def total_norm(self, left: list[tuple[Tensor, Tensor]], squares: list[Tensor]) -> Tensor:
        square = sum((self.square(p, part) for p, part in left), torch.zeros(())) + sum(squares)
        return torch.tensor(self.replicas.numbers(float(square))[0]).sqrt()


def _gathers(space: Space) -> bool:
    """Say whether a refresh needs rows that other processes have."""
    return isinstance(space, Projected) and space.is_due and not isinstance(space.layout, Stack)


def _chunks(items: list[Projected], size: int) -> Iterator[list[Projected]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
