"""The run folder: everything a run was, did and made, in one place that is never overwritten."""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import time
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from lowrank_cli import __version__, console
from lowrank_cli.errors import LowrankError, MissingError, UsageError

RUNS = Path("runs")
MODEL_FILES = ("config.json", "adapter_config.json")
VERSIONED = ("torch", "transformers", "datasets", "tokenizers", "safetensors", "bitsandbytes", "peft")


class RunDir:
    """A run folder. `run.json` is written first and updated last, so that a dead run can be told from a done one."""

    def __init__(self, path: Path):
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.model = path / "model"
        self.plots = path / "plots"
        self.metrics = path / "metrics.jsonl"

    @staticmethod
    def check(out: str | None) -> None:
        """Raises UsageError if `out` is there and not empty: a run never overwrites anything."""
        path = Path(out) if out else None
        if path is not None and path.exists() and (not path.is_dir() or any(path.iterdir())):
            resume = f", or continue the run there: --resume {out}" if (path / "run.json").is_file() else ""
            raise UsageError(
                f"--out {out} is not empty, and a run never overwrites anything", f"take another folder{resume}"
            )

    @classmethod
    def create(cls, out: str | None, name: str) -> RunDir:
        """A new folder: `out`, or runs/DATE-NAME.

        Raises:
            UsageError: `out` exists and is not empty.
            LowrankError: the folder cannot be made.
        """
        cls.check(out)
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        path = Path(out) if out else RUNS / f"{stamp}-{name}"
        suffix = 1
        while True:
            try:
                path.mkdir(parents=True, exist_ok=bool(out))
                break
            except FileExistsError:
                suffix += 1
                path = RUNS / f"{stamp}-{name}-{suffix}"
            except OSError as error:
                raise LowrankError(
                    f"cannot make the run folder {path}: {error.strerror}", "choose a writable place with --out"
                ) from None
        run = cls(path)
        console.log_to(path / "log.txt")
        run.point_latest()
        return run

    @classmethod
    def find(cls, path: str | Path | None = None) -> RunDir:
        """An existing run: a run folder, a folder inside one, or the newest under ./runs.

        Raises:
            MissingError: there is none.
        """
        start = Path(path) if path else RUNS / "latest"
        for folder in (start, *start.resolve().parents[:2]):
            if (folder / "run.json").is_file():
                return cls(folder.resolve() if folder.is_symlink() else folder)
        where = f"no run at {path}" if path else "no run under ./runs yet"
        raise MissingError(where, "train one: lowrank pretrain --method galore")

    @staticmethod
    def newest_with_model(*, plain: bool = False) -> Path | None:
        """The newest run under ./runs that has a model or a checkpoint; None if there is none.

        Args:
            plain: adapters do not count.
        """
        files = MODEL_FILES[:1] if plain else MODEL_FILES

        def has_model(run: Path) -> bool:
            whole = [run / "model", *sorted(run.glob("checkpoints/step-*"))]
            return any((folder / file).is_file() for folder in whole for file in files)

        found = [p for p in RUNS.glob("*") if not p.is_symlink() and (p / "run.json").is_file() and has_model(p)]
        return max(found, key=lambda p: p.name, default=None)

    def point_latest(self) -> None:
        """Make runs/latest point here, if the run is under ./runs."""
        latest = RUNS / "latest"
        if self.path.parent.resolve() != RUNS.resolve():
            return
        temporary = RUNS / f".latest-{os.getpid()}"
        try:
            temporary.symlink_to(self.path.name)
            os.replace(temporary, latest)
        except OSError as error:
            console.detail(f"runs/latest not updated: {error.strerror}")

    def record(self) -> dict[str, Any]:
        """What run.json holds."""
        path = self.path / "run.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def update(self, **changes: Any) -> None:
        """Change entries of run.json; written to a temporary name first, so that it is never half there."""
        write_json(self.path / "run.json", self.record() | changes)

    def start(self, **entries: Any) -> None:
        """Write run.json with what is known before the first step; a resumed run keeps its beginning."""
        before = self.record()
        this = {"started": now(), "command_line": ["lowrank", *sys.argv[1:]], "versions": versions(),
                "git_commit": git_commit(), "python": platform.python_version(), "machine": platform.platform(),
                "pid": os.getpid(), **entries}  # fmt: skip
        if before:
            ended = {"ended": None, "error": None, "exit_code": None}
            self.update(status="running", resumes=[*before.get("resumes", []), this], **ended)
        else:
            self.update(status="running", **this)

    def finish(self, status: str, **entries: Any) -> None:
        """Write how it ended: done, failed or interrupted. A disk without room for that is a warning: what ended the
        run is said anyway."""
        try:
            self.update(status=status, ended=now(), **entries)
        except OSError as error:
            console.warn(f"run.json still says that {self.path} is running: {error.strerror}")


def write_json(path: Path, content: Any) -> None:
    """Write JSON to a temporary name, then rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def peak_resident_bytes() -> int:
    """The most memory that this process has had resident."""
    status = Path("/proc/self/status")
    if status.is_file():
        # not ru_maxrss, which begins with that of the program that started this one
        line = next((li for li in status.read_text(encoding="ascii").splitlines() if li.startswith("VmHWM:")), None)
        if line is not None:
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def versions() -> dict[str, str]:
    """The versions of lowrank-cli and of the libraries that a result depends on."""
    found = {"lowrank-cli": __version__}
    for name in VERSIONED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """The commit of a checkout of this package, with + when files differ from it; None for an installed wheel."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        commit = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if changed else "")


def now() -> str:
    """Local time with its offset, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
