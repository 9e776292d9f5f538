"""Tensors that are cut over processes by rows, and what a projected step needs to know of that.

Shapes: a weight W is (m, n), a left basis P (m, r), a right basis Q (n, r). Rank i holds the rows W_i and G_i of the
weight and of its gradient, as PyTorch's FSDP2 cuts them, and of everything else the rows that it would cut:

    right: R_i = G_i Q           its own rows of R = G Q; the moments are cut like the weight
    left:  R = sum_i P_i^T G_i   (r, n), summed and cut in one exchange; the update N is put together again for P_i N

Bases are cut too, and put together for as long as a product takes. No full gradient is gathered but for a refresh, and
then by the one rank that decomposes it; a right basis from the Gram matrix needs not even that:
G^T G = sum_i G_i^T G_i.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_cli.ops.precision import wide
from lowrank_cli.parallel.replicas import Replicas, rows_of


class Whole:
    """A Whole is the layout of a tensor that this process holds whole."""

    is_cut = False

    def __init__(self, shape: torch.Size):
        self.shape = shape

    def basis(self, stored: Tensor, side: str) -> Tensor:
        """The basis to project this process's gradient with, from the one in the optimizer's state."""
        return stored

    def whole_basis(self, stored: Tensor, side: str) -> Tensor:
        """The whole basis."""
        return stored

    def own_basis(self, whole: Tensor) -> Tensor:
        """Return the part of a new basis that this process's state keeps."""
        return whole

    def summed(self, low_rank_grad: Tensor) -> Tensor:
        """This process's rows of what every process has of its own tokens."""
        return low_rank_grad

    def settled(self, low_rank_grad: Tensor, bases: dict[str, Tensor]) -> Tensor:
        """This process's rows of a projected gradient, from the projection of its own rows of the gradient."""
        return low_rank_grad

    def expandable(self, update: Tensor, bases: dict[str, Tensor]) -> Tensor:
        """Return what this process's rows of the weight need of an update, from its own rows of it."""
        return update

    def total(self, part: Tensor) -> Tensor:
        """The sum over processes of what each has from its own rows, such as the squares of columns."""
        return part

    def height(self, part: Tensor, bases: dict[str, Tensor]) -> int:
        """Rows of the whole gradient, projected with some bases or with none, that a process has a part of."""
        return part.shape[0] if part.dim() else 1

    def agreed(self, *, alive: bool, calm: bool) -> tuple[bool, bool]:
        """Return what holds of the whole tensor: whether its gradient has any direction, and whether all of its bases
        have hardly moved."""
        return alive, calm


class Shard(Whole):
    """A Shard is the layout of a tensor whose rows are cut over processes.

    Args:
        shape: of the whole tensor.
        replicas: the processes.
        source: the parameter of the model that it is this rank's part of.
    """

    is_cut = True

    def __init__(self, shape: torch.Size, replicas: Replicas, source: Tensor):
        super().__init__(shape)
        self.replicas, self.source = replicas, source

    def basis(self, stored: Tensor, side: str) -> Tensor:
        return stored if side == "left" else self.whole_basis(stored, side)

    def whole_basis(self, stored: Tensor, side: str) -> Tensor:
        return self.replicas.gathered(stored, self.shape[0] if side == "left" else self.shape[1])

    def own_basis(self, whole: Tensor) -> Tensor:
        return own_rows(whole, self.replicas).clone()

    def summed(self, low_rank_grad: Tensor) -> Tensor:
        return self.replicas.scattered_sum(low_rank_grad.to(wide(low_rank_grad.dtype)))

    def settled(self, low_rank_grad: Tensor, bases: dict[str, Tensor]) -> Tensor:
        return self.summed(low_rank_grad) if "left" in bases else low_rank_grad

    def total(self, part: Tensor) -> Tensor:
        self.replicas.sum_([part := part.contiguous().clone()])
        return part

    def expandable(self, update: Tensor, bases: dict[str, Tensor]) -> Tensor:
        return self.replicas.gathered(update, self.height(update, bases)) if "left" in bases else update

    def height(self, part: Tensor, bases: dict[str, Tensor]) -> int:
        return bases["left"].shape[1] if "left" in bases else self.shape[0]


class Stack(Whole):
    """A Stack is the layout of a batch of matrices that is cut between them: those of a process are whole, and concern
    it alone.

    Args:
        shape: of the whole batch.
        replicas: the processes.
    """

    is_cut = True

    def __init__(self, shape: torch.Size, replicas: Replicas):
        super().__init__(shape)
        self.replicas = replicas

    def height(self, part: Tensor, bases: dict[str, Tensor]) -> int:
        return self.shape[0]

    def agreed(self, *, alive: bool, calm: bool) -> tuple[bool, bool]:
        living, restless = self.replicas.numbers(float(alive), float(not calm))
        return living > 0, restless == 0


def own_rows(whole: Tensor, replicas: Replicas) -> Tensor:
    """This rank's rows of a whole tensor."""
    start, stop = rows_of(whole.shape[0], replicas.rank, replicas.world_size)
    return whole[start:stop]


def layout(p: Tensor, *, batched: bool = False) -> Whole:
    """Return how a tensor of an optimizer lies over the processes; `batched` if it is a batch of matrices."""
    found = getattr(p, "_lowrank_shard", None) or Whole(p.shape)
    return Stack(found.shape, found.replicas) if batched and found.is_cut else found


def part_of(source: Tensor, local: Tensor, replicas: Replicas) -> torch.nn.Parameter:
    """A rank's part of a parameter, as an optimizer takes it: it shares the memory."""
    part = torch.nn.Parameter(local, requires_grad=source.requires_grad)
    part._lowrank_shard = Shard(source.shape, replicas, source)
    return part


def full_numel(p: Tensor) -> int:
    """Elements of the whole tensor."""
    return layout(p).shape.numel()
