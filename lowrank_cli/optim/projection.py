"""Gradients in a smaller space: which sides of a tensor to project, the projection, and the way back.

Shapes: a weight and its gradient are (m, n) = (out, in); the rank is r. A left basis P is (m, r), a right basis Q is
(n, r), both with orthonormal columns. GaLore, arXiv:2403.03507, Alg. 2 and sec. 4.2. A tensor of more dimensions, such
as a convolution's weight, has a basis for each mode (Tucker); the mode's number is then the side.
"""

from __future__ import annotations

import torch
from torch import Tensor

PROJ_TYPES = ("std", "reverse_std", "left", "right", "full")


def sides(shape: tuple[int, ...], proj_type: str) -> tuple[str, ...]:
    """The sides of an (m, n) gradient that a projection type multiplies: "left" is P^T G, "right" is G Q.

    `std` projects the shorter side, which is what saves memory; a square matrix is projected on the right, as in the
    authors' code (the paper's text says left). A tensor of k > 2 dimensions is projected in every mode: "mode0" ...

    Args:
        shape: of the gradient.
        proj_type: one of PROJ_TYPES.
    Raises:
        ValueError: an unknown projection type, or fewer than two dimensions.
    """
    if proj_type not in PROJ_TYPES:
        raise ValueError(f"proj_type is {proj_type!r}; it is one of {', '.join(PROJ_TYPES)}")
    if len(shape) < 2:
        raise ValueError(f"a group with `rank` holds a tensor of shape {tuple(shape)}; it takes matrices and larger")
    if len(shape) > 2:
        return tuple(f"mode{k}" for k in range(len(shape)))
    m, n = shape
    if proj_type == "std":
        return ("right",) if m >= n else ("left",)
    if proj_type == "reverse_std":
        return ("left",) if m >= n else ("right",)
    return ("left", "right") if proj_type == "full" else (proj_type,)


def unfold(grad: Tensor, side: str) -> tuple[Tensor, str]:
    """The matrix whose singular vectors are the side's basis, and on which side of it they stand."""
    if side in ("left", "right"):
        return grad, side
    mode = int(side.removeprefix("mode"))
    return grad.movedim(mode, 0).flatten(1), "left"


def project(grad: Tensor, bases: dict[str, Tensor]) -> Tensor:
    """The gradient in the coordinates of its bases: P^T G, G Q, P^T G Q, or the Tucker core. GaLore, Alg. 2.

    Args:
        grad: (m, n), or of more dimensions.
        bases: "left": (m, r) and/or "right": (n, r); or "mode0", "mode1", ...
    Returns:
        (r, n), (m, r) or (r, r), or a core of r in every mode; in the gradient's dtype.
    """
    for side, basis in bases.items():
        if side == "left":
            grad = basis.mT @ grad
        elif side == "right":
            grad = grad @ basis
        else:
            grad = _mode_product(grad, basis.mT, side)
    return grad


def expand(update: Tensor, bases: dict[str, Tensor]) -> Tensor:
    """The update at full size: P N, N Q^T, P N Q^T, or the core times the basis of every mode."""
    for side, basis in bases.items():
        if side == "left":
            update = basis @ update
        elif side == "right":
            update = update @ basis.mT
        else:
            update = _mode_product(update, basis, side)
    return update


def expand_add_(weight: Tensor, update: Tensor, bases: dict[str, Tensor], alpha: float = 1.0) -> Tensor:
    """Adds `alpha` times the expanded update straight into a matrix: no (m, n) temporary.

    Args:
        weight: (m, n), changed in place; only a tensor of more dimensions needs a temporary of its size.
        update: as `project` returns; cast to the weight's dtype for the product, which accumulates in float32 and
            rounds once.
        bases: as for `project`.
        alpha: factor of the update.
    Returns:
        The weight.
    """
    update = update.to(weight.dtype)
    if weight.dim() > 2:
        return weight.add_(expand(update, bases), alpha=alpha)
    if "left" not in bases:
        return weight.addmm_(update, bases["right"].mT, alpha=alpha)
    if "right" in bases:
        update = update @ bases["right"].mT
    return weight.addmm_(bases["left"], update, alpha=alpha)


def expand_add_rounded_(
    weight: Tensor, update: Tensor, bases: dict[str, Tensor], alpha: float, rows: int = 256
) -> None:
    """`expand_add_` into a bfloat16 matrix with stochastic rounding, a block of rows at a time in float32.

    The expectation of the rounded weight is the exact one, so that updates smaller than half a spacing are not lost.
    """
    left, right = bases.get("left"), bases.get("right")
    if right is not None:
        update = update if left is None else update @ right.float().mT
    for start in range(0, weight.shape[0], rows):
        block = weight[start : start + rows]
        if left is None:
            exact = torch.addmm(block.float(), update[start : start + rows], right.float().mT, alpha=alpha)
        else:
            exact = torch.addmm(block.float(), left[start : start + rows].float(), update, alpha=alpha)
        block.copy_(stochastic_round(exact))


def stochastic_round(exact: Tensor) -> Tensor:
    """A float32 tensor in bfloat16, rounded up or down with the probabilities that keep its mean.

    bfloat16 is the upper half of float32's bits: a random number below the lower half's range is added, then cut off.
    """
    noise = torch.randint(0, 1 << 16, exact.shape, dtype=torch.int32, device=exact.device)
    return (exact.view(torch.int32) + noise).bitwise_and_(-(1 << 16)).view(torch.float32).to(torch.bfloat16)


def _mode_product(tensor: Tensor, matrix: Tensor, side: str) -> Tensor:
    """The tensor with one of its modes multiplied by a matrix (rows, size)."""
    mode = int(side.removeprefix("mode"))
    return torch.tensordot(tensor, matrix, dims=([mode], [1])).movedim(-1, mode)
