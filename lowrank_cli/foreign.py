"""The gate for files that another program may have written: models, adapters, tokenizers, data, caches, checkpoints.

Whatever is opened here is read as data: no code of a folder ever runs, sizes and nesting have limits, a value has the
type that is asked for, and a file that cannot be read is an error with its name and what to do. Nothing else in the
package parses JSON, YAML, safetensors, pickles or GGUF files, or calls `from_pretrained`.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from lowrank_cli.errors import LowrankError, MissingError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

TEXT_LIMIT = 1 << 30  # bytes of a JSON file that is read whole; the largest tokenizers have a tenth of it
SETTINGS_LIMIT = 1 << 20  # bytes of a YAML file
DEPTH = 16  # of nested settings in a YAML file; ours have two
AGAIN = "copy or save it again"

# the JSON files of a model's folder: Transformers and PEFT take nesting, numbers and strings as they come
FOLDER = ("config.json", "generation_config.json", "adapter_config.json", "tokenizer_config.json", "tokenizer.json",
          "special_tokens_map.json", "added_tokens.json")  # fmt: skip

INDEX = "model.safetensors.index.json"
# in the order in which Transformers looks for them
SINGLE, PICKLED, PICKLED_INDEX = "model.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json"
GGUF_MAGIC, GGUF_VERSIONS = b"GGUF", (2, 3)
# bytes of the smallest entry of a GGUF file's metadata, and of its list of tensors
GGUF_ENTRY, GGUF_TENSOR = 13, 32


def read_text(path: Path, *, limit: int = TEXT_LIMIT) -> str:
    """Return the text of a file.

    Raises:
        MissingError: it is not there.
        UsageError: it is larger than `limit` bytes, not UTF-8, or cannot be read.
    """
    try:
        if path.stat().st_size > limit:
            raise UsageError(
                f"{path} has more than {limit:,} bytes, too many for a file of its kind", "check the file"
            )
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise MissingError(f"there is no file {path}", "check the path") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text: {error.reason}", "save it as UTF-8") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", "check the file and its permissions") from None


def parse_json(text: str, where: str, hint: str = "mend the file") -> Any:
    """Return the value of a JSON text.

    Args:
        text: one value.
        where: its place for the message, such as "a.jsonl, line 3".
        hint: what to do about it.
    Raises:
        UsageError: it is not JSON, nests too deep, has a number that is too long, or a string that is no Unicode.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if error.lineno > 1 else ""
        raise UsageError(f"{where}{line}: not JSON ({error.msg}, column {error.colno})", hint) from None
    except RecursionError:
        raise UsageError(f"{where}: lists or objects are nested too deep to be read", hint) from None
    except ValueError as error:
        # an integer of more digits than Python converts
        raise UsageError(f"{where}: {first_line(error)}", hint) from None
    # half of a surrogate pair can only be written as an escape
    if "\\ud" in text.lower() and (broken := _lone_surrogate(value)):
        raise UsageError(
            f"{where}: a string holds {broken!r}, half of a surrogate pair, which is no character",
            "write the whole pair or leave it out",
        )
    return value


