"""`make worth`: what every method is worth in pretraining, each at its own best two learning rates.

    python tests/bench/worth.py --dataset DIR [--out runs/worth] [--steps 300] [--jobs N] [--speed]

Successive halving (arXiv:1603.06560) over a grid of rates for the matrices and for the rest (`--lr`, `--lr-other`),
in the same budget for every method: all nine pairs for a quarter of the updates, the best three of those for a half,
the best one of those at full length with three seeds. Each run is one of `lowrank pretrain` with a schedule of its own
length, in a folder of its own: what is interrupted goes on at the next call, and what is there is not run again.
Perplexity does not depend on what else the machine does. Tokens per second do: `--speed` measures them, in
alternation, on a machine with nothing else to do.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from comparison import console, in_alternation
from rich.table import Table

REST = (0.003, 0.01, 0.03)
LOW, MIDDLE, HIGH = (0.001, 0.003, 0.01), (0.003, 0.01, 0.03), (0.01, 0.03, 0.1)
GAP = "update-proj-gap 50"
# row: the method's flags, and the rates that its matrices try, around the best ones of earlier runs
ROWS = {
    "full": ("full", LOW),
    "galore": (f"galore --galore-{GAP}", HIGH),
    "galore, 8-bit": (f"galore --galore-{GAP} --optimizer adamw8bit", HIGH),
    "velora": ("velora", LOW),
    "gradnormlorp": (f"gradnormlorp --gradnormlorp-{GAP}", MIDDLE),
    "fira": (f"fira --fira-{GAP}", MIDDLE),
    "apollo": (f"apollo --apollo-{GAP}", HIGH),
    "apollo, rank 1": (f"apollo --apollo-{GAP} --apollo-rank 1", HIGH),
}
SEEDS = (0, 1, 2)
DIVERGED = re.compile("diverged|not finite|NaN")


@dataclass(frozen=True)
class Trial:
    """One run: a row of the table at two rates, for so many updates, from one seed."""

    row: str
    lr: float
    other: float
    steps: int
    seed: int = 0

    @property
    def name(self) -> str:
        """Return the name of its folder."""
        return f"{self.row.replace(', ', '-').replace(' ', '')}-{self.lr:g}-{self.other:g}-{self.steps}-{self.seed}"

    def command(self, given: argparse.Namespace) -> str:
        """Return what a user would type."""
        return (
            f"pretrain --method {ROWS[self.row][0]} --model {given.model} --dataset {given.dataset} "
            f"--batch-size 8 --max-steps {self.steps} --eval-every {self.steps} "
            f"--lr {self.lr:g} --lr-other {self.other:g} --seed {self.seed} --no-plots --quiet --offline"
        )


def ended(record: dict) -> bool:
    """Return whether a run is over: it has a result, or it diverged."""
    return record.get("status") == "done" or bool(DIVERGED.search(record.get("error") or ""))


class Bench:
    """The trials that were run, and those that are still to be."""

    def __init__(self, given: argparse.Namespace):
        self.given = given
        self.environment = os.environ | {"OMP_NUM_THREADS": str(given.threads)}

    def result(self, trial: Trial) -> dict:
        """Return the trial's results, having run what is missing of it.

        A run that diverged has a perplexity of infinity.

        Raises:
            RuntimeError: the run failed otherwise.
        """
        folder = self.given.out / trial.name
        record = self.record(folder)
        if not ended(record):
            again = ["--resume", "auto"] if (folder / "checkpoints").is_dir() else []
            command = [sys.executable, "-m", "lowrank_cli", *trial.command(self.given).split(), "--out", str(folder)]
            done = subprocess.run(
                [*command, *again], env=self.environment, capture_output=True, text=True, check=False
            )
            record = self.record(folder)
            if not ended(record):
                raise RuntimeError(f"{trial.name}: {done.stderr.strip()[-500:]}")
        found = record["result"] if record["status"] == "done" else {"validation_perplexity": math.inf}
        console.print(f"{trial.name}: {found['validation_perplexity']:.2f}")
        return found

    @staticmethod
    def record(folder: Path) -> dict:
        """Return the run.json of a folder; {} if there is none."""
        path = folder / "run.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def best(self, trials: list[Trial], count: int) -> list[Trial]:
        """Return the `count` best of these, the best first."""
        with ThreadPoolExecutor(self.given.jobs) as pool:
            found = list(pool.map(self.result, trials))
        order = sorted(range(len(trials)), key=lambda i: found[i]["validation_perplexity"])
        return [trials[i] for i in order[:count]]

    def rates(self, row: str) -> tuple[float, float]:
        """Return the two rates that successive halving leaves."""
        steps = self.given.steps
        first = [Trial(row, lr, other, steps // 4) for lr in ROWS[row][1] for other in REST]
        second = [Trial(row, t.lr, t.other, steps // 2) for t in self.best(first, 3)]
        last = self.best(second, 1)[0]
        return last.lr, last.other

    def line(self, row: str) -> dict:
        """Return the row's figures: rates, perplexities of the seeds, bytes."""
        lr, other = self.rates(row)
        trials = [Trial(row, lr, other, self.given.steps, seed) for seed in SEEDS]
        with ThreadPoolExecutor(self.given.jobs) as pool:
            found = list(pool.map(self.result, trials))
        edges = [lr in (ROWS[row][1][0], ROWS[row][1][-1]), other in (REST[0], REST[-1])]
        return {
            "row": row,
            "lr": lr,
            "lr_other": other,
            "at_the_edge": edges,
            "perplexity": [one["validation_perplexity"] for one in found],
            "optimizer_bytes": found[0].get("optimizer_state_bytes"),
            "peak_bytes": found[0].get("peak_memory_bytes"),
            "command": "lowrank " + trials[0].command(self.given),
        }

    def speed(self, lines: list[dict], repeats: int = 3) -> None:
        """Add tokens per second to the lines, as a ratio to the first one's, measured in alternation.

        Sixty updates, so that a refresh is in them.
        """
        count = iter(range(1000))

        def tokens_per_second(line: dict) -> float:
            trial = Trial(line["row"], line["lr"], line["lr_other"], min(60, self.given.steps))
            folder = self.given.out / "speed" / f"{trial.name}-{os.getpid()}-{next(count)}"
            command = [sys.executable, "-m", "lowrank_cli", *trial.command(self.given).split(), "--out", str(folder)]
            subprocess.run(command, capture_output=True, check=True)
            record = json.loads((folder / "run.json").read_text(encoding="utf-8"))["result"]
            return record["tokens"] / record["train_seconds"]

        found = in_alternation({line["row"]: lambda line=line: tokens_per_second(line) for line in lines}, repeats)
        reference = found[lines[0]["row"]]
        for line in lines:
            ratios = [a / b for a, b in zip(found[line["row"]], reference, strict=True)]
            line["speed"] = [statistics.median(ratios), min(ratios), max(ratios)]


