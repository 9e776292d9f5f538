"""Folders of models with a field, a weight or a header that is wrong, and files that would execute something."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import random
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from bad_data import SNIPPETS, damaged
from entries import MARKER, Entry, line, on_model
from materials import Materials

COMMANDS = ("eval", "svd-dump", "compress", "finetune", "pretrain")
LOADERS = ("eval", "finetune", "pretrain")
REMOVED = "removed"
OTHERS = [None, -1, "x", [], {}, 1e300, True, 10**30, 0.5, ["x"], "", 0, "\x1b[31m[/b]", {"a": {"b": []}}]
HEADER = "model.safetensors.index.json"
MODULE = f'import pathlib\npathlib.Path("{MARKER}").touch()\nclass Thing:\n    pass\n'


class Touch:
    """What a pickle executes."""

    def __reduce__(self):
        return os.system, (f"touch {MARKER}",)


def entries(made: Materials) -> Iterator[Entry]:
    """Yield every entry of a model's folder."""
    yield from of_fields(made)
    yield from of_weights(made)
    yield from of_gguf(made)
    yield from of_code(made)
    yield from of_folders(made)


def of_fields(made: Materials) -> Iterator[Entry]:
    """Yield every field of every JSON file of a model, removed and of another type."""
    draw = random.Random(1)
    places = [
        (made.model, "config.json", COMMANDS),
        (made.model, "tokenizer.json", LOADERS),
        (made.model, "tokenizer_config.json", LOADERS),
        (made.model, "generation_config.json", ("pretrain", "compress")),
        (made.adapter, "adapter_config.json", ("eval", "svd-dump")),
        (made.compressed, "config.json", ("eval", "finetune")),
        (made.model, HEADER, COMMANDS),
    ]
    for source, file, commands in places:
        turn = itertools.cycle(commands)
        content = index(source) if file == HEADER else json.loads((source / file).read_text())
        paths = [(key,) for key in content]
        inner = {"tokenizer.json": "model", HEADER: "weight_map"}.get(file)
        inner = inner or ("quantization_config" if "quantization_config" in content else None)
        if inner:
            paths += [(inner, key) for key in list(content[inner])[:8]]
        for path in paths:
            for value in (REMOVED, draw.choice(OTHERS)):
                name = f"{file}: {'.'.join(path)} {value if value == REMOVED else ascii(value)}"
                command = next(turn)
                make = partial(with_field, made, source, file, path, value, command)
                yield Entry(f"fields of {file}", f"{command}, {source.parent.name}, {name}", make)
        for name in list(SNIPPETS)[:8]:
            command = next(turn)
            make = partial(with_file, made, source, file, SNIPPETS[name].encode(), command)
            yield Entry(f"fields of {file}", f"{command}, {source.parent.name}, {file}: {name}", make)
        good = json.dumps(content).encode()
        for name, text in list(damaged(good).items())[:6]:
            command = next(turn)
            make = partial(with_file, made, source, file, text, command)
            yield Entry(f"fields of {file}", f"{command}, {source.parent.name}, {file}: {name}", make)


def of_weights(made: Materials) -> Iterator[Entry]:
    """Yield every wrong file of weights."""
    turn = itertools.cycle(COMMANDS)
    for name, change in CHANGES.items():
        for command in (next(turn), next(turn)):
            fails = name not in ("one tensor more",)
            make = partial(with_weights, made, change, command)
            yield Entry("safetensors", f"{command}, {name}", make, fails=fails)
    for name, content in damaged((made.model / "model.safetensors").read_bytes()).items():
        command = next(turn)
        make = partial(with_file, made, made.model, "model.safetensors", content, command)
        yield Entry("safetensors", f"{command}, {name}", make, fails=name not in ("a flipped byte",))


