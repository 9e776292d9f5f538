"""Next-token cross-entropy straight from the hidden states, without the tokens x vocabulary matrix of logits.

For a vocabulary of 32,000 the logits of a batch outweigh everything else that a small model keeps. They are formed
here for one chunk of tokens after the other, and the gradients of the hidden states and of the output embedding are
taken from each chunk while it is there, so that every logit is computed once.

Shapes: B sequences, T positions, N tokens (B T when flattened), D hidden size, V vocabulary, C tokens in a chunk.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE_INDEX = -100
CHUNK_ELEMENTS = 2**24  # logits held at a time: 64 MiB in float32
# on a CPU the logits of a chunk are better off in its cache; fewer tokens would cost more passes over the weight
CPU_CHUNK_TOKENS = 256


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    cap: float | None = None,
    num_targets: int | Tensor | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Mean of -log softmax(f(W h_t + b))[label] over the targets, differentiable once in hidden, weight and bias.

    f(z) = scale z, or with a soft cap f(z) = cap tanh(scale z / cap), of every logit by itself.

    Targets of -100 are dropped before the product, so that padding costs nothing. W h_t + b is in the dtype of the
    weight; f, softmax, loss and the sum of weight gradients over the chunks are in float32 (float64 for float64).

    Args:
        hidden: (B, T, D), where position t predicts label t + 1, or (N, D), where row i predicts label i.
        weight: (V, D), the output embedding.
        labels: (B, T), not shifted, or (N,); integers, -100 for no target.
        bias: (V,), of the output embedding.
        scale: of f, not 0.
        cap: of f, positive; None for no cap.
        num_targets: what the sum is divided by instead of the number of targets here. With several micro-batches
            in an update, give each the update's own number, and their losses and gradients add up to the update's.
        chunk_tokens: C; as many as keep C x V at 2**24, on a CPU at most 256, unless given. It changes the result
            by rounding only.
    Returns:
        A float32 scalar (float64 for float64 weights); 0 with zero gradients when there is no target.
    Raises:
        ValueError: shapes that do not fit, a number of tokens or a cap that is not positive, or a scale of 0.
    """
    _check(hidden, weight, labels, bias, chunk_tokens)
    if scale == 0 or (cap is not None and cap <= 0):
        raise ValueError(f"scale is {scale} and cap {cap}; the scale must not be 0, and a cap must be positive")
    if labels.dim() == 2:
        labels = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    rows = hidden.reshape(-1, hidden.shape[-1])  # (N, D)
    labels = labels.reshape(-1).to(rows.device)  # (N,)
    index = (labels != IGNORE_INDEX).nonzero().squeeze(1)  # (number of targets here,)
    divisor = max(1, len(index)) if num_targets is None else num_targets
    # a tensor stays on its device, where looking at its value would wait for the GPU
    divisor = torch.as_tensor(divisor, device=rows.device).clamp(min=1).to(_accumulation_dtype(weight))
    chunk = chunk_tokens or max(1, CHUNK_ELEMENTS // len(weight))
    if chunk_tokens is None and not rows.is_cuda:
        chunk = min(chunk, CPU_CHUNK_TOKENS)
    tail = None if (scale, cap) == (1.0, None) else (scale, cap)
    return _ChunkedCrossEntropy.apply(rows, weight, bias, labels, index, divisor, chunk, tail, torch.is_grad_enabled())


def num_targets(labels: Tensor) -> Tensor:
    """Number of targets that `chunked_cross_entropy` sees in labels of (B, T), or of (N,): an int64 scalar."""
    targets = labels[:, 1:] if labels.dim() == 2 else labels
    return (targets != IGNORE_INDEX).sum()


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Gradients are formed in forward, undivided, and only scaled in backward."""

    @staticmethod
    def forward(ctx, rows, weight, bias, labels, index, divisor, chunk, tail, needs_grad):
        needs_rows, needs_weight, needs_bias = needs = [needs_grad and n for n in ctx.needs_input_grad[:3]]
        dtype = _accumulation_dtype(weight)
        total = torch.zeros((), dtype=dtype, device=rows.device)
        grad_rows = torch.zeros_like(rows) if needs_rows else None  # (N, D)
        grad_weight = torch.zeros_like(weight, dtype=dtype) if needs_weight else None  # (V, D)
        grad_bias = torch.zeros_like(bias, dtype=dtype) if needs_bias else None  # (V,)
        # autocast would change the dtype of the products under us
        with torch.autocast(rows.device.type, enabled=False):
            for part in index.split(chunk):
                targets = labels[part].unsqueeze(1)  # (C, 1)
                x = rows[part].to(weight.dtype)  # (C, D)
                logits, slope = F.linear(x, weight, bias), None  # (C, V)
                if tail is not None:
                    logits, slope = _bent_(logits.to(dtype), *tail, needs_slope=any(needs))
                log_probs = logits.log_softmax(-1, dtype=dtype)  # (C, V)
                del logits
                total -= log_probs.gather(1, targets).sum()
                if not any(needs):
                    continue
                # d loss / d logits = softmax - one_hot(target)
                grad = log_probs.exp_().scatter_add_(1, targets, log_probs.new_full(targets.shape, -1.0))  # (C, V)
                if slope is not None:
                    grad *= slope
                if needs_bias:
                    grad_bias += grad.sum(0)
                grad = grad.to(weight.dtype)
                if needs_rows:
                    grad_rows[part] = (grad @ weight).to(rows.dtype)
                if needs_weight and weight.dtype == dtype:
                    grad_weight.addmm_(grad.t(), x)
                elif needs_weight:
                    grad_weight += grad.t() @ x
        ctx.save_for_backward(grad_rows, grad_weight, grad_bias, divisor)
        ctx.dtypes = rows.dtype, weight.dtype, bias.dtype if needs_bias else None
        return total / divisor

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        *grads, divisor = ctx.saved_tensors
        scale = grad_output / divisor
        return (*(_scaled(g, scale, dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True)), *[None] * 6)


def _bent_(logits: Tensor, scale: float, cap: float | None, *, needs_slope: bool) -> tuple[Tensor, Tensor | float]:
    """f of logits (C, V), in their place, and its derivative there: (C, V), or a number where it is the same."""
    if cap is None:
        return logits.mul_(scale), scale
    logits.mul_(scale / cap).tanh_()
    # d cap tanh(scale z / cap) / dz = scale (1 - tanh^2)
    slope = logits.square().mul_(-scale).add_(scale) if needs_slope else None
    return logits.mul_(cap), slope


def _scaled(grad: Tensor | None, scale: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The gradient times the scale in another dtype, with no temporary in its own."""
    return None if grad is None else torch.mul(grad, scale, out=torch.empty_like(grad, dtype=dtype))


def _accumulation_dtype(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _check(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, chunk_tokens: int | None) -> None:
    if hidden.dim() not in (2, 3) or labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"hidden is {tuple(hidden.shape)} and labels {tuple(labels.shape)}; "
            "allowed are (N, D) with (N,) and (B, T, D) with (B, T)"
        )
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"weight is {tuple(weight.shape)}; for this hidden size it must be (V, {hidden.shape[-1]})")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias is {tuple(bias.shape)}; for this weight it must be ({len(weight)},)")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; it must be at least 1")
