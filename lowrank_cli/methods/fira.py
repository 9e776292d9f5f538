"""Fira: GaLore's subspace, and what it leaves out of the gradient, scaled as Adam scaled the part inside.

With R = P^T G, N the rule's update of R and S = G - P R the rest of the gradient (a left basis; a right one alike):

    phi(S)_j = |N_j| / |R_j| S_j                 column by column
    |phi(S)| <= 1.01 |phi(S) of the update before|     the norm-growth limiter
    W <- W - lr scale (P N + phi(S))

So the update has full rank, and the state is GaLore's and one number a tensor. The gradient has to be whole at every
update. Chen et al., arXiv:2410.01623, Alg. 1 and eq. 10.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from lowrank_cli.fields import option
from lowrank_cli.methods.galore import ENGINES, REFRESH, GaLore

if TYPE_CHECKING:
    from torch import Tensor

    from lowrank_cli.optim.space import Move, Part, Space

GROWTH = 1.01


class Fira(GaLore):
    title = "Fira"
    paper = "https://arxiv.org/abs/2410.01623"
    summary = "GaLore, with the rest of the gradient scaled as its part is"
    instead_of_full = frozenset()  # where GaLore does not fit, this one does not either

    @dataclass(frozen=True)
    class Config:
        rank: int | None = option(None, "columns of the basis; those of galore unless given", min=1)
        update_proj_gap: int = option(200, "updates between refreshes of the basis (T)", min=1)
        scale: float = option(0.25, "factor of the update (alpha)", above=0)
        proj_type: str = option(
            "std", "side to project: std is the shorter one", choices=("std", "reverse_std", "left", "right")
        )
        refresh: str = option("auto", REFRESH, choices=ENGINES)
        moments: str = option(
            "keep", "the moments at a refresh, as of galore", choices=("keep", "align", "rotate", "reset")
        )
        target_modules: str = option("all-linear", "matrices to project, as of galore")

    def space(self) -> type[Space]:
        return space()


@cache
def space() -> type[Space]:
    """Return the class of Fira's spaces; PyTorch is imported by now."""
    import torch

    from lowrank_cli.ops.precision import wide
    from lowrank_cli.optim.projected import Projected
    from lowrank_cli.optim.projection import expand
    from lowrank_cli.optim.write import add_

    class FiraSpace(Projected):
        """`Projected` that also moves along what the projection leaves out."""

        always_full = True
        rest: Tensor
        inside: Tensor

        def gradient(self) -> list[Part]:
            (part,), grad = super().gradient(), self.weight.grad
            self.rest = grad.to(wide(grad.dtype)) - self.expanded(part.grad)
            self.inside = self.column_norms(part.grad)
            return [part]

        def keeps(self, key: str) -> bool:
            return super().keeps(key) or key == "last_norm"

        def expanded(self, small: Tensor) -> Tensor:
            bases = {side: basis.to(small.dtype) for side, basis in self.bases().items()}
            return expand(self.layout.expandable(small, bases), bases)

        def column_norms(self, small: Tensor) -> Tensor:
            """Return the norms along the projected side, (1, n) or (m, 1), of every expert by itself."""
            if self.sides == ("right",):
                return small.norm(dim=-1, keepdim=True)
            return self.layout.total(small.square().sum(-2, keepdim=True)).sqrt()

        def apply_(self, moves: list[Move]) -> None:
            (move,) = moves
            tiny = torch.finfo(self.inside.dtype).tiny
            self.rest *= -self.column_norms(move.update) / self.inside.clamp_min(tiny)
            limit_(self, self.rest)
            self.rest += self.expanded(move.update)
            alpha, self._bases = self.group["scale"] * move.alpha, None
            add_(self.weight, self.rest, alpha=alpha, beta=move.beta, noise=self.noise())
            del self.rest, self.inside

    return FiraSpace


def limit_(space: Space, move: Tensor) -> None:
    """Shrink a move, so that its norm over the learning rate grows by at most a hundredth an update.

    Of experts each has a norm of its own: one that got few tokens before must not be held back by another, and where
    processes have experts each nothing is exchanged.

    Args:
        space: keeps the norm in its state, as `last_norm`.
        move: this process's rows of it, changed in place.
    """
    rate = space.group["lr"]
    if rate == 0:
        return
    square = move.square().sum((-2, -1), keepdim=True) if space.is_batch else move.square().sum()
    norm = space.layout.total(square).sqrt() / rate
    if "last_norm" in space.state:
        factor = (GROWTH * space.state["last_norm"] / norm).nan_to_num(1.0).clamp(max=1.0)
        move *= factor
        norm = norm * factor
    space.state["last_norm"] = norm
