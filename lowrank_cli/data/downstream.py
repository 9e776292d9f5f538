"""WeLore's downstream sets as records: reasoning questions that are answered in a word, a letter or a number.

Where the published files have no parts, the first examples are trained on and the rest validates, by WeLore's shares.
With the template qa the prompts are those of lm-eval, where it has the set: what is trained is what is evaluated.
"""

import math
from collections.abc import Callable, Iterable
from hashlib import sha256
from typing import Any

import numpy as np

from lowrank_cli.data.conversations import Record, Turn
from lowrank_cli.data.records import read_examples
from lowrank_cli.data.tasks import Task, from_hub, missing_data, task_folder
from lowrank_cli.errors import UsageError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
YES_NO = ("yes", "no")
# train and validation files, or the one that is parted
_FILES = {
    "svamp": ("SVAMP.json",),
    "strategyqa": ("task.json",),
    "boolq": ("boolq_train.jsonl", "boolq_dev.jsonl"),
    "commonsense_qa": ("train_rand_split.jsonl", "dev_rand_split.jsonl"),
    "coin_flip": ("coin_flip.json",),
    "bigbench_date": ("task.json",),
    "object_tracking": ("task.json",),
}


def load(
    task: Task, data_dir: str | None, *, offline: bool = False, status: Callable[[str], None] = lambda _: None
) -> tuple[list[Record], list[Record]]:
    """The questions of a task to train on and to validate with, in the files' order.

    Args:
        task: a causal one.
        data_dir: a folder that holds the task's folder, or is it.
        offline: without a folder, use what the cache of `datasets` holds, or fail.
        status: told where a file that should train is not there and another one is parted instead.
    Raises:
        MissingError: the data are not there.
        UsageError: a file is not what it should be; its record is named.
    """
    read = _READERS[task.name]
    if data_dir is None:
        train, validation = _hub(task, offline)
    else:
        folder = task_folder(task, data_dir)
        files = [folder / name for name in _FILES[task.name]]
        if len(files) > 1 and task.train_share and files[1].is_file() and not files[0].is_file():
            status(f"there is no {files[0]}: the first {task.train_share:.0%} of {files[1].name} are trained on")
            files = files[1:]
        for file in files:
            if not file.is_file():
                raise missing_data(task, f"there is no {file.name} in {folder}")
        parts = [read_examples(file)[1] for file in files]
        if len(parts) == 1:
            cut = int(task.train_share * len(parts[0]))
            parts = [parts[0][:cut], parts[0][cut:]]
        train, validation = parts
    return _read(read, train, task), _read(read, validation, task)


def _hub(task: Task, offline: bool) -> tuple[list[tuple[str, Any]], ...]:
    if task.hub is None:
        raise missing_data(task, f"{task.name} is read from its published files only")
    from lowrank_cli.data import hub

    with from_hub(task):
        splits = hub.whole(*task.hub, offline=offline)
    return tuple(
        [(f"{task.hub[0]} ({part}), record {n}", row) for n, row in enumerate(splits[part], 1)]
        for part in ("train", "validation")
    )


def _read(
    read: Callable[[dict[str, Any], str], Record], examples: Iterable[tuple[str, Any]], task: Task
) -> list[Record]:
    records = []
    for where, example in examples:
        try:
            records.append(read(example, where))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
            raise UsageError(
                f"{where} is not an example of {task.name}: {type(error).__name__} {error}",
                f"the published {task.folder} files are meant, see the docs on fine-tuning data",
            ) from error
    if not records:
        raise UsageError(f"{task.name} has a part without examples", "fetch the files again")
    return records


def _record(where: str, question: str, answer: str, choices: tuple[str, ...] = (), about: str = "") -> Record:
    if not all(isinstance(text, str) for text in (question, answer, about, *choices)):
        raise TypeError("what is asked and answered is text")
    if choices and answer not in choices:
        raise ValueError(f"the answer {answer!r} is none of {', '.join(choices)}")
    return Record(where, (Turn(question.strip(), about.strip(), answer),), choices=choices)


def _svamp(example: dict[str, Any], where: str) -> Record:
    body = example["Body"].strip()
    body += "" if body.endswith((".", "?", "!", ",")) else "."
    answer = float(example["Answer"])
    if not math.isfinite(answer):
        raise ValueError(f"the answer is {answer}, not a number")
    return _record(where, f"{body} {example['Question']}", f"{answer:g}")


def _strategyqa(example: dict[str, Any], where: str) -> Record:
    return _record(where, example["input"], _right(example["target_scores"]).lower(), YES_NO)


def _boolq(example: dict[str, Any], where: str) -> Record:
    if not isinstance(example["answer"], bool):
        raise ValueError(f"the answer is {example['answer']!r}, not true or false")
    question = f"{example['question'].strip().rstrip('?')}?"
    return _record(where, question, YES_NO[not example["answer"]], YES_NO, about=example["passage"])


def _commonsense_qa(example: dict[str, Any], where: str) -> Record:
    question, choices = example["question"], example.get("choices")
    if isinstance(question, dict):
        question, choices = question["stem"], question["choices"]
    if isinstance(choices, dict):
        # the hub's columns
        labels, texts = choices["label"], choices["text"]
    else:
        labels, texts = [c["label"] for c in choices], [c["text"] for c in choices]
    return _record(where, _with_choices(question, labels, texts), example["answerKey"], tuple(labels))


def _coin_flip(example: dict[str, Any], where: str) -> Record:
    return _record(where, example["question"], example["answer"].strip().lower(), YES_NO)


def _bigbench(example: dict[str, Any], where: str) -> Record:
    scores = example["target_scores"]
    texts = sorted(scores)
    # the right one is published first: an order of the question's own, which no seed changes
    seed = int.from_bytes(sha256(example["input"].encode()).digest()[:8], "big")
    texts = [texts[i] for i in np.random.default_rng(seed).permutation(len(texts))]
    letters = tuple(LETTERS[: len(texts)])
    question = _with_choices(example["input"], letters, texts)
    return _record(where, question, letters[texts.index(_right(scores))], letters)


def _right(scores: dict[str, int]) -> str:
    (right,) = [text for text, score in scores.items() if score == 1]
    return right


def _with_choices(question: str, labels: Iterable[str], texts: Iterable[str]) -> str:
    return "\n".join([question.strip(), *(f"{label}. {text}" for label, text in zip(labels, texts, strict=True))])


_READERS = {
    "svamp": _svamp,
    "strategyqa": _strategyqa,
    "boolq": _boolq,
    "commonsense_qa": _commonsense_qa,
    "coin_flip": _coin_flip,
    "bigbench_date": _bigbench,
    "object_tracking": _bigbench,
}
