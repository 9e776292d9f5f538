"""Explain in one sentence, the same from every command, what a machine lacks: memory, room, permission, a home."""

from __future__ import annotations

import errno
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lowrank_cli.errors import LowrankError, PreflightError, UsageError

# what only a write raises, and what another place helps against
_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
# PyTorch on a CPU, CUDA, cuBLAS and cuDNN
_MEMORY = re.compile(r"can't allocate memory|out of memory|_ALLOC_FAILED")
_NUMBER = re.compile(r"\(os error (\d+)\)")


def explained(error: BaseException, place: Path | str | None = None) -> LowrankError | None:
    """Return an error of the machine as a sentence with a way out; None for any other error.

    Args:
        error: whatever was raised.
        place: the folder that was being written, for errors that name no file.
    """
    if isinstance(error, LowrankError):
        return error
    number, text = number_of(error), str(error)
    out_of_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if out_of_memory or number == errno.ENOMEM or (isinstance(error, RuntimeError) and _MEMORY.search(text)):
        return _memory(text)
    if isinstance(error, RuntimeError) and text.startswith("Symlink loop"):
        return UsageError(
            f"a path is a link that leads in a circle: {text.partition(' from ')[2]}", "take another path"
        )
    if isinstance(error, RuntimeError) and "home directory" in text:
        return LowrankError(
            "there is no home folder to keep a cache in", "set LOWRANK_CACHE or HOME to a folder that you may write"
        )
    file = getattr(error, "filename", None)
    if number in _WRITING:
        return unwritten(error, file or place)
    if number is None or file is None:
        return None
    return LowrankError(f"could not read or write {file}: {reason(error)}", "check the path and its permissions")


@contextmanager
def writing(place: Path | str) -> Iterator[None]:
    """Turn what goes wrong while a place is written, and nothing else is done, into an error that names it.

    Raises:
        LowrankError: the disk is full, the folder is read-only, or the like.
    """
    try:
        yield
    except Exception as error:
        # libraries in Rust raise classes of their own
        if number_of(error) is None:
            raise
        raise unwritten(error, place) from None


def check_writable(place: Path) -> None:
    """Raise LowrankError unless something could be written to a folder, which need not be there, before long work."""
    there = next(path for path in (place, *place.parents) if path.exists())
    with writing(place), tempfile.TemporaryFile(dir=there):
        pass


def unwritten(error: BaseException, place: Path | str | None) -> LowrankError:
    """Return the error for a file or folder that could not be written."""
    where = f" {place}" if place else ""
    hint = (
        "choose a place that you may write" if number_of(error) in _FORBIDDEN else "make room, or choose another place"
    )
    return LowrankError(f"could not write{where}: {reason(error)}", f"{hint} with --out")


def number_of(error: BaseException) -> int | None:
    """Return the system's number of an error: Python's, or the one in the text of a library in Rust."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = _NUMBER.search(str(error))
    return int(found[1]) if found else None


def reason(error: BaseException) -> str:
    """Return what the system said, short: no space left on device."""
    number = number_of(error)
    text = os.strerror(number) if number else " ".join(str(error).split()) or type(error).__name__
    return text[:1].lower() + text[1:200]


def _memory(text: str) -> PreflightError:
    device = "the GPU" if "CUDA" in text or "CUBLAS" in text else "this machine"
    asked = re.search(r"ried to allocate ([\d.]+ \w+)", text)
    size = f": {asked[1]} more were asked for" if asked else ""
    return PreflightError(
        f"{device} is out of memory{size}",
        "lower --batch-size or --max-length, or take --dtype bfloat16; --dry-run and --memory-budget tell beforehand",
    )
