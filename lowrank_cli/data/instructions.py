"""Instruction records: questions with their answers from files, the hub or the standard library, in one form.

The form of a data set is told from the keys of its first record. Whatever it was, what comes out is a `Record`: turns
of an instruction, perhaps an input, and a response.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

from lowrank_cli import console
from lowrank_cli.data import docstrings
from lowrank_cli.data.conversations import Record, Turn, read_conversation, text_in, with_context
from lowrank_cli.data.documents import is_hub_id, open_source
from lowrank_cli.data.records import kind_of, read_records
from lowrank_cli.errors import MissingError, UsageError
from lowrank_cli.settings.finetune import TaskConfig
from lowrank_cli.settings.training import DataConfig

FORMS = "--dataset takes docstrings, a .json .jsonl .csv or .parquet file, a folder of them, or a hub id"
VALIDATION_SPLITS = ("validation", "valid", "val", "dev", "test")


@dataclass(frozen=True)
class Form:
    """A way to write records: the keys that tell it, and how one is read."""

    name: str
    keys: tuple[str, ...]
    read: Callable[[dict[str, Any], str], list[Record]]


@dataclass
class Instructions:
    """The records of a data set in two parts.

    Attributes:
        train: in the order of the files.
        validation: in the order of the files; none asks what a train record asks.
        description: for run.json.
    """

    train: list[Record]
    validation: list[Record]
    description: dict[str, Any] = field(default_factory=dict)


def load(
    config: DataConfig, task: TaskConfig, *, offline: bool = False, status: Callable[[str], None] = lambda _: None
) -> Instructions:
    """The configured records: those to train on and those held out.

    Args:
        config: dataset, dataset_config and validation_dataset are used.
        task: validation_share and skip_bad are used.
        offline: never touch the network.
        status: told one line for each form that was found and for records that were left out.
    Raises:
        UsageError: a record cannot be read as given; it is named by file and number.
        MissingError: the data set is not there, or not without a network.
    """
    reader = _Reader(task.skip_bad, status)
    train, validation = _parts(config.dataset, config, offline)
    about: dict[str, Any] = {"dataset": config.dataset, "dataset_config": config.dataset_config}
    records = reader.read(train, config.dataset)
    if config.validation_dataset is not None:
        own_train, own = _parts(config.validation_dataset, config, offline)
        held_out = reader.read(own or own_train, config.validation_dataset)
        about["validation_dataset"] = config.validation_dataset
    elif validation is not None:
        held_out = reader.read(validation, config.dataset)
    else:
        records, held_out = hold_out(records, task.validation_share, config.dataset)
    about |= {"form": " and ".join(reader.forms), "skipped": reader.skipped or None}
    return Instructions(records, held_out, about)


def hold_out(records: list[Record], share: float, name: str) -> tuple[list[Record], list[Record]]:
    """The records in two parts that depend on their prompts alone: not on a seed, the order or the rest of the set.

    Records with the same prompt go to the same part, so that no validation question is trained on.

    Args:
        records: in any order; each part keeps it.
        share: of the records that are held out, as nearly as prompts with several records allow; at least one is.
        name: of the data set, for messages.
    Raises:
        UsageError: all records ask the same, so nothing can be held out.
    """
    digests = [sha256(record.prompt.encode()).digest() for record in records]
    sizes = Counter(digests)
    if len(sizes) < 2:
        raise UsageError(
            f"{name} has one prompt only, so nothing can be held out to validate on",
            "give validation records with --validation-dataset",
        )
    # something is left to train on
    wanted, chosen, count = min(max(1, round(share * len(records))), len(records) - 1), set(), 0
    for digest in sorted(sizes):
        if count + sizes[digest] <= wanted:
            chosen.add(digest)
            count += sizes[digest]
    # one more prompt, where its records miss the share by less than none of them do
    rest = sorted((size, digest) for digest, size in sizes.items() if digest not in chosen)
    if len(rest) > 1 and (not chosen or rest[0][0] < 2 * (wanted - count)):
        count += rest[0][0]
        chosen.add(rest[0][1])
    if not wanted / 2 <= count <= 2 * wanted:
        console.warn(
            f"{name}: {count:,} of {len(records):,} records validate instead of {wanted:,}, because records with the "
            f"same prompt stay together and one prompt has {max(sizes.values()):,}"
        )
    parts: tuple[list[Record], list[Record]] = ([], [])
    for record, digest in zip(records, digests, strict=True):
        parts[digest in chosen].append(record)
    return parts


def form_of(record: Any, where: str) -> Form:
    """The form of a record by its keys; raises UsageError with the known forms."""
    if not isinstance(record, dict):
        raise UsageError(f"{where}: a record is an object, not {kind_of(record)}", _known_forms())
    for form in _FORMS:
        if all(key in record for key in form.keys):
            return form
    keys = ", ".join(str(key) for key in record) or "none"
    raise UsageError(f"{where}: the keys fit no form of instruction data: {keys}", _known_forms())


class LeftOut:
    """Records that cannot be learned from: the first one stops the run, or all are left out and counted.

    Args:
        skip: whether they are left out.
    """

    def __init__(self, skip: bool):
        self.skip, self.reasons = skip, []

    def add(self, error: UsageError) -> None:
        """Count a record, or raise the error that it gave with the flag that would leave it out."""
        if not self.skip:
            raise UsageError(error.message, f"{error.hint}; --skip-bad leaves such records out") from error
        self.reasons.append(error.message)

    def line(self, name: str) -> str:
        """Return a line for the user; "" if nothing was left out."""
        if not self.reasons:
            return ""
        return f"{name}: {len(self.reasons):,} bad records left out, the first is {self.reasons[0]}"


class _Reader:
    """Reads the records of files, all of the form of the first, and counts those it leaves out."""

    def __init__(self, skip_bad: bool, status: Callable[[str], None]):
        self.skip_bad, self.status = skip_bad, status
        self.skipped, self.forms = 0, []

    def read(self, raw: "Raw", name: str) -> list[Record]:
        """The records of a data set; raises UsageError that names the first broken one."""
        form, records, left = None, [], LeftOut(self.skip_bad)
        for where, item in raw(left.add):
            try:
                form = form or form_of(item, where)
                found = _records_of(item, form, where)
            except UsageError as error:
                left.add(error)
                continue
            for record in found:
                if problem := _emptiness(record):
                    left.add(UsageError(f"{record.where}: {problem}", "fill it in"))
                else:
                    records.append(record)
        if form is None or not records:
            raise UsageError(
                f"{name} has no records" + (" that can be learned from; " if left.reasons else "") + left.line(name),
                "check the file, or give another with --dataset",
            )
        self.status(f"{name}: {len(records):,} records of the {form.name} form ({', '.join(form.keys)})")
        if line := left.line(name):
            self.status(line)
        self.skipped += len(left.reasons)
        if form.name not in self.forms:
            self.forms.append(form.name)
        return records


def _records_of(item: Any, form: Form, where: str) -> list[Record]:
    missing = [key for key in form.keys if not isinstance(item, dict) or key not in item]
    if missing:
        has = ", ".join(map(str, item)) if isinstance(item, dict) else f"none, it is {kind_of(item)}"
        raise UsageError(
            f"{where}: no '{missing[0]}'; keys: {has}",
            f"the first record has the {form.name} form: every record needs {' and '.join(form.keys)}",
        )
    return form.read(item, where)


# raw records after their places; what it is called with takes the errors of lines that are none
Raw = Callable[[Callable[[UsageError], None]], Iterable[tuple[str, Any]]]


def _parts(dataset: str, config: DataConfig, offline: bool) -> tuple[Raw, Raw | None]:
    """Return the train part and the validation part, None for one that the data set does not have."""
    if dataset == "docstrings":
        return _files([docstrings.part("train")]), _files([docstrings.part("validation")])
    if dataset == "stdlib":
        raise UsageError("stdlib is text without instructions", "the set made from its docstrings is: docstrings")
    if Path(dataset).expanduser().exists():
        # whether a folder holds its own validation files is the same question as for text
        plain = DataConfig(dataset=dataset)
        train, validation = open_source(plain, "train"), open_source(plain, "validation")
        return _files(train.files), (_files(validation.files) if validation.held_out is None else None)
    if not is_hub_id(dataset):
        raise MissingError(f"there is no file or folder {dataset}", FORMS)
    # datasets takes two seconds to import; files do not need it
    from lowrank_cli.data import hub

    splits = hub.whole(dataset, config.dataset_config, offline=offline)
    if "train" not in splits:
        raise UsageError(
            f"{dataset} has no train split; splits: {', '.join(sorted(splits))}", "choose a data set with one"
        )
    own = next((split for split in VALIDATION_SPLITS if split in splits), None)
    return _rows(dataset, "train", splits["train"]), (_rows(dataset, own, splits[own]) if own else None)


def _files(files: list[Path]) -> Raw:
    return lambda broken: chain.from_iterable(read_records(file, broken=broken) for file in files)


def _rows(dataset: str, split: str, rows: Iterable[Any]) -> Raw:
    return lambda _: ((f"{dataset} ({split}), record {number}", row) for number, row in enumerate(rows, 1))


def _emptiness(record: Record) -> str:
    if record.chat is not None:
        return ""
    if not record.turns or any(not turn.response.strip() for turn in record.turns):
        return "the response is empty"
    if any(not (turn.instruction.strip() or turn.input.strip()) for turn in record.turns):
        return "the prompt is empty"
    return ""


def _pair(prompt: str, response: str, about: str | None = None) -> Callable[[dict[str, Any], str], list[Record]]:
    """Reads records of one turn with these keys; `about` is the optional key of the input."""

    def read(record: dict[str, Any], where: str) -> list[Record]:
        texts = [text_in(record, key, where) if key else "" for key in (prompt, about, response)]
        return with_context(record, [Record(where, (Turn(*texts),))], where)

    return read


def _instances(record: dict[str, Any], where: str) -> list[Record]:
    instruction, instances = text_in(record, "instruction", where), record["instances"]
    if not isinstance(instances, list) or not all(isinstance(i, dict) for i in instances):
        raise UsageError(f"{where}: 'instances' is {kind_of(instances)}, not a list of objects", _known_forms())
    pairs = [(text_in(i, "input", where), text_in(i, "output", where)) for i in instances]
    return with_context(record, [Record(where, (Turn(instruction, *pair),)) for pair in pairs], where)


def _conversation(key: str) -> Callable[[dict[str, Any], str], list[Record]]:
    return lambda record, where: [read_conversation(record, key, where)]


# a record with the keys of several has the first
_FORMS = (
    Form("chat", ("messages",), _conversation("messages")),
    Form("chat", ("conversations",), _conversation("conversations")),
    Form("Alpaca", ("instruction", "output"), _pair("instruction", "output", "input")),
    Form("Dolly", ("instruction", "response"), _pair("instruction", "response", "context")),
    Form("Self-Instruct", ("instruction", "instances"), _instances),
    Form("pair", ("prompt", "response"), _pair("prompt", "response")),
    Form("pair", ("prompt", "completion"), _pair("prompt", "completion")),
    Form("pair", ("query", "response"), _pair("query", "response")),
    Form("pair", ("question", "answer"), _pair("question", "answer")),
)


def _known_forms() -> str:
    return "forms: " + "; ".join(" and ".join(form.keys) for form in _FORMS)
