"""Command lines as real processes that cost no imports: each is forked from this process, which is warm already.

A child has a session of its own, /dev/null as stdin and pipes as stdout and stderr, which a limit on the size of files
does not reach. It can be killed at any moment, and nothing of it is left here.
"""

from __future__ import annotations

import gc
import json
import os
import selectors
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from places import places

# seconds after which a process is given up
LIMIT = 120
# added to every command line
MORE: list[str] = []
# how long the other ranks live on after one was killed
LONELY = 0.2


@dataclass
class Outcome:
    """What a command line came to.

    Attributes:
        code: exit code; negative for a signal.
        late: it was ended because its time was over.
        killed: it was alive when it was to be killed.
    """

    line: list[str]
    code: int
    out: str
    err: str
    seconds: float
    late: bool = False
    killed: bool = False

    def text(self) -> str:
        """Return the command line, its end and the last of what it printed."""
        end = "over the limit" if self.late else f"exit code {self.code}"
        line = " ".join(ascii(word) if not word.isprintable() or " " in word else word for word in self.line)
        return f"$ lowrank {line[:2000]}\n{end} after {self.seconds:.1f} s\n{self.out[-2000:]}{self.err[-6000:]}"


def run(
    line: list[str],
    folder: Path,
    *,
    before: Callable[[], None] | None = None,
    ranks: int = 1,
    limit: float = LIMIT,
    kill_at: float | None = None,
    first: int = 0,
) -> Outcome:
    """Run a command line in a folder and wait for its end.

    Args:
        line: the arguments of `lowrank`.
        folder: the current folder of the process.
        before: called in the child before the command; may patch the product or limit the process.
        ranks: processes that run the same line, as torchrun starts them.
        limit: seconds.
        kill_at: seconds after which it gets SIGKILL.
        first: of several ranks the one that is killed first.
    """
    line, (out, err) = [*line, *MORE], (os.pipe(), os.pipe())
    began = time.monotonic()
    pids = []
    for place in places(ranks):
        pid = os.fork()
        if pid == 0:
            be_command(line, folder, place, before, out[1], err[1])
        pids.append(pid)
    os.close(out[1])
    os.close(err[1])
    texts, codes, killed, late = {out[0]: b"", err[0]: b""}, {}, False, False
    with selectors.DefaultSelector() as selector:
        for pipe in texts:
            os.set_blocking(pipe, False)
            selector.register(pipe, selectors.EVENT_READ)
        while len(codes) < len(pids):
            for key, _ in selector.select(0.01) if selector.get_map() else ():
                read(key.fd, texts, selector)
            for pid in set(pids) - set(codes):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    codes[pid] = os.waitstatus_to_exitcode(status)
            passed = time.monotonic() - began
            over = passed > limit
            if len(codes) < len(pids) and not killed and (over or (kill_at is not None and passed > kill_at)):
                late, killed = over, True
                kill(pids[first], codes)
                if ranks > 1:
                    time.sleep(LONELY)
                for pid in pids:
                    kill(pid, codes)
            if not selector.get_map():
                time.sleep(0.005)
        for pipe in list(selector.get_map() or ()):
            read(pipe, texts, selector)
    for pipe in texts:
        os.close(pipe)
    for pid in pids:
        # what a child has started and left behind
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
    said, printed = (texts[pipe].decode(errors="replace") for pipe in (out[0], err[0]))
    worst = next((code for code in codes.values() if code), 0)
    return Outcome(line, worst, said, printed, time.monotonic() - began, late, killed and not late)


def read(pipe: int, texts: dict[int, bytes], selector: selectors.BaseSelector) -> None:
    """Take what a pipe holds; one that is at its end is no longer looked at."""
    with suppress(BlockingIOError):
        while True:
            new = os.read(pipe, 1 << 16)
            if not new:
                with suppress(KeyError):
                    selector.unregister(pipe)
                return
            texts[pipe] = (texts[pipe] + new)[-(1 << 20) :]


def kill(pid: int, codes: dict[int, int]) -> None:
    """Kill a child and whatever is in its session, unless it has ended."""
    if pid not in codes:
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        # killed before it had made its group
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def be_command(line, folder: Path, place: dict[str, str], before, out: int, err: int) -> None:
    """Be the command until the end of the process."""
    code = 70
    try:
        os.setsid()
        for number, file in ((0, os.open(os.devnull, os.O_RDWR)), (1, out), (2, err)):
            os.dup2(file, number)
        os.closerange(3, 256)
        # those of the parent may believe that they write into a file
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", buffering=1, closefd=False)
        os.environ.update(place)
        os.chdir(folder)
        sys.argv = ["lowrank", *line]
        from lowrank_cli import main

        if before is not None:
            before()
        code = main.main(list(line))
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        with suppress(ValueError, OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def learn(line: list[str], folder: Path) -> Outcome:
    """Run a command line and import here what it imported, so that the next one finds it."""
    file, known = folder / ".imported.json", set(sys.modules)

    def noting() -> None:
        from lowrank_cli import main

        original = main.main

        def noted(argv: list[str]) -> int:
            code = original(argv)
            file.write_text(json.dumps(sorted(set(sys.modules) - known)))
            return code

        main.main = noted

    outcome = run(line, folder, before=noting)
    for name in json.loads(file.read_text()) if file.is_file() else ():
        with suppress(Exception):
            import_module(name)
    file.unlink(missing_ok=True)
    return outcome


def freeze() -> None:
    """Keep the collector of every child from going over, and copying, what is imported."""
    gc.collect()
    gc.freeze()
