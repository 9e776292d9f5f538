"""The documents or records of one local file, by its ending; every broken record is named by file and line."""

import csv
import gzip
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO, TypeVar

from lowrank_cli.errors import LowrankError, UsageError

ENDINGS = (".txt", ".json", ".jsonl", ".csv", ".txt.gz", ".json.gz", ".jsonl.gz", ".csv.gz", ".parquet")
_BROKEN_GZIP = (gzip.BadGzipFile, EOFError, zlib.error)
Record = TypeVar("Record")
PIECE = 20_000  # characters; a .txt file is cut at blank lines into documents of at most this many


def ending(path: Path) -> str:
    """The ending of a file that is read here, such as ".json.gz", else ""."""
    name = path.name.lower()
    return next((e for e in sorted(ENDINGS, key=len, reverse=True) if name.endswith(e)), "")


def read_documents(path: Path, text_field: str) -> Iterator[str | None]:
    """The documents of a file, in order; None for a record whose text is null.

    Args:
        path: with one of ENDINGS.
        text_field: the key or column of the text; not used for .txt.
    Raises:
        UsageError: the file or a record of it cannot be read.
    """
    if ending(path).startswith(".txt"):
        return _readable(path, _pieces(path))
    return (text_of(record, text_field, where) for where, record in read_records(path, text_field))


def read_records(path: Path, column: str | None = None) -> Iterator[tuple[str, Any]]:
    """The records of a file in order, each after its place for messages, such as "a.jsonl, line 3".

    Args:
        path: with one of ENDINGS but .txt.
        column: the only one that is read of a .parquet file; None reads all.
    Raises:
        UsageError: the file or a record of it cannot be read, or is not of this kind.
    """
    if ending(path).startswith(".txt"):
        raise UsageError(f"{path} is plain text, which has no records", "give a .json, .jsonl, .csv or .parquet file")
    return _readable(path, _parquet(path, column) if ending(path) == ".parquet" else _text_file(path))


def _readable(path: Path, items: Iterator[Record]) -> Iterator[Record]:
    def broken(error: Exception) -> UsageError:
        if isinstance(error, UnicodeDecodeError):
            return UsageError(f"{path} is not UTF-8 text: {error.reason}", "save it as UTF-8")
        if isinstance(error, _BROKEN_GZIP):
            return UsageError(
                f"{path} is not a whole gzip file: {error}",
                f"fetch or compress it again; `gzip -t {path.name}` checks one",
            )
        return UsageError(f"{path} cannot be read: {error}", "check the file and its permissions")

    return translated(items, (UnicodeDecodeError, *_BROKEN_GZIP, OSError), broken)


def translated(
    records: Iterator[Record],
    errors: tuple[type[Exception], ...],
    translate: Callable[[Exception], LowrankError],
) -> Iterator[Record]:
    """The records, with the errors of reading them turned into the user's."""
    # no yield inside the try: a generator dropped at exit would look for exceptions of modules that are gone
    while True:
        try:
            record = next(records)
        except StopIteration:
            return
        except errors as error:
            raise translate(error) from error
        yield record


def pieces(lines: Iterable[str], limit: int = PIECE) -> Iterator[str]:
    """Text cut at blank lines into pieces of at most ``limit`` characters, as long as they can be.

    A paragraph longer than that is cut at a line. The pieces joined are the text.

    Args:
        lines: with their line ends, each at most ``limit`` long.
        limit: characters in a piece.
    """
    piece: list[str] = []
    size = 0
    cut = 0  # lines of the piece up to and with the last blank one
    for line in lines:
        if size + len(line) > limit and piece:
            cut = cut or len(piece)
            yield "".join(piece[:cut])
            piece, cut = piece[cut:], 0
            size = sum(map(len, piece))
            if size + len(line) > limit:
                yield "".join(piece)
                piece, size = [], 0
        piece.append(line)
        size += len(line)
        if not line.strip():
            cut = len(piece)
    if piece:
        yield "".join(piece)


