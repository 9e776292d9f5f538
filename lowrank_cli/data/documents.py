"""Sources of documents: where ``--dataset`` gets its texts from, and how they part into train and validation.

A source is a position in a fixed order of documents. Iterating continues from the position; a pass that reaches the
end goes back to the start, so that the next one is the next epoch. ``state_dict`` is the position of the next
document, as JSON.
"""

import hashlib
import os
import re
import sys
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lowrank_cli import console
from lowrank_cli.data.folders import files_below
from lowrank_cli.data.records import ENDINGS, ending, read_documents
from lowrank_cli.errors import MissingError, UsageError
from lowrank_cli.settings.training import DataConfig

HELD_OUT_EVERY = 20  # documents; the second of every 20 is validation where a dataset has no such part
FORMS = "--dataset takes stdlib, a .txt .json .jsonl .csv or .parquet file (.gz .bz2 .xz too), a folder, or a hub id"
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_PARTS = {
    "train": "train",
    "training": "train",
    "valid": "validation",
    "validation": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}


class Source(ABC):
    """Documents in a fixed order, with a position.

    Attributes:
        name: what the user called it, with the part.
        identity: JSON-able; changes when the documents do. What a cache is keyed by.
        local: whether a pass reads this machine's files, so that counting and caching the tokens makes sense.
    """

    name: str
    identity: Any
    local: bool = True

    @abstractmethod
    def difference(self, saved: Any) -> str:
        """Say how the documents differ from those of another identity (maybe from JSON); "" if they do not."""

    @abstractmethod
    def __iter__(self) -> Iterator[str]:
        """The documents from the position on; none is blank."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The position of the next document."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position; {} is the start."""


class FileSource(Source):
    """The documents of files, in the files' order.

    Args:
        name: for messages.
        files: in reading order.
        read: the documents of one file, blank ones included; the same ones each time.
        held_out: "validation" keeps the second of every 20 documents, "train" the other 19, None keeps all.
        identity: what the documents depend on besides the files' sizes and times.
    """

    def __init__(
        self,
        name: str,
        files: list[Path],
        read: Callable[[Path], Iterator[str | None]],
        *,
        held_out: str | None = None,
        identity: Any = None,
    ):
        self.name, self.files, self.read, self.held_out = name, files, read, held_out
        self._about = identity
        self.load_state_dict({})

    @property
    def identity(self) -> Any:
        """The files' paths, sizes and times, and which of their documents are kept."""
        stats = [(path, path.stat()) for path in self.files]
        return [self._about, self.held_out, [[str(p), s.st_size, s.st_mtime_ns] for p, s in stats]]

    def difference(self, saved: Any) -> str:
        identity = self.identity
        if saved == identity:
            return ""
        if len(saved) != len(identity) or saved[:2] != identity[:2]:
            return " ".join(f"{self.name} as {identity[:2]} instead of {saved[:-1]}".split())
        before, after = ({path: stat for path, *stat in files} for files in (saved[2], identity[2]))
        told = [f"{path} has changed" for path in after if path in before and after[path] != before[path]]
        told += [f"{path} is missing" for path in before if path not in after]
        told += [f"{path} is new" for path in after if path not in before]
        return ", ".join(told[:3]) + (f" and {len(told) - 3} more" if len(told) > 3 else "")

    def __iter__(self) -> Iterator[str]:
        found = self._document > 0
        while self._file < len(self.files):
            # the record count is of the file's documents as read, kept or not
            for number, text in enumerate(self.read(self.files[self._file])):
                if number < self._record:
                    continue
                self._record = number + 1
                if text is None or not text.strip():
                    continue
                self._document += 1
                if keeps(self.held_out, self._document - 1):
                    found = True
                    yield text
            self._file, self._record = self._file + 1, 0
        count, empty = self._document, not any(path.stat().st_size for path in self.files)
        self.load_state_dict({})
        if not found:
            raise no_documents(self.name, self.held_out, count, empty=empty)

    def state_dict(self) -> dict[str, Any]:
        return {"file": self._file, "record": self._record, "document": self._document}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._file = state.get("file", 0)
        self._record = state.get("record", 0)
        self._document = state.get("document", 0)


def open_source(config: DataConfig, part: str = "train", *, offline: bool = False) -> Source:
    """The documents of one part of the configured dataset.

    Args:
        config: dataset, dataset_config, validation_dataset and text_field are used.
        part: "train" or "validation".
        offline: never touch the network.
    Raises:
        UsageError: the dataset cannot be read as given.
        MissingError: it is not there, or not without a network.
    """
    if part == "validation" and config.validation_dataset is not None:
        return _open(config.validation_dataset, config, "validation", "all", offline)
    # with validation text of its own the dataset holds nothing back
    return _open(config.dataset, config, part, "all" if config.validation_dataset else "held_out", offline)


