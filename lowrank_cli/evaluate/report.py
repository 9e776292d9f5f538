"""An evaluation as rows and as a table: the score, its standard error, and what a constant answer would get."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

# metrics of one answer are shares of questions; these are not
_PERCENT = ("acc", "exact_match", "f1", "em", "mcc")


def rows_of(output: dict[str, Any]) -> list[dict[str, Any]]:
    """The scores of `simple_evaluate`, one row for each task or group, metric and filter.

    Args:
        output: its result, with samples.
    Returns:
        Rows with `task`, `parent` (the group that it is in, or None), `level` (0 for what was asked for), `metric`,
        `filter`, `value`, `stderr` (None where lm-eval has none), `num_questions`, and `majority`: the share of
        questions that the most frequent answer is right for, where the choices are the same for all.
    """
    children = {group: members for group, members in output["group_subtasks"].items() if members}
    parent = {child: group for group, members in children.items() for child in members}
    golds = {task: _golds(samples) for task, samples in output["samples"].items()}
    rows = []
    for name, values in output["results"].items():
        leaves = _leaves(name, children)
        counts = [golds[leaf] for leaf in leaves if leaf in golds]
        majority = None
        if counts and all(count is not None for count in counts):
            together = sum(counts, Counter())
            majority = max(together.values()) / sum(together.values()) if together else None
        questions = sum(output["n-samples"][leaf]["effective"] for leaf in leaves if leaf in output["n-samples"])
        for key, value in values.items():
            metric, _, filter_name = key.partition(",")
            if not filter_name or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = values.get(f"{metric}_stderr,{filter_name}")
            rows.append(
                {
                    "task": name,
                    "alias": str(values.get("alias", name)).strip(" -"),
                    "parent": parent.get(name),
                    "level": _level(name, parent),
                    "metric": metric,
                    "filter": filter_name,
                    "value": float(value),
                    "stderr": float(error) if isinstance(error, (int, float)) else None,
                    "num_questions": questions,
                    "majority": majority if metric == "acc" else None,
                }
            )
    return rows


def _golds(samples: list[dict[str, Any]]) -> Counter | None:
    """Count how often each choice is the right one; None where questions have no choices, or different ones."""
    seen: Counter = Counter()
    choices = None
    for sample in samples:
        arguments = sample["arguments"]
        if any(len(argument) != 2 or not isinstance(argument[1], str) for argument in arguments):
            return None
        these = [argument[1] for argument in arguments]
        if len(these) < 2 or (choices is not None and these != choices):
            return None
        choices = these
        seen[str(sample["target"])] += 1
    return seen


def _leaves(name: str, children: dict[str, list[str]]) -> list[str]:
    return [leaf for child in children[name] for leaf in _leaves(child, children)] if name in children else [name]


def _level(name: str, parent: dict[str, str]) -> int:
    return 1 + _level(parent[name], parent) if name in parent else 0


def table(result: dict[str, Any], *, verbose: bool = False) -> str:
    """A result as plain text: the whole, its categories, and with `verbose` every subject.

    Args:
        result: of `harness.evaluate`.
        verbose: show every row, not only those of the two upper levels.
    """
    shown = [row for row in result["rows"] if verbose or row["level"] <= 1]
    with_majority = any(row["majority"] is not None for row in shown)
    header = ["", "questions", "metric", "value", "stderr"] + (["majority"] if with_majority else [])
    lines = [header]
    # the whole last, under its parts
    for row in sorted(shown, key=lambda row: row["level"] == 0):
        metric = row["metric"] if row["filter"] == "none" else f"{row['metric']} ({row['filter']})"
        line = ["  " * max(0, row["level"] - 1) + row["alias"], f"{row['num_questions']:,}", metric]
        line += [number(row["value"], row["metric"]), number(row["stderr"], row["metric"])]
        lines.append(line + ([number(row["majority"], row["metric"])] if with_majority else []))
    shots = set(result["num_fewshot"].values())
    told = f"{shots.pop()}-shot, " if len(shots) == 1 else ""
    title = f"{result['task']} ({told}{result['num_questions']:,} questions), {result['model']['source']}"
    return f"{title}\n{aligned(lines)}"


def summary(result: dict[str, Any], *, verbose: bool = False) -> str:
    """A result of any kind as text for stdout."""
    if "rows" in result:
        return table(result, verbose=verbose)
    if "answers" in result:
        return f"{result['task']}: {result['num_questions']} answers in {result['answers']}, for FastChat's judge"
    words = "" if result["word_perplexity"] is None else f", {result['word_perplexity']:.4f} per word"
    protocol = "side by side" if result["stride"] is None else f"every {result['stride']}"
    if result["documents"] == "separate":
        protocol = "each document by itself"
    return (
        f"perplexity {result['perplexity']:.4f} per token{words} ({result['text']}, {result['num_scored']:,} tokens "
        f"scored, windows of {result['window']} {protocol}), {result['model']['source']}"
    )


def number(value: float | None, metric: str) -> str:
    """Shares with two decimals in percent, other numbers with five digits."""
    if value is None or math.isnan(value):
        return ""
    return f"{100 * value:.2f} %" if metric.startswith(_PERCENT) else f"{value:.5g}"


def aligned(lines: list[list[str]]) -> str:
    """Columns: the first to the left, names of metrics too, numbers to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    left = {0} | {i for i, title in enumerate(lines[0]) if title == "metric"}
    rows = [
        [cell.ljust(widths[i]) if i in left else cell.rjust(widths[i]) for i, cell in enumerate(line)]
        for line in lines
    ]
    return "\n".join("  ".join(row).rstrip() for row in rows)
