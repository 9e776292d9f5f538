"""Gradients of one model on several processes: what is summed over them, and who refreshes which basis.

Summed once an update, after its last micro-batch, is what the optimizer works on and no more: the projected gradient
of a tensor whose basis stands, (r, n) or (m, r) instead of (m, n); the factor of a factored one, (m, G) instead of
(m, D); `.grad` of the rest. The sum of projections is the projection of the sum, so this is exact, up to rounding.

A basis that is due is found by one rank alone, from the full gradient that only this rank gets. It tells the others
the basis and the projected gradient: every replica has the same bits, whatever its SVD would have given.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowrank_cli import console
from lowrank_cli.ops.precision import wide
from lowrank_cli.ops.replicas import Replicas, balanced
from lowrank_cli.ops.shards import layout
from lowrank_cli.optim.gradients import Gradients
from lowrank_cli.optim.projection import project, unfold

# how a refresh ended, as the rank that did it tells the others
FOUND, KEPT, NOT_FINITE = 0, 1, 2


class ReplicatedGradients(Gradients):
    """`Gradients` of a process that is one of several.

    Per layer, a tensor is summed and updated as soon as its turn has come. The turns are the same on every rank: those
    in which rank 0's first backward pass gave the tensors their gradients. A basis that is due waits until as many are
    due as there are ranks, so that each rank holds one full gradient and the decompositions run side by side.

    With `clipping` the norm is that of the gradients as one process would hold them, so full ones that are in `.grad`
    are summed whole.

    Args:
        model: the model; its factored linears find their vectors together from now on.
        optimizer: as for Gradients.
        per_layer: as for Gradients.
        clipping: as for Gradients.
        replicas: the processes.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        per_layer: bool,
        clipping: float,
        replicas: Replicas,
    ):
        super().__init__(model, optimizer, per_layer=per_layer, clipping=clipping)
        self.replicas = replicas
        self._names = {p: i for i, p in enumerate(self.groups)}
        # those that every process holds whole
        self._summed = [p for p in self.groups if not layout(p).is_cut]
        self._patched_weights = {self._held(module.weight) for module in self._patched}
        # backward goes roughly from the model's last tensor to its first; the first update shows how exactly
        self._turns = [p for p in reversed(list(model.parameters())) if p in self.groups]
        self._turns_are_known = False
        self._arrivals: list[Tensor] = []
        self._present: set[Tensor] = set()
        self._next = 0
        self._window: list[Tensor] = []
        self._compressors = [
            m.factored_gradient.compressor for m in model.modules() if hasattr(m, "factored_gradient")
        ]
        for compressor in self._compressors:
            compressor.replicas = replicas

    def close(self) -> None:
        super().close()
        for compressor in self._compressors:
            compressor.replicas = None

    def begin(self, *, measuring: bool) -> None:
        super().begin(measuring=measuring)
        self._arrivals.clear()
        self._present.clear()
        self._window.clear()
        self._next = 0

    def reduce(self) -> None:
        """Sum over all processes what has not been summed yet."""
        if self.per_layer and not self.clipping:
            self._proceed(to_the_end=True)
            self._learn_turns()
            return
        if not self._summed:
            return
        # a tensor may have a gradient on some ranks only, such as an expert that got no token elsewhere
        counts = self.replicas.numbers(*(float(self._has_gradient(p)) for p in self._summed))
        present = [p for p, count in zip(self._summed, counts, strict=True) if count]
        due = [p for p in present if p in self.projected and self.optimizer.is_due(p)]
        self._refresh_together(due)
        settled = set(due)
        self.replicas.sum_([part for p in present if p not in settled for part in self._parts(p)])

    def _complete(self, p: Tensor) -> None:
        if self.last and not self.clipping:
            self._arrivals.append(p)
            self._present.add(p)
            self._proceed()

    # ---- per layer: one tensor after the other, in the same order everywhere

    def _proceed(self, to_the_end: bool = False) -> None:
        """Sum and step the tensors whose turn has come; at the end also those that got no gradient on this rank."""
        while self._next < len(self._turns) and (to_the_end or self._turns[self._next] in self._present):
            p = self._turns[self._next]
            self._next += 1
            if p in self.projected and self.optimizer.is_due(p):
                self._window.append(p)
                if len(self._window) == self.replicas.world_size:
                    self._close_window()
            else:
                self.replicas.sum_(self._parts(p))
                self._take(p)
        if to_the_end:
            self._close_window()

    def _close_window(self) -> None:
        self._refresh_together(self._window)
        for p in self._window:
            self._take(p)
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

    def _has_gradient(self, p: Tensor) -> bool:
        return p.grad is not None or p in self.buffers

    def _parts(self, p: Tensor) -> list[Tensor]:
        """The tensors to sum for a parameter; zeros where this rank has none."""
        optimizer = self.optimizer
        if p in self.projected and not (self.clipping and self._is_full(p)):
            if p.grad is not None:
                optimizer.collect(p)
                p.grad = None
            if p not in self.buffers:
                self._add_zeros(p)
            return [self.buffers[p], *([self.magnitudes[p]] if p in optimizer.normalised else [])]
        if p in getattr(optimizer, "factored", ()):
            if p not in self.buffers:
                shape = (p.shape[0], self.groups[p]["num_groups"])
                self.buffers[p] = torch.zeros(shape, device=p.device)
            return [self.buffers[p]]
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        return [p.grad]

    def _is_full(self, p: Tensor) -> bool:
        """Whether one process would hold the whole gradient of a projected tensor until the step: the same answer on
        every rank, with or without a gradient there."""
        return not self.per_layer and p not in self._patched_weights

    def _add_zeros(self, p: Tensor) -> None:
        self.buffers[p] = self._projected_like(p, self.optimizer.bases(p)).zero_()
        if p in self.optimizer.normalised:
            self.magnitudes[p] = torch.zeros_like(self.optimizer.state[p]["magnitude"])

    # ---- refreshing

    def _refresh_together(self, due: list[Tensor]) -> None:
        """New bases for some tensors, each found by one rank; their gradients are sums over all ranks afterwards."""
        replicas, optimizer = self.replicas, self.optimizer
        owners = balanced([p.numel() * min(p.shape) for p in due], replicas.world_size)
        for p, owner in zip(due, owners, strict=True):
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            if self.clipping:
                replicas.sum_([p.grad])
                continue
            p.grad = p.grad.contiguous()
            replicas.sum_to_(p.grad, owner)
            if replicas.rank != owner:
                p.grad = None
        found = {p: self._find(p) for p, owner in zip(due, owners, strict=True) if owner == replicas.rank}
        self._adopt(due, owners, found)
        for p, owner in zip(due, owners, strict=True):
            if self.clipping:
                continue
            if replicas.rank == owner:
                optimizer.collect(p)
                p.grad = None
            else:
                self._add_zeros(p)
            normalised = [self.magnitudes[p]] if p in optimizer.normalised else []
            replicas.broadcast_([self.buffers[p], *normalised], owner)

    def _adopt(self, due: list[Tensor], owners: list[int], found: dict[Tensor, tuple]) -> None:
        """Every rank takes the bases that their owners have found."""
        # what happened to all of them, at once: each rank has the numbers of its own tensors, and zeros for the rest
        told = self.replicas.numbers(*(number for p in due for number in found.get(p, ({}, (0, 0, 0)))[1]))
        for i, (p, owner) in enumerate(zip(due, owners, strict=True)):
            self._check(p, told[3 * i])
            bases = found.pop(p)[0] if p in found else self._empty_bases(p)
            self.replicas.broadcast_(list(bases.values()), owner)
            self.optimizer.adopt(p, bases, bool(told[3 * i + 1]), bool(told[3 * i + 2]))

    def _find(self, p: Tensor, *whole: object) -> tuple[dict[str, Tensor], tuple[int, int, int]]:
        """What a refresh finds, and its outcome as numbers: how it ended, whether alive, whether calm; `whole` is for
        `find_bases`."""
        warnings: list[str] = []
        try:
            bases, alive, calm = self.optimizer.find_bases(p, warnings.append, *whole)
        except FloatingPointError:
            return {}, (NOT_FINITE, 0, 0)
        return bases, (KEPT if warnings else FOUND, int(alive), int(calm))

    def _check(self, p: Tensor, ended: float) -> None:
        """Every rank says, or raises, what the one that refreshed a basis met."""
        name = self.optimizer.names[p]
        if ended == NOT_FINITE:
            raise FloatingPointError(f"the gradient of {name} is not finite at a refresh")
        if ended == KEPT:
            console.warn(f"{self.groups[p]['refresh']} found no basis for {name}: the old one stays")

    def _empty_bases(self, p: Tensor) -> dict[str, Tensor]:
        """Room for the bases that another rank has found: of the gradient's dtype, which is the weight's."""
        bases = {}
        for side in self.optimizer.sides[p]:
            matrix, stands = unfold(torch.empty(layout(p).shape, device="meta"), side)
            size = matrix.shape[0] if stands == "left" else matrix.shape[1]
            bases[side] = p.new_empty(size, min(self.groups[p]["rank"], *matrix.shape))
        return bases

    def _projected_like(self, p: Tensor, bases: dict[str, Tensor]) -> Tensor:
        """An empty tensor of the projected gradient's shape and dtype."""
        shape = project(
            torch.empty(p.shape, device="meta"), {k: b.to("meta", torch.float32) for k, b in bases.items()}
        )
        return torch.empty(shape.shape, dtype=wide(p.dtype), device=p.device)
