"""Questions of a causal task as batches that a model answers by likelihood.

B: rows of a batch, C: the most choices that a question of it has.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from lowrank_cli.data.conversations import Record
from lowrank_cli.data.examples import NO_TARGET, Encoded, Row, chunks
from lowrank_cli.data.tokens import Batch


@dataclass(frozen=True, eq=False)
class _Asked:
    record: int
    choice: int
    right: int
    row: Row


class Questions:
    """The questions of a task, tokenized on first use.

    Args:
        records: the questions; those without choices are open.
        encode: records as rows.
        collate: rows as a batch.
        eos_token_id: is no part of a choice.
    """

    def __init__(
        self,
        records: list[Record],
        encode: Callable[[list[Record]], Encoded],
        collate: Callable[[list[Row]], Batch],
        eos_token_id: int,
    ):
        self._records, self._encode, self._collate, self._eos = records, encode, collate, eos_token_id
        self._asked: list[_Asked] | None = None

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """The questions, longest first; the same every time.

        Where every choice of every question is one token, a question is one row: its batch has choices (B, C) int64,
        the tokens of the choices, -1 behind them. Otherwise a question has a row for each choice, with labels on its
        tokens without end of text, and an open question one with labels on the whole right answer; such a batch has
        choice (B,) int64. All have record and right (B,) int64: which question a row is of, and its right choice.
        """
        if self._asked is None:
            self._asked = sorted(self._rows(), key=lambda asked: len(asked.row), reverse=True)
        first = self._first_choices() if self._one_token() else None
        for part in chunks(self._asked if first is None else list(first), batch_size):
            batch = self._collate([asked.row for asked in part])
            batch |= {key: torch.tensor([getattr(asked, key) for asked in part]) for key in ("record", "right")}
            if first is None:
                yield batch | {"choice": torch.tensor([asked.choice for asked in part])}
            else:
                tokens = [torch.tensor(first[asked]) for asked in part]
                yield batch | {"choices": torch.nn.utils.rnn.pad_sequence(tokens, True, padding_value=-1)}

    def _rows(self) -> Iterator[_Asked]:
        asked = []
        for number, question in enumerate(self._records):
            right = question.turns[-1].response
            choices = question.choices or (right,)
            asked += [(number, choice, choices.index(right)) for choice in range(len(choices))]
        for part in chunks(asked, 1024):
            rows = self._encode([_answered(self._records[number], choice) for number, choice, _ in part]).rows
            for (number, choice, right), row in zip(part, rows, strict=True):
                closed = bool(self._records[number].choices)
                yield _Asked(number, choice, right, self._without_eos(row) if closed else row)

    def _without_eos(self, row: Row) -> Row:
        last = len(row) - 1
        if row.ids[last] != self._eos:
            return row
        return Row(row.ids[:last], row.labels[:last])

    def _one_token(self) -> bool:
        closed = all(record.choices for record in self._records)
        return closed and all(asked.row.targets == 1 for asked in self._asked)

    def _first_choices(self) -> dict[_Asked, list[int]]:
        """The row of the first choice of each question, with the tokens of all of them."""
        rows = {(asked.record, asked.choice): asked for asked in self._asked}
        tokens = {key: int(asked.row.ids[asked.row.labels != NO_TARGET][0]) for key, asked in rows.items()}
        return {
            asked: [tokens[asked.record, c] for c in range(len(self._records[asked.record].choices))]
            for asked in self._asked
            if asked.choice == 0
        }


def _answered(question: Record, choice: int) -> Record:
    if not question.choices:
        return question
    last = replace(question.turns[-1], response=question.choices[choice])
    return replace(question, turns=(*question.turns[:-1], last))
