"""Test sets in the files in which they were published, as the columns that lm-eval's own tasks read.

A reader takes files and gives records by split. Every record is checked here, and a broken one is named by file and
line: an evaluation that drops or miscounts a question is worse than none.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lowrank_cli.data.records import read_examples, read_rows, read_whole
from lowrank_cli.errors import UsageError

LETTERS = ("A", "B", "C", "D")
Records = list[dict[str, Any]]


def mmlu(files: dict[str, str], subject: str) -> dict[str, Records]:
    """MMLU from its CSV files without header: question, four choices, the letter of the answer.

    Args:
        files: the file of each split: dev, test and, if there is one, validation.
        subject: goes into every record.
    Raises:
        MissingError: a file is not there.
        UsageError: a row has not six columns, or its label is none of A to D.
    """
    return {split: list(_mmlu_rows(Path(file), subject)) for split, file in files.items()}


def _mmlu_rows(path: Path, subject: str) -> Iterator[dict[str, Any]]:
    hint = "a row is: question, four choices, and the letter of the answer; fields with commas or line ends in quotes"
    for line, row in read_rows(path):
        if len(row) != 6:
            raise UsageError(f"{path}, line {line}: {len(row)} columns instead of 6", hint)
        question, *choices, answer = row
        if answer.strip() not in LETTERS:
            raise UsageError(f"{path}, line {line}: the label is {answer!r}, not one of A, B, C, D", hint)
        yield {"question": question, "subject": subject, "choices": choices, "answer": LETTERS.index(answer.strip())}


def boolq(files: dict[str, str], train: float = 0.0) -> dict[str, Records]:
    """BoolQ from its JSON lines, Google's (`answer`: true or false) or SuperGLUE's (`label`).

    With `train` the file of the validation is parted: so much at its beginning is for training.
    """

    def convert(record: dict[str, Any], where: str) -> dict[str, Any]:
        label = record.get("label", record.get("answer"))
        if not isinstance(label, bool) and label not in (0, 1):
            raise UsageError(f"{where}: the answer is {label!r}, not true or false", "mend the record")
        texts = _texts(record, ("question", "passage"), where)
        return {**texts, "idx": int(re.findall(r"\d+", where)[-1]) - 1, "label": int(label)}

    splits = _converted(files, convert)
    if not train:
        return splits
    parts = _parted({"test": splits["validation"]}, train)
    return {"train": parts["train"], "validation": parts["test"]}


def commonsense_qa(files: dict[str, str]) -> dict[str, Records]:
    """CommonsenseQA from its JSON lines: `question` with `stem` and `choices`, and `answerKey`."""

    def convert(record: dict[str, Any], where: str) -> dict[str, Any]:
        question = record.get("question")
        choices = question.get("choices") if isinstance(question, dict) else None
        if not isinstance(choices, list) or len(choices) != 5:
            raise UsageError(f"{where}: no question with five choices", "mend the record")
        parts = [_texts(choice, ("label", "text"), where) for choice in choices]
        labels = [part["label"] for part in parts]
        if record.get("answerKey") not in labels:
            raise UsageError(
                f"{where}: the answer is {record.get('answerKey')!r}, not one of {', '.join(labels)}",
                "take the file with answers: dev_rand_split.jsonl",
            )
        return {
            "id": str(record.get("id", "")),
            "question": _texts(question, ("stem",), where)["stem"],
            "question_concept": str(question.get("question_concept", "")),
            "choices": {"label": labels, "text": [part["text"] for part in parts]},
            "answerKey": record["answerKey"],
        }

    return _converted(files, convert)


def gsm8k(files: dict[str, str]) -> dict[str, Records]:
    """GSM8K from its JSON lines: `question`, and `answer` that ends in `#### N`."""

    def convert(record: dict[str, Any], where: str) -> dict[str, Any]:
        texts = _texts(record, ("question", "answer"), where)
        if not re.search(r"#### \S", texts["answer"]):
            raise UsageError(f"{where}: the answer has no '#### N'", "mend the record")
        return texts

    return _converted(files, convert)


def math500(files: dict[str, str]) -> dict[str, Records]:
    """MATH-500 from its JSON lines: `problem` and `solution`, or `question` and a worked `answer`, with a \\boxed."""

    def convert(record: dict[str, Any], where: str) -> dict[str, Any]:
        keys = ("problem", "solution") if "problem" in record else ("question", "answer")
        problem, solution = _texts(record, keys, where).values()
        if "\\boxed" not in solution and "\\fbox" not in solution:
            raise UsageError(f"{where}: the solution has no \\boxed answer", "mend the record")
        return {"problem": problem, "solution": solution}

    return _converted(files, convert)


def svamp(files: dict[str, str]) -> dict[str, Records]:
    """SVAMP from its JSON list: `Body`, `Question`, and `Answer`, a number."""

    def convert(record: dict[str, Any], where: str) -> dict[str, Any]:
        answer = record.get("Answer")
        if isinstance(answer, bool) or not isinstance(answer, (int, float)) or not math.isfinite(answer):
            raise UsageError(f"{where}: the answer is {answer!r}, not a number", "mend the record")
        texts = _texts(record, ("Body", "Question"), where)
        # 51.0 is written 51, as a model would
        number = str(int(answer)) if answer == int(answer) else str(answer)
        body = texts["Body"].strip()
        # some end without a full stop
        body += "" if body.endswith((".", ",", "?", "!")) else "."
        return {"body": body, "question": texts["Question"].strip(), "answer": number}

    return _parted(_converted(files, convert), 0.7)


def yes_no(files: dict[str, str]) -> dict[str, Records]:
    """Coin flip from its JSON file: `examples` of `question` and `answer`, yes or no."""

    def convert(record: dict[str, Any], where: str) -> dict[str, Any]:
        texts = _texts(record, ("question", "answer"), where)
        answer = texts["answer"].strip().lower()
        if answer not in ("yes", "no"):
            raise UsageError(f"{where}: the answer is {texts['answer']!r}, not yes or no", "mend the record")
        return {"question": texts["question"].strip(), "label": int(answer == "yes")}

    return _parted(_converted(files, convert), 0.7)


def bigbench(files: dict[str, str], train: float) -> dict[str, Records]:
    """A multiple-choice task of BIG-bench from its task.json, in the columns of the hub's data set.

    The prompt is what BIG-bench makes of an example without shots: its input between the task's prefixes. The order
    of the choices is drawn, the same one each time: some files list the right one first, and a model that gives all
    the same score would be right every time.

    Args:
        files: the one file, as "test".
        train: the share at the beginning that is kept for training.
    """
    about, examples = read_examples(Path(files["test"]))
    before, after = about.get("example_input_prefix", "\nQ: "), about.get("example_output_prefix", "\nA: ")
    records = []
    for number, (where, record) in enumerate(examples):
        scores = record.get("target_scores") if isinstance(record, dict) else None
        numbers = isinstance(scores, dict) and all(isinstance(score, (int, float)) for score in scores.values())
        if not numbers or max(scores.values(), default=0) <= 0:
            raise UsageError(f"{where}: no target_scores with a right choice", "mend the record")
        order = list(scores.items())
        random.Random(number).shuffle(order)
        best = max(scores.values())
        text = f"{before}{_texts(record, ('input',), where)['input']}{after}".strip()
        records.append(
            {
                "inputs": text,
                "targets": [choice for choice, score in order if score == best],
                "multiple_choice_targets": [choice for choice, _ in order],
                "multiple_choice_scores": [int(score == best) for _, score in order],
            }
        )
    parts = _parted({"test": records}, train)
    # the hub's data set has the evaluation under this name
    return {"train": parts["train"], "default": parts["test"]}


def wikitext(files: dict[str, str]) -> dict[str, Records]:
    """The articles of WikiText files: from one heading of the first level to the next, lines as they stand."""
    return {split: [{"page": page} for page in _pages(Path(file))] for split, file in files.items()}


def _pages(path: Path) -> Iterator[str]:
    page: list[str] = []
    for line in read_whole(path).split("\n"):
        heading = line.strip()
        if re.match(r"= (?!=)", heading) and re.search(r"(?<!=) =$", heading) and page:
            if "\n".join(page).strip():
                yield "\n".join(page)
            page = []
        page.append(line)
    if "\n".join(page).strip():
        yield "\n".join(page)


def wikitext_rows(path: Path) -> list[str]:
    """The lines of a raw WikiText file as the rows of the hub's data set: blank ones empty, others with their end.

    Joined by two line ends they are the text on which the literature measures perplexity.
    """
    lines = read_whole(path).split("\n")
    if lines and not lines[-1]:
        lines.pop()
    return [f"{line}\n" if line.strip() else "" for line in lines]


def _converted(files: dict[str, str], convert) -> dict[str, Records]:
    found = {}
    for split, file in files.items():
        _, examples = read_examples(Path(file))
        found[split] = [convert(_object(record, where), where) for where, record in examples]
        if not found[split]:
            raise UsageError(f"{file} holds no records", "check the file")
    return found


def _parted(splits: dict[str, Records], train: float) -> dict[str, Records]:
    """The one file of a set without parts: its beginning for training, its end for evaluation, as in WeLore's code."""
    records = splits["test"]
    cut = int(len(records) * train)
    return {"train": records[:cut], "test": records[cut:]}


def _object(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise UsageError(f"{where}: not a JSON object", "mend the record")
    return record


def _texts(record: dict[str, Any], keys: Iterable[str], where: str) -> dict[str, str]:
    found = {}
    for key in keys:
        value = record.get(key) if isinstance(record, dict) else None
        if not isinstance(value, str):
            raise UsageError(f"{where}: '{key}' is {'missing' if value is None else 'no text'}", "mend the record")
        found[key] = value
    return found
