"""A classifier's own task: `lowrank eval mrpc` of a model that was fine-tuned with `--task mrpc`."""

from __future__ import annotations

import math
import time
from collections import Counter
from typing import Any

from lowrank_cli import console
from lowrank_cli.data import glue, tasks
from lowrank_cli.data.examples import chunks, encode_labelled
from lowrank_cli.data.glue import Example
from lowrank_cli.data.supervised import collate
from lowrank_cli.data.tasks import Task
from lowrank_cli.errors import UsageError
from lowrank_cli.evaluate.harness import circumstances
from lowrank_cli.evaluate.progress import Progress
from lowrank_cli.evaluate.subject import Subject
from lowrank_cli.measure.classification import predict, score
from lowrank_cli.models.architecture import positions
from lowrank_cli.models.load import Head
from lowrank_cli.settings import COMMANDS
from lowrank_cli.settings.evaluate import HarnessConfig

ROWS = 32


def task_of(names: list[str], labels: int, model: str) -> Task:
    """Return the one task that a classifier can be asked.

    Args:
        names: what was typed.
        labels: of the model's head.
        model: its name.
    Raises:
        UsageError: other names than a task with as many labels.
    """
    fitting = [task.name for task in tasks.TASKS.values() if task.num_labels == labels]
    if len(names) != 1 or names[0] not in fitting:
        raise UsageError(
            f"{model} is a classifier with {labels} label{'s' * (labels > 1)}, and cannot be asked {','.join(names)}",
            f"name the task that it was trained on: {', '.join(fitting)}" if fitting else "give a language model",
        )
    return tasks.describe(names[0])


def examples(task: Task, settings: HarnessConfig, *, offline: bool) -> list[Example]:
    """Read the task's published development set, or the beginning that `limit` says."""
    (found,) = glue.load(task, settings.data_dir, parts=("validation",), offline=offline, status=console.note)
    return found[: settings.limit]


def head(task: Task) -> Head:
    """Return the head that a model of this task has."""
    return Head(task.label_names, regression=task.kind == "regression")


def evaluate(
    subject: Subject, task: Task, asked: list[Example], settings: HarnessConfig, batch_size: int | None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Score a classifier on its task.

    Args:
        subject: with the head.
        task: what its labels are.
        asked: the examples.
        settings: max_length is used; fine-tuning's unless given.
        batch_size: examples in a pass; None for 32.
    Returns:
        The result as its JSON has it, and every prediction.
    """
    start = time.perf_counter()
    tokenizer = subject.tokenizer
    longest = positions(subject.model.config) or math.inf
    max_length = min(settings.max_length or COMMANDS["finetune"].defaults["max_length"], longest)
    encoded = encode_labelled(asked, tokenizer, max_length, task.kind)
    if line := encoded.cut.line("examples", len(asked), max_length):
        console.note(line)
    # long ones first: what does not fit in memory shows at once
    order = sorted(range(len(asked)), key=lambda i: -len(encoded.rows[i]))
    parts = list(chunks([encoded.rows[i] for i in order], batch_size or ROWS))
    with Progress(task.name) as progress:
        progress.begin("batches", len(parts))
        batches = (collate(rows, tokenizer.pad_token_id, max_length) for rows in parts)
        found = predict(subject.model, batches, task.kind, progress.advance)
    # of a constant answer
    majority = max(Counter(found.labels.tolist()).values()) / len(asked)
    rows = [
        {
            "task": task.name, "alias": task.name, "parent": None, "level": 0, "metric": name, "filter": "none",
            "value": value, "stderr": None, "num_questions": len(asked),
            "majority": majority if name == "accuracy" else None,
        }
        for name, value in score(task.metrics, found.predictions, found.labels).items()
    ]  # fmt: skip
    result = {
        "task": task.name,
        "rows": rows,
        "loss": found.loss,
        "num_questions": len(asked),
        "num_truncated": encoded.cut.rows,
        "num_fewshot": {},
        "settings": {"limit": settings.limit, "max_length": max_length},
        "seconds": round(time.perf_counter() - start, 3),
        **circumstances(subject),
    }
    answers = [
        {"doc_id": i, "target": right, "prediction": said}
        for i, right, said in sorted(zip(order, found.labels.tolist(), found.predictions.tolist(), strict=True))
    ]
    return result, answers


def name_of(task: Task, settings: HarnessConfig) -> str:
    """Return mrpc-head-limit100: what has the same name is the same evaluation, of another time."""
    return f"{task.name}-head" + (f"-limit{settings.limit}" if settings.limit else "")
