"""The one place where an update and weight decay become a weight, rounded once.

A 16-bit weight that took the update and the decay in two steps would be rounded twice, and the second rounding loses
what the first kept: lr * decay is far below the spacing of bfloat16. Shapes: a weight W is (m, n), bases P (m, r) and
Q (n, r).
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from lowrank_cli.ops.precision import wide
from lowrank_cli.optim.projection import expand

# rows of a 16-bit weight that are worked on at a time: no temporary of its size
ROWS = 256


def put_(weight: Tensor, exact: Tensor, noise: Generator | None) -> None:
    """Write numbers into a weight, rounded to the nearest, or up or down at random.

    Args:
        weight: changed in place.
        exact: what it should be, float32 or wider.
        noise: draws the roundings of a bfloat16 weight; None rounds to the nearest.
    """
    weight.copy_(exact if noise is None else stochastic_round(exact, noise))


def add_(weight: Tensor, move: Tensor, *, alpha: float, beta: float, noise: Generator | None) -> None:
    """Write `beta` times a weight plus `alpha` times a move of its shape, rounded once.

    Args:
        weight: changed in place.
        move: float32 or wider; of a 16-bit weight it is used up.
        alpha: factor of the move.
        beta: what weight decay leaves of the weight.
        noise: as for `put_`.
    """
    if weight.dtype == wide(weight.dtype):
        if beta != 1:
            weight.mul_(beta)
        weight.add_(move, alpha=alpha)
    else:
        put_(weight, move.mul_(alpha).add_(weight, alpha=beta), noise)


def expand_add_(
    weight: Tensor, update: Tensor, bases: dict[str, Tensor], *, alpha: float = 1.0, beta: float = 1.0,
    noise: Generator | None = None,
) -> Tensor:  # fmt: skip
    """Write `beta` times a weight plus `alpha` times an expanded update, rounded once: no (m, n) temporary.

    Args:
        weight: (m, n), or a batch of matrices (E, m, n), changed in place; only one that is projected in every mode
            needs a temporary of its size.
        update: as `project` returns. Rounded to the nearest, it is cast to the weight's dtype for the product, which
            accumulates in float32; at random, all is computed in float32, a block of rows at a time.
        bases: as for `project`.
        alpha: factor of the update.
        beta: what weight decay leaves of the weight.
        noise: as for `put_`.
    Returns:
        The weight.
    """
    if weight.dim() == 3 and not bases.keys() - {"left", "right"}:
        for i, matrix in enumerate(weight):
            own = {side: basis[i] for side, basis in bases.items()}
            expand_add_(matrix, update[i], own, alpha=alpha, beta=beta, noise=noise)
        return weight
    if weight.dim() > 2:
        add_(weight, expand(update, {side: b.to(update.dtype) for side, b in bases.items()}), alpha=alpha, beta=beta,
             noise=noise)  # fmt: skip
        return weight
    left, right = bases.get("left"), bases.get("right")
    if noise is None:
        update = update.to(weight.dtype)
    elif right is not None:
        right = right.to(update.dtype)
    if left is not None and right is not None:
        update, right = update @ right.mT, None
    if noise is None:
        a, b = (update, right.mT) if left is None else (left, update)
        return weight.addmm_(a, b, alpha=alpha, beta=beta)
    for start in range(0, weight.shape[0], ROWS):
        rows = slice(start, start + ROWS)
        a, b = (update[rows], right.mT) if left is None else (left[rows].to(update.dtype), update)
        exact = torch.addmm(weight[rows].to(update.dtype), a, b, alpha=alpha, beta=beta)
        put_(weight[rows], exact, noise)
    return weight


def stochastic_round(exact: Tensor, noise: Generator) -> Tensor:
    """Round float32 to bfloat16, up or down with the probabilities that keep its mean.

    bfloat16 is the upper half of float32's bits: a random number below the lower half's range is added, then cut off.
    """
    low = torch.randint(0, 1 << 16, exact.shape, dtype=torch.int32, device=exact.device, generator=noise)
    return (exact.view(torch.int32) + low).bitwise_and_(-(1 << 16)).view(torch.float32).to(torch.bfloat16)
