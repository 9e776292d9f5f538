"""The papers' own formula of training memory."""

from __future__ import annotations

from torch import nn


def weights_and_states(model: nn.Module, groups: list[dict], dtype_bytes: int) -> int:
    """Bytes of weights and optimizer states as GaLore counts them, arXiv:2403.03507, Table 1: everything in one dtype.

    An (m, n) matrix with m the shorter side takes m n for itself; full-rank Adam 2 m n more, GaLore m r + 2 n r more.
    What is trained beside frozen weights, LoRA's factors, is full-rank by itself: 3 m r + 3 n r.

    Args:
        model: with the method in it.
        groups: as the method tagged them.
        dtype_bytes: of every number; 2 in the paper's tables.
    """
    elements = sum(p.numel() for p in model.parameters())
    for group in groups:
        for _, p in group["params"]:
            if "rank" in group and p.dim() == 2:
                elements += group["rank"] * (min(p.shape) + 2 * max(p.shape))
            else:
                elements += 2 * p.numel()
    return elements * dtype_bytes
