"""The cache folder: tokenizers and token files that any number of processes may make and read at once."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lowrank_cli.errors import LowrankError


def cache_dir() -> Path:
    """The cache folder: LOWRANK_CACHE, else XDG_CACHE_HOME/lowrank, else ~/.cache/lowrank."""
    if chosen := os.environ.get("LOWRANK_CACHE"):
        return Path(chosen).expanduser()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser() / "lowrank"
    return Path.home() / ".cache" / "lowrank"


def fingerprint(value: Any) -> str:
    """32 hexadecimal digits of a JSON-able value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def cached_folder(kind: str, key: str, make: Callable[[Path], None]) -> Path:
    """The folder ``CACHE/kind/key``, made by ``make(folder)`` unless it is there.

    It is filled under a temporary name and renamed when whole: a kill leaves no half folder. Of two processes
    that make it at once the first to finish wins, and both use the winner's.

    Args:
        kind: what is kept, such as "tokens".
        key: the fingerprint of everything the content depends on.
        make: writes the content into the empty folder it is given.
    Returns:
        The finished folder.
    Raises:
        LowrankError: the cache folder cannot be written.
    """
    folder = cache_dir() / kind / key
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{key[:8]}-", dir=folder.parent))
    except OSError as error:
        raise _unwritable(error) from error
    try:
        # mkdtemp is private to the user; the folder inside has the usual permissions of new files
        whole = scratch / "whole"
        whole.mkdir()
        make(whole)
        try:
            os.replace(whole, folder)
        except OSError:
            # a folder with content cannot be replaced: another process finished first
            if not folder.is_dir():
                raise
    except OSError as error:
        if error.errno is None or not _below(error.filename, scratch):
            raise
        raise _unwritable(error) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _below(path: str | bytes | None, folder: Path) -> bool:
    # a write to an open file names no path: a full disk is such a case
    return path is None or str(path).startswith(str(folder))


def _unwritable(error: OSError) -> LowrankError:
    return LowrankError(
        f"the cache folder {cache_dir()} cannot be written: {error.strerror or error}",
        "set LOWRANK_CACHE to a folder with room that you may write",
    )
