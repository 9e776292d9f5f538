"""A bar with the time that is left, or a line now and then where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lowrank_cli import console

# seconds between lines
LINE_EVERY = 30.0


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[], None]]:
    """Yields a function to call after each of `total` steps."""
    if console.is_live():
        with console.bar() as bar:
            task = bar.add_task(what, total=total)
            yield lambda: bar.advance(task)
        return
    done, start, told = 0, time.monotonic(), time.monotonic()

    def advance() -> None:
        nonlocal done, told
        done += 1
        now = time.monotonic()
        if now - told > LINE_EVERY and done < total:
            told = now
            console.note(f"{what}: {done} of {total}, about {(now - start) / done * (total - done):.0f} s to go")

    yield advance
