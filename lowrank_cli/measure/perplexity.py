"""Perplexity: the exponential of the mean negative log-likelihood over tokens, not over batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_cli.models.forward import causal_lm_loss


@dataclass(frozen=True)
class Perplexity:
    """A mean negative log-likelihood in nats per token, and over how many tokens."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


@torch.no_grad()
def perplexity(
    model: torch.nn.Module, batches: Iterable[dict[str, Tensor]], between: Callable[[], None] = lambda: None
) -> Perplexity:
    """The perplexity of a causal language model on batches, in eval mode.

    Args:
        model: a causal language model; its training mode is put back afterwards.
        batches: `input_ids` and `labels` (B, T), -100 where there is no target; moved to the model's device.
        between: called before every batch; what it raises ends the evaluation.
    Returns:
        The mean over all target tokens.
    """
    training = model.training
    model.eval()
    total, tokens = 0.0, 0
    device = next(model.parameters()).device
    try:
        for batch in batches:
            between()
            batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
            targets = int((batch["labels"][:, 1:] != -100).sum())
            # one without targets too: where weights are cut over processes, all take part in every forward pass
            total += float(causal_lm_loss(model, batch, targets)) * targets
            tokens += targets
    finally:
        model.train(training)
    return Perplexity(total / max(1, tokens), tokens)
