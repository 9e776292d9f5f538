"""Batches for fine-tuning: instruction records and answers with a loss on the response, or texts with a label.

B: sequences in a batch, T: the longest of them, rounded up to a multiple of 8.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from lowrank_cli.data import downstream, glue, instructions, tasks, templates
from lowrank_cli.data.conversations import Record
from lowrank_cli.data.examples import NO_TARGET, Encoded, Row, chunks, encode_labelled, encode_texts
from lowrank_cli.data.instructions import LeftOut
from lowrank_cli.data.questions import Questions
from lowrank_cli.data.streams import EpochRows
from lowrank_cli.data.tasks import Task
from lowrank_cli.data.templates import Template, Text
from lowrank_cli.data.tokens import Batch, TrainStream, check_total
from lowrank_cli.errors import UsageError
from lowrank_cli.measure.classification import score
from lowrank_cli.settings.finetune import TaskConfig
from lowrank_cli.settings.training import DataConfig

MULTIPLE = 8  # of the padded length: matrix units take whole tiles
GROUP = 2048  # rows of the shuffled order that are sorted by length together ...
RUN = 64  # ... and stay together in runs of this many


class Rows:
    """Rows by number, with what an order of them needs.

    Attributes:
        digest: of ids and labels; the same examples, template and tokenizer give the same.
        lengths: (rows,) in tokens.
        tokens: of all rows.
        targets: tokens that are learned, or rows with a label.
    """

    def __init__(self, rows: list[Row], max_length: int):
        self._rows, self.max_length = rows, max_length
        self.lengths = np.array([len(row) for row in rows])
        self.tokens = int(self.lengths.sum())
        self.targets = sum(row.targets for row in rows)
        digest = sha256(self.lengths.tobytes())
        for row in rows:
            digest.update(row.ids.tobytes())
            digest.update(np.asarray(row.labels).tobytes())
        self.digest = digest.hexdigest()[:32]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Row:
        return self._rows[number]


class GroupedRows(EpochRows):
    """Epochs in which rows of like length stand together: GROUP rows of a permutation are sorted, and cut into runs
    of RUN whose order is random."""

    def order(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, epoch])
        permutation = rng.permutation(len(self.corpus))
        grouped = []
        for begin in range(0, len(permutation), GROUP):
            group = permutation[begin : begin + GROUP]
            group = group[np.argsort(self.corpus.lengths[group], kind="stable")]
            runs = [group[i : i + RUN] for i in range(0, len(group), RUN)]
            grouped += [runs[i] for i in rng.permutation(len(runs))]
        return np.concatenate(grouped)


class SupervisedStream(TrainStream):
    """This rank's micro-batches, update by update; everything but the form of a batch is as for text."""

    def batch(self, rows: list[Row]) -> Batch:
        return collate(rows, self._pad, self._max_length)


@dataclass
class SupervisedData:
    """SupervisedData holds the rows that a fine-tuning run trains on, and the held-out ones that it is evaluated on.

    Attributes:
        tokenizer: has eos and pad.
        train: the stream of updates.
        description: for run.json.
        kind: "causal", "classification" or "regression".
        num_labels: outputs of the head; 0 for causal.
        label_names: of the classes.
        metrics: the task's own, the deciding one first; () for records that are no task's.
        best: the number that tells the best evaluation, and whether more of it is better.
    """

    tokenizer: PreTrainedTokenizerFast
    train: TrainStream
    description: dict[str, Any]
    kind: str
    num_labels: int
    label_names: tuple[str, ...]
    metrics: tuple[str, ...]
    best: tuple[str, bool]
    _held_out: list[Row]
    _questions: Questions | None
    _batch_size: int
    _max_length: int

    def validation(self) -> Iterator[Batch]:
        """The validation batches, the same every time and on every rank."""
        # long rows first: what does not fit in memory shows at once
        for rows in chunks(sorted(self._held_out, key=len, reverse=True), self._batch_size):
            yield collate(rows, self.tokenizer.pad_token_id, self._max_length)

    def answers(self) -> Iterator[Batch]:
        """The validation questions of a causal task, as `Questions.batches` gives them; nothing otherwise."""
        return self._questions.batches(self._batch_size) if self._questions else iter(())

    def score(self, predictions: ArrayLike, labels: ArrayLike) -> dict[str, float]:
        """The task's metrics of predicted classes, scores or choices against the right ones."""
        return score(self.metrics, predictions, labels)