def of_gguf(made: Materials) -> Iterator[Entry]:
    """Yield every wrong GGUF file."""
    turn = itertools.cycle(("eval", "svd-dump", "compress", "finetune"))
    good = struct.pack("<4sIQQ", b"GGUF", 3, 1, 1) + text("general.architecture") + struct.pack("<I", 8)
    good += text("llama") + text("x.weight") + struct.pack("<IQQIQ", 2, 32, 32, 0, 0)
    good += b"\0" * (-len(good) % 32) + b"\0" * 4096
    files = damaged(good) | {
        "no tokenizer": good,
        "version 1": good[:4] + struct.pack("<I", 1) + good[8:],
        "version 99": good[:4] + struct.pack("<I", 99) + good[8:],
        "2^60 tensors": good[:8] + struct.pack("<Q", 1 << 60) + good[16:],
        "2^60 entries": good[:16] + struct.pack("<Q", 1 << 60) + good[24:],
        "100 tensors": good[:8] + struct.pack("<Q", 100) + good[16:],
        "100 entries": good[:16] + struct.pack("<Q", 100) + good[24:],
        "a string of 2^40": good[:24] + struct.pack("<Q", 1 << 40) + good[32:],
        "an unknown type": good[:24] + text("a") + struct.pack("<I", 77) + good[40:],
        "another architecture": good.replace(b"llama", b"xxxxx"),
        "big-endian": good[:4] + struct.pack(">I", 3) + good[8:],
    }
    for name, content in files.items():
        command = next(turn)
        yield Entry("GGUF", f"{command}, {name}", partial(one_file, made, "x.gguf", content, command), fails=True)


def of_code(made: Materials) -> Iterator[Entry]:
    """Yield everything that would run code, and must not."""
    pickled = pickle.dumps(Touch())
    for command in COMMANDS:
        yield Entry("code", f"{command}, pytorch_model.bin",
                    partial(with_pickle, made, pickled, command), fails=True)  # fmt: skip
        yield Entry("code", f"{command}, auto_map", partial(with_module, made, "config.json", command))
    for command in LOADERS:
        yield Entry("code", f"{command}, auto_map of the tokenizer",
                    partial(with_module, made, "tokenizer_config.json", command))  # fmt: skip
        yield Entry("code", f"{command}, a zip of torch.save", partial(with_zip, made, command), fails=True)
    yield Entry("code", "compress --spectra", partial(with_spectra, made, pickled), fails=True)
    yield Entry("code", "eval, an adapter", partial(with_adapter, made, pickled), fails=True)
    yield Entry("code", "eval, auto_mapping of an adapter", partial(with_adapter_module, made))
    for name in ("cycler.__init__.__globals__.os", "self.__init__.__globals__.__builtins__.__import__('os')"):
        template = "{{ " + name + f".system('touch {MARKER}')" + " }}"
        yield Entry("code", f"a chat template, {name[:10]}", partial(with_template, made, template))
    endless = "{% for i in range(99999999999) %}x{% endfor %}"
    yield Entry("code", "a chat template without an end", partial(with_template, made, endless))


def of_folders(made: Materials) -> Iterator[Entry]:
    """Yield folders that hold nothing, or themselves."""
    for flag, commands in (("model", COMMANDS), ("dataset", ("pretrain", "finetune", "eval", "compress"))):
        for command in commands:
            for name, make in FOLDERS.items():
                yield Entry("folders", f"{command} --{flag}, {name}", partial(in_folder, made, flag, command, make))
    for command in COMMANDS:
        for name in ("a file", "a link in a circle", "in a file"):
            yield Entry("folders", f"{command} --out, {name}", partial(out_at, made, command, name), fails=True)


def index(source: Path) -> dict:
    """Return an index that says that the weights are in two files."""
    from safetensors import safe_open

    with safe_open(source / "model.safetensors", "pt") as file:
        names = sorted(file.keys())
    shards = {n: f"model-0000{1 + (i >= len(names) // 2)}-of-00002.safetensors" for i, n in enumerate(names)}
    return {"metadata": {"total_size": 1}, "weight_map": shards}


def copied(source: Path, folder: Path) -> Path:
    """Return a copy of a model's folder."""
    return Path(shutil.copytree(source, folder / "model"))


def with_field(made, source: Path, file: str, path: tuple, value, command: str, folder: Path) -> list[str]:
    """Change one field of a JSON file; returns the line."""
    model = copied(source, folder)
    content = divided(model) if file == HEADER else json.loads((model / file).read_text())
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    if value == REMOVED:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    (model / file).write_text(json.dumps(content))
    return on_model(made, command, model)


