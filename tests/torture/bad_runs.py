"""Runs of which a file is gone or damaged, and are to be resumed."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from bad_data import damaged
from bad_models import Touch
from entries import Entry
from materials import Materials

WAYS = ("empty", "half", "a flipped byte", "NULs", "UTF-16")
OF_THE_RUN = ("run.json", "config.yaml", "metrics.jsonl", "targets.json")


def entries(made: Materials) -> Iterator[Entry]:
    """Yield every file of the newest checkpoint and of its run, removed and damaged."""
    last = newest(made.run)
    files = [file.relative_to(made.run) for file in sorted(last.rglob("*")) if file.is_file()]
    for file in [*files, *map(Path, OF_THE_RUN)]:
        ways = ("removed", *WAYS[:3]) if len(file.parts) > 1 else ("removed", *WAYS)
        for way in ways:
            make = partial(damage, made.run, file, way, 1)
            yield Entry("checkpoints", f"{file.name} {way}", make, whole=made.run)
    for content in ("[]", "{}", "null", "3", '{"status": [], "started": 7}'):
        make = partial(replaced, made.run, "run.json", content)
        yield Entry("checkpoints", f"run.json {content}", make, whole=made.run)
    for name, make in {"empty": Path.mkdir, "a file": Path.touch}.items():
        yield Entry("checkpoints", f"step-999999, {name}", partial(beside, made.run, make))
    for key in json.loads((last / "progress.json").read_text()):
        for value in ("removed", None, -1, "x", [], 10**30):
            make = partial(with_progress, made.run, key, value)
            yield Entry("checkpoints", f"progress.json, {key} {value!r}", make)
    shards = sorted(file for file in newest(made.sharded).rglob("*") if file.is_file())
    for file in shards:
        if file.parent.name.startswith("step-"):
            continue
        for way in ("removed", "half", "a flipped byte"):
            make = partial(damage, made.sharded, file.relative_to(made.sharded), way, 2)
            yield Entry("checkpoints", f"{file.name} {way}", make, ranks=2)
        for ranks in (1, 2):
            make = partial(executing, made.sharded, file.relative_to(made.sharded))
            yield Entry("code", f"{file.name} of {ranks}", make, ranks=ranks, fails=True)


def newest(run: Path) -> Path:
    """Return the newest checkpoint."""
    return max((run / "checkpoints").glob("step-*"))


def copied(run: Path, folder: Path) -> Path:
    """Return a copy of a run."""
    return Path(shutil.copytree(run, folder / "run"))


LINE = ["pretrain", "--resume", "run"]


def damage(run: Path, file: Path, way: str, ranks: int, folder: Path) -> list[str]:
    """Remove or damage a file; returns the line that resumes."""
    place = copied(run, folder) / file
    if way == "removed":
        place.unlink()
    else:
        place.write_bytes(damaged(place.read_bytes())[way])
    return LINE


def replaced(run: Path, file: str, content: str, folder: Path) -> list[str]:
    """Replace a file of a run."""
    (copied(run, folder) / file).write_text(content)
    return LINE


def beside(run: Path, make, folder: Path) -> list[str]:
    """Put something beside the checkpoints that looks like the newest."""
    make(copied(run, folder) / "checkpoints" / "step-999999")
    return LINE


def with_progress(run: Path, key: str, value, folder: Path) -> list[str]:
    """Change a number of a checkpoint, and its manifest with it."""
    last = newest(copied(run, folder))
    content = json.loads((last / "progress.json").read_text())
    if value == "removed":
        del content[key]
    else:
        content[key] = value
    (last / "progress.json").write_text(json.dumps(content))
    stamped(last, last / "progress.json")
    return LINE


def executing(run: Path, file: Path, folder: Path) -> list[str]:
    """Replace a file of a checkpoint by a pickle that executes something, and its manifest with it."""
    place = copied(run, folder)
    (place / file).write_bytes(pickle.dumps(Touch()))
    stamped(newest(place), place / file)
    return LINE


def stamped(checkpoint: Path, file: Path) -> None:
    """Say in the manifest that a file is as it is."""
    from lowrank_cli.train.checkpoint import MANIFEST, stamp

    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest[file.relative_to(checkpoint).as_posix()] = stamp(file)
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
