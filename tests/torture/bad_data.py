"""Foreign files of data and settings, broken in a dozen ways each: JSON, JSON lines, CSV, YAML, Parquet, gzip."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import random
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from entries import Entry, line, on_text
from materials import Materials

READERS = ("pretrain", "finetune", "eval", "compress")
DEEP = 100_000
RECORD = {"text": "the cat sat on the mat", "instruction": "say", "input": "", "output": "yes"}
SNIPPETS = {
    "deep lists": "[" * DEEP + "]" * DEEP,
    "deep objects": '{"text":' * DEEP + "1" + "}" * DEEP,
    "nested, 2,000": '{"text": ' + "[" * 2000 + "]" * 2000 + "}",
    "a long integer": '{"text": ' + "9" * 5000 + "}",
    "a lone surrogate": '{"text": "a\\ud800b", "instruction": "a\\ud800", "output": "b"}',
    "a key twice": '{"text": "a", "text": "b", "instruction": "a", "instruction": "c", "output": "b"}',
    "NaN": '{"text": NaN, "instruction": NaN, "output": Infinity}',
    "1e999": '{"text": 1e999, "instruction": 1e999, "output": 1}',
    "an integer": '{"text": 3, "instruction": 3, "output": 3}',
    "null": '{"text": null, "instruction": null, "output": null}',
    "a list": '{"text": ["a"], "instruction": ["a"], "output": []}',
    "an object": '{"text": {"a": 1}, "instruction": {}, "output": {}}',
    "other keys": '{"txt": "a"}',
    "no object": "[[1, 2], [3]]",
    "a bare number": "12",
    "a bare string": '"text"',
    "nothing in it": "{}",
    "an empty list": "[]",
    "a trailing comma": '{"text": "a",}',
    "single quotes": "{'text': 'a'}",
    "cut": '{"text": "a',
    "NUL and ESC": '{"text": "a\\u0000b\\u001b[31m", "instruction": "\\u001b]0;x\\u0007", "output": "\\u0000"}',
    "messages of nothing": '{"messages": [null, 3, {"role": 7}, {"content": "x"}]}',
    "messages that are text": '{"messages": "hello"}',
}
SHEETS = {
    "an open quote": 'text,label\n"abc,1\nd,2\n',
    "rows of another width": "text,label\na\nb,2,3,4\n",
    "only a header": "text,label\n",
    "a column twice": "text,text\na,b\n",
    "NUL": "text\na\0b\n",
    "a huge field": "text\n" + "x" * 200_000 + "\n",
    "semicolons": "text;label\na;1\n",
    "no header": "1,2\n3,4\n",
    "no column of that name": "txt\na\n",
    "blank lines": "\n\n\n",
}
YAMLS = {
    "an alias bomb": "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in itertools.pairwise("abcdefghi")) + "lr: *i\n",
    "an alias to itself": "lr: &a [*a]\n",
    "deep": "lr: " + "[" * 3000 + "]" * 3000,
    "a key twice": "lr: 1\nlr: 2\n",
    "an object of Python": "lr: !!python/object/apply:os.system ['touch EXECUTED']\n",
    "a tag": "lr: !foo bar\n",
    "a list": "- lr\n- 1\n",
    "a text": "hello\n",
    "a tab": "lr:\t1\n\tx: 2\n",
    "two documents": "lr: 1\n---\nlr: 2\n",
    "a date": "lr: 2024-05-40\nmax_steps: 2024-01-01\n",
    "a long integer": "max_steps: " + "9" * 5000 + "\n",
    "keys of numbers": "1: 2\n",
    "a list as a number": "lr: [1, 2]\n",
    "an object as a number": "lr: {a: 1}\n",
    "a number as a method": "method: 3\n",
    "a list as a method": "method: [galore]\n",
    "a method's settings as a list": "method: galore\ngalore: [1]\n",
    "a method's settings as nothing": "method: galore\ngalore:\n",
    "another command": "command: eval\n",
    "nothing everywhere": "lr:\nmax_steps:\ndataset:\nmethod:\n",
    "a merge key": "<<: {lr: 1}\n",
    "infinity": "lr: .inf\nweight_decay: .nan\n",
    "ESC": 'dataset: "\\e[31m"\n',
}  # fmt: skip
TEMPLATES = {
    "no keys": "{}\n",
    "a list": "prompt: [1]\n",
    "an unknown field": "prompt: '{nothing}'\nresponse: '{output}'\n",
    "attributes": "prompt: '{instruction.__class__.__init__.__globals__}'\nresponse: '{output}'\n",
    "an open brace": "prompt: '{instruction'\n",
    "a huge width": "prompt: '{instruction:>999999999}'\n",
}


def entries(made: Materials) -> Iterator[Entry]:
    """Yield every broken file with the commands that read it, in turn."""
    turn = itertools.cycle(READERS)
    for name, text in SNIPPETS.items():
        for ending in ("json", "jsonl"):
            yield data("JSON", name, f"x.{ending}", text.encode() + b"\n", made, next(turn))
        command = next(turn)
        whole = "".join(json.dumps(RECORD) + "\n" for _ in range(40)) + text + "\n"
        yield data("JSON", f"{name} after 40 records", "x.jsonl", whole.encode(), made, command)
        config = partial(written, "x.json", text.encode(), made, "pretrain", "model-config")
        yield Entry("JSON", f"--model-config, {name}", config, fails=True)
    for name, text in SHEETS.items():
        yield data("CSV", name, "x.csv", text.encode(), made, next(turn))
    for name, text in YAMLS.items():
        command = ("pretrain", "finetune", "eval", "compress", "svd-dump")[len(name) % 5]
        yield Entry("YAML", f"{command} --config, {name}",
                    partial(written, "x.yaml", text.encode(), made, command, "config"))  # fmt: skip
    for name, text in {**TEMPLATES, **{n: YAMLS[n] for n in list(YAMLS)[:8]}}.items():
        yield Entry("YAML", f"--template, {name}",
                    partial(written, "x.yaml", text.encode(), made, "finetune", "template"))  # fmt: skip
    for ending, good in (
        ("jsonl", "".join(json.dumps(RECORD) + "\n" for _ in range(40)).encode()),
        ("csv", ("text,instruction,output\n" + "a,b,c\n" * 40).encode()),
        ("txt", b"some words of text\n" * 200),
        ("parquet", parquet([RECORD] * 40)),
        ("json.gz", gzip.compress("".join(json.dumps(RECORD) + "\n" for _ in range(40)).encode(), mtime=0)),
    ):
        for name, content in damaged(good).items():
            yield data(f"bytes of .{ending}", name, f"x.{ending}", content, made, next(turn))
    for name, table in {
        "numbers": [{"text": 3}],
        "nothing": [{"text": None}],
        "no rows": [],
        "lists": [{"text": ["a"]}],
        "other columns": [{"txt": "a"}],
    }.items():
        yield data("bytes of .parquet", name, "x.parquet", parquet(table), made, next(turn))
    for name, settings in (("YAML", b"lr: 0.1\nmax_steps: 1\n"),):
        for how, content in damaged(settings).items():
            make = partial(written, "x.yaml", content, made, "pretrain", "config")
            yield Entry(name, f"pretrain --config, {how}", make)


def damaged(good: bytes) -> dict[str, bytes]:
    """Return a file's bytes, damaged in the ways that do not depend on its form."""
    noise = random.Random(0)
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 0xFF
    return {
        "empty": b"",
        "half": good[: len(good) // 2],
        "without its end": good[:-5],
        "without its beginning": good[3:],
        "NULs": b"\0" * 1000,
        "noise": noise.randbytes(2000),
        "a flipped byte": bytes(flipped),
        "UTF-16": good.decode("latin-1").encode("utf-16"),
        "a byte order mark": b"\xef\xbb\xbf" + good,
        "Latin-1": good + "caf\u00e9".encode("latin-1"),
        "blanks": b" \n\t\n" * 50,
        "deflated": zlib.compress(good),
        "twice": good + good,
    }


def parquet(rows: list[dict]) -> bytes:
    """Return rows as a Parquet file."""
    import pyarrow
    from pyarrow import parquet as files

    file = io.BytesIO()
    files.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


def data(row: str, name: str, file: str, content: bytes, made: Materials, command: str) -> Entry:
    """Return an entry of a command that reads a data set."""
    return Entry(row, f"{command}, {file.partition('.')[2]}, {name}", partial(as_data, file, content, made, command))


def as_data(file: str, content: bytes, made: Materials, command: str, folder: Path) -> list[str]:
    """Write a data set; returns the line that reads it."""
    (folder / file).write_bytes(content)
    return on_text(made, command, folder / file)


def written(file: str, content: bytes, made: Materials, command: str, flag: str, folder: Path) -> list[str]:
    """Write a file that an option names; returns the line."""
    (folder / file).write_bytes(content)
    return line(made, command, {flag: folder / file})
