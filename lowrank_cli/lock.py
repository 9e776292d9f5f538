"""The lock that keeps two processes from writing into one folder at once."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lowrank_cli.errors import UsageError
from lowrank_cli.misfortune import writing

NAME = ".lock"
# file systems without locks, such as some network shares
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the kernel frees it when this process dies, however it does.

    Args:
        folder: exists. While it is locked its file `.lock` holds host and pid.
    Raises:
        UsageError: another process has it.
        LowrankError: the folder cannot be written.
    """
    path = folder / NAME
    while True:
        with writing(folder):
            file = path.open("a+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            with file:
                if error.errno in _UNSUPPORTED:
                    break
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise
                file.seek(0)
                host, _, pid = file.read(300).strip().partition(" ")
            who = f"process {pid} on {host}" if pid else "another process"
            raise UsageError(
                f"{folder} is in use: {who} writes into it", "wait for its end, stop it, or take another folder"
            ) from None
        if _is_current(file.fileno(), path):
            break
        # another process has removed it since it was opened
        file.close()
    try:
        if not file.closed:
            with writing(folder):
                file.truncate(0)
                # unbuffered: what did not fit would be written again when the file is closed
                os.write(file.fileno(), f"{socket.gethostname()} {os.getpid()}\n".encode())
        yield
    finally:
        if not file.closed:
            with suppress(OSError):
                path.unlink()
            file.close()


def _is_current(descriptor: int, path: Path) -> bool:
    """Return whether an open file is the one that the path names."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    own = os.fstat(descriptor)
    return (there.st_dev, there.st_ino) == (own.st_dev, own.st_ino)
