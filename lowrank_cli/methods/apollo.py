"""APOLLO: updates of full rank whose columns are as long as Adam makes them in a random space that is never stored.

With R = P^T G, P drawn from N(0, 1/r) anew every `update_proj_gap` updates, and N the rule's update of R (the shorter
side is projected; on the right alike, with rows for columns):

    s_j = |N_j| / |R_j|                          one factor a column; at rank 1 one a tensor, which is APOLLO-Mini
    W <- W - lr scale G diag(s)                  its norm grows by at most a hundredth an update

The state is the moments of R and one number a tensor: P follows from the tensor's name and the step. The gradient has
to be whole at every update. Zhu et al., arXiv:2412.05270, Alg. 1 and sec. 4; written from the paper alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from lowrank_cli.fields import option
from lowrank_cli.methods.base import Memory
from lowrank_cli.methods.fira import limit_
from lowrank_cli.methods.galore import GaLore
from lowrank_cli.optim import state_bytes

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lowrank_cli.optim.space import Move, Part, Space

# paper, sec. 5: of APOLLO-Mini, whose one factor is that much smaller
MINI_SCALE = 128**0.5


class Apollo(GaLore):
    title = "APOLLO"
    paper = "https://arxiv.org/abs/2412.05270"
    summary = "the gradient, its columns scaled by Adam in a random space"
    instead_of_full = frozenset()

    @dataclass(frozen=True)
    class Config:
        rank: int | None = option(
            None, "columns of the random projection; those of galore unless given; 1 is APOLLO-Mini", min=1
        )
        update_proj_gap: int = option(200, "updates between two draws of the projection (T)", min=1)
        scale: float | None = option(None, "factor of the update; 1, or the root of 128 at rank 1", above=0)
        target_modules: str = option("all-linear", "matrices to project, as of galore")

    def param_groups(self, model: nn.Module, groups: list[dict]) -> list[dict]:
        tagged = super().param_groups(model, groups)
        for group in tagged:
            if group["role"] == self.name and group["scale"] is None:
                group["scale"] = MINI_SCALE if group["rank"] == 1 else 1.0
        return tagged

    def space(self) -> type[Space]:
        return space()

    def memory(
        self, shape: tuple[int, ...], dtype_bytes: int = 4, optimizer: str = "adamw", group: dict | None = None
    ) -> Memory:
        *batch, m, n = shape
        rank, size = self.rank_for(shape), math.prod(shape) * dtype_bytes
        small = (*batch, m, rank) if m >= n else (*batch, rank, n)
        return Memory(weights=size, gradients=size, states=state_bytes(optimizer, small) + 4 * math.prod(batch))


@cache
def space() -> type[Space]:
    """Return the class of APOLLO's spaces; PyTorch is imported by now."""
    import zlib

    import torch

    from lowrank_cli.ops.precision import wide
    from lowrank_cli.optim.projection import project, sides
    from lowrank_cli.optim.space import Part, is_batch
    from lowrank_cli.optim.space import Space as Base
    from lowrank_cli.optim.write import add_

    class ApolloSpace(Base):
        """The whole gradient, its columns scaled."""

        always_full = True
        inside: Tensor

        @classmethod
        def check(cls, group: dict) -> None:
            group.setdefault("update_proj_gap", 200)
            group.setdefault("scale", MINI_SCALE if group["rank"] == 1 else 1.0)
            if any(p.dim() != 2 and not is_batch(p.shape, group) for p in group["params"]):
                raise ValueError("apollo takes matrices, or a batch of them in a group that is `batched`")

        def keeps(self, key: str) -> bool:
            return key == "last_norm"

        def check_loaded(self, state: dict, group: dict) -> None:
            """Accept any: the moments are those of R, whose shape the group's rank says."""

        @property
        def side(self) -> str:
            return sides(self.layout.shape, "std", batched=self.is_batch)[0]

        def bases(self) -> dict[str, Tensor]:
            """Draw the projection: the same one from draw to draw, on every process, and for all experts."""
            size = self.layout.shape[-2 if self.side == "left" else -1], self.group["rank"]
            grad, number = self.weight.grad, self.state.get("step", 0) // self.group["update_proj_gap"]
            basis = torch.empty(size, dtype=wide(grad.dtype), device=grad.device)
            if not grad.is_meta:
                seed = zlib.crc32(f"{self.name} {number}".encode())
                basis.normal_(0, size[1] ** -0.5, generator=torch.Generator(grad.device).manual_seed(seed))
            basis = basis.to(grad.dtype)
            return {self.side: self.layout.own_basis(basis) if self.side == "left" else basis}

        def gradient(self) -> list[Part]:
            grad, bases = self.weight.grad, self.bases()
            small = self.layout.settled(project(grad, bases), bases).to(wide(grad.dtype))
            self.inside = self.norms(small)
            return [Part(small, self.weight, self.layout.height(small, bases))]

        def norms(self, small: Tensor) -> Tensor:
            """Return the norms of columns (1, n), of rows (m, 1) on the right, or of the whole (1, 1) at rank 1; of
            every expert by itself."""
            squares = small.square()
            if self.group["rank"] == 1:
                return self.layout.total(squares.sum((-2, -1), keepdim=True)).sqrt()
            if self.side == "right":
                return squares.sum(-1, keepdim=True).sqrt()
            return self.layout.total(squares.sum(-2, keepdim=True)).sqrt()

        def apply_(self, moves: list[Move]) -> None:
            (move,), grad = moves, self.weight.grad
            tiny = torch.finfo(self.inside.dtype).tiny
            step = grad.to(self.inside.dtype) * (-self.norms(move.update) / self.inside.clamp_min(tiny))
            limit_(self, step)
            add_(self.weight, step, alpha=self.group["scale"] * move.alpha, beta=move.beta, noise=self.noise())
            del self.inside

    return ApolloSpace
