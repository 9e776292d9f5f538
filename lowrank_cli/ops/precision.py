"""The precision of sums and moments, which is never below float32, and the largest gradient they take."""

import torch
from torch import Tensor

# gradients are cut to this, whose square float32 still holds: one that overflowed would freeze its moments for ever
LARGEST = 1e18


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of moments, and of sums of gradients, for weights of a dtype: float32, or float64 for those."""
    return torch.promote_types(dtype, torch.float32)


def cut(grad: Tensor) -> Tensor:
    """Return a gradient cut to +-LARGEST; infinity becomes NaN, which the weight then shows, as NaN stays NaN."""
    return grad.clamp(-LARGEST, LARGEST).addcmul_(grad, grad.new_zeros(()))
