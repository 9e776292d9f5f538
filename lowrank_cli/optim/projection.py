"""Gradients in a smaller space: which sides of a tensor to project, the projection, and the way back.

Shapes: a weight and its gradient are (m, n) = (out, in); the rank is r. A left basis P is (m, r), a right basis Q is
(n, r), both with orthonormal columns. GaLore, arXiv:2403.03507, Alg. 2 and sec. 4.2. A tensor of more dimensions, such
as a convolution's weight, has a basis for each mode (Tucker); the mode's number is then the side. Experts are a batch
of matrices, (E, m, n): every one has bases of its own, (E, m, r) or (E, n, r), and all here is batched.
"""

from __future__ import annotations

import torch
from torch import Tensor

PROJ_TYPES = ("std", "reverse_std", "left", "right", "full")


def sides(shape: tuple[int, ...], proj_type: str, *, batched: bool = False) -> tuple[str, ...]:
    """The sides of an (m, n) gradient that a projection type multiplies: "left" is P^T G, "right" is G Q.

    `std` projects the shorter side, which is what saves memory; a square matrix is projected on the right, as in the
    authors' code (the paper's text says left). A tensor of k > 2 dimensions is projected in every mode: "mode0" ...

    Args:
        shape: of the gradient.
        proj_type: one of PROJ_TYPES.
        batched: the last two dimensions are those of a matrix.
    Raises:
        ValueError: an unknown projection type, or fewer than two dimensions.
    """
    if proj_type not in PROJ_TYPES:
        raise ValueError(f"proj_type is {proj_type!r}; it is one of {', '.join(PROJ_TYPES)}")
    if len(shape) < 2:
        raise ValueError(f"a group with `rank` holds a tensor of shape {tuple(shape)}; it takes matrices and larger")
    if len(shape) > 2 and not batched:
        return tuple(f"mode{k}" for k in range(len(shape)))
    m, n = shape[-2:]
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
        bases: "left": (m, r) and/or "right": (n, r), batched like it; or "mode0", "mode1", ...
    Returns:
        (r, n), (m, r) or (r, r), batched like it, or a core of r in every mode; in the gradient's dtype.
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


def _mode_product(tensor: Tensor, matrix: Tensor, side: str) -> Tensor:
    """The tensor with one of its modes multiplied by a matrix (rows, size)."""
    mode = int(side.removeprefix("mode"))
    return torch.tensordot(tensor, matrix, dims=([mode], [1])).movedim(-1, mode)
