"""The test sets with a name of their own here: which lm-eval task each one is, and which published files hold it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowrank_cli.errors import MissingError


@dataclass(frozen=True)
class Suite:
    """A test set.

    Attributes:
        task: the task of lm-eval whose prompts and scores it has; "" for one that is defined in `local_tasks`.
        folder: of that task's YAML below lm_eval/tasks.
        reader: of `evaluate.published`.
        files: of each split, the names under which its file was published, the best first.
        needed: splits without which it cannot be evaluated; the others serve few-shot examples.
        options: of the reader.
        settings: of the task, where the files differ from the hub's data set.
        note: what a user should know about the part that is evaluated.
    """

    task: str
    folder: str
    reader: str
    files: dict[str, tuple[str, ...]]
    needed: tuple[str, ...] = ("test",)
    options: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    note: str = ""


MMLU = "mmlu"
# parts of MMLU's published folder and the splits that lm-eval calls them by
MMLU_PARTS = {"test": "test", "val": "validation", "dev": "dev"}
DEFAULT_SHOTS = {MMLU: 5}
_PARTED = {"training_split": "train", "test_split": "test", "fewshot_split": "train"}
_BIGBENCH = {"training_split": "train", "fewshot_split": "train"}

SUITES = {
    "boolq": Suite(
        "boolq",
        "super_glue/boolq",
        "boolq",
        {
            "validation": ("boolq_dev.jsonl", "BoolQ/val.jsonl", "boolq/dev.jsonl", "boolq/val.jsonl"),
            "train": ("boolq_train.jsonl", "BoolQ/train.jsonl", "boolq/train.jsonl"),
        },
        needed=("validation",),
    ),
    "boolq_held_out": Suite(
        "boolq",
        "super_glue/boolq",
        "boolq",
        {"validation": ("boolq_dev.jsonl",)},
        needed=("validation",),
        options={"train": 0.7},
        note="the last 30 % of boolq_dev.jsonl, where finetune had no boolq_train.jsonl and trained on the rest",
    ),
    "commonsense_qa": Suite(
        "commonsense_qa",
        "commonsense_qa",
        "commonsense_qa",
        {"validation": ("dev_rand_split.jsonl",), "train": ("train_rand_split.jsonl",)},
        needed=("validation",),
    ),
    "gsm8k": Suite(
        "gsm8k", "gsm8k", "gsm8k", {"test": ("gsm8k/test.jsonl",), "train": ("gsm8k/train.jsonl",)}, ("test", "train")
    ),
    "math500": Suite(
        "hendrycks_math500", "hendrycks_math", "math500", {"test": ("math500/test.jsonl", "MATH-500/test.jsonl")}
    ),
    "wikitext": Suite(
        "wikitext",
        "wikitext",
        "wikitext",
        {"test": ("wiki.test.raw",), "validation": ("wiki.valid.raw",), "train": ("wiki.train.raw",)},
    ),
    "svamp": Suite(
        "", "", "svamp", {"test": ("SVAMP.json",)}, settings=_PARTED, note="the last 30 %, the rest is for training"
    ),
    "coin_flip": Suite(
        "",
        "",
        "yes_no",
        {"test": ("coin_flip.json",)},
        settings=_PARTED,
        note="the last 30 %, the rest is for training",
    ),
    "strategyqa": Suite(
        "bigbench_strategyqa_multiple_choice",
        "bigbench",
        "bigbench",
        {"test": ("StrategyQA/task.json", "strategyqa/task.json")},
        options={"train": 0.7},
        settings=_BIGBENCH,
        note="the last 30 %, the rest is for training",
    ),
    "bigbench_date": Suite(
        "bigbench_date_understanding_multiple_choice",
        "bigbench",
        "bigbench",
        {"test": ("Bigbench_Date/task.json", "date_understanding/task.json")},
        options={"train": 0.8},
        settings=_BIGBENCH,
        note="the last 20 %, the rest is for training",
    ),
    "object_tracking": Suite(
        "bigbench_tracking_shuffled_objects_multiple_choice",
        "bigbench",
        "bigbench",
        {"test": ("Bigbench_object_tracking/task.json", "tracking_shuffled_objects/three_objects/task.json")},
        options={"train": 0.8},
        settings=_BIGBENCH,
        note="the last 20 %, the rest is for training",
    ),
}


def is_mmlu(name: str) -> bool:
    """Return whether a name is MMLU, one of its groups or one of its subjects."""
    return name == MMLU or (
        name.startswith("mmlu_") and not name.startswith(("mmlu_pro", "mmlu_flan", "mmlu_redux", "mmlu_prox"))
    )


def find(data_dir: Path, names: tuple[str, ...]) -> Path | None:
    """The first file of these names in a folder or in folders below it, two deep; compressed ones too."""
    for name in names:
        for pattern in (name, f"{name}.gz"):
            for depth in ("", "*/", "*/*/"):
                for path in sorted(data_dir.glob(depth + pattern)):
                    if path.is_file():
                        return path
        # the folder of the set may itself be given
        folder, _, file = name.rpartition("/")
        if folder and data_dir.name.lower() == folder.lower() and (data_dir / file).is_file():
            return data_dir / file
    return None


def mmlu_folder(data_dir: Path) -> Path | None:
    """The folder that holds MMLU's dev/ and test/: the given one, or one below it."""
    for depth in ("", "*/", "*/*/"):
        for test in sorted(data_dir.glob(f"{depth}test")):
            if test.is_dir() and any(test.glob("*_test.csv")):
                return test.parent
    return None


def files_of(name: str, data_dir: Path) -> dict[str, str] | None:
    """The files of a suite in a folder, by split; None if the evaluated one is not there.

    Raises:
        MissingError: it is there, but not what it needs besides.
    """
    suite = SUITES[name]
    found = {split: find(data_dir, names) for split, names in suite.files.items()}
    if found[suite.needed[0]] is None:
        return None
    for split in suite.needed:
        if found[split] is None:
            raise MissingError(
                f"{data_dir} has {found[suite.needed[0]].name} of {name}, but no {suite.files[split][0]}",
                "put the whole set there, as it was published",
            )
    return {split: str(path.resolve()) for split, path in found.items() if path is not None}
