"""Weight normalisation inside the step: W = g V / ||V||, with W the only matrix that is kept.

Shapes: a weight W, its direction V and its gradient G are (m, n) = (out, in), and row i of W is g_i V_i / ||V_i||. The
magnitude g and the norm c = ||V|| are (m,). W, g and c say all that V would: V_i = c_i u_i with the unit vector
u_i = V_i / c_i = sign(g_i) W_i / ||W_i||. A left basis P is (m, r), a right basis Q is (n, r).

Salimans & Kingma, arXiv:1602.07868, eq. 3; GradNormLoRP, arXiv:2412.19616, projects the gradient of V:

    dg_i = <G_i, u_i>
    dV_i = (g_i / c_i) (G_i - dg_i u_i)      orthogonal to V_i, so ||V_i|| never shrinks along it

A row of zeros has no direction. It is trained as it is, and its magnitude begins with its norm after the first step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_cli.ops.precision import wide
from lowrank_cli.optim.projection import project
from lowrank_cli.optim.write import put_

# what is worked on at a time: rows that stay in a CPU's cache, or elements where launches cost more than memory
ROWS, ELEMENTS = 256, 1 << 24
# a magnitude on its way through zero stays this far from it: a row of zeros has lost its direction
SMALLEST = 1e-15


class Direction:
    """What turns the gradient of a weight into those of its magnitude and of its direction, at one point.

    Linear in G while W stands still, so that the results of micro-batches add up.

    Args:
        weight: W (m, n).
        magnitude: g (m,), float32 or wider.
        norm: c (m,), of the same dtype.
        detached: leave out the tangent part, dV_i = (g_i / c_i) G_i: ||V|| counts as a constant in backward, as in
            DoRA, arXiv:2402.09353, sec. 4.3.
    """

    def __init__(self, weight: Tensor, magnitude: Tensor, norm: Tensor, *, detached: bool = False):
        self.weight, self.detached = weight, detached
        # a 16-bit weight is only nearly as long as its magnitude says
        size = magnitude.abs() if weight.element_size() >= 4 else row_norms(weight)
        alive, one = (size > 0) & (norm > 0) & (magnitude != 0), torch.ones_like(norm)
        # u = unit * W, V = back * W
        self.unit = torch.where(alive, magnitude.sign() / size.where(alive, one), 0.0)
        self.back = torch.where(alive, self.unit * norm, one)
        self.ratio = torch.where(alive, magnitude / norm.where(alive, one), one)

    def magnitude_grad(self, row_dots: Tensor) -> Tensor:
        """dg (m,) from <G_i, W_i> (m,)."""
        return row_dots * self.unit

    def row_scaled(self, bases: dict[str, Tensor]) -> dict[str, Tensor]:
        """Bases for G itself: a left one mixes rows, so it has to carry their factors g / c."""
        if "left" not in bases:
            return bases
        return {**bases, "left": (bases["left"] * self.ratio.unsqueeze(1)).to(bases["left"].dtype)}

    def projected(self, low_rank_grad: Tensor, row_dots: Tensor, bases: dict[str, Tensor]) -> Tensor:
        """The projection of dV, which is never formed.

        Args:
            low_rank_grad: G in the coordinates of `row_scaled(bases)`.
            row_dots: <G_i, W_i> (m,).
            bases: of dV.
        Returns:
            P^T dV, dV Q or P^T dV Q, float32 or wider.
        """
        result = low_rank_grad.to(self.ratio.dtype)
        if "left" not in bases:
            result = result * self.ratio.unsqueeze(1)
        if self.detached:
            return result
        pull = (self.ratio * self.magnitude_grad(row_dots) * self.unit).unsqueeze(1)
        if "left" in bases:
            left = (bases["left"] * pull).to(bases["left"].dtype)
            return result - project(self.weight, {**bases, "left": left})
        return result - pull * project(self.weight, bases)

    def collect(self, grad: Tensor, bases: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """dg (m,) and the projection of dV, in one pass over G and W: a block of dV at a time.

        Args:
            grad: G (m, n).
            bases: of dV.
        Returns:
            dg, and P^T dV, dV Q or P^T dV Q, both float32 or wider.
        """
        (m, n), wide = grad.shape, self.ratio.dtype
        left, right = bases.get("left"), bases.get("right")
        dots = torch.empty(m, dtype=wide, device=grad.device)
        width = n if right is None else right.shape[1]
        result = torch.zeros(m if left is None else left.shape[1], width, dtype=wide, device=grad.device)
        for rows in row_blocks(grad):
            block = self._block(grad, rows, dots).to(grad.dtype)
            if right is not None:
                block = block @ right
            if left is None:
                result[rows] = block
            else:
                result += left[rows].mT @ block
        return self.magnitude_grad(dots), result

    def dense(self, grad: Tensor) -> Tensor:
        """dV itself, (m, n), in the gradient's dtype: a refresh decomposes it."""
        result, dots = torch.empty_like(grad), torch.empty_like(self.ratio)
        for rows in row_blocks(grad):
            result[rows] = self._block(grad, rows, dots)
        return result

    def _block(self, grad: Tensor, rows: slice, dots: Tensor) -> Tensor:
        """Rows of dV, float32 or wider; fills those of <G_i, W_i>."""
        wide, ratio = self.ratio.dtype, self.ratio[rows]
        block, weight = grad[rows].to(wide), self.weight[rows].to(wide)
        result = block * weight
        dots[rows] = result.sum(1)
        torch.mul(block, ratio.unsqueeze(1), out=result)
        if self.detached:
            return result
        pull = ratio * dots[rows] * self.unit[rows] ** 2
        return result.addcmul_(weight, pull.unsqueeze(1), value=-1)