def _lone_surrogate(value: Any) -> str:
    """Return the first lone surrogate in the strings of a JSON value, else ""."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            try:
                item.encode()
            except UnicodeEncodeError as error:
                return item[error.start]
        elif isinstance(item, dict):
            waiting += [*item, *item.values()]
        elif isinstance(item, list):
            waiting += item
    return ""


def read_json(path: Path, kind: type = dict, *, hint: str = AGAIN, limit: int = TEXT_LIMIT) -> Any:
    """Return the content of a JSON file.

    Args:
        path: the file.
        kind: what its value has to be: dict, list, or object for anything.
        hint: what to do where it is broken.
        limit: bytes that it may have.
    Raises:
        MissingError: it is not there.
        UsageError: it cannot be read, or holds something else.
    """
    value = parse_json(read_text(path, limit=limit), str(path), hint)
    if not isinstance(value, kind):
        names = {dict: "an object", list: "a list"}
        raise UsageError(f"{path} holds no {names.get(kind, kind.__name__).split()[-1]} but {kind_of(value)}", hint)
    return value


def entry(content: dict[str, Any], key: str, kind: type | tuple[type, ...], where: Path, hint: str = AGAIN) -> Any:
    """Return one value of a JSON object, checked.

    Raises:
        UsageError: it is not there, or of another type.
    """
    value = content.get(key)
    # a boolean is an int to Python
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        what = f"has no {key}" if value is None else f"has {kind_of(value)} as {key}"
        raise UsageError(f"{where} {what}", hint)
    return value


def kind_of(value: Any) -> str:
    """Return what a JSON value is, in a user's words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping that a YAML file holds.

    Raises:
        MissingError: it is not there.
        UsageError: it is no mapping, has a key twice or one that is no text, nests deeper than DEPTH, or uses aliases,
            of which ten lines can stand for more values than fit in memory.
    """
    import yaml

    text = read_text(path, limit=SETTINGS_LIMIT)
    mend = "mend the file"
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEPTH:
                raise UsageError(f"{path} is nested deeper than {DEPTH}, which no setting is", mend)
            if isinstance(event, yaml.AliasEvent):
                line = event.start_mark.line + 1
                raise UsageError(f"{path}, line {line}: aliases (*{event.anchor}) are not read", "write the value out")
        content = yaml.load(text, Loader=_yaml_loader())
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())}", mend) from None
    except (ValueError, RecursionError) as error:
        # an integer of more digits than Python converts, a date of the 40th of May
        raise UsageError(f"{path}: {first_line(error)}", mend) from None
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds no settings", "write one `key: value` a line, such as `method: galore`")
    nested = [value for value in content.values() if isinstance(value, dict)]
    for key in (key for mapping in (content, *nested) for key in mapping):
        if not isinstance(key, str):
            raise UsageError(f"{path} has the key {key!r}, which is no setting's name", mend)
    return content


def _yaml_loader() -> type:
    """Return a safe loader, in C where PyYAML has it (ten times as fast), that refuses a key which stands twice."""
    import yaml

    class Loader(yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            seen = set()
            for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value} stands twice, again in line {key.start_mark.line + 1}"
                    )
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    return Loader


@contextmanager
def open_tensors(path: Path, hint: str = AGAIN) -> Iterator[Any]:
    """Open a safetensors file to read.

    Raises:
        LowrankError: it is damaged, or cannot be read.
    """
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise LowrankError(f"{path} is damaged: {first_line(error)}", hint) from None
    except OSError as error:
        # safetensors gives no errno
        reason = error.strerror or ("it is not there" if isinstance(error, FileNotFoundError) else first_line(error))
        raise LowrankError(f"{path} cannot be read: {reason}", hint) from None


def read_tensors(path: Path, *, device: str = "cpu", hint: str = AGAIN) -> dict[str, Tensor]:
    """Return every tensor of a safetensors file; raises as `open_tensors`."""
    from safetensors.torch import load_file

    with open_tensors(path, hint):
        return load_file(path, device=device)


def read_pickle(path: Path, hint: str) -> Any:
    """Return the content of a file of torch.save's: tensors and plain containers; nothing in it is executed.

    Raises:
        UsageError: it is no such file, or holds other objects.
    """
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        # PyTorch's own text advises to switch the check off
        raise UsageError(
            f"{path} holds more than tensors and plain containers, and nothing else is read", hint
        ) from None
    except (RuntimeError, ValueError, EOFError, OSError, KeyError, AttributeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no file of tensors: {first_line(error)}", hint) from None


class Unpickler(pickle.Unpickler):
    """Unpickle plain containers and objects of the classes that are named, nothing else.

    Args:
        file: the pickle.
        allowed: (module, name) of each class.
        where: the file's name for the message.
    """

    def __init__(self, file: io.BufferedIOBase, allowed: frozenset[tuple[str, str]], where: Path):
        super().__init__(file)
        self.allowed, self.where = allowed, where

    def find_class(self, module: str, name: str) -> Any:
        """Return the class, or raise UsageError."""
        if (module, name) not in self.allowed:
            raise UsageError(
                f"{self.where} asks for {module}.{name}, which no checkpoint holds", "do not trust the file"
            )
        return super().find_class(module, name)


def inside(folder: Path, name: str, where: Path) -> Path:
    """Return the path of a file that a foreign file names.

    Raises:
        UsageError: it would lie outside of the folder.
    """
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
        raise UsageError(f"{where} names {name!r}, which is not in its folder", "copy or save the model again")
    return path


def weights_in(folder: Path) -> list[Path]:
    """Return the files of weights that Transformers would load from a folder, in its order; none if there are none.

    Raises:
        UsageError: an index is broken, or names files that are not in the folder.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    for index, single in ((INDEX, PICKLED), (PICKLED_INDEX, None)):
        if (folder / index).is_file():
            return _indexed(folder, folder / index)
        if single is not None and (folder / single).is_file():
            return [folder / single]
    return []


