"""The folder that `compress` and `svd-dump` write: one process at a time, and once more after one that was killed."""

from __future__ import annotations

import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lowrank_cli import console, foreign
from lowrank_cli.config import RunConfig
from lowrank_cli.errors import FAILED, INTERRUPTED, Interrupted, LowrankError
from lowrank_cli.lock import NAME as LOCK
from lowrank_cli.lock import locked
from lowrank_cli.misfortune import check_writable, explained
from lowrank_cli.run import RUNS, RunDir

RECORD = "run.json"
# all that they write, temporary names and those of safetensors' writer among it
OWN = re.compile(
    r"run\.json|config\.yaml|log\.txt|\.lock|result\.json|ranks\.(json|csv)|model|plots"
    r"|(gradient_)?singular_values\.(safetensors|csv|pt)|\.(run\.json|result\.json|ranks\.json|model|decompositions)\.\d+"
    r"|\.tmp\w+"
)


def check(out: str | None, command: str) -> None:
    """Raise UsageError unless `out` is free, or is what this command left there before its end."""
    if out and (Path(out) / LOCK).is_file():
        # another process may be at work there
        with locked(Path(out)):
            pass
    if not out or not is_half_done(Path(out), command):
        RunDir.check(out)
    check_writable(Path(out) if out else RUNS)


def is_half_done(folder: Path, command: str) -> bool:
    """Return whether a folder holds what the command wrote before it was killed or stopped, and nothing else."""
    try:
        record = foreign.read_json(folder / RECORD)
    except LowrankError:
        return False
    ours = record.get("command") == command and record.get("status") != "done"
    return ours and all(OWN.fullmatch(path.name) for path in folder.iterdir())


def recorded(
    out: str | None, name: str, resolved: RunConfig, settings: str, work: Callable[[RunDir], dict[str, Any]]
) -> dict[str, Any]:
    """Do the work in a folder of its own; run.json says how it ended, whatever happens.

    Args:
        out: the folder, or None for a new one under ./runs.
        name: of the run.
        resolved: the configuration.
        settings: for config.yaml.
        work: gets the folder and returns the result.
    """
    if out and is_half_done(Path(out), resolved.command):
        with locked(Path(out)):
            clear(Path(out))
        console.note(f"{out} was left half-done: what was there is replaced")
    folder = RunDir.create(out, name)
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        with locked(folder.path):
            return _recorded(folder, resolved, settings, work)
    finally:
        signal.signal(signal.SIGTERM, previous)


def clear(folder: Path) -> None:
    """Remove what a command has written, its record last: killed in between, the folder is still known."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == RECORD):
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def _recorded(
    folder: RunDir, resolved: RunConfig, settings: str, work: Callable[[RunDir], dict[str, Any]]
) -> dict[str, Any]:
    try:
        (folder.path / "config.yaml").write_text(settings, encoding="utf-8")
        folder.start(command=resolved.command, method=resolved.method, seed=resolved.common.seed)
        console.note(f"run {folder.path}")
        result = work(folder)
    except KeyboardInterrupt:
        folder.finish("interrupted", error="stopped", exit_code=INTERRUPTED)
        raise Interrupted("stopped; no model was written", "type the command again") from None
    except BaseException as error:
        known = explained(error, folder.path)
        text, code = (known.message, known.exit_code) if known else (f"{type(error).__name__}: {error}", FAILED)
        folder.finish("failed", error=text, exit_code=code)
        if known is None or known is error:
            raise
        raise known from error
    folder.finish("done", exit_code=0, result=result)
    return result
