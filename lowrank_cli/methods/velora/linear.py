"""A linear layer that keeps one number for each group of input features, and a gradient in factored form.

Shapes: x is (..., D), the weight (m, D), N tokens; D = G * M: G groups (sub-tokens) of M features; v is (M,), unit.

    zp = x.view(..., G, M) @ v     (N, G), saved instead of x
    F  = scale * dY^T zp           (m, G)
    dW = F (x) v                   dW[o, g M + j] = F[o, g] v[j], never formed

VeLoRA, arXiv:2405.17991, Alg. 1. The authors' code rebuilds x from zp in backward and forms a weight-sized gradient
for every sample; the factored form is the same gradient in 1/M of the operations.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def compress(x: Tensor, vector: Tensor) -> Tensor:
    """The coordinates of every group of features along the vector: (..., D) and (M,) to (..., G)."""
    return x.unflatten(-1, (-1, vector.shape[0])) @ vector.to(x.dtype)


def velora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, kept: Tensor, vector: Tensor, scale: float,
    leaf: Tensor | None,
) -> Tensor:  # fmt: skip
    """x W^T + b, exact; backward works from `kept` alone.

    Args:
        x: (..., D).
        weight: (m, D).
        bias: (m,) or None.
        kept: zp, (..., G), as `compress` returns.
        vector: v, (M,).
        scale: factor of the weight's gradient.
        leaf: zeros (m, G) that stand for the weight: their gradient is F; without them the weight gets the dense
            gradient F (x) v.
    Returns:
        (..., m).
    """
    return _VeLoRALinear.apply(x, weight if leaf is None else weight.detach(), bias, kept, vector, scale, leaf)


class _VeLoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, kept, vector, scale, leaf):
        ctx.save_for_backward(kept, weight, vector)
        ctx.scale, ctx.dtype = scale, x.dtype
        ctx.factored = None if leaf is None else leaf.dtype
        return F.linear(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        kept, weight, vector = ctx.saved_tensors
        # under autocast the products are narrower than what they are of
        dx = (dy @ weight.to(dy.dtype)).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        flat = dy.reshape(-1, dy.shape[-1])  # (N, m)
        dbias = flat.sum(0) if ctx.needs_input_grad[2] else None
        factor = (flat.mT @ kept.reshape(-1, kept.shape[-1]).to(flat.dtype)).mul_(ctx.scale)  # (m, G)
        if ctx.factored is not None:
            return dx, None, dbias, None, None, None, factor.to(ctx.factored)
        dense = (factor.unsqueeze(-1) * vector.to(factor.dtype)).flatten(1) if ctx.needs_input_grad[1] else None
        return dx, dense, dbias, None, None, None, None
