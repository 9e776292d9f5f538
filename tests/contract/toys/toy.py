"""Scale the full gradient's columns as a random projection of it says: a toy, for the contract's tests.

With a random Q (m, r), drawn anew for every update from a seed: G_j <- G_j |Q^T G_j| / |G_j|, after APOLLO's idea. It
needs the whole gradient, summed over micro-batches and processes.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowrank_cli.config import option
from lowrank_cli.methods.base import Method

if TYPE_CHECKING:
    from torch import Tensor, nn


class Toy(Method):
    title = "Toy"
    paper = "https://arxiv.org/abs/2412.05270"
    summary = "columns of the full gradient, scaled by those of a random projection"
    acts_on = frozenset({"gradients"})
    commands = frozenset({"pretrain", "finetune"})
    updates = 0

    @dataclass(frozen=True)
    class Config:
        rank: int = option(4, "rows of the random projection", min=1)

    def param_groups(self, model: nn.Module, groups: list[dict]) -> list[dict]:
        from lowrank_cli.models.targets import select

        names = {f"{name}.weight" for name in select(model, None)}
        own = [g | {"params": [(n, p) for n, p in g["params"] if n in names], "role": "toy"} for g in groups]
        rest = [g | {"params": [(n, p) for n, p in g["params"] if n not in names]} for g in groups]
        return [g for g in own + rest if g["params"]]

    def before_step(self, model: nn.Module) -> None:
        from lowrank_cli.models.targets import select

        self.updates += 1
        for name, module in select(model, None).items():
            self.scale_(module.weight.grad, f"{name} {self.updates}")

    def scale_(self, grad: Tensor, seed: str) -> None:
        """Scale the columns of a gradient (m, n) in place."""
        import torch

        generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
        random = torch.randn(self.config.rank, grad.shape[0], generator=generator).to(grad)
        grad.mul_((random @ grad).norm(dim=0) / grad.norm(dim=0).clamp_min(1e-12))

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        import torch

        return {"updates": torch.tensor([self.updates])}

    def load_state(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        self.updates = int(state["updates"])
