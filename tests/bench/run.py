"""`make bench`: every claim as a ratio to a peer, both measured in alternation within this run.

    python tests/bench/run.py [--only NAME ...] [--repeats 5] [--steps N] [--threads N] [--json FILE] [--smoke]

On a machine with nothing else to do; another process makes the spread wide. One file a bench: it is a program that
`comparison.measured` starts, so that none inherits memory or threads from another.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict
from pathlib import Path

from comparison import Comparison, Settings, console, machine, measured, show

from lowrank_cli.run import git_commit

HERE = Path(__file__).resolve().parent
BENCHES = (
    "optimizer_step",
    "kernel",
    "refresh",
    "block",
    "velora",
    "vblora",
    "spectra",
    "welore",
    "end_to_end",
    "evaluation",
    "guard",
)
# more waiting processes than this when the run begins, and its figures are not worth keeping
BUSY = 0.5


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Ratios of lowrank to its peers, measured in alternation.")
    parser.add_argument(
        "--only", nargs="+", choices=BENCHES, default=BENCHES, metavar="NAME", help=" or ".join(BENCHES)
    )
    parser.add_argument("--repeats", type=positive, help="pairs of measurements (5)")
    parser.add_argument("--steps", type=positive, help="timed steps in each measurement (each bench has its own)")
    parser.add_argument("--threads", type=positive, help="for block and end_to_end (all cores); the others take one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every value, the machine and the commit")
    parser.add_argument("--smoke", action="store_true", help="the smallest sizes, once: does it run? no figures")
    return parser.parse_args()


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return int(text)


def main() -> None:
    """Run the benches, print the table, write the file."""
    given = arguments()
    repeats = given.repeats or (1 if given.smoke else 5)
    # tests run beside a smoke run
    threads = given.threads or (1 if given.smoke else os.cpu_count() or 1)
    settings = Settings(repeats=repeats, steps=given.steps, threads=threads, smoke=given.smoke)
    load = os.getloadavg()[0]
    about = {**machine(settings.threads), "load before": round(load, 2), "commit": git_commit()}
    if load > BUSY and not settings.smoke:
        console.print(f"the machine is busy (load {load:.2f}): the figures will not mean much")
    rows: list[Comparison] = []
    for name in given.only:
        start = time.perf_counter()
        rows += measured(HERE / f"{name}.py", settings)
        console.print(f"{name}: done in {time.perf_counter() - start:.0f} s")
    show(rows, about)
    if settings.smoke:
        print("smoke: these figures mean nothing")
    if given.json:
        content = {"settings": asdict(settings), "machine": about, "rows": [row.record() for row in rows]}
        given.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