def show(lines: list[dict]) -> None:
    """Print the table."""
    table = Table(title="validation perplexity: mean (range over the seeds); * at the edge of the rates tried")
    for title in ("method", "lr", "lr-other", "perplexity", "optimizer", "peak", "speed"):
        table.add_column(title)
    for line in lines:
        values = line["perplexity"]
        stars = ["*" if edge else "" for edge in line["at_the_edge"]]
        speed = line.get("speed")
        table.add_row(
            line["row"],
            f"{line['lr']:g}{stars[0]}",
            f"{line['lr_other']:g}{stars[1]}",
            f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})",
            f"{line['optimizer_bytes'] / 2**20:.2f} MiB",
            f"{line['peak_bytes'] / 2**20:.0f} MiB",
            "{:.2f} ({:.2f} to {:.2f})".format(*speed) if speed else "",
        )
    console.print(table)


def main() -> None:
    """Run what is missing, print the table, write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", type=Path, required=True, help="a text that `lowrank pretrain` takes")
    parser.add_argument("--model", default="llama-9m")
    parser.add_argument("--out", type=Path, default=Path("runs/worth"))
    parser.add_argument("--steps", type=int, default=300, help="updates of a run at full length (300)")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=" or ".join(ROWS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time (the cores)")
    parser.add_argument("--threads", type=int, default=1, help="of each run (1)")
    parser.add_argument("--speed", action="store_true", help="measure tokens per second too, with nothing beside it")
    given = parser.parse_args()
    bench = Bench(given)
    lines = [bench.line(row) for row in given.rows]
    if given.speed:
        bench.speed(lines)
    show(lines)
    (given.out / "worth.json").write_text(json.dumps(lines, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
