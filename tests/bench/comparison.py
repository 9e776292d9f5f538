"""Comparisons with a peer: run both sides in alternation, take medians and spread, print one table.

Imports nothing heavy. On Linux a process inherits the peak resident memory of the one that starts it, so whoever
starts a measured process has to be small itself.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

console = Console(stderr=True, highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Bar:
    """What a ratio has to reach: at least `value`, or at most if `at_most`."""

    value: float
    at_most: bool = False

    def met(self, ratio: float) -> bool:
        """Whether the ratio reaches it."""
        return ratio <= self.value if self.at_most else ratio >= self.value

    def __str__(self) -> str:
        return f"{'<=' if self.at_most else '>='} {self.value:.2f}"


@dataclass(frozen=True)
class Comparison:
    """One quantity of both sides, measured in pairs.

    Attributes:
        bench: name of the bench.
        what: the quantity, and the peer.
        unit: of the values.
        ours: one value a pair.
        peer: likewise.
        bar: what ours / peer has to reach; None for context.
    """

    bench: str
    what: str
    unit: str
    ours: Sequence[float]
    peer: Sequence[float]
    bar: Bar | None = None

    @property
    def ratios(self) -> list[float]:
        """ours / peer of each pair."""
        return [a / b for a, b in zip(self.ours, self.peer, strict=True)]

    @property
    def ratio(self) -> float:
        """The median of the pairs' ratios."""
        return statistics.median(self.ratios)

    def record(self) -> dict[str, Any]:
        """For the JSON file: every value, and what is made of them."""
        return {
            "bench": self.bench, "what": self.what, "unit": self.unit,
            "ours": list(self.ours), "peer": list(self.peer),
            "ratio": self.ratio, "spread": [min(self.ratios), max(self.ratios)],
            "bar": str(self.bar) if self.bar else None, "met": self.bar.met(self.ratio) if self.bar else None,
        }  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What a bench is told: pairs, the length of one measurement (None: the bench's own), threads, smallest size."""

    repeats: int = 5
    steps: int | None = None
    threads: int = 1
    smoke: bool = False


def in_alternation(sides: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[Any]]:
    """The results of each side, called in turn: A B C A B C ..."""
    results: dict[str, list[Any]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, call in sides.items():
            results[name].append(call())
    return results


def measured(script: Path, settings: Settings) -> list[Comparison]:
    """The comparisons of a bench, run in a process of its own; raises RuntimeError if it failed."""
    rows = in_process(script, json.dumps(asdict(settings)), threads=settings.threads, talking=True)
    return [Comparison(**row | {"bar": row["bar"] and Bar(**row["bar"])}) for row in rows]


def answer(compare: Callable[[Settings], Sequence[Comparison]]) -> None:
    """The other end of `measured`: a bench's main program."""
    print(json.dumps([asdict(row) for row in compare(Settings(**json.loads(sys.argv[1])))]))


def in_process(
    script: Path, *arguments: str, threads: int, talking: bool = False, environment: dict[str, str] | None = None
) -> Any:
    """What a fresh Python process prints as its last line of stdout: a JSON value.

    Args:
        script: the program.
        arguments: its arguments.
        threads: of the numerical libraries.
        talking: show its stderr as it comes; otherwise only if it fails.
        environment: further variables.
    Raises:
        RuntimeError: it failed.
    """
    limits = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        env={**os.environ, **limits, **quiet, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=None if talking else subprocess.PIPE,
        text=True,
        check=False,
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        console.print((done.stderr or "")[-4000:], markup=False)
        raise RuntimeError(f"{script.name} {' '.join(arguments)[:200]} ended with exit code {done.returncode}")
    return json.loads(lines[-1])


def machine(threads: int) -> dict[str, Any]:
    """What the absolute numbers depend on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model n")
        ]
        cpu = names[0] if names else cpu
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "galore-torch")}
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": threads, **versions}


def show(comparisons: Sequence[Comparison], about: dict[str, Any]) -> None:
    """Print the table, and the machine under it."""
    table = Table(title="ours / peer, measured in alternation", title_justify="left", header_style="bold")
    for name in ("bench", "what"):
        table.add_column(name, overflow="fold")
    for name in ("ours", "peer", "ratio", "spread", "bar", "met"):
        table.add_column(name, justify="right", no_wrap=True)
    for c in comparisons:
        table.add_row(
            c.bench,
            c.what,
            amount(statistics.median(c.ours), c.unit),
            amount(statistics.median(c.peer), c.unit),
            f"{c.ratio:.3f}",
            f"{min(c.ratios):.3f}..{max(c.ratios):.3f}",
            str(c.bar) if c.bar else "",
            ("yes" if c.bar.met(c.ratio) else "no") if c.bar else "",
        )
    out = Console(width=max(150, Console().width), highlight=False)
    out.print(table)
    out.print(f"machine: {', '.join(f'{key} {value}' for key, value in about.items())}")
    out.print("ours and peer: medians of the repeats; ratio: median of the pairs' ratios; spread: min..max of them")


def amount(value: float, unit: str) -> str:
    """A value with its unit, three digits or more."""
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
