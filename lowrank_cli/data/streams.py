"""Orders of rows for training, by seed and position alone: epochs of a corpus permuted, streams shuffled in pools.

A stream of rows knows nothing of ranks or micro-batches. Its position is JSON; a new process that loads it gives
exactly the rows that the old one would have given.
"""

from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from lowrank_cli.data.cache import fingerprint
from lowrank_cli.data.corpus import Corpus
from lowrank_cli.data.documents import Source
from lowrank_cli.data.rows import Row, RowReader
from lowrank_cli.errors import UsageError

POOL = 2048  # rows shuffled together in a streamed dataset


class Origin:
    """An Origin records a streamed run's data and tokenizer, so that a resumed run does not go on with others.

    A run over a tokenized corpus needs none: the digest of its tokens says the same.
    """

    def __init__(self, source: Source, tokenizer: PreTrainedTokenizerFast):
        # the files as they are now, whatever becomes of them while the run reads
        self.source, self._identity = source, source.identity
        # not the whole tokenizer: saved and loaded again it may be written differently and still give the same tokens
        self._vocabulary = fingerprint(tokenizer.get_vocab())

    def state_dict(self) -> dict[str, Any]:
        return {"source": self._identity, "vocabulary": self._vocabulary}

    def check(self, saved: dict[str, Any]) -> None:
        """Raises UsageError that says what is not as it was."""
        told = []
        if difference := self.source.difference(saved["source"]):
            told.append(f"other data: {difference}")
        if saved["vocabulary"] != self._vocabulary:
            told.append("a tokenizer of another vocabulary")
        if told:
            raise UsageError(
                f"this run would go on with {'; and with '.join(told)}",
                "put back what the run began with (files with their times, as cp -p does), "
                "or start a new run from its weights with --continue-from",
            )


class EpochRows:
    """The rows of a corpus, each epoch in another order.

    Args:
        corpus: with at least one row.
        seed: of the order.
        name: of the dataset, for messages.
    Raises:
        UsageError: the corpus has fewer tokens than one row.
    """

    def __init__(self, corpus: Corpus, seed: int, name: str):
        if not len(corpus):
            raise too_short(name, corpus.tokens, corpus.max_length)
        self.corpus, self.seed, self.name = corpus, seed, name
        self.rows_per_epoch: int | None = len(corpus)
        self._position = 0
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def take(self, count: int) -> list[Row]:
        """The next rows, over the ends of epochs."""
        rows = []
        for position in range(self._position, self._position + count):
            epoch, index = divmod(position, len(self.corpus))
            if epoch != self._epoch:
                self._epoch, self._order = epoch, self.order(epoch)
            rows.append(self.corpus[int(self._order[index])])
        self._position += count
        return rows

    def order(self, epoch: int) -> np.ndarray:
        """The rows' numbers in the order of an epoch, a function of the seed and the epoch."""
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.corpus))

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self._position, "digest": self.corpus.digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.get("digest") != self.corpus.digest:
            raise UsageError(
                f"the saved position is of other tokens than those of {self.name}",
                "resume with the data, tokenizer and --streaming setting that the run began with",
            )
        self._position = state["rows"]


class PoolRows:
    """The rows of a stream, shuffled in pools of POOL; after the last pool the next epoch begins.

    The position is that of the stream where the pool begins and the rows used of the pool, so that a resume reads
    the pool again, not the stream.

    Args:
        reader: at the start of its source.
        seed: of the order.
        name: of the dataset, for messages.
    """

    rows_per_epoch: int | None = None

    def __init__(self, reader: RowReader, seed: int, name: str):
        self.reader, self.seed, self.name = reader, seed, name
        self._start = reader.state_dict()
        self._begin(0, 0, self._start, 0)

    def take(self, count: int) -> list[Row]:
        """The next rows, over the ends of pools and epochs."""
        rows: list[Row] = []
        while len(rows) < count:
            if self._rows is None:
                self._fill()
            part = self._rows[self._used : self._used + count - len(rows)]
            rows += part
            self._used += len(part)
            if self._used == len(self._rows):
                if self._ended:
                    self._begin(self._epoch + 1, 0, self._start, 0)
                else:
                    self._begin(self._epoch, self._pool + 1, self.reader.state_dict(), 0)
        return rows

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "pool": self._pool, "pool_start": self._pool_start, "used": self._used}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "pool" not in state:
            raise UsageError(
                f"the saved position is of a tokenized dataset, {self.name} is streamed",
                "resume with the --streaming setting that the run began with",
            )
        self.reader.load_state_dict(state["pool_start"])
        self._iterator = None
        self._begin(state["epoch"], state["pool"], state["pool_start"], state["used"])

    def _begin(self, epoch: int, pool: int, start: dict[str, Any], used: int) -> None:
        self._epoch, self._pool, self._pool_start, self._used = epoch, pool, start, used
        self._rows: list[Row] | None = None
        self._ended = False
        if pool == 0:
            self.reader.load_state_dict(start)
            self._iterator = None

    def _fill(self) -> None:
        if self._iterator is None:
            self._iterator = iter(self.reader)
        rows: list[Row] = []
        for row in self._iterator:
            rows.append(row)
            if len(rows) == POOL:
                break
        else:
            self._ended = True
        if not rows and self._pool == 0:
            raise too_short(self.name, self.reader.tokens, self.reader.max_length)
        order = np.random.default_rng([self.seed, self._epoch, self._pool]).permutation(len(rows))
        self._rows = [rows[i] for i in order]


def too_short(name: str, tokens: int, max_length: int) -> UsageError:
    """The error for a dataset that does not fill one row."""
    way = f"--max-length {tokens} would fit, or " if tokens >= 2 else ""
    return UsageError(
        f"{name} has {tokens:,} tokens, fewer than one sequence of {max_length:,}",
        f"{way}--packing padded, or give more text",
    )
