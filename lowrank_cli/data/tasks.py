"""Tasks by name: GLUE, which is classified, and WeLore's downstream sets, which are answered in words.

What a task is (`describe`) is known without its data and without torch. Its examples come from the published files
in a folder of the user's, or from the hub.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank_cli.errors import MissingError, unknown

_ARCHIVE = "kojima-takeshi188/zero_shot_cot, folder dataset"


@dataclass(frozen=True)
class Task:
    """A Task describes a downstream task: its files, its columns, its labels and the metrics that it is judged by.

    Attributes:
        name: as in --task.
        kind: "classification", "regression" or "causal" (answered in words).
        folder: where the published archive has its files.
        label_names: of the classes, in the order of their numbers; () unless classified.
        metrics: of `measure.classification.METRICS`, the one that decides first.
        columns: the texts of an example, one or two, by the published column names.
        label: the column of the label.
        hub: dataset id and configuration on the hub, if the same data are there.
        train_share: the first part of the examples that is trained on, where the files have no parts.
        values: classes by how the published files write them; () where they write the number.
    """

    name: str
    kind: str
    folder: str
    metrics: tuple[str, ...]
    label_names: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    label: str = ""
    hub: tuple[str, str | None] | None = None
    train_share: float = 0.0
    values: tuple[str, ...] = ()

    @property
    def num_labels(self) -> int:
        """Outputs of the model's head: one a class, one for a regression, none for answers in words."""
        return {"causal": 0, "regression": 1}.get(self.kind, len(self.label_names))


def describe(name: str) -> Task:
    """A task by name.

    Raises:
        UsageError: no such task; the nearest is named.
    """
    if name not in TASKS:
        raise unknown("task", name, TASKS, "--task")
    return TASKS[name]


def names() -> list[str]:
    """Every task."""
    return sorted(TASKS)


def task_folder(task: Task, data_dir: str) -> Path:
    """The task's folder in the folder of all tasks, whatever its case and dashes, else that folder itself.

    Raises:
        MissingError: there is no such folder.
    """
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        raise missing_data(task, f"there is no folder {root}")
    wanted = {_plain(task.name), _plain(task.folder)}
    return next((path for path in sorted(root.iterdir()) if path.is_dir() and _plain(path.name) in wanted), root)


def missing_data(task: Task, what: str) -> MissingError:
    """The error for a task whose data are not there, with the ways to get them."""
    published = f"--data-dir FOLDER with the published files in FOLDER/{task.folder}"
    source = "" if task.hub else f" (they are in github.com/{_ARCHIVE})"
    way = f", or without --data-dir and --offline, to fetch {task.hub[0]} from the hub" if task.hub else source
    return MissingError(what, published + way)


@contextmanager
def from_hub(task: Task) -> Iterator[None]:
    """Says of a data set that the hub or the cache did not give that a folder would do as well."""
    try:
        yield
    except MissingError as error:
        raise missing_data(task, error.message) from error


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


def _glue(name: str, folder: str, columns: str, labels: str, metrics: str, **options: Any) -> Task:
    label = options.pop("label", "label")
    kind = options.pop("kind", "classification")
    return Task(
        name,
        kind,
        folder,
        tuple(metrics.split()),
        tuple(labels.split()),
        tuple(columns.split(",")),
        label,
        ("nyu-mll/glue", name),
        **options,
    )


def _answers(name: str, folder: str, metric: str = "accuracy", **options: Any) -> Task:
    return Task(name, "causal", folder, (metric,), **options)


_ENTAILS = "entailment not_entailment"
_ALL: tuple[Task, ...] = (
    _glue("cola", "CoLA", "sentence", "unacceptable acceptable", "matthews_correlation"),
    _glue("sst2", "SST-2", "sentence", "negative positive", "accuracy"),
    _glue("mrpc", "MRPC", "#1 String,#2 String", "not_equivalent equivalent", "f1 accuracy", label="Quality"),
    _glue("stsb", "STS-B", "sentence1,sentence2", "", "pearson spearman", kind="regression", label="score"),
    _glue("qqp", "QQP", "question1,question2", "not_duplicate duplicate", "f1 accuracy", label="is_duplicate"),
    _glue(
        "mnli",
        "MNLI",
        "sentence1,sentence2",
        "entailment neutral contradiction",
        "accuracy",
        label="gold_label",
        values=("entailment", "neutral", "contradiction"),
    ),
    _glue("qnli", "QNLI", "question,sentence", _ENTAILS, "accuracy", values=tuple(_ENTAILS.split())),
    _glue("rte", "RTE", "sentence1,sentence2", _ENTAILS, "accuracy", values=tuple(_ENTAILS.split())),
    _glue("wnli", "WNLI", "sentence1,sentence2", "not_entailment entailment", "accuracy"),
    # the parts of the sets without any are WeLore's
    _answers("svamp", "SVAMP", "greedy_exact_match", train_share=0.7),
    _answers("strategyqa", "StrategyQA", train_share=0.7),
    _answers("boolq", "boolq", hub=("google/boolq", None), train_share=0.7),
    _answers("commonsense_qa", "CommonsenseQA", hub=("tau/commonsense_qa", None)),
    _answers("coin_flip", "coin_flip", train_share=0.7),
    _answers("bigbench_date", "Bigbench_Date", train_share=0.8),
    _answers("object_tracking", "Bigbench_object_tracking", train_share=0.8),
)
TASKS = {task.name: task for task in _ALL}
