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

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowrank_cli.ops.precision import wide
from lowrank_cli.optim.projected import Projected
from lowrank_cli.optim.projection import project
from lowrank_cli.optim.space import Move, Part, is_batch
from lowrank_cli.optim.write import add_, put_

if TYPE_CHECKING:
    from lowrank_cli.optim.optimizer import LowRankOptimizer

# what is worked on at a time: rows that stay in a CPU's cache, or elements where launches cost more than memory
ROWS, ELEMENTS = 256, 1 << 24
# a magnitude on its way through zero stays this far from it: a row of zeros has lost its direction
SMALLEST = 1e-15
WEIGHT_NORMS = ("exact", "detached")


class Normalised(Projected):
    """Magnitude times direction: the direction in `Projected`, the magnitude by the plain rule.

    Keys of its groups, beside those of `Projected`: `weight_norm`, "exact" (the default) or "detached" (see
    `Direction`); `magnitude_scale` (1.0), times the learning rate, for the magnitude. Weight decay acts on the
    magnitude, which is decay of the weight.

    State: `magnitude`, `norm`, and under `magnitude_...` what the rule keeps of the magnitude.
    """

    DEFAULTS = {**Projected.DEFAULTS, "weight_norm": "exact"}

    def __init__(self, weight: Tensor, group: dict, optimizer: LowRankOptimizer):
        super().__init__(weight, group, optimizer)
        self._direction: Direction | Directions | None = None

    @classmethod
    def check(cls, group: dict) -> None:
        super().check(group)
        if group["weight_norm"] not in WEIGHT_NORMS:
            raise ValueError(f"weight_norm is {group['weight_norm']!r}; it is one of {', '.join(WEIGHT_NORMS)}")
        for p in group["params"]:
            if p.dim() != 2 and not is_batch(p.shape, group):
                raise ValueError(f"weight_norm takes matrices, not a tensor of shape {tuple(p.shape)}")

    def direction(self) -> Direction | Directions:
        """Return magnitude and direction of the weight as it stands between two steps; the first call makes both."""
        if self._direction is None:
            state = self.state
            if "magnitude" not in state:
                state["norm"] = row_norms(self.weight)
                state["magnitude"] = state["norm"].clone()
            detached = self.group["weight_norm"] == "detached"
            kind = Directions if self.is_batch else Direction
            self._direction = kind(self.weight.detach(), state["magnitude"], state["norm"], detached=detached)
        return self._direction

    def made_small(self, grad: Tensor) -> list[Tensor]:
        bases = self.bases()
        magnitude_grad, low_rank_grad = self.direction().collect(grad, bases)
        return [self.layout.settled(low_rank_grad, bases), magnitude_grad]

    def zeros(self) -> list[Tensor]:
        return [*super().zeros(), torch.zeros_like(self.state["magnitude"])]

    def clear(self) -> None:
        self._direction = None
        super().clear()

    def keeps(self, key: str) -> bool:
        return super().keeps(key) or key in ("magnitude", "norm") or key.startswith("magnitude_")

    def dense_grad(self) -> Tensor:
        return self.direction().dense(self.weight.grad)

    def adopt(self, bases: dict[str, Tensor], alive: bool, calm: bool) -> None:
        # whoever found the bases has asked for it already; another process has not
        self.direction()
        super().adopt(bases, alive, calm)

    def parts(self, grads: list[Tensor], bases: dict[str, Tensor]) -> list[Part]:
        direction, grad = grads
        magnitude = self.state["magnitude"]
        of_magnitude = Part(grad, magnitude, self.layout.height(grad, {}), "magnitude_", self.rate)
        return [*super().parts([direction], bases), of_magnitude]

    @property
    def rate(self) -> float:
        """The magnitude's learning rate, in learning rates."""
        return self.group.get("magnitude_scale", 1.0)

    def apply_(self, moves: list[Move]) -> None:
        move, of_magnitude = moves
        state, bases, direction = self.state, self.bases(), self.direction()
        self._bases = self._direction = None
        magnitude = state["magnitude"]
        add_(magnitude, of_magnitude.update, alpha=of_magnitude.alpha, beta=of_magnitude.beta, noise=None)
        update = self.layout.expandable(move.update, bases)
        common = {"alpha": self.group["scale"], "noise": self.noise()}
        if not self.is_batch:
            compose_(self.weight, magnitude, state["norm"], update, bases, direction=direction, **common)
            return
        for i, one in enumerate(direction.each):
            own = {side: basis[i] for side, basis in bases.items()}
            compose_(self.weight[i], magnitude[i], state["norm"][i], update[i], own, direction=one, **common)

    # ---- in backward

    def leaf_shapes(self) -> list[tuple[int, ...]]:
        return [*super().leaf_shapes(), (self.layout.shape[0],)]

    def bases_in_backward(self) -> dict[str, Tensor]:
        bases = self.direction().row_scaled(self.bases())
        return {**bases, "left": self.layout.whole_basis(bases["left"], "left")} if "left" in bases else bases

    def from_backward(self, parts: list[Tensor]) -> list[Tensor]:
        low_rank_grad, row_dots = parts
        direction, bases, row_dots = self.direction(), self.bases(), self.layout.summed(row_dots)
        if "left" not in bases:
            low_rank_grad = self.layout.summed(low_rank_grad)
        projected = direction.projected(low_rank_grad, row_dots, bases)
        return [self.layout.settled(projected, bases), direction.magnitude_grad(row_dots)]


class Direction:
    """A Direction turns the gradient of a weight into those of its magnitude g and its direction V, at one point.

    It is linear in G while W does not change, so the results of micro-batches add up.

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


class Directions:
    """Directions are those of a batch of matrices, such as experts: every argument has one more dimension."""

    def __init__(self, weight: Tensor, magnitude: Tensor, norm: Tensor, *, detached: bool = False):
        self.each = [Direction(*one, detached=detached) for one in zip(weight, magnitude, norm, strict=True)]
        self.empty = norm[:0]

    def collect(self, grad: Tensor, bases: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return dg (E, m), and the projections of dV, see `Direction.collect`."""
        if not self.each:
            return torch.zeros_like(grad[..., 0], dtype=self.empty.dtype), project(grad, bases).to(self.empty.dtype)
        found = [
            one.collect(grad[i], {side: basis[i] for side, basis in bases.items()}) for i, one in enumerate(self.each)
        ]
        return torch.stack([dots for dots, _ in found]), torch.stack([small for _, small in found])

    def dense(self, grad: Tensor) -> Tensor:
        """Return dV itself, (E, m, n), in the gradient's dtype."""
        found = [one.dense(grad[i]) for i, one in enumerate(self.each)]
        return torch.stack(found) if found else grad.clone()


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
    """||W_i|| of every row, (m,) or (E, m), float32 or wider."""
    return torch.linalg.vector_norm(weight.detach(), dim=-1, dtype=wide(weight.dtype))


def row_blocks(matrix: Tensor) -> list[slice]:
    """Slices of rows that cover a matrix, so that no temporary has its size."""
    m, n = matrix.shape
    size = ROWS if matrix.device.type == "cpu" else max(ROWS, ELEMENTS // n)
    return [slice(start, min(m, start + size)) for start in range(0, m, size)]
