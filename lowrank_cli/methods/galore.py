"""GaLore: gradients projected onto their leading singular directions, so that the optimizer's state is low-rank.

Every `update_proj_gap` (T) updates the basis of each targeted matrix W (m x n) becomes the leading `rank` (r) singular
vectors of its current gradient G. Between refreshes the update rule, here AdamW, sees only the projected gradient:

    R = G Q   (m >= n, Q: n x r)      or   R = P^T G   (m < n, P: m x r)
    N = Adam(R)                       moments of size m x r or r x n, kept as they are at a refresh
    W <- W - lr * scale * N Q^T       or   W <- W - lr * scale * P N

The weight itself stays full-rank and is trained everywhere. Zhao et al., arXiv:2403.03507, Alg. 2. The step is in
`optim/projected.py`, the projections in `optim/projection.py`; this file says which tensors are projected and how.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from lowrank_cli import console
from lowrank_cli.errors import UsageError
from lowrank_cli.fields import option
from lowrank_cli.methods.base import Memory, Method
from lowrank_cli.optim import state_bytes

if TYPE_CHECKING:
    from torch import nn

    from lowrank_cli.config import RunConfig
    from lowrank_cli.optim.space import Space

# paper's Table 2 where it has the size (1b: 512, the authors' script has 1024); else a quarter of the hidden size
RANKS = {"llama-9m": 32, "llama-20m": 64, "llama-35m": 96, "llama-40m": 104, "llama-60m": 128, "llama-71m": 128,
         "llama-100m": 160, "llama-130m": 256, "llama-250m": 192, "llama-350m": 256, "llama-1b": 512,
         "llama-3b": 640, "llama-7b": 1024}  # fmt: skip
ENGINES = ("auto", "svd", "gram", "randomized", "subspace")
REFRESH = "how a basis is found: svd as in the paper; auto is gram, or randomized where that would take long"


class GaLore(Method):
    title = "GaLore"
    paper = "https://arxiv.org/abs/2403.03507"
    summary = "AdamW on gradients projected to their leading singular directions"
    acts_on = frozenset({"gradients"})
    commands = frozenset({"pretrain", "finetune"})
    defaults = {"lr": 0.01}
    # clipping would make every gradient wait, whole, for the norm of all
    instead_of_full = frozenset({"pretrain"})
    command_defaults = {"finetune": {"lr": 2e-4, "grad_clipping": 0.0}}
    presets = {model: {"rank": rank} for model, rank in RANKS.items()} | {
        "llama-7b": {"rank": 1024, "update_proj_gap": 500}
    }

    @dataclass(frozen=True)
    class Config:
        rank: int | None = option(
            None,
            "columns of the basis; the paper's for the llama presets, else a quarter of the matrix's shorter side",
            min=1,
        )
        update_proj_gap: int = option(200, "updates between refreshes of the basis (T)", min=1)
        scale: float = option(0.25, "factor of the projected update (alpha)", above=0)
        proj_type: str = option(
            "std",
            "side to project: std is the shorter one, full is both",
            choices=("std", "reverse_std", "left", "right", "full"),
        )
        refresh: str = option("auto", REFRESH, choices=ENGINES)
        moments: str = option(
            "keep",
            "the moments at a refresh: kept as in the paper, kept with the basis's signs aligned to the old one's, "
            "rotated or reset",
            choices=("keep", "align", "rotate", "reset"),
        )
        stagger: bool = option(False, "spread the refreshes of the tensors over the gap")
        lazy_refresh: bool = option(False, "double the gap of a basis that has stopped moving (Q-GaLore)")
        target_modules: str = option(
            "all-linear", "matrices to project: all-linear, or comma-separated names and patterns"
        )
        in_backward: bool | None = option(
            None,
            "project inside backward, so that no full gradient is formed between refreshes; on unless given where it "
            "takes fewer operations and --grad-clipping is off",
        )

    def check(self, run: RunConfig) -> None:
        if getattr(self.config, "moments", None) == "rotate" and run.optim.optimizer == "adafactor":
            flag = self.flag("moments")
            raise UsageError(
                f"{flag} rotate does not go with --optimizer adafactor: factored moments cannot be rotated",
                f"take {flag} keep or reset, or --optimizer adamw",
            )

    def param_groups(self, model: nn.Module, groups: list[dict]) -> list[dict]:
        from lowrank_cli.models.targets import matrices, parse

        targeted = matrices(model, parse(self.config.target_modules))
        tagged, clamped = [], set()
        for group in groups:
            if group["role"] != "full":
                # another method has made this gradient small already
                tagged.append(group)
                continue
            by_rank: dict[int, list] = {}
            for name, p in group["params"]:
                if name in targeted:
                    rank = self.rank_for(tuple(p.shape))
                    if self.config.rank and rank < self.config.rank:
                        clamped.add(rank)
                    by_rank.setdefault(rank, []).append((name, p))
            rest = [(name, p) for name, p in group["params"] if name not in targeted]
            for rank, params in by_rank.items():
                tags = {"role": self.name, "rank": rank, "space": self.space(), "batched": True, "params": params}
                tagged.append(group | asdict(self.config) | tags)
            if rest:
                tagged.append({**group, "params": rest, "why": "outside the layers' linears"})
        if clamped:
            console.warn(
                f"rank {self.config.rank} is larger than some matrices: clamped to "
                f"{', '.join(map(str, sorted(clamped)))} there, which rotates but saves nothing"
            )
        return tagged

    def space(self) -> type[Space]:
        """Return the class of the spaces of this method's tensors."""
        from lowrank_cli.optim.projected import Projected

        return Projected

    def rank_for(self, shape: tuple[int, ...]) -> int:
        """The rank for an (m, n) weight, or for each of a batch: the configured one, at most the shorter side."""
        return min(self.config.rank or max(1, min(shape[-2:]) // 4), *shape[-2:])

    def memory(
        self, shape: tuple[int, ...], dtype_bytes: int = 4, optimizer: str = "adamw", group: dict | None = None
    ) -> Memory:
        from lowrank_cli.optim.projection import sides

        # paper, Table 1: m r for the basis and 2 n r for the moments, m the shorter side
        *batch, m, n = shape
        rank, used = self.rank_for(shape), sides((m, n), self.config.proj_type)
        projected = (*batch, rank if "left" in used else m, rank if "right" in used else n)
        basis = math.prod(batch) * sum(rank * (m if side == "left" else n) for side in used)
        size = math.prod(shape) * dtype_bytes
        return Memory(weights=size, gradients=size, states=basis * dtype_bytes + state_bytes(optimizer, projected))
