"""Updates from a factored gradient F (x) v, straight into the weight. VeLoRA, arXiv:2405.17991.

Shapes: a weight W is (m, D), D = G * M; F is (m, G), v is (M,) of unit length; (F (x) v)[o, g M + j] = F[o, g] v[j].
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_cli.optim.projection import stochastic_round

# rows of the weight that are worked on at a time: no temporary of its size
ROWS = 256


def factored_adamw_(
    weight: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, vector: Tensor, *, step_size: float, eps: float,
    stochastic_rounding: bool = False,
) -> None:  # fmt: skip
    """Dense Adam's update of F (x) v from the moments of F: W -= step_size * (M_F v) / (sqrt(V_F) |v| + eps).

    With v fixed the moments of F (x) v are M_F (x) v and V_F (x) v^2, so this is the dense update up to rounding.

    Args:
        weight: (m, D), changed in place.
        exp_avg: M_F (m, G), float32, after this step's gradient.
        exp_avg_sq: V_F (m, G), likewise.
        vector: v (M,), float32.
        step_size: learning rate with both bias corrections.
        eps: added to the root.
        stochastic_rounding: of a bfloat16 weight.
    """
    size = vector.abs()
    for start in range(0, weight.shape[0], ROWS):
        rows = slice(start, start + ROWS)
        move = exp_avg[rows].unsqueeze(-1) * vector  # (rows, G, M)
        move.div_((exp_avg_sq[rows].sqrt().unsqueeze(-1) * size).add_(eps))
        add_(weight[rows], move.flatten(1), -step_size, stochastic_rounding)


def factored_sign_(weight: Tensor, update: Tensor, vector: Tensor, stochastic_rounding: bool = False) -> None:
    """Adds `update (x) sign(v)`: what a scale-free rule makes of F (x) v, where eps does not matter.

    Args:
        weight: (m, D), changed in place.
        update: the rule's own update of F (m, G), float32.
        vector: v (M,).
        stochastic_rounding: of a bfloat16 weight.
    """
    signs = vector.sign()
    for start in range(0, weight.shape[0], ROWS):
        rows = slice(start, start + ROWS)
        add_(weight[rows], (update[rows].unsqueeze(-1) * signs).flatten(1), 1.0, stochastic_rounding)


def add_(weight: Tensor, move: Tensor, alpha: float, stochastic_rounding: bool) -> None:
    """Add `alpha` times a move to rows of a weight.

    Args:
        weight: (rows, D), changed in place.
        move: (rows, D), float32 or float64.
        alpha: factor of the move.
        stochastic_rounding: round bfloat16 up or down at random, keeping the mean.
    """
    if stochastic_rounding and weight.dtype == torch.bfloat16:
        weight.copy_(stochastic_round(torch.add(weight, move, alpha=alpha)))
    else:
        weight.add_(move.to(weight.dtype), alpha=alpha)
