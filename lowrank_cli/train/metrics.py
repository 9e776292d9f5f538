"""Report a run while it trains: metrics.jsonl always, other loggers on request, and the screen."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from lowrank_cli import console
from lowrank_cli.config import RunConfig
from lowrank_cli.errors import MissingError, unknown
from lowrank_cli.run import RunDir, peak_resident_bytes
from lowrank_cli.strict_json import dumps

SINKS = ("tensorboard", "wandb", "trackio")


class Metrics:
    """One line of metrics.jsonl for each report, copied to the chosen loggers.

    Args:
        path: metrics.jsonl; lines after `resume_step` are dropped, since that part of the run is done again, and what
            is no line of ours.
        log: comma-separated names of further loggers.
        name: the run's name there.
        config: the configuration, for those that keep it.
        resume_step: the step that the run goes on from; -1 for one that begins.
    """

    def __init__(self, path: Path, *, log: str, name: str, config: dict[str, Any], resume_step: int = -1):
        self.path = path
        names = check_sinks(log)
        if path.exists():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            steps = [step_of(line) for line in lines]
            if broken := sum(step is None for step in steps[:-1]):
                # the last one may be what a kill has cut off
                console.warn(f"{path}: {broken} damaged lines are left out")
            kept = [line for line, step in zip(lines, steps, strict=True) if step is not None and step <= resume_step]
            temporary = path.with_name(f".{path.name}")
            temporary.write_text("".join(kept), encoding="utf-8")
            temporary.replace(path)
        self.file = path.open("a", encoding="utf-8")
        self.sinks = [open_sink(sink, path.parent, name, config) for sink in names]

    def write(self, step: int, **values: Any) -> None:
        """Report values at a step."""
        self.file.write(dumps({"step": step, **values}) + "\n")
        self.file.flush()
        for sink in self.sinks:
            sink.write(step, values)

    def close(self) -> None:
        """Flush and close every logger."""
        self.file.close()
        for sink in self.sinks:
            sink.close()


def step_of(line: str) -> int | None:
    """Return the step of a line of metrics.jsonl; None if it is none."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if isinstance(step, int) and line.endswith("\n") else None


def check_sinks(log: str) -> list[str]:
    """The loggers of a comma-separated list; raises if one is unknown or its library is not installed."""
    names = [s.strip() for s in log.split(",") if s.strip()]
    for sink in names:
        if sink not in SINKS:
            raise unknown("logger", sink, SINKS, "--log")
        try:
            import_module("torch.utils.tensorboard" if sink == "tensorboard" else sink)
        except ImportError:
            raise MissingError(
                f"--log {sink} needs a library that is not installed", f"pip install {sink}, or 'lowrank-cli[{sink}]'"
            ) from None
    return names


class TensorBoard:
    """torch's own writer, into the run folder."""

    def __init__(self, folder: Path):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"))

    def write(self, step: int, values: dict[str, Any]) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def close(self) -> None:
        self.writer.close()


class Tracker:
    """W&B, or trackio, which has the same interface."""

    def __init__(self, module, folder: Path, name: str, config: dict[str, Any]):
        place = {"dir": str(folder)} if module.__name__ == "wandb" else {}
        self.module = module
        module.init(project="lowrank", name=name, config=config, **place)

    def write(self, step: int, values: dict[str, Any]) -> None:
        self.module.log({**values, "step": step})

    def close(self) -> None:
        self.module.finish()


def open_sink(sink: str, folder: Path, name: str, config: dict[str, Any]):
    """A logger by name, which `check_sinks` has seen."""
    return TensorBoard(folder) if sink == "tensorboard" else Tracker(import_module(sink), folder, name, config)


class Reporter:
    """Everything a run says while it trains: metrics.jsonl, other loggers, and the screen. It keeps the clock too.

    On a terminal the screen is one moving line, elsewhere a line for each report. `progress.seconds` counts training
    alone, without evaluation and saving; so do the tokens per second.
    """

    def __init__(
        self,
        run: RunDir,
        config: RunConfig,
        *,
        total: int,
        progress: Any,
        device: torch.device,
        causal: bool = True,
        resumed: bool = False,
    ):
        self.progress, self.total, self.device, self.causal = progress, total, device, causal
        self.metrics = Metrics(
            run.metrics, log=config.train.log, name=run.path.name, config=config.flat(),
            resume_step=progress.step if resumed else -1,
        )  # fmt: skip
        self.bar: Progress | None = None
        if console.is_live():
            self.bar = Progress(
                TextColumn("step {task.completed}/{task.total}", markup=False),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[numbers]}", markup=False),
                TimeRemainingColumn(compact=True),
                console=console.stderr,
                transient=True,
            )
            self.task = self.bar.add_task("", total=total, completed=progress.step, numbers="")

    def __enter__(self) -> Reporter:
        if self.bar:
            self.bar.start()
        self.clock = time.monotonic()
        self.window = (self.progress.seconds, self.progress.tokens)
        return self

    def __exit__(self, *_) -> None:
        if self.bar:
            self.bar.stop()
        self.metrics.close()

    def advance(self) -> None:
        """An update is done."""
        now = time.monotonic()
        self.progress.seconds += now - self.clock
        self.clock = now
        if self.bar:
            self.bar.update(self.task, completed=self.progress.step)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is not training."""
        yield
        self.clock = time.monotonic()

    def training(self, *, loss: float, lr: float, grad_norm: float | None, **extra: float) -> None:
        """The numbers of the updates since the last report."""
        step, seconds, tokens = self.progress.step, self.progress.seconds, self.progress.tokens
        speed = (tokens - self.window[1]) / max(1e-9, seconds - self.window[0])
        self.window = (seconds, tokens)
        memory = peak_memory(self.device)
        self.metrics.write(
            step,
            tokens=tokens,
            loss=loss,
            lr=lr,
            grad_norm=grad_norm,
            tokens_per_second=round(speed, 1),
            memory=memory,
            **extra,
        )
        perplexity = f"ppl {math.exp(min(loss, 700)):.1f}  " if self.causal else ""
        numbers = f"loss {loss:.3f}  {perplexity}lr {lr:.1e}  {speed:,.0f} tok/s  {console.human_bytes(memory)}"
        if self.bar:
            self.bar.update(self.task, numbers=numbers)
            console.log_only(f"step {step}/{self.total}  {numbers}")
        else:
            left_s = (self.total - step) * seconds / step
            console.note(f"step {step}/{self.total}  {numbers}  {left_s:.0f} s left")

    def evaluation(self, values: dict[str, float], line: str) -> None:
        """The numbers of an evaluation, and how to say them."""
        self.metrics.write(self.progress.step, **{f"eval_{key}": value for key, value in values.items()})
        console.note(f"step {self.progress.step}/{self.total}  validation {line}")
        self.clock = time.monotonic()


class Follower(Reporter):
    """A Follower is the reporter of a rank other than the first: it reports nothing, and only keeps the clock."""

    def __init__(self, run: RunDir, config: RunConfig, *, progress: Any, **_: Any):
        self.progress, self.bar = progress, None

    def __exit__(self, *_) -> None:
        """There is nothing to close."""

    def training(self, **_: Any) -> None:
        """Rank 0 does it."""

    def evaluation(self, values: dict[str, float], line: str) -> None:
        """Rank 0 does it."""


def peak_memory(device: torch.device) -> int:
    """The most memory held so far, in bytes: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident_bytes()
