"""The run folder: everything a run was, did and made, in one place that is never overwritten."""

from __future__ import annotations

import os
import platform
import re
import resource
import subprocess
import sys
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from lowrank_cli import __version__, console, foreign
from lowrank_cli.errors import MissingError, UsageError
from lowrank_cli.misfortune import unwritten
from lowrank_cli.strict_json import dumps

RUNS = Path("runs")
NOW = "%Y-%m-%dT%H:%M:%S.%f%z"
CONFIG, ADAPTER = "config.json", "adapter_config.json"
# what a run writes before it has trained anything; run.json under its temporary name too
BEGINNINGS = re.compile(r"log\.txt|config\.yaml|targets\.json|\.lock|\.(run|targets)\.json\.\d+")
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
        """Raise UsageError if `out` is there and not empty: a run never overwrites anything.

        What a run leaves that was killed before its first run.json is nothing.
        """
        path = Path(out) if out else None
        if path is None or not path.exists():
            return
        if not path.is_dir() or not all(BEGINNINGS.fullmatch(p.name) for p in path.iterdir()):
            resume = f", or continue the run there: --resume {out}" if is_run(path) else ""
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
                if out:
                    raise UsageError(f"--out {out} is a link that leads nowhere", "take another folder") from None
                suffix += 1
                path = RUNS / f"{stamp}-{name}-{suffix}"
            except OSError as error:
                raise unwritten(error, f"the run folder {path}") from None
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
            if is_run(folder):
                return cls(folder.resolve() if folder.is_symlink() else folder)
        where = f"no run at {path}" if path else "no run under ./runs yet"
        raise MissingError(where, "train one: lowrank pretrain --method galore")

    @staticmethod
    def newest_with_model(*, plain: bool = False) -> Path | None:
        """The run under ./runs that began last and has a language model or a checkpoint of one; None if there is none.

        Args:
            plain: adapters do not count.
        """

        def has_model(run: Path) -> bool:
            whole = [run / "model", *sorted(run.glob("checkpoints/step-*"))]
            return any(is_language_model(folder, plain=plain) for folder in whole)

        found = [p for p in RUNS.glob("*") if not p.is_symlink() and is_run(p) and has_model(p)]
        return max(found, key=started, default=None)

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
        """Return what run.json holds; {} if it is not there, or is damaged, which a warning says."""
        path = self.path / "run.json"
        if not path.is_file():
            return {}
        try:
            return foreign.read_json(path)
        except UsageError as error:
            console.warn(f"{error.message}; what it recorded is lost")
            return {}

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
        path = self.path / "run.json"
        if not path.is_file():
            # there was no room for its beginning
            return
        try:
            self.update(status=status, ended=now(), **entries)
        except OSError as error:
            try:
                # where no second file fits beside it there may be room for the same one again
                write_json(path, {**self.record(), "status": status, "ended": now()}, in_place=True)
            except OSError:
                console.warn(f"run.json still says that {self.path} is running: {error.strerror}")


def is_run(folder: Path) -> bool:
    """Return whether a folder is a run's: it has its record, or a checkpoint where that has been lost."""
    return (folder / "run.json").is_file() or any(folder.glob("checkpoints/step-*/manifest.json"))


def is_language_model(folder: Path, *, plain: bool = False) -> bool:
    """Return whether a folder holds a language model, or an adapter of one unless it has to be `plain`.

    A classifier is no model for the other commands, which took the newest run's in its place.
    """
    adapter, config = (folder / name for name in (ADAPTER, CONFIG))
    if adapter.is_file():
        return not plain and '"SEQ_CLS"' not in adapter.read_text(encoding="utf-8", errors="replace")
    return config.is_file() and "ForSequenceClassification" not in config.read_text(encoding="utf-8", errors="replace")


def started(folder: Path) -> float:
    """Return when a run began, in seconds since 1970: what run.json says, else the age of its config.yaml."""
    said = RunDir(folder).record().get("started")
    try:
        return datetime.fromisoformat(str(said)).timestamp()
    except ValueError:
        pass  # a record that is gone or damaged
    file = next((folder / name for name in ("config.yaml", "run.json") if (folder / name).is_file()), folder)
    return file.stat().st_mtime


def write_json(path: Path, content: Any, *, in_place: bool = False) -> None:
    """Write JSON to a temporary name and flush it to disk, then rename; `in_place` where there is no room for two."""
    temporary = path if in_place else path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("r+" if in_place else "w", encoding="utf-8") as file:
            file.write(dumps(content, indent=2, default=str) + "\n")
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
        if not in_place:
            os.replace(temporary, path)
    except OSError:
        if not in_place:
            temporary.unlink(missing_ok=True)
        raise


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
    """Return local time with its offset, to the microsecond: two runs may begin in one second."""
    return datetime.now().astimezone().strftime(NOW)
