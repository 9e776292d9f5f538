"""One bad input: what makes it, and the shortest line of every command that reads something."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from materials import Materials, own_flags

# written into the current folder by whatever should never be executed
MARKER = "EXECUTED"


@dataclass
class Entry:
    """A bad input.

    Attributes:
        make: writes the files into a folder, returns the command line.
        fails: it must not end with 0.
        ranks: processes that run the line.
        whole: the run that it resumes, before the damage; what ends with 0 has its result.
    """

    row: str
    name: str
    make: Callable[[Path], list[str]]
    fails: bool = False
    ranks: int = 1
    whole: Path | None = None


def line(made: Materials, command: str, changes: dict[str, object] | None = None, method: str = "") -> list[str]:
    """Return a line of a command that ends within a second, with other options in it; None leaves one out."""
    training = {"max-length": 32, "batch-size": 4, "eval-tokens": 200, "max-steps": 1, "out": "run"}
    flags: dict[str, object] = {
        "pretrain": {"dataset": made.news, "model-config": made.config, "vocab-size": 512, **training},
        "finetune": {"dataset": made.records, "model": made.model, "template": "plain", **training},
        "compress": {"model": made.model, "eval-tokens": 0, "welore-weighting": "none", "out": "run"},
        "svd-dump": {"model": made.model, "out": "run"},
        "eval": {"model": made.model, "dataset": made.text, "window": 64, "max-tokens": 200, "out": "run"},
    }[command]
    switches = ["--no-plots"] if command != "eval" else []
    if method:
        flags["method"] = method
        switches += own_flags(method).split()
    if command == "compress" and {"dataset", "max-length"} & set(changes or ()):
        del flags["eval-tokens"]
    if {"max-train-tokens", "epochs"} & set(changes or ()):
        del flags["max-steps"]
    if {"continue-from", "model"} & set(changes or ()) and command == "pretrain":
        del flags["model-config"], flags["vocab-size"]
    if {"task"} & set(changes or ()):
        del flags["dataset"]
    flags = {name: value for name, value in (flags | (changes or {})).items() if value is not None}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return [command, *(["ppl"] if command == "eval" else []), *words, *switches]


def on_model(made: Materials, command: str, model: Path) -> list[str]:
    """Return the line of a command that reads a model's folder or file."""
    return line(made, command, {"continue-from" if command == "pretrain" else "model": model})


def on_text(made: Materials, command: str, file: Path) -> list[str]:
    """Return the line of a command that reads a data set."""
    return line(made, command, {"dataset": file})
