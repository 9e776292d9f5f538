"""The embedded instruction set: what the public functions and classes of the standard library do, by their docstrings.

Nothing is shipped or downloaded: the source text of the running interpreter is read, and the same Python version
gives the same records. Modules part into train and validation as the corpus `stdlib` does.
"""

import ast
import inspect
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from lowrank_cli.data.cache import cached_folder, fingerprint
from lowrank_cli.data.documents import open_source
from lowrank_cli.settings.training import DataConfig

VERSION = 1  # of the records; another one is another cache folder
# programs and tables rather than a library that anybody asks about
_SKIPPED = frozenset({"distutils", "encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "turtledemo"})
_LENGTHS = range(20, 1201)  # characters of an answer; shorter ones say nothing


def part(name: str) -> Path:
    """The .jsonl file of a part, made on first use: records with instruction, input (the signature) and output.

    Args:
        name: "train" or "validation".
    """
    sources = {part: open_source(DataConfig(dataset="stdlib"), part) for part in ("train", "validation")}
    key = fingerprint([VERSION, sys.version, [source.identity for source in sources.values()]])

    def make(folder: Path) -> None:
        # an answer stands once in the whole set, so that none of validation is trained on
        answers: set[str] = set()
        for part, source in sources.items():
            with (folder / f"{part}.jsonl").open("w", encoding="utf-8") as file:
                for path in source.files:
                    for record in _records(path):
                        if record["output"] not in answers:
                            answers.add(record["output"])
                            file.write(json.dumps(record) + "\n")

    return cached_folder("docstrings", key, make) / f"{name}.jsonl"


def _records(path: Path) -> Iterator[dict[str, str]]:
    names = list(path.relative_to(sysconfig.get_path("stdlib")).with_suffix("").parts)
    if names[-1] == "__init__":
        names.pop()
    if not names or _SKIPPED & set(names) or any(name.startswith("_") for name in names):
        return
    source = path.read_bytes()
    # parsing is nearly all of the time, and a third of the files have nothing to find
    if b'"""' in source:
        yield from _documented(ast.parse(source).body, ".".join(names), "function")


def _documented(body: list[ast.stmt], owner: str, kind: str) -> Iterator[dict[str, str]]:
    for node in body:
        if isinstance(node, ast.If | ast.Try):
            yield from _documented(node.body, owner, kind)
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        name = f"{owner}.{node.name}"
        answer = _answer(ast.get_docstring(node, clean=False) or "")
        if len(answer) in _LENGTHS:
            asked = "class" if isinstance(node, ast.ClassDef) else kind
            question = (
                f"What is the class `{name}` for?" if asked == "class" else f"What does the {asked} `{name}` do?"
            )
            yield {"instruction": question, "input": _signature(node), "output": answer}
        if isinstance(node, ast.ClassDef):
            yield from _documented(node.body, name, "method")


def _answer(docstring: str) -> str:
    """The first paragraph on one line, and the second as well where the first is only its heading."""
    paragraphs = [" ".join(text.split()) for text in inspect.cleandoc(docstring).split("\n\n")]
    paragraphs = [text for text in paragraphs if text and not text.startswith((">>>", "#"))]
    return " ".join(paragraphs[: 2 if paragraphs and paragraphs[0].endswith(":") else 1])


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(map(ast.unparse, node.bases))
        return f"class {node.name}({bases})" if bases else f"class {node.name}"
    return f"{node.name}({ast.unparse(node.args)})"
