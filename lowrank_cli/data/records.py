"""The documents or records of one local file, by its ending; every broken record is named by file and line."""

import bz2
import csv
import gzip
import lzma
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TextIO, TypeVar

from lowrank_cli.errors import LowrankError, MissingError, UsageError
from lowrank_cli.foreign import parse_json

# the opener of a compressed file by its last ending, and the program that checks one
_COMPRESSED = {".gz": (gzip.open, "gzip"), ".bz2": (bz2.open, "bzip2"), ".xz": (lzma.open, "xz")}
ENDINGS = (
    *(text + more for more in ("", *_COMPRESSED) for text in (".txt", ".json", ".jsonl", ".csv")),
    ".parquet",
)
_BROKEN_COMPRESSION = (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError)
_NOT_JSON = "a .json file is a list of objects or one object a line; a .jsonl file is one object a line"
_NOT_CSV = "the first line names the columns; a value with a comma, a quote or a line end stands in quotes"
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


def read_records(
    path: Path, column: str | None = None, broken: Callable[[UsageError], None] | None = None
) -> Iterator[tuple[str, Any]]:
    """The records of a file in order, each after its place for messages, such as "a.jsonl, line 3".

    Args:
        path: with one of ENDINGS but .txt.
        column: the only one that is read of a .parquet file; None reads all.
        broken: takes the error of a line that is no record, and the next one is read; None raises it.
    Raises:
        UsageError: the file or a record of it cannot be read, or is not of this kind.
        MissingError: there is no such file.
    """
    if ending(path).startswith(".txt"):
        raise UsageError(f"{path} is plain text, which has no records", "give a .json, .jsonl, .csv or .parquet file")
    if ending(path) == ".parquet":
        return _readable(path, _parquet(path, column))
    return _readable(path, _text_file(path, broken or _stop))


def read_examples(path: Path) -> tuple[dict[str, Any], list[tuple[str, Any]]]:
    """Read the records of a published test set: JSON lines, a list, or an object with a list under `examples`.

    Returns:
        What stands beside the list, {} unless the file is an object; and the records after their places.
    Raises:
        UsageError: the file is none of these.
        MissingError: there is no such file.
    """
    first, _, rest = ("", "", "") if ".jsonl" in ending(path) else read_whole(path).lstrip().partition("\n")
    if not first or (rest.strip() and first.startswith("{") and first.rstrip().endswith("}")):
        return {}, list(read_records(path))
    content = parse_json(f"{first}\n{rest}", str(path), "fetch it again")
    records = content.get("examples", content) if isinstance(content, dict) else content
    if not isinstance(records, list):
        raise UsageError(f"{path} holds {kind_of(records)}, not a list of examples", "fetch it again")
    about = content if isinstance(content, dict) else {}
    return about, [(f"{path}, record {number}", record) for number, record in enumerate(records, 1)]