def divided(model: Path) -> dict:
    """Put a model's weights into two files; returns their index."""
    from safetensors.torch import load_file, save_file

    content, tensors = index(model), load_file(model / "model.safetensors")
    for shard in sorted(set(content["weight_map"].values())):
        save_file({n: tensors[n] for n, s in content["weight_map"].items() if s == shard}, model / shard)
    (model / "model.safetensors").unlink()
    return content


def with_file(made, source: Path, file: str, content: bytes, command: str, folder: Path) -> list[str]:
    """Replace a file of a model; returns the line."""
    model = copied(source, folder)
    if file == HEADER:
        divided(model)
    (model / file).write_bytes(content)
    return on_model(made, command, model)


def one_file(made, file: str, content: bytes, command: str, folder: Path) -> list[str]:
    """Write a file that is a model; returns the line."""
    (folder / file).write_bytes(content)
    return on_model(made, command, folder / file)


def with_weights(made, change: Callable[[dict, dict], None], command: str, folder: Path) -> list[str]:
    """Change the header or the tensors of the weights; returns the line."""
    model = copied(made.model, folder)
    file = model / "model.safetensors"
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header, body = json.loads(raw[8 : 8 + length]), bytearray(raw[8 + length :])
    names = [name for name in header if name != "__metadata__" and len(header[name]["shape"]) == 2]
    said = change(header, header[names[len(names) // 2]], body)
    text = json.dumps(header).encode()
    said = len(text) if said is None else said
    file.write_bytes(struct.pack("<Q", said) + text + bytes(body))
    return on_model(made, command, model)


def _dtype(kind: str, size: int) -> Callable:
    def change(header: dict, entry: dict, body: bytearray) -> None:
        # all of them, in a fraction of their bytes
        for tensor in (t for n, t in header.items() if n != "__metadata__"):
            tensor["dtype"] = kind
            tensor["shape"] = [*tensor["shape"][:-1], tensor["shape"][-1] * 4 // size]

    return change


def _value(value: float) -> Callable:
    def change(header: dict, entry: dict, body: bytearray) -> None:
        start = entry["data_offsets"][0]
        body[start : start + 4] = struct.pack("<f", value)

    return change


def _shape(shape: list) -> Callable:
    def change(header: dict, entry: dict, body: bytearray) -> None:
        entry["shape"] = shape

    return change


def _turned(header: dict, entry: dict, body: bytearray) -> None:
    # the same bytes as another matrix
    entry["shape"] = [entry["shape"][0] // 2, entry["shape"][1] * 2]


def _beyond(header: dict, entry: dict, body: bytearray) -> None:
    entry["data_offsets"] = [entry["data_offsets"][0], 10**15]


def _backwards(header: dict, entry: dict, body: bytearray) -> None:
    entry["data_offsets"] = entry["data_offsets"][::-1]


def _renamed(header: dict, entry: dict, body: bytearray) -> None:
    header["x.weight"] = header.pop(next(n for n in header if header[n] is entry))


def _more(header: dict, entry: dict, body: bytearray) -> None:
    header["x.weight"] = {"dtype": "F32", "shape": [1], "data_offsets": [len(body), len(body) + 4]}
    body += b"\0\0\0\0"


CHANGES: dict[str, Callable] = {
    "NaN": _value(float("nan")),
    "infinity": _value(float("inf")),
    "int8": _dtype("I8", 1),
    "fp8": _dtype("F8_E4M3", 1),
    "int32": _dtype("I32", 4),
    "another shape": _turned,
    "a shape of nothing": _shape([]),
    "a negative shape": _shape([-1, 32]),
    "a huge shape": _shape([1 << 40, 1 << 40]),
    "offsets beyond the end": _beyond,
    "offsets backwards": _backwards,
    "a tensor missing": _renamed,
    "one tensor more": _more,
    "an unknown type": lambda header, entry, body: entry.update(dtype="F7"),
    "a header of 2^60": lambda header, entry, body: 1 << 60,
    "a header of nothing": lambda header, entry, body: 0,
    "a header that is cut": lambda header, entry, body: 50,
    "no tensors": lambda header, entry, body: header.clear(),
}


def text(value: str) -> bytes:
    """Return a string of GGUF."""
    return struct.pack("<Q", len(value)) + value.encode()


def with_pickle(made, pickled: bytes, command: str, folder: Path) -> list[str]:
    """Replace the weights by a pickle."""
    model = copied(made.model, folder)
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickled)
    return on_model(made, command, model)


def with_zip(made, command: str, folder: Path) -> list[str]:
    """Replace the weights by what torch.save writes, with a pickle of ours in it."""
    model = copied(made.model, folder)
    (model / "model.safetensors").unlink()
    with zipfile.ZipFile(model / "pytorch_model.bin", "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(Touch(), protocol=2))
        file.writestr("archive/version", "3\n")
        file.writestr("archive/byteorder", "little")
    return on_model(made, command, model)


def with_module(made, file: str, command: str, folder: Path) -> list[str]:
    """Name classes of a module beside the model."""
    model = copied(made.model, folder)
    content = json.loads((model / file).read_text())
    names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer", "AutoProcessor")
    content["auto_map"] = dict.fromkeys(names, "thing.Thing") | {"AutoTokenizer": ["thing.Thing", "thing.Thing"]}
    content |= {"model_type": "thing"} if file == "config.json" else {"tokenizer_class": "Thing"}
    (model / file).write_text(json.dumps(content))
    (model / "thing.py").write_text(MODULE)
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text(MODULE)
    return on_model(made, command, model)


def with_spectra(made, pickled: bytes, folder: Path) -> list[str]:
    """Give a pickle as singular values."""
    (folder / "x.pt").write_bytes(pickled)
    return line(made, "compress", {"spectra": folder / "x.pt"})


def with_adapter(made, pickled: bytes, folder: Path) -> list[str]:
    """Give an adapter whose weights are a pickle."""
    model = copied(made.adapter, folder)
    (model / "adapter_model.safetensors").unlink()
    (model / "adapter_model.bin").write_bytes(pickled)
    return on_model(made, "eval", model)


def with_adapter_module(made, folder: Path) -> list[str]:
    """Give an adapter that names a class of a module beside it."""
    model = copied(made.adapter, folder)
    content = json.loads((model / "adapter_config.json").read_text())
    content["auto_mapping"] = {"base_model_class": "Thing", "parent_library": "thing"}
    (model / "adapter_config.json").write_text(json.dumps(content))
    (folder / "thing.py").write_text(MODULE)
    return on_model(made, "eval", model)


def with_template(made, template: str, folder: Path) -> list[str]:
    """Give a tokenizer a chat template, and fine-tune with it."""
    model = copied(made.model, folder)
    (model / "chat_template.jinja").write_text(template)
    return line(made, "finetune", {"model": model, "template": "chat"})


def _circle(folder: Path) -> None:
    folder.mkdir()
    (folder / "again").symlink_to(folder)
    (folder / "up").symlink_to(folder.parent)


def _dangling(folder: Path) -> None:
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "x.jsonl", "tokenizer.json"):
        (folder / name).symlink_to("nowhere")


def _folders(folder: Path) -> None:
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "x.jsonl", "x.txt", "run.json"):
        (folder / name).mkdir()


def _pipes(folder: Path) -> None:
    folder.mkdir()
    for name in ("config.json", "x.jsonl", "x.txt"):
        os.mkfifo(folder / name)


FOLDERS: dict[str, Callable[[Path], None]] = {
    "empty": Path.mkdir,
    "links in a circle": _circle,
    "a link to itself": lambda folder: folder.symlink_to(folder),
    "dangling links": _dangling,
    "folders where files should be": _folders,
    "named pipes": _pipes,
    "a named pipe": os.mkfifo,
    "a name of blanks and brackets": lambda folder: folder.write_text(""),
}


def in_folder(made, flag: str, command: str, make: Callable[[Path], None], folder: Path) -> list[str]:
    """Make a strange folder; returns the line that reads it."""
    place = folder / "strange [b] $(touch EXECUTED)"
    make(place)
    return on_model(made, command, place) if flag == "model" else line(made, command, {"dataset": place})


def out_at(made, command: str, name: str, folder: Path) -> list[str]:
    """Have the result go where it cannot."""
    place = folder / "place"
    if name == "a link in a circle":
        place.symlink_to(place)
    else:
        place.write_text("mine")
    return line(made, command, {"out": place / "below" if name == "in a file" else place})
