"""Choose the weights that get an adapter: matrices of the table, less those that its method has no form for."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Collection, Iterable
from functools import cache

from torch import Tensor, nn

from lowrank_cli import console
from lowrank_cli.errors import UsageError
from lowrank_cli.models.lowrank_experts import LowRankStack
from lowrank_cli.models.share import inventory
from lowrank_cli.models.targets import ALL_LINEAR, last_parts, matches, matrices, parse

# the reason for which a method has no adapter for a weight of a name; empty if it has one
WhyNot = Callable[[str, Tensor], str]
COMPRESSED = "experts that are low-rank already have factors of their own to train"
PASSED_BY = "the model multiplies by their weights without calling them"


def adapted(model: nn.Module, text: str, title: str, why_not: WhyNot) -> dict[str, Tensor]:
    """Return the weights that get an adapter, by the parameter's name, and say which of the chosen ones get none.

    Args:
        model: without adapters.
        text: all-linear, or comma-separated patterns as `targets.matrices` takes.
        title: of the method.
        why_not: see `WhyNot`.
    Raises:
        UsageError: a pattern that names nothing, or nothing that the method has a form for.
    """
    patterns = parse(text)
    chosen = matrices(model, patterns)

    def reason(name: str, weight: Tensor) -> str:
        if isinstance(model.get_submodule(name.rpartition(".")[0]), LowRankStack):
            return COMPRESSED
        return PASSED_BY if _is_passed_by(model, name) else why_not(name, weight)

    left = {name: why for name, weight in chosen.items() if (why := reason(name, weight))}
    for pattern in [ALL_LINEAR] if patterns is None else patterns:
        named = [name for name in chosen if patterns is None or matches(name, pattern)]
        if all(name in left for name in named):
            others = [name for name, weight in matrices(model, None).items() if not reason(name, weight)]
            raise UsageError(
                f"{title} adapts nothing that '{pattern}' names: {left[named[0]]}",
                f"name others: {', '.join(last_parts(others))}",
            )
    kept = {name: weight for name, weight in chosen.items() if name not in left}
    sizes = inventory(model).sizes
    for why in dict.fromkeys(left.values()):
        names = [name for name in left if left[name] == why]
        share = 100 * sum(sizes.get(name, 0) for name in names) / sum(sizes.values())
        console.note(
            f"{title} leaves {_counted(chosen, names)} ({share:.3g} % of the layers' parameters) as they are: {why}"
        )
    if any(weight.dim() == 3 for weight in kept.values()):
        console.note(f"{title} adapts {_counted(chosen, kept)}")
    return kept


def linears_of(model: nn.Module, weights: Iterable[str]) -> dict[str, nn.Module]:
    """Return the linears that weights are of, by their full names, in the order of the weights."""
    names = [name.removesuffix(".weight") for name in weights]
    return {name: model.get_submodule(name) for name in names}


def shortest(chosen: Collection[str], names: Iterable[str]) -> list[str]:
    """Return the last parts of the chosen names if no other of the names has one of them, else the chosen names."""
    leaves = {name.rpartition(".")[2] for name in chosen}
    meant = {name for name in names if name.rpartition(".")[2] in leaves}
    return sorted(leaves if meant == set(chosen) else chosen)


def _is_passed_by(model: nn.Module, name: str) -> bool:
    """Return whether a model takes the weight of a linear out of it: nothing beside the linear would be noticed."""
    path, _, leaf = name.removesuffix(".weight").rpartition(".")
    return name.endswith(".weight") and leaf in _taken_out(type(model.get_submodule(path)))


@cache
def _taken_out(kind: type[nn.Module]) -> set[str]:
    """Return the names of those submodules whose weight a module's code uses, but for initialising it."""
    try:
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    except (OSError, TypeError, SyntaxError):
        # a class that was made while the program ran
        return set()
    used = [node for f in body.body if isinstance(f, ast.FunctionDef) and "init" not in f.name for node in ast.walk(f)]
    # self.x.weight as it is; self.x.weight.dtype looks at it only, and slices are another way to do what a call does
    parts = {node.value for node in used if isinstance(node, (ast.Attribute, ast.Subscript))}
    weights = {n.value for n in used if isinstance(n, ast.Attribute) and n.attr == "weight" and n not in parts}
    return {n.attr for n in weights if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "self"}


def _counted(weights: dict[str, Tensor], names: Iterable[str]) -> str:
    """Return how many linears and tensors of experts there are among the names."""
    experts = [weights[name].dim() == 3 for name in names]
    counts = {"linears": experts.count(False), "tensors of experts": experts.count(True)}
    return " and ".join(f"{count} {what}" for what, count in counts.items() if count)
