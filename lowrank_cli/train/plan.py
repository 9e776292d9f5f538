"""Plan the length of a run: every count that was left open is worked out before the first step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lowrank_cli.config import RunConfig
from lowrank_cli.errors import UsageError

# what a run takes when no length is given: minutes for the default preset on a laptop
DEFAULT_STEPS = 300
# and passes over the data of a task, where records are few and are seen several times
METRICS_PER_EPOCH = ("classification", "regression")
DEFAULT_EPOCHS = {"classification": 3.0, "regression": 3.0, "causal": 1.0}


@dataclass(frozen=True)
class Plan:
    """The counts of a run, in optimizer updates."""

    steps: int
    warmup_steps: int
    eval_every: int
    save_every: int
    tokens_per_update: int

    def evaluates(self, step: int) -> bool:
        """Say whether there is an evaluation after so many updates."""
        return step % self.eval_every == 0 or step == self.steps

    def saves(self, step: int) -> bool:
        """Say whether there is a checkpoint after so many updates."""
        return step % self.save_every == 0 or step == self.steps


def total_batch_size(config: RunConfig) -> int:
    """Sequences in one update over all devices."""
    return config.train.total_batch_size or config.train.batch_size


def make(
    config: RunConfig,
    updates_per_epoch: int | None,
    kind: str | None = None,
    tokens_per_row: float | None = None,
) -> Plan:
    """The plan of a run.

    Args:
        config: the resolved configuration.
        updates_per_epoch: updates in one pass over the data; None for a stream of unknown length.
        tokens_per_row: the mean, where rows are shorter than max_length.
        kind: of a supervised task: causal, classification or regression; None for running text.
    Raises:
        UsageError: the length is given twice, or in epochs of a stream.
    """
    check(config)
    train = config.train
    tokens_per_update = round(total_batch_size(config) * (tokens_per_row or config.data.max_length))
    epochs = train.epochs
    if kind is not None and updates_per_epoch and not any((train.max_steps, train.max_train_tokens, epochs)):
        epochs = DEFAULT_EPOCHS[kind]
    if train.max_train_tokens is not None:
        steps = math.ceil(train.max_train_tokens / tokens_per_update)
    elif epochs is not None:
        if updates_per_epoch is None:
            raise UsageError(
                "a streamed dataset has no known length, so --epochs means nothing",
                "give --max-steps or --max-train-tokens",
            )
        steps = max(1, round(epochs * updates_per_epoch))
    else:
        steps = train.max_steps or DEFAULT_STEPS
    per_epoch = min(steps, updates_per_epoch or steps)
    warmup = config.optim.warmup_steps
    if warmup is not None and warmup > steps:
        raise UsageError(f"--warmup-steps {warmup} is longer than the run of {steps} steps", "take a shorter warm-up")
    return Plan(
        steps=steps,
        warmup_steps=steps // 10 if warmup is None else warmup,
        eval_every=config.eval.eval_every
        or (per_epoch if kind in METRICS_PER_EPOCH else max(1, math.ceil(steps / 10))),
        save_every=train.save_every or max(1, math.ceil(steps / 4)),
        tokens_per_update=tokens_per_update,
    )


def check(config: RunConfig) -> None:
    """Raises UsageError if the length of the run is given twice."""
    given = [name for name in ("max_steps", "max_train_tokens", "epochs") if getattr(config.train, name) is not None]
    if len(given) > 1:
        raise UsageError(
            f"the length is given twice: {' and '.join('--' + g.replace('_', '-') for g in given)}", "keep one of them"
        )
