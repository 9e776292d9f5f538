"""Updates from a factored gradient F (x) v, straight into the weight. VeLoRA, arXiv:2405.17991.

Shapes: a weight W is (m, D), D = G * M; F is (m, G), v is (M,) of unit length; (F (x) v)[o, g M + j] = F[o, g] v[j].
"""

from __future__ import annotations

from torch import Generator, Tensor

from lowrank_cli.optim.write import ROWS, add_


def factored_adamw_(
    weight: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, vector: Tensor, *, step_size: float, eps: float,
    beta: float = 1.0, noise: Generator | None = None,
) -> None:  # fmt: skip
    """Dense Adam's update of F (x) v from the moments of F: W <- beta W - step_size * (M_F v) / (sqrt(V_F) |v| + eps).

    With v fixed the moments of F (x) v are M_F (x) v and V_F (x) v^2, so this is the dense update up to rounding.

    Args:
        weight: (m, D), changed in place.
        exp_avg: M_F (m, G), float32, after this step's gradient.
        exp_avg_sq: V_F (m, G), likewise.
        vector: v (M,), float32.
        step_size: learning rate with both bias corrections.
        eps: added to the root.
        beta: what weight decay leaves of the weight.
        noise: as for `write.put_`.
    """
    size = vector.abs()
    for start in range(0, weight.shape[0], ROWS):
        rows = slice(start, start + ROWS)
        move = exp_avg[rows].unsqueeze(-1) * vector  # (rows, G, M)
        move.div_((exp_avg_sq[rows].sqrt().unsqueeze(-1) * size).add_(eps))
        add_(weight[rows], move.flatten(1), alpha=-step_size, beta=beta, noise=noise)


def factored_sign_(
    weight: Tensor, update: Tensor, vector: Tensor, *, alpha: float = 1.0, beta: float = 1.0,
    noise: Generator | None = None,
) -> None:  # fmt: skip
    """Add `update (x) sign(v)`: what a scale-free rule makes of F (x) v, where eps does not matter.

    Args:
        weight: (m, D), changed in place.
        update: the rule's own update of F (m, G), float32.
        vector: v (M,).
        alpha: factor of the update.
        beta: what weight decay leaves of the weight.
        noise: as for `write.put_`.
    """
    signs = vector.sign()
    for start in range(0, weight.shape[0], ROWS):
        rows = slice(start, start + ROWS)
        move = (update[rows].unsqueeze(-1) * signs).flatten(1)
        add_(weight[rows], move, alpha=alpha, beta=beta, noise=noise)
