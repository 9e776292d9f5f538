"""A whole dataset part as tokens in the cache: written once, memory-mapped by every process that trains on it."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from lowrank_cli.data.cache import cached_folder, fingerprint
from lowrank_cli.data.documents import Source
from lowrank_cli.data.rows import Encoder, Row, document_batches
from lowrank_cli.foreign import read_json

STATUS_EVERY_S = 10.0


class Corpus:
    """The rows of a tokenized source, by number.

    Attributes:
        documents: how many there are.
        tokens: of all documents, with separators, without padding.
        digest: of the tokens; the same text, tokenizer and form give the same.
    """

    def __init__(self, folder: Path, packing: str, max_length: int):
        about = read_json(folder / "about.json")
        self.documents, self.tokens, self.digest = about["documents"], about["tokens"], about["digest"]
        self.packing, self.max_length = packing, max_length
        self._ids = np.memmap(folder / "tokens.bin", dtype=about["dtype"], mode="r")  # (tokens,)
        self._ends = np.memmap(folder / "ends.bin", dtype=np.int64, mode="r")  # (documents,)

    def __len__(self) -> int:
        """Rows: full blocks (packed) or documents (padded)."""
        return self.tokens // self.max_length if self.packing == "packed" else self.documents

    def __getitem__(self, number: int) -> Row:
        if not 0 <= number < len(self):
            raise IndexError(number)
        if self.packing == "packed":
            start, end = number * self.max_length, (number + 1) * self.max_length
        else:
            start, end = (self._ends[number - 1] if number else 0), self._ends[number]
        return self._ids[start:end].astype(np.int32)

    def rows(self) -> Iterator[Row]:
        """Every row in order, and the tokens after the last full block as a shorter one."""
        for number in range(len(self)):
            yield self[number]
        rest = self.tokens % self.max_length if self.packing == "packed" else 0
        if rest:
            yield self._ids[-rest:].astype(np.int32)


def tokenized(source: Source, encoder: Encoder, status: Callable[[str], None] = lambda _: None) -> Corpus:
    """The source's documents from its position on as a corpus, out of the cache if they have been tokenized before.

    Args:
        source: of local files.
        encoder: the form of the rows.
        status: told before the work begins and every ten seconds of it.
    Raises:
        UsageError: a document cannot be read, or there are none.
    """

    def make(folder: Path) -> None:
        status(f"tokenizing {source.name}")
        _write(source, encoder, folder, status)

    key = fingerprint([source.identity, encoder.identity])
    return Corpus(cached_folder("tokens", key, make), encoder.packing, encoder.max_length)


def _write(source: Source, encoder: Encoder, folder: Path, status: Callable[[str], None]) -> None:
    dtype = np.dtype(np.uint16 if len(encoder.tokenizer) <= 2**16 else np.int32)
    digest = hashlib.sha256()
    documents = tokens = 0
    told = time.monotonic()
    with (folder / "tokens.bin").open("wb") as ids_file, (folder / "ends.bin").open("wb") as ends_file:
        for _, texts in document_batches(source):
            encoded = encoder(texts)
            ids = np.concatenate(encoded).astype(dtype)
            ends = tokens + np.cumsum([len(document) for document in encoded], dtype=np.int64)
            for file, array in ((ids_file, ids), (ends_file, ends)):
                file.write(array.tobytes())
                digest.update(array.tobytes())
            documents, tokens = documents + len(texts), int(ends[-1])
            if time.monotonic() - told > STATUS_EVERY_S:
                told = time.monotonic()
                status(f"tokenized {documents:,} documents of {source.name}: {tokens:,} tokens")
    about = {"documents": documents, "tokens": tokens, "dtype": dtype.name, "digest": digest.hexdigest()[:32]}
    (folder / "about.json").write_text(json.dumps(about))
