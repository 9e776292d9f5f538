"""Bad input: options, files, models and runs that nobody should have. Each ends soon, with an error and a way out."""

from __future__ import annotations

import random
import resource
import shutil
from collections import defaultdict
from functools import partial
from pathlib import Path

import bad_data
import bad_models
import bad_options
import bad_runs
import children
from cases import RAN, WRONG, Case, Report, counted, digest, look
from entries import MARKER, Entry
from materials import Materials

SECONDS = 10
# what a process may take beside what it has at its start
MEMORY = 4 << 30
# printed when every check has passed and training begins: a huge number of updates is no mistake
BEGUN = "\nrun "


def cases(made: Materials, scale: float) -> list[Case]:
    """Return the entries; at a smaller scale some of each row."""
    rows: dict[str, list[Entry]] = defaultdict(list)
    for source in (bad_options, bad_data, bad_models, bad_runs):
        for entry in source.entries(made):
            rows[entry.row].append(entry)
    return [
        Case("bad-input", row, entry.name, partial(tried, entry))
        for row, entries in rows.items()
        for entry in drawn(row, entries, counted(len(entries), scale))
    ]


def drawn(row: str, entries: list[Entry], count: int) -> list[Entry]:
    """Return `count` entries of a row, the same ones every time."""
    chosen = random.Random(row).sample(range(len(entries)), min(count, len(entries)))
    return [entries[i] for i in sorted(chosen)]


def tried(entry: Entry, folder: Path) -> Report:
    """Run an entry; returns what is wrong with its end."""
    report = Report(strokes=1)
    line = entry.make(folder)
    outcome = children.run(line, folder, before=limited, ranks=entry.ranks, limit=SECONDS)
    if outcome.late and BEGUN in f"\n{outcome.err}":
        return report
    well = look(report, outcome, ranks=entry.ranks)
    if list(folder.rglob(MARKER)):
        report.add(RAN, "something was executed", outcome)
    if well and entry.fails:
        report.add(WRONG, "it ended with 0", outcome)
    if well and (folder / "run" / "model").is_dir() and not finite(folder / "run" / "model"):
        report.add(WRONG, "a model that is not finite", outcome)
    if well and entry.whole is not None and digest(folder / "run" / "model") != resumed(entry.whole, folder):
        report.add(WRONG, "other weights than those of the run that is whole", outcome)
    return report


_resumed: dict[Path, str] = {}


def resumed(run: Path, folder: Path) -> str:
    """Return the digest of what a run comes to when nothing of it is damaged."""
    if run not in _resumed:
        shutil.copytree(run, folder / "whole" / "run")
        children.run(bad_runs.LINE, folder / "whole")
        _resumed[run] = digest(folder / "whole" / "run" / "model")
    return _resumed[run]


def limited() -> None:
    """Leave the machine some memory, whatever a file says that it holds."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))


def finite(folder: Path) -> bool:
    """Say whether all weights of a model are finite."""
    from safetensors.torch import load_file

    return all(
        bool(tensor.isfinite().all())
        for file in folder.glob("*.safetensors")
        for tensor in load_file(file).values()
        if tensor.is_floating_point()
    )
