"""The cache folder: tokenizers and token files that any number of processes may make and read at once."""

import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from lowrank_cli import console
from lowrank_cli.errors import LowrankError
from lowrank_cli.foreign import inside, read_json

MANIFEST = "manifest.json"  # size and checksum of each file of an entry
# of a larger file so many blocks, the first and the last among them, are in its checksum
BLOCKS, BLOCK_BYTES = 64, 1 << 16
_SCRATCH = re.compile(r"\.[^-]+-(?P<host>.+)-(?P<pid>\d+)-\w+")


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
    """Return the folder ``CACHE/kind/key``, made by ``make(folder)`` unless it is there.

    It is filled under a temporary name, flushed to the disk, and renamed when whole: a kill leaves no half folder. Of
    two processes that make it at once the first to finish wins, and both use the winner's. A folder whose files are
    not those of its manifest is made again.

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
        if not (damage := _damage(folder)):
            return folder
        console.note(f"an entry of the cache is damaged and is made again: {damage}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder.parent)
        prefix = f".{key[:8]}-{socket.gethostname()}-{os.getpid()}-"
        scratch = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    except OSError as error:
        raise _unwritable(error) from error
    try:
        # mkdtemp is private to the user; the folder inside has the usual permissions of new files
        whole = scratch / "whole"
        whole.mkdir()
        make(whole)
        sums = {path.relative_to(whole).as_posix(): _checksum(path) for path in whole.rglob("*") if path.is_file()}
        (whole / MANIFEST).write_text(json.dumps(sums), encoding="utf-8")
        _flush(*whole.rglob("*"), whole)
        _give_name(whole, folder, scratch)
        _flush(folder.parent)
    except OSError as error:
        if error.errno is None or not _below(error.filename, scratch):
            raise
        raise _unwritable(error) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _damage(folder: Path) -> str:
    """Return what is wrong with an entry, "" if it is whole."""
    where = folder / MANIFEST
    try:
        for name, checksum in read_json(where).items():
            if _checksum(path := inside(folder, name, where)) != checksum:
                return f"{path} is not as it was written"
    except LowrankError as error:
        return error.message
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    return ""


def _checksum(path: Path) -> list[Any]:
    """Return a file's size, and a digest of it or of blocks all over it."""
    size, digest = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        if size <= BLOCKS * BLOCK_BYTES:
            digest.update(file.read())
        else:
            for number in range(BLOCKS):
                file.seek((size - BLOCK_BYTES) * number // (BLOCKS - 1))
                digest.update(file.read(BLOCK_BYTES))
    return [size, digest.hexdigest()[:32]]


def _flush(*paths: Path) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _give_name(whole: Path, folder: Path, scratch: Path) -> None:
    """Move a whole entry to its place, unless another process has put one there that is whole."""
    while True:
        try:
            os.replace(whole, folder)
            return
        except OSError:
            # a folder with content cannot be replaced
            if not folder.is_dir():
                raise
        if not _damage(folder):
            return
        with suppress(FileNotFoundError):
            os.replace(folder, tempfile.mkdtemp(dir=scratch))


def _remove_leftovers(parent: Path) -> None:
    """Remove what processes of this machine that are gone have left half-made."""
    for path in parent.glob(".*"):
        named = _SCRATCH.fullmatch(path.name)
        if named and named["host"] == socket.gethostname() and _is_gone(int(named["pid"])):
            shutil.rmtree(path, ignore_errors=True)


def _is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def _below(path: str | bytes | None, folder: Path) -> bool:
    # a write to an open file names no path: a full disk is such a case
    return path is None or str(path).startswith(str(folder))


def _unwritable(error: OSError) -> LowrankError:
    return LowrankError(
        f"the cache folder {cache_dir()} cannot be written: {error.strerror or error}",
        "set LOWRANK_CACHE to a folder with room that you may write",
    )


def is_offline(offline: bool) -> bool:
    """Return whether the caller or the environment (HF_HUB_OFFLINE, HF_DATASETS_OFFLINE) forbids the network."""
    forbidden = ("1", "ON", "YES", "TRUE")
    return offline or any(
        os.environ.get(name, "").upper() in forbidden for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    )
