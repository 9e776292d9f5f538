"""Examples as rows of tokens with what is to be learned of them: a response token by token, or one label.

t: tokens of a row.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice
from typing import Any, TypeVar

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from lowrank_cli.data.glue import Example
from lowrank_cli.data.templates import Segment, Text
from lowrank_cli.data.tokenizer import adds_bos

NO_TARGET = -100
PROMPT_SHARE = 4  # a prompt that is cut keeps at least a quarter of max_length, or all of itself
_BATCH = 512  # texts encoded at a time
Item = TypeVar("Item")


@dataclass(frozen=True)
class Row:
    """One example.

    Attributes:
        ids: (t,) int32.
        labels: (t,) int32, NO_TARGET where there is no loss; or the one label of the row.
        type_ids: (t,) int32, which of two texts a token is of; None where rows are texts of one piece.
    """

    ids: np.ndarray
    labels: np.ndarray | int | float
    type_ids: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def targets(self) -> int:
        """Tokens with a loss; the first of a row is predicted from nothing."""
        return int((self.labels[1:] != NO_TARGET).sum()) if isinstance(self.labels, np.ndarray) else 1


@dataclass
class Cut:
    """A Cut records the rows that were longer than the limit and were truncated.

    Attributes:
        found: of each row that was too long its number, its place, its length, and whether its response was cut.
    """

    found: list[tuple[int, str, int, bool]] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Rows that were cut."""
        return len(self.found)

    @property
    def responses(self) -> int:
        """Rows of which a part of the response was cut."""
        return sum(response for *_, response in self.found)

    @property
    def longest(self) -> int:
        """The tokens that would have held them all."""
        return max((length for _, _, length, _ in self.found), default=0)

    def line(self, what: str, total: int, max_length: int) -> str:
        """One line for the user; "" if nothing was cut."""
        if not self.rows:
            return ""
        inside = f", {self.responses:,} of them in the response" if self.responses else ""
        first = f", the first is {self.found[0][1]}" if self.found[0][1] else ""
        return (
            f"{self.rows:,} of {total:,} {what} are longer than {max_length:,} tokens and were cut{inside}{first}; "
            f"--max-length {self.longest} holds all"
        )


@dataclass
class Encoded:
    """Rows in the order of their examples."""

    rows: list[Row] = field(default_factory=list)
    cut: Cut = field(default_factory=Cut)

    def keep(self, count: int) -> None:
        """Drop all rows but the first ones, and what is known of the others."""
        self.rows, self.cut.found = self.rows[:count], [found for found in self.cut.found if found[0] < count]


def encode_texts(
    texts: Iterable[Text], tokenizer: PreTrainedTokenizerFast, max_length: int, *, train_on_inputs: bool = False
) -> Encoded:
    """Rows whose prompt is tokenized as if nothing followed it, which is how a model meets it when it answers.

    The tokens of a prompt are those of its text alone. Those of the response are the rest of the tokens of both
    together, if these begin with the prompt's; where a token would reach over the boundary, the response is tokenized
    by itself. So no target token holds a part of the prompt, and no prompt ends in tokens that only training sees.

    A row that is too long loses the left of everything before its last response, down to a quarter of max_length; what
    is still too much is cut off the end of the response. The response never goes whole.

    Args:
        texts: rendered records.
        tokenizer: fast, with eos.
        max_length: the most tokens of a row.
        train_on_inputs: every token is a target, not those of responses only.
    """
    result = Encoded()
    backend, eos = tokenizer.backend_tokenizer, tokenizer.eos_token_id
    bos = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    for batch in chunks(texts, _BATCH):
        # every part up to the end of each of its segments, all at once: one call is faster than thousands
        prefixes = [p for text in batch for part in text.parts for p in accumulate(s.text for s in part)]
        encoded = iter([e.ids for e in backend.encode_batch_fast(prefixes, add_special_tokens=False)])
        for text in batch:
            pieces: list[tuple[list[int], bool]] = []
            for part in text.parts:
                pieces += _pieces(part, encoded, backend)
                if text.eos:
                    pieces.append(([eos], part[-1].target))
            result.rows.append(_row(pieces, bos if text.bos else [], max_length, train_on_inputs, result, text.where))
    return result


def encode_labelled(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast, max_length: int, kind: str
) -> Encoded:
    """Rows of one or two texts in the tokenizer's own form, the longer text cut first where they are too long.

    Args:
        examples: with one text or two, all alike.
        tokenizer: fast.
        max_length: the most tokens of a row.
        kind: "classification" or "regression".
    """
    result, backend = Encoded(), tokenizer.backend_tokenizer
    inputs = [example.texts if len(example.texts) > 1 else example.texts[0] for example in examples]
    encoded: list[Any] = [e for batch in chunks(inputs, _BATCH) for e in backend.encode_batch(batch)]
    long = [i for i, e in enumerate(encoded) if len(e.ids) > max_length]
    for i in long:
        result.cut.found.append((i, "", len(encoded[i].ids), False))
    backend.enable_truncation(max_length, strategy="longest_first")
    for i, e in zip(long, backend.encode_batch([inputs[i] for i in long]), strict=True):
        encoded[i] = e
    # it would be saved with the tokenizer
    backend.no_truncation()
    makes_types = "token_type_ids" in tokenizer.model_input_names
    for example, e in zip(examples, encoded, strict=True):
        label = float(example.label) if kind == "regression" else int(example.label)
        types = np.array(e.type_ids, dtype=np.int32) if makes_types and len(example.texts) > 1 else None
        result.rows.append(Row(np.array(e.ids, dtype=np.int32), label, types))
    return result


def chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """The items in lists of `size`, the last one perhaps shorter."""
    rest = iter(items)
    while chunk := list(islice(rest, size)):
        yield chunk


def _pieces(
    part: tuple[Segment, ...], encoded: Iterator[list[int]], backend: Tokenizer
) -> list[tuple[list[int], bool]]:
    pieces: list[tuple[list[int], bool]] = []
    before: list[int] = []
    together = True
    for segment in part:
        joined = next(encoded)
        together = together and joined[: len(before)] == before
        new = joined[len(before) :] if together else backend.encode(segment.text, add_special_tokens=False).ids
        before = before + new
        pieces.append((new, segment.target))
    return pieces


def _row(
    pieces: list[tuple[list[int], bool]],
    bos: list[int],
    max_length: int,
    train_on_inputs: bool,
    result: Encoded,
    where: str,
) -> Row:
    ids = np.array([i for new, _ in pieces for i in new], dtype=np.int32)
    target = np.array([target for new, target in pieces for _ in new], dtype=bool)
    room = max_length - len(bos)
    if len(ids) > room:
        # the last stretch of targets is the last response
        start = len(ids) - int(np.argmin(target[::-1])) if not target.all() else 0
        kept = min(start, max(room - (len(ids) - start), min(start, max_length // PROMPT_SHARE)))
        begin, end = start - kept, start - kept + room
        result.cut.found.append((len(result.rows), where, len(ids) + len(bos), end < len(ids)))
        ids, target = ids[begin:end], target[begin:end]
    labels = np.where(target | train_on_inputs, ids, NO_TARGET).astype(np.int32)
    head = np.array(bos, dtype=np.int32)
    return Row(np.concatenate([head, ids]), np.concatenate([np.full_like(head, NO_TARGET), labels]))
