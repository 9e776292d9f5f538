"""A linear layer whose backward forms the projected gradient of its weight, never the full one.

Shapes: x is (..., n), the weight (m, n), y = x W^T is (..., m); N tokens in all. P is (m, r), Q is (n, r).

    right: R = G Q   = dY^T (X Q)     X Q (N, r) is saved instead of X (N, n)
    left:  R = P^T G = (dY P)^T X

The product G = dY^T X costs 2 N m n; these cost 2 N r (m + n), and no (m, n) gradient exists. The output and dX are
those of an ordinary linear. CompAct, arXiv:2410.15352, does this with random bases.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def projected_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, bases: dict[str, Tensor], sink: Callable[[Tensor], None]
) -> Tensor:
    """x W^T + b, exact; in backward, `sink` gets the projected gradient of the weight, whose .grad stays as it is.

    Args:
        x: (..., n).
        weight: (m, n).
        bias: (m,) or None.
        bases: "left": P (m, r) and/or "right": Q (n, r).
        sink: called once in backward with P^T G (r, n), G Q (m, r) or P^T G Q (r, r).
    Returns:
        (..., m).
    """
    return _ProjectedLinear.apply(x, weight, bias, bases.get("left"), bases.get("right"), sink)


class _ProjectedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, left, right, sink):
        ctx.sink = sink
        ctx.save_for_backward(x if right is None else x @ right, weight, left)
        ctx.is_right = right is not None
        return F.linear(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        kept, weight, left = ctx.saved_tensors
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        flat = dy.reshape(-1, dy.shape[-1])  # (N, m)
        dbias = flat.sum(0) if ctx.needs_input_grad[2] else None
        if left is not None:
            flat = flat @ left  # (N, r)
        ctx.sink(flat.mT @ kept.reshape(-1, kept.shape[-1]))
        return dx, None, dbias, None, None, None
