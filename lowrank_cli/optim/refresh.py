"""The refresh of a basis: which subspace the gradient is projected to next, found exactly or cheaply.

Shapes: a gradient G is (m, n); the rank is r; a left basis P is (m, r), a right basis Q is (n, r), orthonormal. The
gradients of experts are a batch of matrices, (E, m, n), and so are their bases.
Everything is computed in float32 (float64 for float64 gradients, and where the first try fails); a gradient whose
squares would overflow or underflow is scaled first. GaLore, arXiv:2403.03507, Alg. 2, takes `svd`; the other engines
find nearly the same subspace at a fraction of the cost.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lowrank_cli.ops.precision import wide

# power iterations: of a randomized start, of a warm one
COLD_ROUNDS, WARM_ROUNDS = 2, 1
OVERSAMPLING = 8
# largest entries between these can be squared and summed in float32
SAFE = (1e-12, 1e12)
# the longest shorter side of a gradient whose eigenproblem `auto` solves; measured in docs/log.md
EXACT = 1024


def find_basis(
    grad: Tensor,
    rank: int,
    side: str,
    engine: str = "svd",
    old: Tensor | None = None,
    *,
    keep_signs: bool = False,
    seed: int = 0,
    name: str = "",
    warn: Callable[[str], None] = lambda _: None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Find the basis of a gradient's leading singular directions.

    A decomposition that fails is tried again in float64 as an eigenproblem; if that fails too, or the gradient is
    zero, the old basis stays (the first columns of the identity where there is none) and `warn` is told. Each matrix
    of a batch by itself: an expert without tokens has a gradient of zeros.

    Args:
        grad: (m, n) or (E, m, n), any floating dtype.
        rank: wanted columns; at most min(m, n) exist.
        side: "left" or "right".
        engine: one of ENGINES; or "of_gram", for the right side of a G of which `grad` is G^T G (n, n).
        old: the basis so far, which `subspace` starts from.
        keep_signs: turn every vector to the side on which the old one of its place pointed.
        seed: of the random start.
        name: of the tensor, for messages.
        warn: told when the old basis is kept.
        dtype: of the result; the gradient's unless given.
    Returns:
        (m, r) or (n, r), batched like the gradient, in memory of its own.
    Raises:
        FloatingPointError: the gradient holds NaN or infinity.
    """
    size, rank = grad.shape[-2 if side == "left" else -1], min(rank, *grad.shape[-2:])
    if grad.dim() == 3:
        settings = {"keep_signs": keep_signs, "seed": seed, "name": name, "warn": warn, "dtype": dtype}
        found = torch.empty(len(grad), size, rank, dtype=dtype or grad.dtype, device=grad.device)
        for i, matrix in enumerate(grad):
            found[i] = find_basis(matrix, rank, side, engine, None if old is None else old[i], **settings)
        return found
    low, high = torch.aminmax(grad.detach())
    largest = float(torch.maximum(-low, high))
    if largest != largest or largest == float("inf"):
        raise FloatingPointError(f"the gradient of {name or 'a projected tensor'} is not finite at a refresh")
    if largest and not SAFE[0] < largest < SAFE[1]:
        matrix = grad.to(wide(grad.dtype)) / largest
    else:
        matrix = grad.to(wide(grad.dtype))
    warm = None if old is None or old.shape != (size, rank) else old.to(matrix.dtype)
    basis = None
    if largest:
        for attempt in (of_gram if engine == "of_gram" else ENGINES[engine], _double):
            try:
                basis = attempt(matrix, side, rank, warm, seed)
            except torch.linalg.LinAlgError:
                continue
            if bool(torch.isfinite(basis).all()):
                break
            basis = None
        if basis is None:
            warn(f"{engine} found no basis for {name or 'a tensor'}: the old one stays")
    if basis is None:
        basis = warm if warm is not None else torch.eye(size, rank, dtype=matrix.dtype, device=grad.device)
    if keep_signs:
        basis = align(basis, warm)
    return basis.to(dtype or grad.dtype, copy=True).contiguous()


def svd(grad: Tensor, side: str, rank: int, old: Tensor | None, seed: int) -> Tensor:
    """U[:, :r] of the whole decomposition, signs and order as it gives them: the reference's trajectory."""
    u, _, vh = torch.linalg.svd(grad, full_matrices=False)
    return u[:, :rank] if side == "left" else vh[:rank].mT


