"""A frozen linear with a low-rank addition whose factors collect their gradients in buffers.

Shapes: x is (..., n), the frozen weight (m, n), the factors A (r, n) and B^T (r, m); N tokens in all.

    y = x W^T + bias + (x A^T) B^T       added into the output of the frozen linear
    dx = dy W + g A,  g = dy B           added into the frozen linear's dx
    dA += g^T x,  dB^T += (x A^T)^T dy   added into buffers

What is kept for backward is x and x A^T. LoRA, arXiv:2106.09685, without its factor alpha / r.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Factors(NamedTuple):
    """The factors of one linear, and where their gradients are summed.

    Attributes:
        a: A, (r, n).
        b: B^T, (r, m).
        grad_a: (r, n), may have more precision than a; None if the factors are not trained.
        grad_b: (r, m), likewise.
        anchor: any tensor that requires a gradient if the factors are trained, so that backward comes by; gets none.
    """

    a: Tensor
    b: Tensor
    grad_a: Tensor | None
    grad_b: Tensor | None
    anchor: Tensor | None

    def to(self, dtype: torch.dtype) -> Factors:
        """With factors of a dtype; the buffers stay."""
        return self if self.a.dtype == dtype else self._replace(a=self.a.to(dtype), b=self.b.to(dtype))


def adapted_linear(x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors) -> Tensor:
    """x W^T + bias + (x A^T) B^T.

    Args:
        x: (..., n).
        weight: (m, n), frozen; dtype of x.
        bias: (m,), frozen, or None.
        factors: of the dtype of x; backward adds to their buffers.
    Returns:
        (..., m).
    """
    return _AdaptedLinear.apply(x, weight, bias, factors.anchor, factors)


def add_low_rank(out: Tensor, x: Tensor, factors: Factors) -> Tensor:
    """out + (x A^T) B^T, in place of `out`.

    Args:
        out: (..., m), contiguous, any linear's output; its own backward must not need it.
        x: (..., n).
        factors: backward adds to their buffers.
    Returns:
        `out`.
    """
    # a linear in 4 bit or under autocast may give another dtype than it gets
    with torch.autocast(out.device.type, enabled=False):
        return _AddLowRank.apply(out, x.to(out.dtype), factors.anchor, factors.to(out.dtype))


def _forward(out: Tensor, x: Tensor, factors: Factors) -> Tensor:
    """Add the low-rank part to `out`; returns A x^T (r, N), the faster way round on a CPU."""
    hidden = factors.a @ x.reshape(-1, x.shape[-1]).mT
    out.view(-1, out.shape[-1]).addmm_(hidden.mT, factors.b)
    return hidden


def _backward(
    flat: Tensor, x: Tensor, hidden: Tensor, a: Tensor, b: Tensor, factors: Factors, trained: bool
) -> Tensor:
    """Add to the factors' buffers; returns g^T (r, N)."""
    grad_hidden = b @ flat.mT
    if trained:
        _add_product_(factors.grad_b, hidden, flat)
        _add_product_(factors.grad_a, grad_hidden, x.reshape(-1, x.shape[-1]))
    return grad_hidden


def _add_product_(buffer: Tensor, left: Tensor, right: Tensor) -> None:
    if buffer.dtype == left.dtype:
        buffer.addmm_(left, right)
    else:
        buffer.add_(left @ right)


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, anchor, factors):
        out = F.linear(x, weight, bias)
        ctx.save_for_backward(x, _forward(out, x, factors), weight, factors.a, factors.b)
        ctx.factors = factors
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, hidden, weight, a, b = ctx.saved_tensors
        flat = dy.reshape(-1, dy.shape[-1])  # (N, m)
        grad_hidden = _backward(flat, x, hidden, a, b, ctx.factors, ctx.needs_input_grad[3])
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (flat @ weight).addmm_(grad_hidden.mT, a).view(x.shape)
        return dx, None, None, None, None


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out, x, anchor, factors):
        ctx.mark_dirty(out)
        ctx.save_for_backward(x, _forward(out, x, factors), factors.a, factors.b)
        ctx.factors = factors
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, hidden, a, b = ctx.saved_tensors
        flat = dy.reshape(-1, dy.shape[-1])  # (N, m)
        grad_hidden = _backward(flat, x, hidden, a, b, ctx.factors, ctx.needs_input_grad[2])
        return dy, (grad_hidden.mT @ a).view(x.shape) if ctx.needs_input_grad[1] else None, None, None