def compose_(
    weight: Tensor, magnitude: Tensor, norm: Tensor, update: Tensor, bases: dict[str, Tensor], *, alpha: float,
    direction: Direction, noise: torch.Generator | None = None,
) -> None:  # fmt: skip
    """The step of the direction, and the weight from it: V <- V + alpha P N Q^T, c <- ||V||, W <- g V / c.

    Row blocks in float32 or wider; a 16-bit weight is rounded once.

    Args:
        weight: W (m, n), changed in place.
        magnitude: g (m,), already updated; rows that were zero get theirs here, and none is left at zero.
        norm: c (m,), changed in place.
        update: N, the rule's update of the projected gradient.
        bases: of the projection.
        alpha: factor of the update.
        direction: of the weight before the step.
        noise: as for `write.put_`.
    """
    precision = wide(weight.dtype)
    update = update.to(precision)
    left, right = (bases[side].to(precision) if side in bases else None for side in ("left", "right"))
    if left is not None and right is not None:
        update = update @ right.mT
    # squares of a smaller one, or the entries of its row, would underflow
    floor = max(SMALLEST, torch.finfo(weight.dtype).tiny * weight.shape[1] ** 0.5)
    small = magnitude.abs() < floor
    magnitude.copy_(torch.where(small, torch.full_like(magnitude, floor).copysign(magnitude), magnitude))
    for rows in row_blocks(weight):
        exact = weight[rows].to(precision)  # the weight itself, or its block in float32
        exact.mul_(direction.back[rows].unsqueeze(1))
        if left is None:
            exact.addmm_(update[rows], right.mT, alpha=alpha)
        else:
            exact.addmm_(left[rows], update, alpha=alpha)
        size = torch.linalg.vector_norm(exact, dim=1)
        born = norm[rows] == 0
        magnitude[rows] = torch.where(born, size, magnitude[rows])
        exact.mul_(torch.where(size > 0, magnitude[rows] / size.where(size > 0, 1.0), 1.0).unsqueeze(1))
        norm[rows] = size
        if exact.dtype != weight.dtype:
            put_(weight[rows], exact, noise)


def row_norms(weight: Tensor) -> Tensor:
    """||W_i|| of every row, (m,), float32 or wider."""
    return torch.linalg.vector_norm(weight.detach(), dim=1, dtype=wide(weight.dtype))


def row_blocks(matrix: Tensor) -> list[slice]:
    """Slices of rows that cover a matrix, so that no temporary has its size."""
    m, n = matrix.shape
    size = ROWS if matrix.device.type == "cpu" else max(ROWS, ELEMENTS // n)
    return [slice(start, min(m, start + size)) for start in range(0, m, size)]
