"""Batches of text for training and validation, the same whatever the micro-batch, the rank or the number of ranks.

B: sequences in a batch, T: max_length.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from lowrank_cli.data.corpus import tokenized
from lowrank_cli.data.documents import Source, open_source
from lowrank_cli.data.rows import Encoder, Row, RowReader
from lowrank_cli.data.streams import EpochRows, Origin, PoolRows
from lowrank_cli.data.tokenizer import load_tokenizer
from lowrank_cli.errors import UsageError
from lowrank_cli.settings.training import DataConfig

NO_TARGET = -100
Batch = dict[str, Tensor]  # input_ids, labels: (B, T) int64; attention_mask: (B, T) int64, only when padded


class TrainStream:
    """This rank's micro-batches, update by update.

    An update takes the next ``total_batch_size`` sequences of an order that depends on the seed and the position only;
    rank r has the r-th of ``world_size`` equal runs of them, cut into micro-batches in order.
    """

    def __init__(
        self,
        rows: EpochRows | PoolRows,
        form: dict[str, Any],
        pad_token_id: int,
        *,
        batch_size: int,
        total_batch_size: int,
        rank: int,
        world_size: int,
        origin: Origin | None = None,
    ):
        self._origin = origin
        self._rows, self._form, self._pad, self._max_length = rows, form, pad_token_id, form["max_length"]
        self._batch_size, self._total, self._rank, self._world_size = batch_size, total_batch_size, rank, world_size

    @property
    def updates_per_epoch(self) -> int | None:
        """Updates that take every sequence once, the last of them reaching into the next epoch; None if unknown."""
        count = self._rows.rows_per_epoch
        return None if count is None else -(-count // self._total)

    def next_update(self) -> list[Batch]:
        """The micro-batches of the next optimizer update."""
        rows = self._rows.take(self._total)
        share = self._total // self._world_size
        mine = rows[self._rank * share : (self._rank + 1) * share]
        return [self.batch(mine[i : i + self._batch_size]) for i in range(0, share, self._batch_size)]

    def batch(self, rows: list[Row]) -> Batch:
        """The micro-batch of some rows."""
        return collate(rows, self._pad, self._max_length)

    def state_dict(self) -> dict[str, Any]:
        """The position of the next update, as JSON; the same on every rank."""
        origin = {} if self._origin is None else {"origin": self._origin.state_dict()}
        return {"form": dict(self._form), **origin, **self._rows.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position, also with another batch_size, total_batch_size or world_size.

        Raises:
            UsageError: the position belongs to other data, or to another form or order of it.
        """
        # first, because other data also explain a trained tokenizer of another size
        if self._origin is not None and "origin" in state:
            self._origin.check(state["origin"])
        saved = state["form"]
        if saved != self._form:
            key = next(key for key, value in self._form.items() if saved.get(key) != value)
            raise UsageError(
                f"the saved data position is of {key} {saved.get(key)}, this run has {self._form[key]}",
                "resume with the settings that the run began with",
            )
        self._rows.load_state_dict(state)


@dataclass
class TextData:
    """TextData holds the text that a run trains on, and the held-out text that it is evaluated on.

    Attributes:
        tokenizer: has eos and pad.
        train: the stream of updates.
        description: for run.json; what is not known of a streamed dataset is left out.
    """

    tokenizer: PreTrainedTokenizerFast
    train: TrainStream
    description: dict[str, Any]
    _validation_rows: Callable[[], Iterator[Row]]
    _eval_tokens: int
    _batch_size: int
    _max_length: int

    def validation(self) -> Iterator[Batch]:
        """The validation batches, the same every time and on every rank, with at most eval_tokens targets."""
        left, rows, labels_cut = self._eval_tokens, [], 0
        for row in self._validation_rows():
            rows.append(row)
            # the first token of a sequence is predicted from nothing
            left -= len(row) - 1
            labels_cut = max(0, -left)
            if len(rows) == self._batch_size or left <= 0:
                yield self._validation_batch(rows, labels_cut)
                rows = []
            if left <= 0:
                return
        if rows:
            yield self._validation_batch(rows, 0)

    def _validation_batch(self, rows: list[Row], labels_cut: int) -> Batch:
        batch = collate(rows, self.tokenizer.pad_token_id, self._max_length)
        if labels_cut:
            end = len(rows[-1])
            batch["labels"][-1, end - labels_cut : end] = NO_TARGET
        return batch


