"""Singular values and the best low-rank forms of one weight, weighted by what its errors cost.

Shapes: a weight W is (m, n) = (out, in), y = W x. A = E[x x^T] is (n, n), B = E[g g^T] is (m, m), g the gradient of
the loss at y. k is the shorter side, r a rank.

A rank-r weight W_r that minimises the second-order change of the loss, with the Fisher matrix as A (x) B,

    tr( B (W - W_r) A (W - W_r)^T ) = || L^T (W - W_r) K ||_F^2        B = L L^T,  A = K K^T

is the truncated singular value decomposition of L^T W K, mapped back. Without A and B it is that of W (Eckart and
Young); with A alone it is the whitening of SVD-LLM, arXiv:2403.07378; both are the factors of the Kronecker-factored
Fisher, Martens and Grosse, arXiv:1503.05671. One eigendecomposition of the smaller Gram matrix gives everything: with
m <= n, the eigenvectors U of L^T W A W^T L,

    W_r = P Q^T W        P = L^-T U_r  (m, r),   Q = L U_r  (m, r),   Q^T P = I

so neither a second decomposition nor a root of the longer side's moment is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_cli.errors import LowrankError

# share of the mean eigenvalue that is added to a moment: directions that the calibration text never used keep a weight
DAMPING = 0.03
# columns that are taken to float64 at a time: a weight never exists in it as a whole unless it is weighted
BLOCK = 1024
# rows of a symmetric product at a time
STRIP = 512


@dataclass(frozen=True)
class Decomposition:
    """A weight's singular values and the two bases that truncate it.

    Attributes:
        values: (k,) float64, descending; singular values of the weighted matrix.
        basis: (k, k), or its first columns; column i belongs to value i.
        dual: likewise, `dual.T @ basis` is the identity; the same as `basis` where nothing is weighted.
        side: "left": W_r = basis_r dual_r^T W; "right": W_r = W dual_r basis_r^T.
    """

    values: Tensor
    basis: Tensor
    dual: Tensor
    side: str

    def first(self, columns: int) -> Decomposition:
        """All values, and the bases for ranks up to `columns` only."""
        basis = self.basis[:, :columns].contiguous()
        dual = basis if self.dual is self.basis else self.dual[:, :columns].contiguous()
        return Decomposition(self.values, basis, dual, self.side)

    def factors(self, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """The factors of the best weight of a rank: W_r = first @ second, of equal norms direction by direction.

        Without weighting they are U sqrt(s) and sqrt(s) V^T. WeLore, arXiv:2407.11239, sec. 3.

        Args:
            weight: (m, n), the weight that was decomposed.
            rank: r, at most k.
        Returns:
            (m, r) and (r, n), float32.
        """
        if not 1 <= rank <= self.basis.shape[1]:
            raise ValueError(f"rank {rank} of a weight decomposed for at most {self.basis.shape[1]}")
        basis, dual = self.basis[:, :rank], self.dual[:, :rank]
        oriented = weight.detach() if self.side == "left" else weight.detach().mT  # (k, other)
        # the products in float64, but never all of them at once
        far = torch.empty(rank, oriented.shape[1], device=weight.device)
        squares = torch.zeros(rank, dtype=torch.float64, device=weight.device)
        for block, part in zip(oriented.split(BLOCK, dim=1), far.split(BLOCK, dim=1), strict=True):
            product = dual.mT @ block.double()
            squares += product.square().sum(1)
            part.copy_(product)
        balance = (squares.sqrt() / basis.norm(dim=0)).sqrt()
        # a direction of a zero singular value: both factors stay as they are
        balance = torch.where(torch.isfinite(balance) & (balance > 0), balance, 1.0)
        near, far = (basis * balance).float(), far.div_(balance.float()[:, None])
        return (near, far) if self.side == "left" else (far.mT.contiguous(), near.mT.contiguous())


def singular_values(weight: Tensor) -> Tensor:
    """The singular values of a weight, descending, by the eigenvalues of its smaller Gram matrix in float64.

    Values down to 1e-7 of the largest one are right to three digits; smaller ones are noise of about that size.

    Args:
        weight: (m, n), any floating dtype.
    Returns:
        (k,), float64.
    Raises:
        LowrankError: the weight holds a value that is not finite.
    """
    weight, scale = weight.detach(), largest_entry(weight)
    gram = gram_matrix(weight if weight.shape[0] <= weight.shape[1] else weight.mT, scale)
    return torch.linalg.eigvalsh(gram).flip(0).clamp_(min=0).sqrt_() * scale


def decompose(
    weight: Tensor,
    input_moment: Tensor | None = None,
    output_moment: Tensor | None = None,
    *,
    damping: float = DAMPING,
) -> Decomposition:
    """Singular values and truncating bases of a weight, weighted by the moments that are given.

    Args:
        weight: (m, n), any floating dtype.
        input_moment: A, (n, n), symmetric; None weighs all inputs alike.
        output_moment: B, (m, m), symmetric; None weighs all outputs alike.
        damping: share of a moment's mean eigenvalue that is added to its diagonal.
    Raises:
        LowrankError: the weight or a moment holds a value that is not finite.
    """
    weight, scale = weight.detach(), largest_entry(weight)
    side = "left" if weight.shape[0] <= weight.shape[1] else "right"
    near, far = (output_moment, input_moment) if side == "left" else (input_moment, output_moment)
    oriented = weight if side == "left" else weight.mT  # (k, other)
    near, far = (None if x is None else regularized(x, damping) for x in (near, far))
    gram = gram_matrix(oriented, scale, far)
    root = None
    if near is not None:
        root = torch.linalg.cholesky(near)
        gram = root.mT @ gram @ root
        gram = (gram + gram.mT) / 2
    values, vectors = torch.linalg.eigh(gram)
    del gram
    values, vectors = values.flip(0).clamp(min=0).sqrt() * scale, vectors.flip(1)
    if root is None:
        return Decomposition(values, vectors, vectors, side)
    basis = torch.linalg.solve_triangular(root.mT, vectors, upper=True)
    return Decomposition(values, basis, root @ vectors, side)


def regularized(moment: Tensor, damping: float) -> Tensor:
    """A moment with a share of its mean eigenvalue on the diagonal, in float64; the identity for a moment of zeros."""
    moment = moment.double()
    mean = float(moment.diagonal().mean())
    if not torch.isfinite(moment).all():
        raise LowrankError(
            "the calibration gave a second moment that is not finite", "use --dtype float32, or another text"
        )
    eye = torch.eye(moment.shape[0], dtype=moment.dtype, device=moment.device)
    return moment + damping * mean * eye if mean > 0 else eye


def gram_matrix(oriented: Tensor, scale: float, far: Tensor | None = None) -> Tensor:
    """W W^T, or W A W^T, of a (k, other) weight divided by a number; (k, k) float64."""
    size = oriented.shape[0]
    gram = torch.zeros(size, size, dtype=torch.float64, device=oriented.device)
    if far is not None:
        matrix = oriented.double() / scale
        add_symmetric_(gram, matrix @ far, matrix)
    else:
        for block in oriented.split(BLOCK, dim=1):
            block = block.double() / scale
            add_symmetric_(gram, block, block)
    for start in range(0, size, STRIP):
        gram[:start, start : start + STRIP] = gram[start : start + STRIP, :start].mT
    return gram


def add_symmetric_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds the lower part of left right^T, which is symmetric: half of the product, strip by strip."""
    for start in range(0, total.shape[0], STRIP):
        stop = min(total.shape[0], start + STRIP)
        total[start:stop, :stop].addmm_(left[start:stop], right[:stop].mT)


def largest_entry(weight: Tensor) -> float:
    """The largest absolute value of a weight, 1 for a weight of zeros: divided by it, squares stay in range."""
    largest = max(abs(float(x)) for x in torch.aminmax(weight.detach()))
    if largest != largest or largest == float("inf"):
        raise LowrankError("the weight holds a value that is not finite", "load a sound copy of the model")
    return largest or 1.0


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of s / sum(s): k for equal values, 1 for a single one. Roy and Vetterli, EUSIPCO 2007."""
    share = values.double() / values.double().sum().clamp(min=1e-300)
    return float(torch.exp(-(share * share.clamp(min=1e-300).log()).sum()))
