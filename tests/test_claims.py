"""README's table of claims: every claim names a test, and a stranger can run it."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def functions_of(path: Path) -> dict[str, ast.FunctionDef]:
    """Return the functions of a module by name, those of its classes too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_claim_names_tests_that_run_without_published_data():
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("| claim | test |")[2].partition("\n\n")[0]
    rows = [line.strip("|").split(" | ") for line in table.splitlines()[2:]]
    assert len(rows) > 20
    wrong, path = [], None
    for row in rows:
        names = re.findall(r"`([^`]*)`", row[-1])
        wrong += [] if names else [f"no test: {row[0]}"]
        for name in names:
            file, _, function = name.partition("::")
            path = ROOT / file if file else path
            if not path.exists():
                wrong.append(f"{name} does not exist")
            elif function:
                found = functions_of(path).get(function.rpartition("::")[2])
                if found is None:
                    wrong.append(f"{name} does not exist")
                elif "published_data" in {a.arg for a in found.args.args}:
                    wrong.append(f"{name} needs published data")
                elif "pytest.mark.slow" in map(ast.unparse, found.decorator_list):
                    wrong.append(f"{name} is slow")
    assert not wrong