def _indexed(folder: Path, index: Path) -> list[Path]:
    names = entry(read_json(index), "weight_map", dict, index).values()
    for broken in (name for name in names if not isinstance(name, str)):
        raise UsageError(f"{index} has {kind_of(broken)} as a file's name", AGAIN)
    files = [inside(folder, name, index) for name in sorted(set(names))]
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None:
        raise UsageError(f"{index} names {missing.name}, which is not there", "copy or save the model again")
    return files


def check_model(folder: Path) -> dict[str, Any]:
    """Return a model folder's config.json after a look at what Transformers would open besides.

    Raises:
        UsageError: the configuration or an index is broken, or names files elsewhere.
    """
    path = folder / "config.json"
    config = read_json(path)
    named = config.get("transformers_weights")
    if named is not None:
        inside(folder, entry(config, "transformers_weights", str, path), path)
    weights_in(folder)
    return config


def check_gguf(path: Path) -> None:
    """Look at a GGUF file's beginning before a reader believes its counts.

    Raises:
        UsageError: it is no GGUF file, of another version, or shorter than it says.
    """
    hint = "fetch the file again"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(24)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", "check the file and its permissions") from None
    if head[:4] != GGUF_MAGIC:
        raise UsageError(f"{path} is no GGUF file: it does not begin with GGUF", hint)
    if len(head) < 24:
        raise UsageError(f"{path} ends after {size} bytes, within its header", hint)
    version, tensors, entries = struct.unpack("<IQQ", head[4:])
    if version not in GGUF_VERSIONS:
        raise UsageError(
            f"{path} is of version {version} of GGUF; 2 and 3 are read", "convert it again with llama.cpp"
        )
    if tensors * GGUF_TENSOR + entries * GGUF_ENTRY > size:
        raise UsageError(
            f"{path} says that it holds {tensors:,} tensors and {entries:,} entries, too many for {size:,} bytes", hint
        )


@contextmanager
def reading(path: Path | str, what: str, hint: str) -> Iterator[None]:
    """Turn whatever a library raises about a file that it parses into an error that names the file.

    Libraries raise anything for a broken file (KeyError, IndexError, plain Exception out of Rust): what arises while a
    foreign file is parsed is the file's fault, so here, and only here, every exception is taken.

    Args:
        path: the file or folder.
        what: what it should be, such as "a GGUF file".
        hint: what to do.
    Raises:
        UsageError: with the library's first line.
    """
    try:
        yield
    except (LowrankError, MemoryError, ImportError):
        raise
    except OSError as error:
        raise UsageError(f"{path} cannot be read as {what}: {error.strerror or first_line(error)}", hint) from error
    except Exception as error:
        raise UsageError(f"{path} cannot be read as {what}: {first_line(error)}", hint) from error


def from_pretrained(cls: type, location: str | Path, **arguments: Any) -> Any:
    """Return `cls.from_pretrained(location)`; code that a folder or a repository brings is never executed.

    Raises:
        UsageError: it cannot be loaded without its code, or a JSON file of the folder is broken.
    """
    # PEFT's model takes the base in the first place, and its folder by name
    folder = arguments.get("model_id", location)
    for name in FOLDER:
        if (path := Path(folder) / name).is_file():
            read_json(path)
    try:
        return cls.from_pretrained(location, trust_remote_code=False, **arguments)
    except ValueError as error:
        # Transformers' own text advises to switch the check off
        if "trust_remote_code" not in str(error):
            raise
        raise UsageError(
            f"{folder} is of a class that only its own code defines, and code from a model's folder is never run",
            "take a model of a class that Transformers has",
        ) from None


def first_line(error: BaseException) -> str:
    """Return the first line of an error, at most 200 characters, without PyTorch advising to run what it reads."""
    if "weights_only" in str(error):
        return "it holds more than tensors and plain containers, and nothing else is read"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip().rstrip(".")[:200]
