"""Rows: the token sequences of at most ``max_length`` that documents become, packed or padded, with a position.

packed: every document's tokens without specials, after bos if the tokenizer itself adds one, before eos; all joined
and cut into full blocks. padded: every document with the tokenizer's own specials, truncated; the padding itself is
added when rows become a batch.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from lowrank_cli.data.documents import Source
from lowrank_cli.data.tokenizer import adds_bos

DOCUMENTS = 512  # encoded at a time ...
CHARACTERS = 2_000_000  # ... or fewer, if they are long
Row = np.ndarray  # (t,), int32, t <= max_length


class Encoder:
    """Documents to tokens, in one of the two forms.

    Args:
        tokenizer: fast, with eos.
        packing: "packed" or "padded".
        max_length: where padded documents are truncated.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, packing: str, max_length: int):
        self.tokenizer, self.packing, self.max_length = tokenizer, packing, max_length
        self.bos = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
        # what the tokens of a text depend on; blocks of any length are cut from the same packed tokens
        self.identity: list[Any] = [
            tokenizer.backend_tokenizer.to_str(),
            tokenizer.eos_token_id,
            self.bos,
            packing,
            max_length if packing == "padded" else None,
        ]

    def __call__(self, texts: list[str]) -> list[Row]:
        """The tokens of each document, in order."""
        backend = self.tokenizer.backend_tokenizer
        if self.packing == "packed":
            encoded = backend.encode_batch_fast(texts, add_special_tokens=False)
            return [np.array([*self.bos, *e.ids, self.tokenizer.eos_token_id], dtype=np.int32) for e in encoded]
        backend.enable_truncation(self.max_length)
        encoded = backend.encode_batch_fast(texts)
        # it would be saved with the tokenizer
        backend.no_truncation()
        return [np.array(e.ids, dtype=np.int32) for e in encoded]


def document_batches(source: Source) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """Batches of documents to encode together, each with the position of its first."""
    before, texts, size = source.state_dict(), [], 0
    for text in source:
        texts.append(text)
        size += len(text)
        if len(texts) == DOCUMENTS or size >= CHARACTERS:
            yield before, texts
            before, texts, size = source.state_dict(), [], 0
    if texts:
        yield before, texts


@dataclass
class _Encoded:
    before: dict[str, Any]  # the source's position at the first document
    items: list[Row] | Row  # padded: one row a document; packed: the joined tokens
    size: int


class RowReader:
    """The rows of one pass over a source, encoded as they are read, with an exact position.

    Args:
        source: read from its position on.
        encoder: the form of the rows.
        max_length: tokens in a packed row.
        partial: also give the tokens after the last full block, as a shorter row.
    """

    def __init__(self, source: Source, encoder: Encoder, max_length: int, *, partial: bool = False):
        self.source, self.encoder, self.max_length, self.partial = source, encoder, max_length, partial
        self.tokens = 0  # read since the position it was loaded at
        self.load_state_dict({"source": source.state_dict(), "used": 0})

    def state_dict(self) -> dict[str, Any]:
        """The position of the next row: a document, and the tokens (packed) or rows (padded) used since."""
        before = self._encoded[0].before if self._encoded else self.source.state_dict()
        return {"source": before, "used": self._used}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position; {} is the start of the source."""
        self.source.load_state_dict(state.get("source", {}))
        self._encoded: deque[_Encoded] = deque()
        self._batches = document_batches(self.source)
        self._used = state.get("used", 0)
        self.tokens = 0

    def __iter__(self) -> Iterator[Row]:
        packed = self.encoder.packing == "packed"
        needed = self.max_length if packed else 1
        while self._available() >= needed or self._read(needed):
            row = self._take(needed)
            yield row if packed else row[0]
        if packed and self.partial and self._available():
            yield self._take(self._available())

    def _available(self) -> int:
        return sum(batch.size for batch in self._encoded) - self._used

    def _read(self, needed: int) -> bool:
        for before, texts in self._batches:
            documents = self.encoder(texts)
            self.tokens += sum(map(len, documents))
            items = np.concatenate(documents) if self.encoder.packing == "packed" else documents
            self._encoded.append(_Encoded(before, items, len(items)))
            if self._available() >= needed:
                return True
        return False

    def _take(self, count: int) -> Any:
        taken = []
        while count:
            first = self._encoded[0]
            part = first.items[self._used : self._used + count]
            taken.append(part)
            count -= len(part)
            self._used += len(part)
            # one that is used up goes, so that the position moves past it
            if self._used >= first.size:
                self._encoded.popleft()
                self._used -= first.size
        return taken[0] if len(taken) == 1 else np.concatenate(taken)
