"""Updates from a factored gradient F (x) v, straight into the weight. VeLoRA, arXiv:2405.17991.

Shapes: a weight W is (m, D), D = G * M; F is (m, G), v is (M,) of unit length; (F (x) v)[o, g M + j] = F[o, g] v[j].
"""

from __future__ import annotations

from torch import Tensor

# rows of the weight that are worked on at a time: no temporary of its size
ROWS = 256


def factored_adamw_(
    weight: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, vector: Tensor, *, step_size: float, eps: float
) -> None:
    """Dense Adam's update of F (x) v from the moments of F: W -= step_size * (M_F v) / (sqrt(V_F) |v| + eps).

    With v fixed the moments of F (x) v are M_F (x) v and V_F (x) v^2, so this is the dense update up to rounding.

    Args:
        weight: (m, D), changed in place.
        exp_avg: M_F (m, G), float32, after this step's gradient.
        exp_avg_sq: V_F (m, G), likewise.
        vector: v (M,), float32.
        step_size: learning rate with both bias corrections.
        eps: added to the root.
    """
    size = vector.abs()
    for start in range(0, weight.shape[0], ROWS):
        rows = slice(start, start + ROWS)
        move = exp_avg[rows].unsqueeze(-1) * vector  # (rows, G, M)
        move.div_((exp_avg_sq[rows].sqrt().unsqueeze(-1) * size).add_(eps))
        weight[rows].add_(move.flatten(1).to(weight.dtype), alpha=-step_size)


def factored_sign_(weight: Tensor, update: Tensor, vector: Tensor) -> None:
    """Adds `update (x) sign(v)`: what a scale-free rule makes of F (x) v, where eps does not matter.

    Args:
        weight: (m, D), changed in place.
        update: the rule's own update of F (m, G), float32.
        vector: v (M,).
    """
    signs = vector.sign()
    for start in range(0, weight.shape[0], ROWS):
        rows = slice(start, start + ROWS)
        weight[rows].add_((update[rows].unsqueeze(-1) * signs).flatten(1).to(weight.dtype))