def read_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Read the rows of a CSV file that are not blank, each after the number of its first line.

    Raises:
        UsageError: the file cannot be read, or is not CSV.
        MissingError: there is no such file.
    """
    return _readable(path, _rows(path))


def read_lines(path: Path) -> Iterator[str]:
    """Read the lines of a text file, which end in \\n alone, with their ends; raises as `read_rows` does."""

    def lines() -> Iterator[str]:
        with _open_text(path, newline="\n") as file:
            yield from _lines(path, file)

    return _readable(path, lines())


def read_whole(path: Path) -> str:
    """Read a text file at once; raises as `read_rows` does."""

    def whole() -> Iterator[str]:
        with _open_text(path) as file:
            yield file.read()

    return next(_readable(path, whole()))


def _stop(error: UsageError) -> NoReturn:
    raise error


def _readable(path: Path, items: Iterator[Record]) -> Iterator[Record]:
    def broken(error: Exception) -> LowrankError:
        if isinstance(error, UnicodeDecodeError):
            return UsageError(f"{path} is not UTF-8 text: {error.reason}", "save it as UTF-8")
        if isinstance(error, FileNotFoundError):
            return MissingError(f"there is no file {path}", "check the path, and get the whole set if it is of one")
        # bzip2's errors are OSErrors that the system did not give
        if path.suffix.lower() in _COMPRESSED and (isinstance(error, _BROKEN_COMPRESSION) or error.errno is None):
            program = _COMPRESSED[path.suffix.lower()][1]
            return UsageError(
                f"{path} is not a whole {program} file: {error}",
                f"fetch or compress it again; `{program} -t {path.name}` checks one",
            )
        return UsageError(f"{path} cannot be read: {error}", "check the file and its permissions")

    return translated(items, (UnicodeDecodeError, *_BROKEN_COMPRESSION, OSError), broken)


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
        except (LowrankError, MemoryError):
            raise
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
        yield from pieces(_lines(path, file, PIECE))


def _lines(path: Path, file: TextIO, limit: int = -1) -> Iterator[str]:
    """Yield the lines of a file, those over the limit in several; a NUL byte is an error."""
    number = 1
    while line := file.readline(limit):
        if "\0" in line:
            raise UsageError(
                f"{path}, line {number}: a NUL byte, which no text holds", "save it as UTF-8, or fetch it again"
            )
        number += line.endswith(("\n", "\r"))
        yield line


def _text_file(path: Path, broken: Callable[[UsageError], None]) -> Iterator[tuple[str, Any]]:
    if ending(path).startswith(".csv"):
        yield from _csv(path, broken)
        return
    with _open_text(path) as file:
        if ending(path).startswith(".jsonl") or not _starts_with_bracket(file):
            yield from _json_lines(path, file, broken)
        else:
            yield from _json_list(path, file)


def _open_text(path: Path, newline: str | None = None) -> TextIO:
    opener = _COMPRESSED[path.suffix.lower()][0] if path.suffix.lower() in _COMPRESSED else open
    return opener(path, "rt", encoding="utf-8-sig", newline=newline)


def _starts_with_bracket(file: TextIO) -> bool:
    while (character := file.read(1)).isspace():
        pass
    file.seek(0)
    return character == "["


def _json_lines(path: Path, file: TextIO, broken: Callable[[UsageError], None]) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(file, 1):
        where = f"{path}, line {number}"
        try:
            found = [(where, parse_json(line.rstrip(), where, _NOT_JSON))] if line.strip() else []
        except UsageError as error:
            broken(error)
            continue
        yield from found


def _json_list(path: Path, file: TextIO) -> Iterator[tuple[str, Any]]:
    for number, record in enumerate(parse_json(file.read(), str(path), _NOT_JSON), 1):
        yield f"{path}, record {number}", record


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    # the default of 128 KiB a value is less than one long document
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    # a value may hold line breaks, which newline="" keeps
    with _open_text(path, newline="") as file:
        # strict: a quote that is never closed would swallow the rest of the file
        reader = csv.reader(_lines(path, file), strict=True)
        while True:
            first = reader.line_num + 1
            try:
                row = next(reader, None)
            except csv.Error as error:
                raise UsageError(f"{path}, line {first}: not CSV ({error})", _NOT_CSV) from None
            if row is None:
                return
            if row:
                yield first, row


def _csv(path: Path, broken: Callable[[UsageError], None]) -> Iterator[tuple[str, Any]]:
    rows = _rows(path)
    number, names = next(rows, (1, []))
    double = next((name for name in names if names.count(name) > 1), None)
    # a table that was written with the numbers of its rows has no name for their column
    if double is not None or "" in names[1:] or names == [""]:
        what = f"'{double}' twice" if double else "a column without a name"
        raise UsageError(f"{path}, line {number}: the header has {what}", "give each column a name of its own")
    for number, row in rows:
        where = f"{path}, line {number}"
        if len(row) == len(names):
            yield where, dict(zip(names, row, strict=True))
        else:
            broken(UsageError(f"{where}: {len(row)} cells, and the header has {len(names)}", _NOT_CSV))


def _parquet(path: Path, column: str | None) -> Iterator[tuple[str, Any]]:
    from pyarrow import parquet

    def broken(error: Exception) -> UsageError:
        lines = str(error).splitlines() or [type(error).__name__]
        return UsageError(f"{path} is not a readable parquet file: {lines[0]}", "fetch or write it again")

    def rows() -> Iterator[dict[str, Any]]:
        with parquet.ParquetFile(path) as file:
            if column is not None and column not in file.schema_arrow.names:
                raise _no_field(str(path), column, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=1024, columns=None if column is None else [column]):
                yield from batch.to_pylist()

    # pyarrow raises anything for a broken file
    for number, row in enumerate(translated(rows(), (Exception,), broken), 1):
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
    """Return the kind of a JSON value in a user's words, such as "an object"."""
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
