"""A linear layer whose backward forms the projected gradient of its weight, never the full one.

Shapes: x is (..., n), the weight (m, n), y = x W^T is (..., m); N tokens in all. P is (m, r), Q is (n, r).

    right: R = G Q   = dY^T (X Q)     X Q (N, r) is saved instead of X (N, n)
    left:  R = P^T G = (dY P)^T X

R is the gradient of a leaf Z that stands for the weight: W + Z Q^T or W + P Z at Z = 0. So autograd itself sums it
over uses, micro-batches and recomputations, and leaves alone what it would leave alone: frozen weights, gradients of
the input only, weights that another tensor has taken the place of.

The products <G_i, W_i> of the rows, which weight normalisation needs, come from the output: sum_t dY_ti (y_ti - b_i);
they are the gradient of a second leaf (m,).

The product G = dY^T X costs 2 N m n; these cost 2 N r (m + n), and no (m, n) gradient exists. The output and dX are
those of an ordinary linear. CompAct, arXiv:2410.15352, does this with random bases.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_cli.ops.precision import wide


class Handle:
    """A layer's way to the space of its weight, which a copy of the layer does not get."""

    def __init__(self, space: Any = None):
        self.space = space

    def serves(self, weight: Tensor) -> bool:
        """Say whether the space takes the gradient of this tensor: not of one that pruning, a parametrization or
        `functional_call` has put in its weight's place; a weight that is cut is put together for the moment."""
        space = self.space
        return space is not None and (weight is space.weight or space.layout.is_cut)

    def __deepcopy__(self, memo: dict) -> Handle:
        return Handle()

    def __reduce__(self) -> tuple:
        return Handle, ()


class ProjectedLinear(nn.Linear):
    """An `nn.Linear` whose weight's space takes the gradient small, whenever its basis stands; a copy is an ordinary
    linear."""

    handle: Handle

    @classmethod
    def dress(cls, module: nn.Linear, space: Any) -> None:
        """Make an ordinary linear one of these, or give it another space."""
        if type(module) is cls and (before := module.handle.space) is not None:
            before.detach(module)
        module.__class__, module.handle = cls, Handle(space)

    @classmethod
    def undress(cls, module: nn.Linear) -> None:
        """Make it an ordinary one again."""
        # whoever has the bound `forward`, or has derived a class since, keeps what computes the same
        module.handle.space = None
        if type(module) is cls:
            module.__class__ = nn.Linear
            del module.handle

    def __reduce_ex__(self, protocol: int) -> tuple:
        return _empty_linear, (), {key: value for key, value in vars(self).items() if key != "handle"}

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b, (..., m) of (..., n)."""
        handle, weight = getattr(self, "handle", None), self.weight
        usual = (
            handle is None
            or not handle.serves(weight)
            or not handle.space.is_open
            or not torch.is_grad_enabled()
            or not weight.requires_grad
            # somebody changes the full gradient
            or weight._backward_hooks
        )
        if usual:
            return F.linear(x, weight, self.bias)
        space = handle.space
        return projected_linear(x, weight, self.bias, space.bases_in_backward(), *space.leaves)


def _empty_linear() -> nn.Linear:
    return nn.Linear.__new__(nn.Linear)


def projected_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, bases: dict[str, Tensor], leaf: Tensor, rows: Tensor | None = None
) -> Tensor:
    """Return x W^T + b, exact; in backward the leaf gets the projected gradient of the weight, which gets none.

    Args:
        x: (..., n).
        weight: (m, n).
        bias: (m,) or None.
        bases: "left": P (m, r) and/or "right": Q (n, r).
        leaf: zeros; its gradient is P^T G (r, n), G Q (m, r) or P^T G Q (r, r), in its dtype.
        rows: zeros (m,), if the products <G_i, W_i> are wanted as its gradient; the output is kept for them.
    Returns:
        (..., m).
    """
    return _Projected.apply(x, weight.detach(), bias, bases.get("left"), bases.get("right"), leaf, rows)


class _Projected(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, left, right, leaf, rows):
        y = F.linear(x, weight, bias)
        ctx.dtypes = x.dtype, leaf.dtype
        kept = x if right is None else x @ right
        ctx.save_for_backward(kept, weight, left, *((y, bias) if rows is not None else ()))
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        kept, weight, left, *output = ctx.saved_tensors
        dtype, wider = ctx.dtypes
        # under autocast the products are narrower than what they are of
        dx = (dy @ weight.to(dy.dtype)).to(dtype) if ctx.needs_input_grad[0] else None
        flat = dy.reshape(-1, dy.shape[-1])  # (N, m)
        dbias = flat.sum(0).to(dtype) if ctx.needs_input_grad[2] else None
        if not ctx.needs_input_grad[5]:
            return dx, None, dbias, None, None, None, None
        dots = row_products(flat, *output) if output else None
        if left is not None:
            flat = flat @ left.to(flat.dtype)  # (N, r)
        grad = flat.mT @ kept.reshape(-1, kept.shape[-1]).to(flat.dtype)
        return dx, None, dbias, None, None, grad.to(wider), dots


def row_products(dy: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
    """Return <G_i, W_i> (m,) of every row: sum_t dY_ti (y_ti - b_i), with dY (N, m), y (..., m); float32 or wider."""
    precision = wide(dy.dtype)
    dots = (dy * y.reshape(dy.shape)).sum(0, dtype=precision)
    return dots if bias is None else dots - bias.to(precision) * dy.sum(0, dtype=precision)
