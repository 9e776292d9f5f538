"""Show how far an evaluation is: a bar on a terminal, otherwise a line now and then."""

from __future__ import annotations

import time

from lowrank_cli import console

LINE_EVERY_S = 15.0


class Progress:
    """Counts what is done.

    Args:
        name: of the task.
    """

    def __init__(self, name: str):
        self.name = name
        self.done = self.total = 0
        self._what = ""
        self._started = self._last = time.monotonic()
        self._bar = None

    def __enter__(self) -> Progress:
        if console.is_live():
            self._bar = console.bar()
            self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self, what: str, total: int) -> None:
        """From now on `total` of something are to be done."""
        self._what, self.done, self.total = what, 0, total
        self._started = self._last = time.monotonic()
        if self._bar is not None:
            for task in self._bar.task_ids:
                self._bar.remove_task(task)
            self._bar.add_task(console.visible(f"{self.name}: {what}"), total=total)

    def advance(self, count: int = 1) -> None:
        """So many more are done."""
        self.done += count
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[-1], count)
            return
        now = time.monotonic()
        if now - self._last >= LINE_EVERY_S and self.done < self.total:
            self._last = now
            rate = self.done / (now - self._started)
            left = (self.total - self.done) / rate
            console.note(f"{self.name}: {self.done:,} of {self.total:,} {self._what}, {left / 60:.0f} min left")
