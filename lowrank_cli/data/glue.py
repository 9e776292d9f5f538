"""GLUE's tasks: labelled sentences and pairs from the published files in a folder, or from the hub."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank_cli.data.records import kind_of, read_lines, read_records
from lowrank_cli.data.tasks import Task, from_hub, missing_data, task_folder
from lowrank_cli.errors import UsageError

# CoLA's files have no header
_COLA = ("source", "label", "mark", "sentence")
# where the hub's names, which .jsonl and .parquet files made from it have, are not the published ones
_HUB_COLUMNS = {"mrpc": ("sentence1", "sentence2"), "mnli": ("premise", "hypothesis")}
_PARTS = {
    "train": ("train",),
    "validation": ("dev", "validation", "dev_matched", "validation_matched"),
}
_ENDINGS = (".tsv", ".jsonl", ".json", ".csv", ".parquet")
_BROKEN_SHARE = 0.01  # the published QQP and QNLI have a few rows that lack a column


@dataclass(frozen=True)
class Example:
    """One or two texts and what they are: a class's number, or a score."""

    texts: tuple[str, ...]
    label: int | float


def load(
    task: Task,
    data_dir: str | None,
    *,
    parts: tuple[str, ...] = ("train", "validation"),
    offline: bool = False,
    status: Callable[[str], None] = lambda _: None,
) -> tuple[list[Example], ...]:
    """Read the examples of parts of a task, in the files' order.

    The validation part is the published development set (MNLI: the matched one): the test labels are not public.

    Args:
        task: not a causal one.
        data_dir: a folder that holds the task's folder, or is it.
        parts: "train" and "validation", or one of them.
        offline: without a folder, use what the cache of `datasets` holds, or fail.
        status: told of the rows that were left out.
    Raises:
        MissingError: the data are not there.
        UsageError: a file is not what it should be; its line is named.
    """
    if data_dir is not None:
        folder = task_folder(task, data_dir)
        files = [_part(folder, task, part) for part in parts]
        found = [(_tsv(f, task) if f.suffix == ".tsv" else _records(f, task), str(f)) for f in files]
    else:
        # datasets takes two seconds to import; files do not need it
        from lowrank_cli.data import hub

        with from_hub(task):
            splits = hub.whole(*task.hub, offline=offline)
        own = [next(name for name in _PARTS[part] if name in splits) for part in parts]
        found = [
            (_rows(splits[name], where, task), where)
            for name, where in ((name, f"{task.hub[0]} {task.name} ({name})") for name in own)
        ]
    return tuple(_whole(examples, where, status) for examples, where in found)


def _part(folder: Path, task: Task, part: str) -> Path:
    known = [folder / f"{name}{ending}" for name in _PARTS[part] for ending in _ENDINGS]
    found = next((path for path in known if path.is_file()), None)
    if found is None:
        raise missing_data(task, f"there is no {known[0].name} in {folder}")
    return found


def _tsv(path: Path, task: Task) -> Iterator[Example | str]:
    """Yield the examples; for a row with a column too few or too many its place."""
    columns = _COLA if task.name == "cola" else None
    needed = (*task.columns, task.label)
    # quotes are text, and \r or other line separators inside a sentence do not end a row
    for number, line in enumerate(read_lines(path), 1):
        cells = line.rstrip("\r\n").split("\t")
        if columns is None:
            columns = cells
            if wrong := [name for name in needed if columns.count(name) != 1]:
                problem = f"the column '{wrong[0]}' twice" if wrong[0] in columns else f"no column '{wrong[0]}'"
                raise UsageError(
                    f"{path} has {problem}; columns: {', '.join(columns)}",
                    f"the published {task.folder} files have {', '.join(needed)}",
                )
            continue
        row, where = dict(zip(columns, cells, strict=False)), f"{path}, line {number}"
        whole = len(cells) <= len(columns) and all(row.get(name) for name in needed)
        yield _example(row, where, task) if whole else where


def _records(path: Path, task: Task) -> Iterator[Example]:
    return (_example(record, where, task) for where, record in read_records(path))


def _rows(split: Iterable[Any], where: str, task: Task) -> Iterator[Example]:
    return (_example(row, f"{where}, record {number}", task) for number, row in enumerate(split, 1))


def _example(row: Any, where: str, task: Task) -> Example:
    if not isinstance(row, dict):
        raise UsageError(f"{where}: a record is an object, not {kind_of(row)}", "one object a line")
    published = all(name in row for name in (*task.columns, task.label))
    columns, label = (task.columns, task.label) if published else (_HUB_COLUMNS.get(task.name, task.columns), "label")
    if lacking := [name for name in (*columns, label) if row.get(name) is None]:
        raise UsageError(
            f"{where}: no '{lacking[0]}'; keys: {', '.join(map(str, row))}",
            f"{task.name} needs {', '.join((*columns, label))}",
        )
    texts = tuple(row[name] for name in columns)
    if not all(isinstance(text, str) for text in texts):
        raise UsageError(f"{where}: {', '.join(columns)} should be text", "write it in quotes")
    return Example(texts, _label(row[label], where, task))


def _label(value: Any, where: str, task: Task) -> int | float:
    try:
        if task.kind == "regression":
            if math.isfinite(score := float(value)):
                return score
            raise ValueError
        number = task.values.index(value) if value in task.values else int(value)
    except (TypeError, ValueError, OverflowError):
        number = -1
    if task.kind == "regression" or not 0 <= number < task.num_labels:
        allowed = (
            "a number" if task.kind == "regression" else ", ".join(task.values or map(str, range(task.num_labels)))
        )
        raise UsageError(f"{where}: the label is {value!r}", f"labels of {task.name}: {allowed}")
    return number


def _whole(rows: Iterable[Example | str], name: str, status: Callable[[str], None]) -> list[Example]:
    examples, broken = [], []
    for row in rows:
        (broken if isinstance(row, str) else examples).append(row)
    if not examples or len(broken) > _BROKEN_SHARE * len(examples):
        if broken:
            raise UsageError(
                f"{len(broken):,} rows of {name} have a column too few or too many, the first is {broken[0]}",
                "fetch the file again",
            )
        raise UsageError(f"{name} has no examples", "fetch the file again")
    if broken:
        places = f"the first is {broken[0]}"
        status(f"{len(broken):,} rows of {name} have a column too few or too many and are left out, {places}")
    return examples
