"""The precision of sums and moments, which is never below float32."""

import torch


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of moments, and of sums of gradients, for weights of a dtype: float32, or float64 for those."""
    return torch.promote_types(dtype, torch.float32)
