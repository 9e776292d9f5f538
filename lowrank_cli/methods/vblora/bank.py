"""Sub-vectors composed from a shared bank, and the way back of their gradient.

Letters: h vectors of length b in the bank, S sub-vectors, k of the h vectors in each.

    indices = topk(logits, k);  weights = softmax(logits[indices])      (S, k)
    u_s = sum_j weights_sj bank[indices_sj]                              (S, b)

VB-LoRA, arXiv:2405.15179, sec. 3.2 (the top-k admixture module). All sub-vectors of a model are composed by these
three calls, and no (S, k, b) tensor exists.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def select(logits: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """The k largest logits of each row, and their softmax.

    Args:
        logits: (S, h).
        topk: k, at most h.
    Returns:
        Indices (S, k), int64, the largest logit first, and weights (S, k), which sum to 1.
    """
    values, indices = logits.topk(topk, dim=-1)
    return indices, values.softmax(-1)


def compose(bank: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of vectors of the bank: u_s = sum_j w_sj bank[i_sj].

    Args:
        bank: (h, b).
        indices: (S, k), int64.
        weights: (S, k), dtype of the bank.
    Returns:
        (S, b).
    """
    return F.embedding_bag(indices, bank, per_sample_weights=weights, mode="sum")


def compose_backward(grad: Tensor, bank: Tensor, indices: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the bank and of the selected logits, from that of the sub-vectors.

        d bank[i] = sum over the s, j with i_sj = i of w_sj du_s
        d logit_sj = w_sj (g_j - sum_l w_sl g_l),  g_j = <bank[i_sj], du_s>

    Args:
        grad: du, (S, b).
        bank: (h, b).
        indices: (S, k).
        weights: (S, k).
    Returns:
        (h, b), and (S, k): a logit that was not selected has no gradient.
    """
    grad_bank = torch.zeros_like(bank)
    grad_weights = torch.empty_like(weights)
    for j in range(indices.shape[1]):
        index = indices[:, j]
        picked = bank.index_select(0, index)  # (S, b)
        torch.sum(picked.mul_(grad), dim=-1, out=grad_weights[:, j])
        torch.mul(grad, weights[:, j, None], out=picked)
        grad_bank.index_add_(0, index, picked)
    # the softmax's Jacobian
    mean = (weights * grad_weights).sum(-1, keepdim=True)
    return grad_bank, grad_weights.sub_(mean).mul_(weights)


def pack(indices: Tensor, weights: Tensor, num_vectors: int) -> tuple[Tensor, Tensor]:
    """The smallest form of a selection: indices in few bits, and all weights but the last.

    Args:
        indices: (..., k).
        weights: (..., k), which sum to 1.
        num_vectors: h; up to 256 an index is a byte (PEFT takes two for exactly 256).
    Returns:
        (..., k) in uint8, int16, int32 or int64, and (..., k - 1).
    """
    limits = ((torch.uint8, 2**8), (torch.int16, 2**15), (torch.int32, 2**31))
    dtype = next((dtype for dtype, limit in limits if num_vectors <= limit), torch.int64)
    kept = weights[..., :-1]
    # a last weight below zero, from rounding, would be a logarithm of a negative number to whoever reads this
    excess = kept.sum(-1, keepdim=True).sub(1).clamp(min=0)
    kept = torch.where(excess > 0, kept * (1 - 2 * excess), kept)
    return indices.to(dtype), kept.contiguous()


def unpack(indices: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `pack`: indices (..., k) as int64, weights (..., k) with the last one, 1 minus the others."""
    last = (1 - weights.sum(-1, keepdim=True)).clamp(min=0)
    return indices.long(), torch.cat([weights, last], dim=-1)
