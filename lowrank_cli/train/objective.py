"""Define what a run minimises and is judged by: next tokens, classes or a number."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_cli.measure.classification import label_loss
from lowrank_cli.measure.perplexity import Perplexity, perplexity
from lowrank_cli.measure.supervised import evaluate as supervised
from lowrank_cli.models.forward import causal_lm_loss
from lowrank_cli.parallel.replicas import Alone

Batch = dict[str, Tensor]


class Causal:
    """Next-token cross-entropy over the tokens that have a label."""

    causal = True
    # whether the loss is a cross-entropy
    in_nats = True

    def __init__(self, data: Any = None):
        # running text has no metric of its own
        self.best: tuple[str, bool] = getattr(data, "best", ("loss", False))

    def targets(self, batches: list[Batch]) -> int:
        """Return the number of targets that the loss of an update is the mean over."""
        return sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)

    def tokens(self, batches: list[Batch]) -> int:
        """Tokens that an update has seen."""
        return sum(_tokens(batch) for batch in batches)

    def loss(self, model: nn.Module, batch: Batch, targets: int) -> Tensor:
        """This micro-batch's share of the mean, a float32 scalar."""
        return causal_lm_loss(model, batch, targets)

    def evaluate(self, model: nn.Module, data: Any, between: Callable[[], None], replicas: Alone) -> dict[str, float]:
        """Evaluate on the validation batches: loss in nats a token, perplexity and tokens; for a task its metrics.

        Several processes share the batches of running text. A task's metrics are no means, so rank 0 evaluates all of
        it, and the other ranks only take part in its forward passes where weights are sharded.
        """
        if hasattr(data, "kind"):
            # where weights are cut, all take part in every forward pass
            values = supervised(model, data, between) if replicas.is_main or replicas.sharded else {}
            return replicas.told(values)
        batches = (
            in_step(data.validation(), replicas)
            if replicas.sharded
            else islice(data.validation(), replicas.rank, None, replicas.world_size)
        )
        result = perplexity(model, batches, between=between)
        if replicas.world_size > 1:
            total, tokens = replicas.numbers(result.loss * result.tokens, result.tokens)
            result = Perplexity(total / max(1.0, tokens), int(tokens))
        return {"loss": result.loss, "perplexity": result.perplexity, "tokens": result.tokens}


def in_step(batches: Iterable[Batch], replicas: Alone) -> Iterator[Batch]:
    """This process's share of some batches, and as many on every process: a batch without targets where there is none
    left."""
    batches = iter(batches)
    while some := list(islice(batches, replicas.world_size)):
        if replicas.rank < len(some):
            yield some[replicas.rank]
        else:
            yield {**some[0], "labels": torch.full_like(some[0]["labels"], -100)}


class Classification(Causal):
    """Cross-entropy over classes, or the squared error of one number; judged by the task's own metrics."""

    causal = False

    def __init__(self, data: Any):
        super().__init__(data)
        self.kind: str = data.kind
        self.in_nats = data.kind == "classification"

    def targets(self, batches: list[Batch]) -> int:
        return sum(len(batch["labels"]) for batch in batches)

    def loss(self, model: nn.Module, batch: Batch, targets: int) -> Tensor:
        return label_loss(model, batch, self.kind, targets)


def objective(data: Any) -> Causal:
    """The objective for a run's data."""
    return Classification(data) if getattr(data, "kind", "causal") != "causal" else Causal(data)


def _tokens(batch: Batch) -> int:
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else int(mask.sum())


def is_better(values: dict[str, float], than: dict[str, float], metric: str, higher: bool) -> bool:
    """Return whether an evaluation is better than another by its metric, or by the loss where that is the same."""
    if values[metric] != than[metric]:
        return values[metric] > than[metric] if higher else values[metric] < than[metric]
    return values["loss"] < than["loss"]


def mean_line(values: dict[str, float]) -> str:
    """An evaluation as text: the task's metrics first, then perplexity or loss."""
    metrics = {k: v for k, v in values.items() if k not in {"perplexity", "loss", "tokens"}}
    parts = [f"{key} {value:.4f}" for key, value in metrics.items()]
    if "perplexity" in values:
        parts.append(f"perplexity {values['perplexity']:.2f}")
    over = f" over {int(values['tokens']):,} tokens" if "tokens" in values else ""
    return f"{'  '.join(parts)} (loss {values['loss']:.4f}{over})"
