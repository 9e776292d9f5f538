"""Optimizers: one is built from tagged groups, whatever the method that tagged them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from lowrank_cli.config import OptimConfig


def base_groups(model: nn.Module, config: OptimConfig) -> list[dict]:
    """Every trainable tensor once: matrices with weight decay, vectors and scalars without.

    Returns:
        Groups whose `params` are (name, parameter) pairs; methods split and tag them.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [(name, p) for name, p in named if p.dim() >= 2]
    vectors = [(name, p) for name, p in named if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay, "role": "full"},
        {"params": vectors, "weight_decay": 0.0, "role": "full"},
    ]
    return [g for g in groups if g["params"]]


def build(config: OptimConfig, groups: list[dict]) -> Optimizer:
    """The optimizer for these groups: torch's own fused AdamW where nothing is projected or 16-bit."""
    betas = (config.beta1, config.beta2)
    parameters = [p for group in groups for _, p in group["params"]]
    # torch's keeps the moments in the weight's dtype, ours in float32 always: both sides of a comparison get the same
    if not any("rank" in group for group in groups) and all(p.element_size() >= 4 for p in parameters):
        from torch.optim import AdamW

        return AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, weight_decay=0.0, fused=True)
    from lowrank_cli.optim.adamw import GaLoreAdamW

    return GaLoreAdamW(groups, lr=config.lr, betas=betas, eps=config.eps)
