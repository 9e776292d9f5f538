"""Show the user what a command does while it runs: one line per event on stderr, kept in the run's log.txt as well.

A terminal or a pipe that goes away loses its lines and stops nothing: writing to either stream does not raise.
"""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from rich.progress import Progress

SILENT, QUIET, NORMAL, VERBOSE = -1, 0, 1, 2
# C0 but tab and line feed, DEL, C1, and the marks that turn the direction of the text around them
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


class Stream:
    """A standard stream as a file that raises nothing: once it takes no more, what is written is dropped.

    Args:
        stream: returns the stream of the moment; None if there is none.
    Attributes:
        error: why it took no more, "" if it took everything.
    """

    def __init__(self, stream: Callable[[], TextIO | None]):
        self._stream, self.error = stream, ""

    def __getattr__(self, name: str) -> Any:
        # asked for by rich, which would then write there itself
        if name == "rich_proxied_file":
            raise AttributeError(name)
        return getattr(self._stream(), name)

    def write(self, text: str) -> int:
        self._do("write", text)
        return len(text)

    def flush(self) -> None:
        self._do("flush")

    def _do(self, action: str, *arguments: str) -> None:
        stream = self._stream()
        try:
            if stream is not None:
                getattr(stream, action)(*arguments)
        except BlockingIOError:
            # a pipe that is full for the moment
            pass
        except (OSError, ValueError) as error:
            self.error = (getattr(error, "strerror", None) or str(error)).lower()
            # what libraries write there and what Python flushes at its exit would raise again
            with suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)


def _screen() -> TextIO | None:
    # while a bar moves, rich has its own in the place of sys.stderr
    return getattr(sys.stderr, "rich_proxied_file", sys.stderr)


# nothing that is printed is markup: paths, names and records have brackets and colons of their own
stderr = Console(file=Stream(_screen), markup=False, emoji=False, highlight=False, soft_wrap=True)
_level = NORMAL
_muted = False
_log: Path | None = None
_early: list[str] = []


def set_level(level: int) -> None:
    """QUIET prints only warnings and errors, VERBOSE also details, SILENT nothing."""
    global _level
    _level = level


def log_to(path: Path | None) -> None:
    """From now on every line is appended to this file too, after those that were printed before there was one."""
    global _log
    _log = path
    if path is not None:
        while _early:
            log_only(_early.pop(0))


def log_only(text: str) -> None:
    """A line for log.txt alone."""
    if _log is None:
        _early.append(text)
        return
    # a full disk must not keep an error from being shown
    with suppress(OSError), _log.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(visible(text) + "\n")


def visible(text: str) -> str:
    """Return the text with control characters written out, such as \\x1b: they would steer the terminal."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


@contextmanager
def streams() -> Iterator[Stream]:
    """Make stdout and stderr take everything: characters that their encoding lacks are written out, such as \\u2022
    where it is ASCII, and nothing raises. Yields stdout, whose `error` says in the end what became of it."""
    before = sys.stdout
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    guarded = Stream(lambda: before)
    sys.stdout = before and guarded
    try:
        yield guarded
    finally:
        guarded.flush()
        sys.stdout = before


def output(text: str) -> None:
    """Print a result on stdout."""
    print(visible(text), flush=True)


@contextmanager
def muted() -> Iterator[None]:
    """Nothing is printed or logged in here: for what is done over again only to look at it."""
    global _muted
    before, _muted = _muted, True
    try:
        yield
    finally:
        _muted = before


def _print(text: str, style: str, level: int) -> None:
    if _muted:
        return
    log_only(text)
    if _level >= level:
        stderr.print(visible(text), style=style or None)


def note(text: str) -> None:
    """A line about what happens."""
    _print(text, "", NORMAL)


def detail(text: str) -> None:
    """A line that only -v shows."""
    _print(text, "dim", VERBOSE)


def warn(text: str) -> None:
    """A line that -q shows too."""
    _print(f"warning: {text}", "yellow", QUIET)


def error(message: str, hint: str = "") -> None:
    """Print what happened and, with a hint, what to type instead."""
    _print(f"error: {message}", "bold red", QUIET)
    if hint:
        _print(f"hint:  {hint}", "", QUIET)


def table(title: str, columns: list[str], rows: list[list[Any]], *, right: tuple[int, ...] = ()) -> None:
    """A table on stderr, and as plain lines in the log."""
    view = Table(title=visible(title), title_justify="left", title_style="bold", header_style="bold")
    for i, column in enumerate(columns):
        view.add_column(visible(column), justify="right" if i in right else "left", overflow="fold")
    for row in rows:
        view.add_row(*(visible(str(cell)) for cell in row))
    if _level >= NORMAL:
        stderr.print(view)
    for row in [columns, *rows]:
        log_only("  ".join(str(cell) for cell in row))


def quiet_libraries() -> None:
    """Keep the bars and advice of the libraries off the screen: this program says what it does itself."""
    import logging

    # bitsandbytes, which transformers imports, advises to install a package that only 4-bit weights on a CPU would use
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # what the hub says while it retries; the error in the end is ours
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def bar() -> Progress:
    """A moving bar with a description, what is done of the whole, and the time that is left."""
    from rich import progress as rich

    description = rich.TextColumn("{task.description}", markup=False)
    columns = (description, rich.BarColumn(), rich.MofNCompleteColumn(), rich.TimeRemainingColumn())
    return rich.Progress(*columns, console=stderr, transient=True)


def is_live() -> bool:
    """Return whether a moving progress display makes sense: stderr is a terminal, and lines are shown there."""
    return stderr.is_terminal and _level >= NORMAL


def human_bytes(count: float) -> str:
    """1.5 GiB, 320 MiB, ..."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or abs(count) >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def human_count(count: float) -> str:
    """1.9M, 58.1M, 6.7B, ..."""
    for unit in ("", "K", "M", "B"):
        if abs(count) < 1000:
            return f"{count:.0f}{unit}" if not unit or abs(count) >= 100 else f"{count:.1f}{unit}"
        count /= 1000
    return f"{count:.1f}T"
