"""Gradients in a smaller space: which side of a matrix to project, the basis of that space, and the way back.

Shapes: a weight and its gradient are (m, n) = (out, in); the rank is r. A left basis P is (m, r), a right basis Q is
(n, r), both with orthonormal columns. GaLore, arXiv:2403.03507, Alg. 2 and sec. 4.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

PROJ_TYPES = ("std", "reverse_std", "left", "right", "full")


def sides(shape: tuple[int, int], proj_type: str) -> tuple[str, ...]:
    """The sides of an (m, n) gradient that a projection type multiplies: "left" is P^T G, "right" is G Q.

    `std` projects the shorter side, which is what saves memory; a square matrix is projected on the right, as in the
    authors' code (the paper's text says left).

    Args:
        shape: (m, n) of the gradient.
        proj_type: one of PROJ_TYPES.
    Returns:
        ("left",), ("right",) or, for `full`, ("left", "right").
    Raises:
        ValueError: an unknown projection type.
    """
    m, n = shape
    if proj_type == "std":
        return ("right",) if m >= n else ("left",)
    if proj_type == "reverse_std":
        return ("left",) if m >= n else ("right",)
    if proj_type == "full":
        return ("left", "right")
    if proj_type in ("left", "right"):
        return (proj_type,)
    raise ValueError(f"proj_type is {proj_type!r}; it is one of {', '.join(PROJ_TYPES)}")


def svd_basis(grad: Tensor, rank: int, side: str) -> Tensor:
    """The leading singular vectors of a gradient: U[:, :r] (left) or V[:, :r] (right). GaLore, Alg. 2.

    Computed in float32 and returned in the gradient's dtype. The result owns its memory: a slice would keep the whole
    factor of the decomposition alive, which is how galore-torch comes to hold more than the paper's formula.

    Args:
        grad: (m, n), any floating dtype.
        rank: wanted columns; at most min(m, n) exist.
        side: "left" or "right".
    Returns:
        (m, min(r, m, n)) for left, (n, min(r, m, n)) for right.
    """
    u, _, vh = torch.linalg.svd(grad.float(), full_matrices=False)
    basis = u[:, :rank] if side == "left" else vh[:rank].mT
    return basis.to(grad.dtype, memory_format=torch.contiguous_format, copy=True).contiguous()


def project(grad: Tensor, bases: dict[str, Tensor]) -> Tensor:
    """The gradient in the coordinates of its bases: P^T G, G Q, or P^T G Q. GaLore, Alg. 2.

    Args:
        grad: (m, n).
        bases: "left": (m, r) and/or "right": (n, r).
    Returns:
        (r, n), (m, r) or (r, r), in the gradient's dtype.
    """
    if "left" in bases:
        grad = bases["left"].mT @ grad
    return grad @ bases["right"] if "right" in bases else grad


def expand_add_(weight: Tensor, update: Tensor, bases: dict[str, Tensor], alpha: float = 1.0) -> Tensor:
    """Adds `alpha` times the update, taken back to full size, straight into the weight: no (m, n) temporary.

    Args:
        weight: (m, n), changed in place.
        update: (r, n), (m, r) or (r, r), as `project` returns; cast to the weight's dtype for the product, which
            accumulates in float32 and rounds once.
        bases: as for `project`.
        alpha: factor of the update.
    Returns:
        The weight.
    """
    update = update.to(weight.dtype)
    if "left" not in bases:
        return weight.addmm_(update, bases["right"].mT, alpha=alpha)
    if "right" in bases:
        update = update @ bases["right"].mT
    return weight.addmm_(bases["left"], update, alpha=alpha)