def build(
    config: DataConfig,
    task: TaskConfig,
    *,
    batch_size: int,
    total_batch_size: int,
    eval_tokens: int,
    seed: int,
    offline: bool = False,
    tokenizer: PreTrainedTokenizerFast,
    rank: int = 0,
    world_size: int = 1,
    status: Callable[[str], None] = lambda _: None,
) -> SupervisedData:
    """The batches of a fine-tuning run. Every rank calls it, at the same time or not.

    Args:
        config: the dataset and max_length.
        task: the task or how records are read; a task is taken instead of the dataset.
        batch_size: sequences in a micro-batch.
        total_batch_size: sequences in an update, on all ranks together.
        eval_tokens: the most validation targets of causal data; of labelled examples all are taken.
        seed: of the order, not of what is held out.
        offline: never touch the network.
        tokenizer: the model's own: fast, with eos and pad.
        rank: of this process, from 0.
        world_size: number of processes.
        status: told one line before each long step, and what was found.
    Raises:
        UsageError: the data, the template or the batch sizes cannot be used.
        MissingError: the data are not there.
    """
    check_total(total_batch_size, batch_size, world_size)
    about = tasks.describe(task.task) if task.task else None
    max_length = config.max_length
    if about is not None and about.kind != "causal":
        examples = glue.load(about, task.data_dir, offline=offline, status=status)
        parts = [encode_labelled(part, tokenizer, max_length, about.kind) for part in examples]
        description, questions = {"task": about.name}, None
    else:
        template = templates.load(task.template, tokenizer, task=about is not None)

        as_rows = partial(
            encode_texts, tokenizer=tokenizer, max_length=max_length, train_on_inputs=task.train_on_inputs
        )

        def encode(records: list[Record]) -> Encoded:
            return as_rows(map(template.render, records))

        questions = None
        train, held_out, description = _records(config, task, about, offline, status)
        status(f"tokenizing {len(train):,} records with the template {template.name}")
        if about is not None:
            parts = [encode(train), encode(held_out)]
        else:
            texts = [_texts(part, template, task.skip_bad, config.dataset, status) for part in (train, held_out)]
            parts = [as_rows(part) for part in texts]
            if left := len(train) + len(held_out) - sum(map(len, texts)):
                description["skipped"] = (description.get("skipped") or 0) + left
        parts[1].keep(_within(parts[1].rows, eval_tokens))
        if about is not None:
            asked = held_out[: len(parts[1].rows)]
            questions = Questions(asked, encode, partial(_collated, tokenizer, max_length), tokenizer.eos_token_id)
        description |= {"template": template.name, "train_on_inputs": task.train_on_inputs}
    for part, what in zip(parts, ("train records", "validation records"), strict=True):
        if line := part.cut.line(what, len(part.rows), max_length):
            status(line)
    rows = Rows(parts[0].rows, max_length)
    order = GroupedRows if task.group_by_length else EpochRows
    form = {"max_length": max_length, "vocab_size": len(tokenizer), "seed": seed, "grouped": task.group_by_length}
    kind = about.kind if about else "causal"
    stream = SupervisedStream(
        order(rows, seed, str(task.task or config.dataset)),
        form,
        tokenizer.pad_token_id,
        batch_size=batch_size,
        total_batch_size=total_batch_size,
        rank=rank,
        world_size=world_size,
    )
    description |= {
        "kind": kind,
        "records": len(rows),
        "tokens": rows.tokens,
        "targets": rows.targets,
        "truncated": parts[0].cut.rows,
        "truncated_responses": parts[0].cut.responses,
        "validation_records": len(parts[1].rows),
        "validation_targets": sum(row.targets for row in parts[1].rows),
        "max_length": max_length,
        "vocab_size": len(tokenizer),
        "labels": list(about.label_names) if about and about.label_names else None,
    }
    metrics = about.metrics if about else ()
    return SupervisedData(
        tokenizer=tokenizer,
        train=stream,
        description={key: value for key, value in description.items() if value is not None},
        kind=kind,
        num_labels=about.num_labels if about else 0,
        label_names=about.label_names if about else (),
        metrics=metrics,
        best=("loss", False) if kind == "causal" else (metrics[0], True),
        _held_out=parts[1].rows,
        _questions=questions,
        _batch_size=batch_size,
        _max_length=max_length,
    )


