"""Answers of a causal model to questions: the likeliest of a closed set, or a right answer token by token."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@torch.no_grad()
def answer(
    model: nn.Module, batches: Iterable[dict[str, Tensor]], between: Callable[[], None] = lambda: None
) -> tuple[np.ndarray, np.ndarray]:
    """Return a model's answers and the right ones, in eval mode; its training mode is put back afterwards.

    A question with choices is answered by the choice whose tokens have the largest log-likelihood together. An open
    question is answered by 1 if every token of the right answer, end of text too, is the likeliest after the right
    ones before it, so that greedy decoding would write this answer, else by 0; the right one is 1.

    Args:
        model: a causal language model.
        batches: of `SupervisedData.answers`; moved to the model's device.
        between: called before every batch; what it raises ends the evaluation.
    Returns:
        Answers and right answers, each (questions,) int64, by the number of the choice; empty without batches.
    """
    training, device = model.training, next(model.parameters()).device
    model.eval()
    found: dict[int, tuple[int, int]] = {}
    ranked: dict[int, list[tuple[float, int, bool, int]]] = {}
    try:
        for batch in batches:
            between()
            records, rights = batch["record"].tolist(), batch["right"].tolist()
            batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
            if "choices" in batch:
                found |= dict(zip(records, zip(_likeliest(model, batch), rights, strict=True), strict=True))
                continue
            likelihood, greedy = (values.tolist() for values in _said(model, batch))
            for record, *row in zip(records, likelihood, batch["choice"].tolist(), greedy, rights, strict=True):
                ranked.setdefault(record, []).append(tuple(row))
    finally:
        model.train(training)
    for record, rows in ranked.items():
        _, choice, greedy, right = max(rows, key=lambda row: row[0])
        found[record] = (choice, right) if len(rows) > 1 else (int(greedy), 1)
    answers = np.array([found[record] for record in sorted(found)], dtype=np.int64).reshape(-1, 2)
    return answers[:, 0], answers[:, 1]


def _likeliest(model: nn.Module, batch: dict[str, Tensor]) -> list[int]:
    """The number of the likeliest of each row's choices, of one token each."""
    logits, targets = _logits(model, batch)  # (B, P, V), (B, P)
    place = (targets != -100).int().argmax(1)  # (B,)
    logits = logits[torch.arange(len(place), device=place.device), place]  # (B, V)
    choices = batch["choices"]  # (B, C)
    return logits.gather(1, choices.clamp(min=0)).masked_fill(choices < 0, -torch.inf).argmax(1).tolist()


def _said(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Log-likelihood of the targets of each row (B,), and whether each is the likeliest token at its place (B,)."""
    logits, targets = _logits(model, batch)
    real = targets != -100
    tokens = targets.clamp(min=0)
    likelihood = logits.gather(-1, tokens[..., None]).squeeze(-1) - logits.logsumexp(-1)
    return (likelihood * real).sum(1), ((logits.argmax(-1) == tokens) | ~real).all(1)


def _logits(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Float32 logits (B, P, V) at the P places where any row has a target, and the targets there (B, P)."""
    targets = batch["labels"][:, 1:]  # (B, T-1)
    places = (targets != -100).any(0).nonzero().squeeze(1)  # (P,)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask") if key in batch}
    options: dict[str, Any] = {"logits_to_keep": places} if _keeps_logits(model) else {}
    logits = model(**inputs, use_cache=False, **options)[0]
    return (logits if options else logits[:, places]).float(), targets[:, places]


def _keeps_logits(model: nn.Module) -> bool:
    # an adapter's wrapper passes on what the model inside takes
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(inner.forward).parameters
