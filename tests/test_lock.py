"""The lock of a folder, between real processes."""

import errno
import os
import socket
import subprocess
import sys

import pytest

from lowrank_cli.errors import LowrankError, UsageError
from lowrank_cli.lock import NAME, locked

HOLD = """
import sys
from pathlib import Path
from lowrank_cli.lock import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that has the lock of the test's folder until its stdin ends."""
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "locked\n"
    yield child
    child.kill()
    child.communicate()


def test_the_second_says_which_host_and_pid_has_it(tmp_path, holder):
    with pytest.raises(UsageError, match=f"process {holder.pid} on {socket.gethostname()}"), locked(tmp_path):
        pass
    assert (tmp_path / NAME).read_text().split() == [socket.gethostname(), str(holder.pid)]


def test_a_killed_process_frees_it(tmp_path, holder):
    holder.kill()
    holder.wait()
    assert (tmp_path / NAME).is_file()
    with locked(tmp_path):
        assert (tmp_path / NAME).read_text().split()[1] == str(os.getpid())


def test_leaves_nothing_behind(tmp_path, holder):
    holder.communicate("")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ZeroDivisionError), locked(tmp_path):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_named(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(LowrankError, match=f"could not write {tmp_path}: no space left on device"), locked(tmp_path):
        pass