def collate(rows: Sequence[Row], pad_token_id: int, max_length: int) -> Batch:
    """Rows as a batch, padded on the right to the longest of them, to a multiple of 8 but not over max_length.

    Args:
        rows: B of them, each at most max_length long, all with labels of one kind.
        pad_token_id: may be the id of a token that also stands in the rows, such as eos.
        max_length: the most that T can be.
    Returns:
        input_ids (B, T) and labels: (B, T), not shifted, NO_TARGET for prompts and padding; or (B,), int64 for classes
        and float32 for scores. Where a row is padded or has a label attention_mask (B, T), and where rows are pairs
        and the tokenizer tells their parts token_type_ids (B, T).
    """
    lengths = torch.tensor([len(row) for row in rows])  # (B,)
    width = min(max_length, -(-int(lengths.max()) // MULTIPLE) * MULTIPLE)
    real = torch.arange(width) < lengths[:, None]  # (B, T)
    batch = {"input_ids": _padded([row.ids for row in rows], width, pad_token_id)}
    labels = [row.labels for row in rows]
    if isinstance(labels[0], np.ndarray):
        batch["labels"] = _padded(labels, width, NO_TARGET)
    else:
        batch["labels"] = torch.tensor(labels, dtype=torch.float32 if isinstance(labels[0], float) else torch.int64)
    if batch["labels"].dim() == 1 or not real.all():
        # by length, not by id: an eos in the row is real even where eos is also the padding
        batch["attention_mask"] = real.long()
    if rows[0].type_ids is not None:
        batch["token_type_ids"] = _padded([row.type_ids for row in rows], width, 0)
    return batch


def _collated(tokenizer: PreTrainedTokenizerFast, max_length: int, rows: Sequence[Row]) -> Batch:
    return collate(rows, tokenizer.pad_token_id, max_length)


def _padded(arrays: Sequence[np.ndarray], width: int, value: int) -> Tensor:
    padded = np.full((len(arrays), width), value, dtype=np.int64)
    for i, array in enumerate(arrays):
        padded[i, : len(array)] = array
    return torch.from_numpy(padded)


def _records(
    config: DataConfig, task: TaskConfig, about: Task | None, offline: bool, status: Callable[[str], None]
) -> tuple[list[Record], list[Record], dict[str, Any]]:
    if about is None:
        data = instructions.load(config, task, offline=offline, status=status)
        return data.train, data.validation, data.description
    train, held_out = downstream.load(about, task.data_dir, offline=offline, status=status)
    return train, held_out, {"task": about.name}


def _texts(
    records: list[Record], template: Template, skip_bad: bool, name: str, status: Callable[[str], None]
) -> list[Text]:
    """Return the records as text, without those that the template cannot write."""
    texts, left = [], LeftOut(skip_bad)
    for record in records:
        try:
            texts.append(template.render(record))
        except UsageError as error:
            left.add(error)
    if line := left.line(name):
        status(line)
    if not texts:
        raise UsageError(f"{name} has no records that the template {template.name} can write", "take another one")
    if unlearned := [text.unlearned for text in texts if text.unlearned]:
        status(
            f"{name}: the chat template writes {sum(unlearned):,} earlier answers of {len(unlearned):,} conversations "
            "in another way than when they were given; these are context, and only the later answers are learned"
        )
    return texts


def _within(rows: list[Row], eval_tokens: int) -> int:
    """Return how many rows from the start have at most eval_tokens targets together, and one at least."""
    within = np.cumsum([row.targets for row in rows]) <= eval_tokens
    return max(1, int(within.sum()))
