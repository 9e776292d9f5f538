"""Runs side by side: what each scored, beside what it cost. From the runs' folders alone; nothing is evaluated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowrank_cli.console import human_bytes, human_count
from lowrank_cli.errors import MissingError, UsageError
from lowrank_cli.evaluate.report import aligned, number
from lowrank_cli.foreign import read_json, reading
from lowrank_cli.misfortune import writing

# what training wrote into a run's result, and how it is told
COSTS = (
    ("parameters", "parameters", human_count),
    ("weights_bytes", "weights", human_bytes),
    ("peak_memory_bytes", "memory of training", human_bytes),
    ("tokens_per_second", "tokens/s of training", lambda value: f"{value:,.0f}"),
)


def read(folders: list[str]) -> list[dict[str, Any]]:
    """Read the scores and the costs of some runs.

    Args:
        folders: run folders, each with an eval/.
    Returns:
        For each: `run`, `method`, `scores` (by evaluation and metric: value, stderr, whether higher is better) and
        `costs`.
    Raises:
        UsageError: fewer than two runs.
        MissingError: a folder is not there, or has no evaluation.
    """
    if len(folders) < 2:
        raise UsageError("a comparison takes two runs or more", "lowrank eval --compare runs/A runs/B")
    return [_one(Path(folder)) for folder in folders]


def _one(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise MissingError(f"there is no run {folder}", "give the folders of runs that were evaluated")
    results = {path.stem: read_json(path) for path in sorted(folder.glob("eval/*.json"))}
    if not results:
        raise MissingError(
            f"{folder} has not been evaluated",
            f"lowrank eval mmlu --model {folder}, or another task, the same for all",
        )
    record = read_json(folder / "run.json") if (folder / "run.json").is_file() else {}
    with reading(folder / "eval", "results of evaluations", "evaluate the run again"):
        scores = {f"{name} {metric}": score for name, result in results.items() for metric, score in _scores(result)}
        newest = max(results.values(), key=lambda result: result["date"])
        costs = dict(newest["model"]) | {k: v for k, v in (record.get("result") or {}).items() if v is not None}
        costs = {key: costs[key] for key, *_ in COSTS if isinstance(costs.get(key), (int, float))}
        costs["eval_seconds"] = sum(result["seconds"] for result in results.values())
    return {
        "run": folder.resolve().name if folder.is_symlink() else folder.name,
        "method": record.get("method"),
        "scores": scores,
        "costs": costs,
    }


def _scores(result: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    if "rows" not in result:
        kinds = [("perplexity", result["perplexity"]), ("word_perplexity", result["word_perplexity"])]
        return [(name, {"value": value, "stderr": None, "metric": name}) for name, value in kinds if value is not None]
    rows = [row for row in result["rows"] if row["level"] == 0]
    return [
        (
            row["metric"] if row["filter"] == "none" else f"{row['metric']} ({row['filter']})",
            {"value": row["value"], "stderr": row["stderr"], "metric": row["metric"]},
        )
        for row in rows
    ]


def table(runs: list[dict[str, Any]]) -> str:
    """The comparison as plain text: a column for each run, scores first, then costs."""
    lines = [["", *(run["run"] for run in runs)], ["method", *(run["method"] or "" for run in runs)]]
    names = dict.fromkeys(name for run in runs for name in run["scores"])
    lines += [[name, *(_cell(run["scores"].get(name)) for run in runs)] for name in names]
    for key, label, tell in COSTS:
        if any(key in run["costs"] for run in runs):
            lines.append([label, *(tell(run["costs"][key]) if key in run["costs"] else "" for run in runs)])
    lines.append(["time of evaluation", *(f"{run['costs']['eval_seconds']:,.0f} s" for run in runs)])
    return aligned(lines)


def _cell(score: dict[str, Any] | None) -> str:
    if score is None:
        return ""
    text = number(score["value"], score["metric"])
    return (
        text if score["stderr"] is None else f"{text.removesuffix(' %')} +- {number(score['stderr'], score['metric'])}"
    )


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Draw the scores as bars with their standard errors, a panel for each evaluation.

    Raises:
        UsageError: the file's ending is no picture's.
    """
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise UsageError(f"--picture {path} is no picture", "end its name in .png, .svg or .pdf")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for run in runs for name in run["scores"]))
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(max(5, 3 * columns), 1 + 2.8 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axes in panels:
        axes.set_visible(False)
    for axes, name in zip(figure.axes, names, strict=False):
        axes.set_visible(True)
        for i, run in enumerate(runs):
            score = run["scores"].get(name)
            if score is not None and score["value"] is not None:
                axes.bar(i, score["value"], color=f"C{i}", yerr=score["stderr"], capsize=4, label=run["run"])
        evaluation, _, metric = name.partition(" ")
        axes.set_title(f"{evaluation}\n{metric}", fontsize=9)
        axes.set_xticks([])
        axes.grid(axis="y", alpha=0.3)
    handles = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", fontsize=9)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
