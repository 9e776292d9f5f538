"""What a user sees while a command runs: one line per event on stderr, kept in the run's log.txt as well."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

SILENT, QUIET, NORMAL, VERBOSE = -1, 0, 1, 2

stderr = Console(stderr=True, highlight=False, soft_wrap=True)
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
    with suppress(OSError), _log.open("a", encoding="utf-8") as file:
        file.write(text + "\n")


@contextmanager
def muted() -> Iterator[None]:
    """Nothing is printed or logged in here: for what is done over again only to look at it."""
    global _muted
    before, _muted = _muted, True
    try:
        yield
    finally:
        _muted = before


def _print(text: str, markup: str, level: int) -> None:
    if _muted:
        return
    log_only(text)
    if _level >= level:
        stderr.print(text, style=markup or None, markup=False)


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
    """What happened and what to type instead."""
    _print(f"error: {message}", "bold red", QUIET)
    if hint:
        _print(f"hint:  {hint}", "", QUIET)


def table(title: str, columns: list[str], rows: list[list[Any]], *, right: tuple[int, ...] = ()) -> None:
    """A table on stderr, and as plain lines in the log."""
    view = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for i, column in enumerate(columns):
        view.add_column(column, justify="right" if i in right else "left", overflow="fold")
    for row in rows:
        view.add_row(*(str(cell) for cell in row))
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


def is_live() -> bool:
    """Whether a moving progress display makes sense."""
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
