"""Disks of sixteen sizes: no file can grow beyond a limit. Each command says so and goes on afterwards."""

from __future__ import annotations

import resource
import signal
from functools import partial
from pathlib import Path

import children
import events
from cases import CODE, Case, Report, counted, look
from materials import Materials

SIZES, SMALLEST, LARGEST = 16, 64, 1 << 19


def cases(made: Materials, scale: float) -> list[Case]:
    """Return every command at sizes evenly on a logarithmic scale."""
    count = counted(SIZES, scale)
    sizes = [round(SMALLEST * (LARGEST / SMALLEST) ** ((i + 0.5) / count)) for i in range(count)]
    return [
        Case("disks", row, f"{size} bytes", partial(full, line, row, size))
        for row, line in events.lines(made).items()
        for size in sizes
    ]


_alone: dict[str, str] = {}


def full(line: list[str], row: str, size: int, folder: Path) -> Report:
    """Run a command where no file may be larger, then again without the limit."""
    report = Report(strokes=1)
    if row not in _alone:
        (folder / "alone").mkdir()
        look(report, children.run(line, folder / "alone"), done=True)
        _alone[row] = events.result(folder / "alone" / "run")
    place = folder / "full"
    place.mkdir()
    first = children.run(line, place, before=partial(events.own_cache_and, place, partial(limited, size)))
    look(report, first)
    status = events.record(place / "run").get("status")
    wanted = ("failed", None) if first.code else ("done", None)
    if status not in wanted and "run.json still says" not in first.err:
        report.add(CODE, f"run.json says {status} after exit code {first.code}", first)
    events.go_on(report, first, line, place, _alone[row])
    return report


def limited(size: int) -> None:
    """No file of this process may grow beyond `size`: writing more is an error, as where no room is left."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
