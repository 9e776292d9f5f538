"""Pictures of a run, drawn from metrics.jsonl. `python -m lowrank_cli.plots RUN` draws them again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from lowrank_cli import console
from lowrank_cli.run import RunDir

PANELS = (
    # file, title, [(key, label)], y label, logarithmic
    ("loss", "Loss", [("loss", "training, a batch"), ("eval_loss", "validation")], "nats per token", False),
    ("perplexity", "Validation perplexity", [("eval_perplexity", "validation")], "perplexity", True),
    (
        "metrics",
        "Validation metrics",
        [(f"eval_{key}", key) for key in ("accuracy", "f1", "matthews_correlation", "pearson", "spearman")],
        "score",
        False,
    ),
    ("learning_rate", "Learning rate", [("lr", "learning rate")], "learning rate", False),
    ("throughput", "Throughput", [("tokens_per_second", "tokens/s")], "tokens per second", False),
    ("memory", "Peak memory", [("memory", "peak memory")], "GiB", False),
)


def draw(run: RunDir) -> None:
    """Write plots/*.png of a run; figures with no data yet are left out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]
    run.plots.mkdir(exist_ok=True)
    for name, title, series, unit, logarithmic in PANELS:
        figure = Figure(figsize=(7, 4))
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0.11, 0.13, 0.86, 0.78))
        drawn = False
        for key, label in series:
            points = [(line["step"], line[key] / (2**30 if key == "memory" else 1)) for line in lines if key in line]
            if points:
                steps, values = zip(*points, strict=True)
                axes.plot(
                    steps, values, label=label, linewidth=1.4, marker="o" if len(points) < 30 else None, markersize=3
                )
                drawn = True
        if not drawn:
            continue
        if logarithmic:
            axes.set_yscale("log")
        elif name != "loss":
            axes.set_ylim(bottom=0)
        axes.set(title=f"{title}: {run.path.name}", xlabel="step", ylabel=unit)
        axes.grid(alpha=0.3)
        if len(series) > 1:
            axes.legend()
        figure.savefig(run.plots / f"{name}.png", dpi=130)


class Drawing:
    """Draws in a process of its own: matplotlib costs tens of megabytes and seconds that are the training's."""

    def __init__(self, run: RunDir):
        self.run = run
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        """Begin to draw what there is by now, unless a drawing is still under way."""
        if self.process is None or self.process.poll() is not None:
            command = [sys.executable, "-m", "lowrank_cli.plots", str(self.run.path)]
            self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def finish(self) -> None:
        """Draw everything and wait for it; a picture that fails is a warning, never the end of a run."""
        if self.process is not None:
            self.process.communicate()
        self.start()
        _, complaint = self.process.communicate()
        if self.process.returncode:
            console.warn(f"no plots: {' '.join(complaint.split())[-200:]}")


if __name__ == "__main__":
    draw(RunDir(Path(sys.argv[1])))
