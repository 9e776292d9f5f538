"""A linear layer whose backward forms the projected gradient of its weight, never the full one.

Shapes: x is (..., n), the weight (m, n), y = x W^T is (..., m); N tokens in all. P is (m, r), Q is (n, r).

    right: R = G Q   = dY^T (X Q)     X Q (N, r) is saved instead of X (N, n)
    left:  R = P^T G = (dY P)^T X

The products <G_i, W_i> of the rows, which weight normalisation needs, come from the output: sum_t dY_ti (y_ti - b_i).

The product G = dY^T X costs 2 N m n; these cost 2 N r (m + n), and no (m, n) gradient exists. The output and dX are
those of an ordinary linear. CompAct, arXiv:2410.15352, does this with random bases.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank_cli.ops.precision import wide


def projected_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, bases: dict[str, Tensor], sink: Callable[..., None], *,
    row_dots: bool = False,
) -> Tensor:  # fmt: skip
    """x W^T + b, exact; in backward, `sink` gets the projected gradient of the weight, whose .grad stays as it is.

    Args:
        x: (..., n).
        weight: (m, n).
        bias: (m,) or None.
        bases: "left": P (m, r) and/or "right": Q (n, r).
        sink: called once in backward with P^T G (r, n), G Q (m, r) or P^T G Q (r, r).
        row_dots: keep the output too, and give the sink <G_i, W_i> (m,) as its second argument.
    Returns:
        (..., m).
    """
    return _ProjectedLinear.apply(x, weight, bias, bases.get("left"), bases.get("right"), sink, row_dots)


class _ProjectedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, left, right, sink, row_dots):
        ctx.sink = sink
        y = F.linear(x, weight, bias)
        ctx.save_for_backward(x if right is None else x @ right, weight, left, *((y, bias) if row_dots else ()))
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        kept, weight, left, *output = ctx.saved_tensors
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        flat = dy.reshape(-1, dy.shape[-1])  # (N, m)
        dbias = flat.sum(0) if ctx.needs_input_grad[2] else None
        dots = row_products(flat, *output) if output else None
        if left is not None:
            flat = flat @ left  # (N, r)
        grad = flat.mT @ kept.reshape(-1, kept.shape[-1])
        ctx.sink(*((grad,) if dots is None else (grad, dots)))
        return dx, None, dbias, None, None, None, None


def row_products(dy: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
    """<G_i, W_i> (m,) of every row: sum_t dY_ti (y_ti - b_i), with dY (N, m) and y (..., m); float32 or wider."""
    precision = wide(dy.dtype)
    dots = (dy * y.reshape(dy.shape)).sum(0, dtype=precision)
    return dots if bias is None else dots - bias.to(precision) * dy.sum(0, dtype=precision)
