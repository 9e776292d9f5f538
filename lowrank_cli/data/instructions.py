"""Instruction records: questions with their answers from files, the hub or the standard library, in one form.

The form of a data set is told from the keys of its first record. Whatever it was, what comes out is a `Record`: turns
of an instruction, perhaps an input, and a response.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

from lowrank_cli.config import DataConfig, TaskConfig
from lowrank_cli.data import docstrings
from lowrank_cli.data.documents import is_hub_id, open_source
from lowrank_cli.data.records import kind_of, read_records
from lowrank_cli.errors import MissingError, UsageError

FORMS = "--dataset takes docstrings, a .json .jsonl .csv or .parquet file, a folder of them, or a hub id"
VALIDATION_SPLITS = ("validation", "valid", "val", "dev", "test")
_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}


@dataclass(frozen=True)
class Turn:
    """A request and its answer; the input is what the instruction is about, "" if there is none."""

    instruction: str
    input: str
    response: str


@dataclass(frozen=True)
class Record:
    """A conversation of one or more turns.

    Attributes:
        where: its place for messages, such as "a.jsonl, line 3".
        turns: at least one.
        system: what a conversation says of the assistant before its first turn.
        choices: the answers that the question allows, where they are a closed set; the response is one of them.
    """

    where: str
    turns: tuple[Turn, ...]
    system: str = ""
    choices: tuple[str, ...] = ()

    @property
    def prompt(self) -> str:
        """What is asked, without any answer: equal for records that must not part into train and validation."""
        return "\n".join(chain([self.system], *((turn.instruction, turn.input) for turn in self.turns)))


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
        task: validation_share and skip_empty are used.
        offline: never touch the network.
        status: told one line for each form that was found and for records that were left out.
    Raises:
        UsageError: a record cannot be read as given; it is named by file and number.
        MissingError: the data set is not there, or not without a network.
    """
    reader = _Reader(task.skip_empty, status)
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
        share: of the records that are held out; at least one is.
        name: of the data set, for messages.
    Raises:
        UsageError: all records ask the same, so nothing can be held out.
    """
    digests = [sha256(record.prompt.encode()).digest() for record in records]
    wanted, chosen, count = max(1, round(share * len(records))), set(), 0
    sizes: dict[bytes, int] = {}
    for digest in digests:
        sizes[digest] = sizes.get(digest, 0) + 1
    # the last one is never held out, so that something is left to train on
    for digest in sorted(sizes)[:-1]:
        if count >= wanted:
            break
        chosen.add(digest)
        count += sizes[digest]
    if not chosen:
        raise UsageError(
            f"{name} has one prompt only, so nothing can be held out to validate on",
            "give validation records with --validation-dataset",
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


class _Reader:
    """Reads the records of files, all of the form of the first, and counts those it leaves out."""

    def __init__(self, skip_empty: bool, status: Callable[[str], None]):
        self.skip_empty, self.status = skip_empty, status
        self.skipped, self.forms = 0, []

    def read(self, raw: Iterable[tuple[str, Any]], name: str) -> list[Record]:
        """The records of a data set; raises UsageError that names the first broken one."""
        form, records, skipped = None, [], []
        for where, item in raw:
            form = form or form_of(item, where)
            missing = [key for key in form.keys if not isinstance(item, dict) or key not in item]
            if missing:
                has = ", ".join(item) if isinstance(item, dict) else f"none, it is {kind_of(item)}"
                raise UsageError(
                    f"{where}: no '{missing[0]}'; keys: {has}",
                    f"the first record has the {form.name} form: every record needs {' and '.join(form.keys)}",
                )
            for record in form.read(item, where):
                if problem := _emptiness(record):
                    if not self.skip_empty:
                        raise UsageError(
                            f"{record.where}: {problem}", "fill it in, or leave such records out with --skip-empty"
                        )
                    skipped.append(record.where)
                else:
                    records.append(record)
        if form is None or not records:
            raise UsageError(f"{name} has no records", "check the file, or give another with --dataset")
        self.status(f"{name}: {len(records):,} records of the {form.name} form ({', '.join(form.keys)})")
        if skipped:
            self.status(f"{name}: {len(skipped):,} empty records left out, the first is {skipped[0]}")
        self.skipped += len(skipped)
        if form.name not in self.forms:
            self.forms.append(form.name)
        return records


def _parts(
    dataset: str, config: DataConfig, offline: bool
) -> tuple[Iterable[tuple[str, Any]], Iterable[tuple[str, Any]] | None]:
    """Raw records of the train part and of the validation part; None for one that the data set does not have."""
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


def _files(files: list[Path]) -> Iterator[tuple[str, Any]]:
    return chain.from_iterable(map(read_records, files))


def _rows(dataset: str, split: str, rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"{dataset} ({split}), record {number}", row) for number, row in enumerate(rows, 1))


def _emptiness(record: Record) -> str:
    if not record.turns or any(not turn.response.strip() for turn in record.turns):
        return "the response is empty"
    if any(not (turn.instruction.strip() or turn.input.strip()) for turn in record.turns):
        return "the prompt is empty"
    return ""


def _pair(prompt: str, response: str, about: str | None = None) -> Callable[[dict[str, Any], str], list[Record]]:
    """Reads records of one turn with these keys; `about` is the optional key of the input."""

    def read(record: dict[str, Any], where: str) -> list[Record]:
        texts = [_text(record, key, where) if key else "" for key in (prompt, about, response)]
        return [Record(where, (Turn(*texts),))]

    return read


def _instances(record: dict[str, Any], where: str) -> list[Record]:
    instruction, instances = _text(record, "instruction", where), record["instances"]
    if not isinstance(instances, list) or not all(isinstance(i, dict) for i in instances):
        raise UsageError(f"{where}: 'instances' is {kind_of(instances)}, not a list of objects", _known_forms())
    pairs = [(_text(i, "input", where), _text(i, "output", where)) for i in instances]
    return [Record(where, (Turn(instruction, about, response),)) for about, response in pairs]


def _conversation(key: str) -> Callable[[dict[str, Any], str], list[Record]]:
    def read(record: dict[str, Any], where: str) -> list[Record]:
        messages = record[key]
        if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
            raise UsageError(f"{where}: '{key}' is {kind_of(messages)}, not a list of messages", _known_forms())
        return [_turns([_message(m, where) for m in messages], where)]

    return read


def _message(message: dict[str, Any], where: str) -> tuple[str, str]:
    sender = "role" if "role" in message else "from"
    role = message.get(sender)
    if role not in _ROLES:
        raise UsageError(
            f"{where}: a message of the {sender} {role!r}", f"roles that are read here: {', '.join(_ROLES)}"
        )
    return _ROLES[role], _text(message, "content" if "content" in message else "value", where)


def _turns(messages: list[tuple[str, str]], where: str) -> Record:
    system = ""
    if messages and messages[0][0] == "system":
        system, messages = messages[0][1], messages[1:]
    order = [role for role, _ in messages]
    if order != [("user", "assistant")[i % 2] for i in range(len(order))]:
        raise UsageError(
            f"{where}: messages of {', '.join(order)}",
            "a conversation is one of user, assistant, user, assistant ... after at most one of system",
        )
    texts = [text for _, text in messages]
    # a question at the end without an answer is an empty response
    texts += [""] * (len(texts) % 2)
    return Record(where, tuple(Turn(a, "", b) for a, b in zip(texts[::2], texts[1::2], strict=True)), system)


def _text(record: dict[str, Any], key: str, where: str) -> str:
    value = record.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UsageError(f"{where}: '{key}' is {kind_of(value)}, not text", "write it as text in quotes")
    return value


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