def build(
    config: DataConfig,
    *,
    batch_size: int,
    total_batch_size: int,
    eval_tokens: int,
    seed: int,
    offline: bool = False,
    rank: int = 0,
    world_size: int = 1,
    tokenizer_fallback: str | None = None,
    status: Callable[[str], None] = lambda _: None,
) -> TextData:
    """The batches of a run. Every rank calls it, at the same time or not.

    Args:
        config: the dataset, the tokenizer and the form of the sequences.
        batch_size: sequences in a micro-batch.
        total_batch_size: sequences in an update, on all ranks together.
        eval_tokens: the most validation targets.
        seed: of the order.
        offline: never touch the network.
        rank: of this process, from 0.
        world_size: number of processes.
        tokenizer_fallback: a model folder with a tokenizer, for when the configuration names none.
        status: told one line before each long step.
    Raises:
        UsageError: the dataset, the tokenizer or the batch sizes cannot be used.
        MissingError: the dataset or the tokenizer is not there.
    """
    check_total(total_batch_size, batch_size, world_size)
    train_source = open_source(config, "train", offline=offline)
    validation_source = open_source(config, "validation", offline=offline)
    for source in (train_source, validation_source):
        _check_first(source)
    tokenizer = load_tokenizer(config, train_source, fallback=tokenizer_fallback, offline=offline, status=status)
    encoder = Encoder(tokenizer, config.packing, config.max_length)
    description = {
        "dataset": config.dataset,
        "dataset_config": config.dataset_config,
        "validation_dataset": config.validation_dataset,
        "packing": config.packing,
        "max_length": config.max_length,
        "vocab_size": len(tokenizer),
    }
    rows: EpochRows | PoolRows
    origin = None
    if train_source.local and not config.streaming:
        corpus = tokenized(train_source, encoder, status)
        rows = EpochRows(corpus, seed, train_source.name)
        description |= {"documents": corpus.documents, "tokens": corpus.tokens, "sequences": len(corpus)}
    else:
        rows = PoolRows(RowReader(train_source, encoder, config.max_length), seed, train_source.name)
        origin = Origin(train_source, tokenizer)
        description["streaming"] = True
    if validation_source.local and not config.streaming:
        held_out = tokenized(validation_source, encoder, status)
        validation_rows = held_out.rows
        description |= {"validation_documents": held_out.documents, "validation_tokens": held_out.tokens}
    else:
        reader = RowReader(validation_source, encoder, config.max_length, partial=True)
        validation_rows = _KeptRows(reader, eval_tokens)
    # not the tokenizer itself: saved and loaded again it may be written differently and still give the same tokens
    form = {"packing": config.packing, "max_length": config.max_length, "vocab_size": len(tokenizer), "seed": seed}
    train = TrainStream(
        rows,
        form,
        tokenizer.pad_token_id,
        batch_size=batch_size,
        total_batch_size=total_batch_size,
        rank=rank,
        world_size=world_size,
        origin=origin,
    )
    description = {key: value for key, value in description.items() if value is not None}
    return TextData(tokenizer, train, description, validation_rows, eval_tokens, batch_size, config.max_length)


def collate(rows: Sequence[Row], pad_token_id: int, max_length: int) -> Batch:
    """Rows as a batch, padded on the right; labels are not shifted, padding has none.

    Args:
        rows: B of them, each at most ``max_length`` long.
        pad_token_id: may be the id of a token that also stands in the rows, such as eos.
        max_length: T.
    """
    lengths = torch.tensor([len(row) for row in rows])  # (B,)
    ids = np.full((len(rows), max_length), pad_token_id, dtype=np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    input_ids = torch.from_numpy(ids)  # (B, T)
    # by length, not by id: an eos in the text is a target even where eos is also the padding
    real = torch.arange(max_length) < lengths[:, None]  # (B, T)
    batch = {"input_ids": input_ids, "labels": input_ids.masked_fill(~real, NO_TARGET)}
    if not real.all():
        batch["attention_mask"] = real.long()
    return batch


class _KeptRows:
    """The first rows of a stream, read once: a validation pass should not wait for the network every time."""

    def __init__(self, reader: RowReader, eval_tokens: int):
        self._reader, self._eval_tokens = reader, eval_tokens
        self._rows: list[Row] | None = None

    def __call__(self) -> Iterator[Row]:
        if self._rows is None:
            self._reader.load_state_dict({})
            rows, left = [], self._eval_tokens
            for row in self._reader:
                rows.append(row)
                left -= len(row) - 1
                if left <= 0:
                    break
            self._rows = rows
        return iter(self._rows)


def _check_first(source: Source) -> None:
    # a dataset that cannot be read should say so before a model is loaded, streamed ones too
    next(iter(source))
    source.load_state_dict({})


def check_total(total_batch_size: int, batch_size: int, world_size: int) -> None:
    """Raises UsageError unless an update is a whole number of micro-batches on every process."""
    unit = batch_size * world_size
    if total_batch_size % unit == 0:
        return
    below = total_batch_size // unit * unit
    nearest = f"{below} or {below + unit}" if below else str(unit)
    ranks = f" on {world_size} processes" if world_size > 1 else ""
    raise UsageError(
        f"a total batch of {total_batch_size} sequences is not a whole number of batches of {batch_size}{ranks}",
        f"--total-batch-size {nearest}, or another --batch-size",
    )