def _pieces(path: Path) -> Iterator[str]:
    with _open_text(path) as file:
        yield from pieces(iter(lambda: file.readline(PIECE), ""))


def _text_file(path: Path) -> Iterator[tuple[str, Any]]:
    kind = ending(path)
    with _open_text(path) as file:
        if kind.startswith(".csv"):
            yield from _csv(path, file)
        elif kind.startswith(".jsonl") or not _starts_with_bracket(file):
            yield from _json_lines(path, file)
        else:
            yield from _json_list(path, file)


def _open_text(path: Path) -> TextIO:
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    # a csv value may hold line breaks, which newline="" keeps
    newline = "" if ".csv" in ending(path) else None
    return opener(path, "rt", encoding="utf-8-sig", newline=newline)


def _starts_with_bracket(file: TextIO) -> bool:
    while (character := file.read(1)).isspace():
        pass
    file.seek(0)
    return character == "["


def _json_lines(path: Path, file: TextIO) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(
                f"{path}, line {number}: not JSON ({error.msg}, column {error.colno})",
                "a .json file is a list of objects or one object a line; a .jsonl file is one object a line",
            ) from error
        yield f"{path}, line {number}", record


def _json_list(path: Path, file: TextIO) -> Iterator[tuple[str, Any]]:
    try:
        records = json.load(file)
    except json.JSONDecodeError as error:
        raise UsageError(
            f"{path}, line {error.lineno}: not JSON ({error.msg}, column {error.colno})",
            "a .json file is a list of objects or one object a line",
        ) from error
    for number, record in enumerate(records, 1):
        yield f"{path}, record {number}", record


def _csv(path: Path, file: TextIO) -> Iterator[tuple[str, Any]]:
    # the default of 128 KiB a value is less than one long document
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    reader = csv.DictReader(file)

    def broken(error: Exception) -> UsageError:
        return UsageError(
            f"{path}, line {reader.line_num}: not CSV ({error})",
            "save it as comma-separated UTF-8 with the column names in the first line",
        )

    for row in translated(iter(reader), (csv.Error,), broken):
        yield f"{path}, line {reader.line_num}", row


def _parquet(path: Path, column: str | None) -> Iterator[tuple[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    def broken(error: Exception) -> UsageError:
        return UsageError(
            f"{path} is not a readable parquet file: {str(error).splitlines()[0]}", "fetch or write it again"
        )

    def rows() -> Iterator[dict[str, Any]]:
        with parquet.ParquetFile(path) as file:
            if column is not None and column not in file.schema_arrow.names:
                raise _no_field(str(path), column, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=1024, columns=None if column is None else [column]):
                yield from batch.to_pylist()

    for number, row in enumerate(translated(rows(), (pyarrow.ArrowException, OSError), broken), 1):
        yield f"{path}, record {number}", row


def text_of(record: Any, text_field: str, where: str) -> str | None:
    """The text of a record; UsageError with the place if it has none."""
    if not isinstance(record, dict):
        raise UsageError(
            f"{where}: a record is an object with a '{text_field}' key, not {kind_of(record)}",
            'one object a line, such as {"text": "..."}',
        )
    if text_field not in record:
        raise _no_field(where, text_field, record)
    text = record[text_field]
    if text is not None and not isinstance(text, str):
        raise UsageError(f"{where}: '{text_field}' is {kind_of(text)}, not text", "name another key with --text-field")
    return text


def _no_field(where: str, text_field: str, keys: Iterable[str]) -> UsageError:
    known = ", ".join(str(key) for key in keys) or "none"
    return UsageError(f"{where}: no '{text_field}'; keys: {known}", "name the key of the text with --text-field")


def kind_of(value: Any) -> str:
    """What a JSON value is, in a user's words."""
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        type(None): "null",
    }
    return names.get(type(value), f"of type {type(value).__name__}")
