"""A case of the campaign, what is wrong with how it went, and what is looked at in every outcome."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from children import Outcome

# the kinds of faults, each a column of the table; none is wanted
WRONG, STUCK, BUG, CODE, UNCLEAR, SLOW, RAN = KINDS = (
    "wrong result",
    "cannot go on",
    "this is a bug",
    "other end",
    "no error and hint",
    "over the limit",
    "code run",
)
DOCUMENTED = (0, 1, 2, 3, 4)
ERROR, HINT = re.compile(r"^error: ", re.M), re.compile(r"^hint: ", re.M)


@dataclass
class Fault:
    """One thing that is wrong, with the command lines and what they printed."""

    kind: str
    what: str
    shown: str


@dataclass
class Report:
    """How a case went.

    Attributes:
        strokes: kills, limits or values that were broken in it.
    """

    strokes: int = 0
    faults: list[Fault] = field(default_factory=list)

    def add(self, kind: str, what: str, *outcomes: Outcome) -> None:
        """Note a fault."""
        self.faults.append(Fault(kind, what, "\n".join(outcome.text() for outcome in outcomes)))


@dataclass
class Case:
    """A case: a row of the table counts it, its name finds it again, `run` takes a folder of its own.

    Attributes:
        part: kills, events, disks, nan or bad-input.
    """

    part: str
    row: str
    name: str
    run: Callable[[Path], Report]

    @property
    def place(self) -> str:
        """Return its name as a file's."""
        return re.sub(r"[^\w.+=-]+", "_", f"{self.part} {self.row} {self.name}")[:150]


def look(report: Report, outcome: Outcome, *, done: bool = False, ranks: int = 1) -> bool:
    """Note what is wrong with how a command line ended; returns whether it ended well.

    Args:
        done: it has to end with 0.
        ranks: processes, each of which may say what is wrong.
    """
    said = outcome.out + outcome.err
    if outcome.late:
        report.add(SLOW, f"ended after {outcome.seconds:.0f} s", outcome)
    elif "this is a bug" in said:
        report.add(BUG, (ERROR.split(outcome.err)[-1].splitlines() or [""])[0][:200], outcome)
    elif "Traceback (most recent call last)" in said:
        report.add(CODE, "a traceback: " + outcome.err.strip().splitlines()[-1][:200], outcome)
    elif outcome.code not in DOCUMENTED:
        report.add(CODE, f"exit code {outcome.code}", outcome)
    elif outcome.code and not 1 <= len(ERROR.findall(outcome.err)) == len(HINT.findall(outcome.err)) <= ranks:
        report.add(UNCLEAR, f"exit code {outcome.code} without one error and one hint", outcome)
    elif done and outcome.code:
        report.add(STUCK, f"exit code {outcome.code}: {ERROR.split(outcome.err)[-1].splitlines()[0][:200]}", outcome)
    return outcome.code == 0


def digest(folder: Path, pattern: str = "*.safetensors") -> str:
    """Return a digest of every file of a folder that the pattern fits; "" if there is none."""
    files = sorted(file for file in folder.rglob(pattern) if file.is_file())
    found = hashlib.sha256()
    for file in files:
        found.update(file.name.encode() + b"\0" + file.read_bytes())
    return found.hexdigest() if files else ""


def evenly(items: list, count: int) -> list:
    """Return `count` items, evenly over a list; all if there are no more."""
    if count >= len(items):
        return items
    return [items[int((i + 0.5) * len(items) / count)] for i in range(max(1, count))]


def counted(full: int, scale: float) -> int:
    """Return the number of cases at a scale; at least one."""
    return max(1, round(full * scale))
