"""Metrics of labelled examples, and the predictions of a model with a classification or regression head."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor, nn

from lowrank_cli.errors import LowrankError


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """The share of predictions that are right."""
    return float((predictions == labels).mean())


def f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """The harmonic mean of precision and recall of class 1, as GLUE has it; 0 where class 1 never stands."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, zero_division=0))


def matthews_correlation(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Matthews' correlation of two classes, or its generalisation to more; 0 for one prediction for everything."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, predictions)) if _vary(predictions, labels) else 0.0


def pearson(predictions: np.ndarray, labels: np.ndarray) -> float:
    """The linear correlation; 0 where either does not vary, which has none."""
    from scipy.stats import pearsonr

    return float(pearsonr(predictions, labels).statistic) if _vary(predictions, labels) else 0.0


def spearman(predictions: np.ndarray, labels: np.ndarray) -> float:
    """The correlation of the ranks, ties at their mean; 0 where either does not vary, which has none."""
    from scipy.stats import spearmanr

    return float(spearmanr(predictions, labels).statistic) if _vary(predictions, labels) else 0.0


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews_correlation": matthews_correlation,
    "pearson": pearson,
    "spearman": spearman,
    # the share of answers whose every token, end of text too, is the likeliest after the right ones before it: those
    # that greedy decoding would write token for token
    "greedy_exact_match": accuracy,
}


def score(names: Iterable[str], predictions: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """Metrics by name.

    Args:
        names: of METRICS.
        predictions: (n,) classes or scores.
        labels: (n,) the right ones.
    Raises:
        ValueError: there are none, or not equally many.
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if predictions.shape != labels.shape or predictions.ndim != 1 or not len(labels):
        raise ValueError(f"predictions of shape {predictions.shape}, labels of shape {labels.shape}")
    return {name: METRICS[name](predictions, labels) for name in names}


@dataclass(frozen=True)
class Predictions:
    """Predictions hold what a model predicts for labelled examples, and its loss.

    Attributes:
        loss: the mean over examples, see `label_loss`.
        predictions: (n,) int64 classes, or float64 scores.
        labels: (n,) the right ones.
    """

    loss: float
    predictions: np.ndarray
    labels: np.ndarray


def label_loss(
    model: nn.Module, batch: Mapping[str, Tensor], kind: str, num_targets: int | Tensor | None = None
) -> Tensor:
    """Cross-entropy of classes, or squared error of scores, over a batch.

    Args:
        model: with a head; its first output is the logits (B, classes), or (B, 1) for scores.
        batch: what the model takes, and labels (B,).
        kind: "classification" or "regression".
        num_targets: divides the sum instead of B, so that micro-batches add up to their update.
    Returns:
        A float32 scalar.
    """
    return _loss(_logits(model, batch), batch["labels"], kind) / (num_targets or len(batch["labels"]))


@torch.no_grad()
def predict(
    model: nn.Module, batches: Iterable[dict[str, Tensor]], kind: str, between: Callable[[], None] = lambda: None
) -> Predictions:
    """The predictions of a model in eval mode; its training mode is put back afterwards.

    Args:
        model: with a head.
        batches: as for `label_loss`; moved to the model's device.
        kind: "classification" or "regression".
        between: called before every batch; what it raises ends the evaluation.
    Raises:
        LowrankError: a prediction is not finite.
    """
    training, device = model.training, next(model.parameters()).device
    model.eval()
    total, predictions, labels = 0.0, [], []
    try:
        for batch in batches:
            between()
            batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
            logits = _logits(model, batch)
            total += float(_loss(logits, batch["labels"], kind))
            # the likeliest class of numbers that are none would be a prediction like any other
            if not bool(logits.isfinite().all()):
                raise LowrankError("the model's predictions are not finite", "evaluate an earlier checkpoint")
            predictions.append((logits.argmax(-1) if kind == "classification" else logits.squeeze(-1)).cpu().numpy())
            labels.append(batch["labels"].cpu().numpy())
    finally:
        model.train(training)
    right = np.concatenate(labels)
    made = np.concatenate(predictions)
    if kind == "regression":
        right, made = right.astype(np.float64), made.astype(np.float64)
    return Predictions(total / len(right), made, right)


def _logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return model(**{key: value for key, value in batch.items() if key != "labels"})[0].float()


def _loss(logits: Tensor, labels: Tensor, kind: str) -> Tensor:
    if kind == "regression":
        return F.mse_loss(logits.squeeze(-1), labels.to(logits.dtype), reduction="sum")
    return F.cross_entropy(logits, labels, reduction="sum")


def _vary(*arrays: np.ndarray) -> bool:
    return all((array != array[0]).any() for array in arrays)