def gram(grad: Tensor, side: str, rank: int, old: Tensor | None, seed: int) -> Tensor:
    """Eigenvectors of the smaller of G G^T and G^T G: exact to about the square root of the precision."""
    matrix = oriented(grad, side)
    m, n = matrix.shape
    if m <= n:
        basis = leading(matrix @ matrix.mT, rank)
    else:
        right = leading(matrix.mT @ matrix, rank)
        basis = torch.linalg.qr(matrix @ right).Q
    return basis


def randomized(grad: Tensor, side: str, rank: int, old: Tensor | None, seed: int) -> Tensor:
    """Range of G Omega after power iterations, cut to its leading directions (Halko et al., arXiv:0909.4061).

    GaLore 2, arXiv:2504.20437, refreshes this way. The random start comes from `seed`, never from the global
    generator, so that a resumed run draws the same one.
    """
    matrix = oriented(grad, side)
    m, n = matrix.shape
    width = min(rank + OVERSAMPLING, m, n)
    if grad.is_meta:
        # only the sizes count
        start = matrix.new_empty(n, width)
    else:
        # drawn on the CPU: the same numbers on every device
        start = torch.randn(n, width, generator=torch.Generator().manual_seed(seed)).to(matrix)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(COLD_ROUNDS):
        basis = power_iteration(matrix, basis)
    if width > rank:
        small = matrix.mT @ basis  # (n, width)
        basis = basis @ leading(small.mT @ small, rank)
    return basis


def subspace(grad: Tensor, side: str, rank: int, old: Tensor | None, seed: int) -> Tensor:
    """A round of block power iteration from the old basis: orth(G G^T P_old). PowerSGD, arXiv:1905.13727; LDAdam.

    The columns keep their meaning from refresh to refresh, and directions are averaged over history. The first
    basis, which has nothing to start from, is a randomized one.
    """
    if old is None:
        return randomized(grad, side, rank, None, seed)
    matrix, basis = oriented(grad, side), old
    for _ in range(WARM_ROUNDS):
        basis = power_iteration(matrix, basis)
    return basis


def of_gram(square: Tensor, side: str, rank: int, old: Tensor | None, seed: int) -> Tensor:
    """Return the basis that `gram` finds on the right, from G^T G (n, n) in the place of the gradient."""
    return leading(square, rank)


def leading(square: Tensor, rank: int) -> Tensor:
    """Return the leading eigenvectors (n, rank) of a symmetric matrix (n, n), the sum of each one's entries positive.

    LAPACK leaves their signs to rounding, and 8-bit codes are not symmetric: the same run computed in another way
    would be another run.
    """
    vectors = torch.linalg.eigh(square).eigenvectors.flip(-1)[:, :rank]
    return vectors * torch.where(vectors.sum(0) < 0, -1.0, 1.0)


def oriented(grad: Tensor, side: str) -> Tensor:
    """The gradient, turned so that the wanted singular vectors are its left ones."""
    return grad if side == "left" else grad.mT


def power_iteration(matrix: Tensor, basis: Tensor) -> Tensor:
    """orth(G (G^T P)): one round, O(m n r)."""
    return torch.linalg.qr(matrix @ (matrix.mT @ basis)).Q


def align(basis: Tensor, old: Tensor | None) -> Tensor:
    """The same singular vectors, each pointing where the old one of its place did; unchanged without an old basis.

    A decomposition leaves their signs free, and a flipped vector turns the kept moments of its coordinate against it.
    Turning the whole basis towards the old one (orthogonal Procrustes) was tried too: docs/log.md.
    """
    if old is None:
        return basis
    return basis * torch.where((basis * old).sum(0) < 0, -1.0, 1.0)


def overlap(new: Tensor, old: Tensor) -> float:
    """The mean squared cosine of the angles between two subspaces, or the mean over a batch of them: 1 is the same,
    r / size is chance."""
    return float((new.float().mT @ old.float()).square().sum(-1).mean())


def _double(grad: Tensor, side: str, rank: int, old: Tensor | None, seed: int) -> Tensor:
    return gram(grad.double(), side, rank, None if old is None else old.double(), seed).to(grad.dtype)


def engine_for(engine: str, shape: tuple[int, ...]) -> str:
    """Return the engine that a group's `refresh` means for a gradient (m, n): `auto` is chosen by its shorter side.

    `gram` finds the subspace of `svd` several times as fast; its eigenproblem grows with the cube of that side. For
    4,096 it takes three times as long as `randomized` at a quarter of full rank, and thirty times at rank 128.
    """
    if engine != "auto":
        return engine
    return "gram" if min(shape[-2:]) <= EXACT else "randomized"


ENGINES = {"svd": svd, "gram": gram, "randomized": randomized, "subspace": subspace}
CHOICES = ("auto", *ENGINES)
