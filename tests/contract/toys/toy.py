"""Scale the full gradient's columns as a random projection of it says: a toy, for the contract's tests.

With a random Q (m, r), drawn anew for every update: G_j <- G_j |Q^T G_j| / |G_j|, after APOLLO's idea
(arXiv:2412.05270). It needs the whole gradient, summed over micro-batches and processes.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowrank_cli.fields import option
from lowrank_cli.methods.base import Method

if TYPE_CHECKING:
    from torch import nn


class Toy(Method):
    title = "Toy"
    paper = "https://arxiv.org/abs/2412.05270"
    summary = "columns of the full gradient, scaled by those of a random projection"
    acts_on = frozenset({"gradients"})
    commands = frozenset({"pretrain", "finetune"})

    @dataclass(frozen=True)
    class Config:
        rank: int = option(4, "rows of the random projection", min=1)

    def param_groups(self, model: nn.Module, groups: list[dict]) -> list[dict]:
        from dataclasses import replace

        import torch

        from lowrank_cli.models.targets import select
        from lowrank_cli.optim.space import Space

        class Scaled(Space):
            def gradient(self):
                (part,) = super().gradient()
                grad, seed = part.grad.double(), zlib.crc32(f"{self.name} {self.state.get('step', 0)}".encode())
                size = self.layout.shape[0], self.group["projection_rank"]
                random = torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(grad)
                small = self.layout.total(self.layout.own_basis(random).mT @ grad)
                norms = self.layout.total(grad.square().sum(0)).sqrt()
                scaled = grad * (small.norm(dim=0) / norms.clamp_min(1e-12))
                return [replace(part, grad=scaled.to(torch.promote_types(self.weight.dtype, torch.float32)))]

        names = {f"{name}.weight" for name in select(model, None)}
        tags = {"role": "toy", "space": Scaled, "projection_rank": self.config.rank}
        own = [g | tags | {"params": [(n, p) for n, p in g["params"] if n in names]} for g in groups]
        rest = [g | {"params": [(n, p) for n, p in g["params"] if n not in names]} for g in groups]
        return [g for g in own + rest if g["params"]]