def is_hub_id(dataset: str) -> bool:
    """Return whether a name that is no path here may be the id of a dataset on the hub."""
    looks_local = ending(Path(dataset)) or dataset.startswith((".", "/", "~")) or dataset.count("/") > 1
    return not looks_local and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", dataset) is not None


def keeps(held_out: str | None, document: int) -> bool:
    """Return whether a part keeps the document of this number, counted from 0; `held_out` is as in FileSource."""
    # the second, not the twentieth: two documents are then enough for both parts
    return held_out is None or (document % HELD_OUT_EVERY == 1) == (held_out == "validation")


def no_documents(name: str, held_out: str | None, count: int, *, empty: bool = False) -> UsageError:
    """The error for a part that turned out to have no documents."""
    if held_out == "validation" and count:
        return UsageError(
            f"{name} has no validation part: of {count} document(s) none is the second of {HELD_OUT_EVERY}",
            "give validation text with --validation-dataset",
        )
    return UsageError(
        f"{name} is empty" if empty else f"{name} has no documents: every text in it is blank",
        "check the file, or give another with --dataset",
    )


def _open(dataset: str, config: DataConfig, part: str, otherwise: str, offline: bool) -> Source:
    if dataset == "stdlib":
        return _stdlib(part)
    path = Path(dataset).expanduser()
    if path.exists():
        return _local(path, config.text_field, part, otherwise)
    if not is_hub_id(dataset):
        raise MissingError(f"there is no file or folder {dataset}", FORMS)
    # datasets takes two seconds to import; files do not need it
    from lowrank_cli.data.hub import HubSource

    return HubSource(dataset, config.dataset_config, config.text_field, part, otherwise=otherwise, offline=offline)


def _stdlib(part: str) -> FileSource:
    root = Path(sysconfig.get_path("stdlib"))
    paths = {}
    for folder, folders, files in os.walk(root):
        # not walked into: site-packages holds ten times the files of the library
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
        # _sysconfigdata is written by the build: compiler flags and paths, not source
        found = [Path(folder, f) for f in files if f.endswith(".py") and not f.startswith("_sysconfigdata")]
        paths |= {path.relative_to(root).as_posix(): path for path in found}
    names = sorted(paths)
    held_out = {n for n in names if int(hashlib.sha256(n.encode()).hexdigest(), 16) % HELD_OUT_EVERY == 0}
    files = [paths[n] for n in names if (n in held_out) == (part == "validation")]
    if not files:
        raise MissingError("this Python has no source text of its standard library", FORMS)
    return FileSource(f"stdlib ({part})", files, _source_text, identity=sys.version)


def _source_text(path: Path) -> Iterator[str | None]:
    try:
        yield path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        yield None


def _local(path: Path, text_field: str, part: str, otherwise: str) -> FileSource:
    name = f"{path} ({part})"

    def source(files: list[Path], held_out: str | None = None) -> FileSource:
        return FileSource(
            name,
            files,
            lambda file: read_documents(file, text_field),
            held_out=held_out,
            identity=["text_field", text_field],
        )

    held_out = part if otherwise == "held_out" else None
    if path.is_file():
        if not ending(path):
            raise UsageError(f"{path} has an ending that is not read here", FORMS)
        return source([path], held_out)
    files, left_out = files_below(path)
    if not files:
        found = f" ({left_out})" if left_out else ""
        raise UsageError(f"the folder {path} has no file that is read here{found}", f"endings: {' '.join(ENDINGS)}")
    # once, though the folder is opened for each part
    if left_out and (part == "train" or otherwise == "all"):
        console.note(f"{path}: {left_out}")
    parts = [_part_of(p.relative_to(path)) for p in files]
    chosen = next((p for p in ("validation", "test") if p in parts), None)
    train = [f for f, p in zip(files, parts, strict=True) if p in (None, "train")]
    if part == "validation" and chosen:
        return source([f for f, p in zip(files, parts, strict=True) if p == chosen])
    if not train:
        raise UsageError(
            f"the folder {path} has only {' and '.join(sorted(set(parts)))} files, nothing to train on",
            "give a folder with train files, or one file by its name",
        )
    return source(train, None if chosen else held_out)


def _part_of(path: Path) -> str | None:
    # the file's own name first, then its folders, the nearest first
    for name in reversed(path.parts):
        for word in re.findall(r"[a-z]+", name.lower()):
            if word in _PARTS:
                return _PARTS[word]
    return None
