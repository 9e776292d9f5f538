"""SIGKILL at random moments of training, and resumed until the end: the weights are those of a run left alone."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path

import children
from cases import STUCK, WRONG, Case, Report, counted, digest, evenly, look
from materials import MODES, Materials, subjects

KILLS = 200
# processes after which a run that does not end is given up
PATIENCE = 40


def cases(made: Materials, scale: float) -> list[Case]:
    """Return a case for every method in every command that trains, and for the modes with the methods of pretraining.

    The kills are shared out among them.
    """
    every = []
    for mode in MODES:
        of = subjects() if mode == "plain" else [s for s in subjects() if s[0] == "pretrain"]
        every += [(mode, *subject) for subject in of]
    kills = counted(KILLS, scale)
    chosen = evenly(every, kills)
    shares = [kills // len(chosen) + (i < kills % len(chosen)) for i in range(len(chosen))]
    return [
        Case("kills", f"{command}, {mode}", method, partial(killed, made, mode, command, method, share))
        for (mode, command, method), share in zip(chosen, shares, strict=True)
    ]


def killed(made: Materials, mode: str, command: str, method: str, kills: int, folder: Path) -> Report:
    """Kill runs of a method until there were so many kills; every run that ends is compared with one left alone."""
    report, draw = Report(), random.Random(f"{mode} {command} {method}")
    ranks = 2 if mode == "two processes" else 1
    line = [*made.training_line(command, method), *MODES[mode].split()]
    if ranks > 1:
        line += ["--total-batch-size", "8", "--rank-timeout", "20"]
    (folder / "alone").mkdir()
    alone = children.run(line, folder / "alone", ranks=ranks)
    if not look(report, alone, done=True):
        return report
    wanted = digest(folder / "alone" / "run" / "model")
    for number in range(PATIENCE):
        left = kills - report.strokes
        if not left or report.faults:
            break
        place = folder / f"run-{number}"
        place.mkdir()
        end = to_the_end(report, line, place, draw, alone.seconds, left, ranks)
        if end is not None:
            compare(report, place / "run", wanted, end)
    return report


def to_the_end(report: Report, line: list[str], place: Path, draw, seconds: float, left: int, ranks: int):
    """Start and resume a run, killing it at random moments as often as is left; returns its last outcome."""
    for _ in range(PATIENCE):
        again = [*line, "--resume", "auto"]
        if any((place / "run" / "checkpoints").glob("step-*")) and draw.random() < 0.5:
            again = [line[0], "--resume", "run"]
        when = draw.uniform(0, 1.1 * seconds) if left else None
        outcome = children.run(again, place, ranks=ranks, kill_at=when, first=draw.randrange(ranks))
        if outcome.killed:
            report.strokes, left = report.strokes + 1, left - 1
            continue
        return outcome if look(report, outcome, done=True) else None
    report.add(STUCK, f"no end after {PATIENCE} processes", outcome)
    return None


def compare(report: Report, run: Path, wanted: str, end: children.Outcome) -> None:
    """Compare the weights of a run that has ended; every update is in its metrics once."""
    if digest(run / "model") != wanted:
        report.add(WRONG, "other weights than those of a run left alone", end)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for kind in ("loss", "eval_loss"):
        steps = [entry["step"] for entry in lines if kind in entry]
        if steps != sorted(set(steps)):
            report.add(WRONG, f"steps with {kind} in metrics.jsonl: {steps}", end)
    if json.loads((run / "run.json").read_text())["status"] != "done":
        report.add(WRONG, "run.json does not say done", end)
