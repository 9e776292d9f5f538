"""The rules of the house that a machine can check: who imports whom, what stays light, what the docs name."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from lowrank_cli import methods
from lowrank_cli.fields import key_of

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "lowrank_cli"

# each layer may import itself and the layers after it; the last one may be imported by everyone
LAYERS = [{"commands", "main", "options", "__main__"}, {"train", "compress", "evaluate"},
          {"memory", "measure", "data", "methods", "config"}, {"svd", "models", "parallel", "optim", "plots"}, {"ops"},
          {"settings", "fields", "errors", "run", "console", "foreign", "lock", "misfortune",
           "strict_json"}]  # fmt: skip


def files() -> list[Path]:
    return [*PACKAGE.rglob("*.py"), *(ROOT / "commands").glob("*.py")]


def layer_of(name: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if name in layer)


def part_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE if path.is_relative_to(PACKAGE) else ROOT)
    return relative.parts[0].removesuffix(".py")


def statements(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield every node of a file but what stands there for annotations only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from statements(node)


def imported_parts(path: Path) -> set[str]:
    """Return the parts of lowrank_cli that a file imports, at any depth of nesting."""
    found = set()
    for node in statements(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "lowrank_cli":
                found |= {alias.name for alias in node.names if alias.name != "__version__"}
            elif node.module.startswith("lowrank_cli."):
                found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("lowrank_cli.")}
    return found


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_downwards(path):
    part = part_of(path)
    if part == "__init__":
        return
    for other in imported_parts(path):
        assert layer_of(other) >= layer_of(part), f"{path} imports lowrank_cli.{other}"


def test_rooms_have_no_circles():
    graph = {}
    for path in files():
        graph.setdefault(part_of(path), set()).update(imported_parts(path) - {part_of(path)})
    order = TopologicalSorter(graph)
    order.prepare()  # raises CycleError with the circle


def test_methods_do_not_import_torch():
    script = (
        "import sys; from lowrank_cli import methods; [methods.get(n) for n in methods.names()]; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


NAMELESS = [PACKAGE / room for room in ("train", "compress", "memory", "measure", "optim", "parallel")]
NAMELESS_FILES = [path for room in [*NAMELESS, ROOT / "commands"] for path in room.glob("*.py")]


@pytest.mark.parametrize("path", NAMELESS_FILES, ids=lambda p: p.name)
def test_no_room_but_its_own_names_a_method_or_its_flags(path):
    text = path.read_text(encoding="utf-8").lower()
    for name in methods.names():
        if name != "full":
            named = rf"""(?<!["'])["']{name}["']|methods\.{name}\b|--{name}-|methods import .*\b{name}\b"""
            assert not re.search(named, text), name


def test_packages_are_the_folders():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {".".join(p.parent.relative_to(ROOT).parts) for p in PACKAGE.rglob("__init__.py")}
    assert listed == folders | {"lowrank_cli.commands", "lowrank_cli.kernels"}


def test_kernels_hold_no_python():
    assert not list((ROOT / "kernels").rglob("*.py"))


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_small_enough_to_hold_in_the_head(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 450


@pytest.mark.parametrize("name", methods.names())
def test_docs_name_every_setting_of_a_method(name):
    page = (ROOT / "docs" / "methods" / f"{name}.md").read_text(encoding="utf-8")
    for f in fields(methods.get(name).Config):
        assert f"`{key_of(f)}`" in page or f"`--{name}-{key_of(f).replace('_', '-')}`" in page, key_of(f)


# a docstring that begins with one of these is neither an imperative nor a sentence
NO_BEGINNING = {"What", "Whether", "As", "That", "How", "Which", "Where"}


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_docstrings_begin_with_an_imperative_or_a_sentence(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = re.match(r"\w*", ast.get_docstring(node) or "")[0]
            assert first not in NO_BEGINNING, f"{path}:{getattr(node, 'lineno', 1)} begins with {first}"


# what parses a file that may be another program's, and the one module that may call it
PARSERS = {"from_pretrained", "load_file", "safe_open", "safe_load", "read_metadata", "full_load", "unsafe_load"}
MODULES = {("torch", "load"), ("pickle", "load"), ("pickle", "loads"), ("yaml", "load"), ("json", "load")}


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_foreign_files_are_opened_at_the_gate_alone(path):
    if path.name == "foreign.py":
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            function = node.func
            name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            owner = function.value if isinstance(function, ast.Attribute) else None
            if isinstance(owner, ast.Name) and owner.id == "foreign":
                continue
            assert name not in PARSERS, f"{path}:{node.lineno} calls {name}"
            assert (getattr(owner, "id", ""), name) not in MODULES, f"{path}:{node.lineno} calls {owner.id}.{name}"


def test_the_gate_never_runs_a_folders_code():
    source = (PACKAGE / "foreign.py").read_text(encoding="utf-8")
    calls = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)]
    loads = [c for c in calls if isinstance(c.func, ast.Attribute) and c.func.attr in {"from_pretrained", "load"}]
    values = {(k.arg, getattr(k.value, "value", None)) for call in loads for k in call.keywords}
    assert {("trust_remote_code", False), ("weights_only", True)} <= values
    assert "weights_only=False" not in source
    assert "trust_remote_code=True" not in source
