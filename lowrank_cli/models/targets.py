"""The table of a model's matrices, by structure and not by names, and the choice of those that a method acts on."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cache

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lowrank_cli.errors import UsageError
from lowrank_cli.models.layers import IN_LAYER, decoder_of, outside_text
from lowrank_cli.models.lowrank_experts import LowRankStack

# packages whose subclasses of nn.Linear are linears; one of a model's own may compute something else
LINEAR_PACKAGES = ("torch", "bitsandbytes", "lowrank_cli", "peft")


@dataclass(frozen=True)
class Matrix:
    """A Matrix is a tensor that multiplies activations in a repeating layer: one matrix, or one of every expert.

    Attributes:
        name: of the parameter.
        module: that has it.
        weight: (out, in), (experts, out, in), or transposed, as the model's code stores it.
        why: the reason for leaving it as it is; empty for what methods act on.
    """

    name: str
    module: nn.Module
    weight: Tensor
    why: str = ""


def table(model: nn.Module) -> list[Matrix]:
    """Return every matrix of a model's repeating layers, in the model's order.

    Linears, and the weights of experts that are kept as one tensor, are what methods act on. Routers, gates of one
    output, convolutions, and what else a layer multiplies by in a way of its own have a reason instead. What stands
    outside the decoder, such as a vision tower, is not in the table.
    """
    rows, inside = [], decoder_of(model)
    prefix = next((f"{name}." for name, module in model.named_modules() if module is inside and name), "")
    for path, module in inside.named_modules():
        if not IN_LAYER.search(path):
            continue
        for leaf, weight in module.named_parameters(recurse=False):
            if weight.dim() > 1 and not isinstance(module, nn.Embedding):
                rows.append(Matrix(f"{prefix}{path}.{leaf}", module, weight, _why_not(inside, path, module, weight)))
    return rows


def _why_not(inside: nn.Module, path: str, module: nn.Module, weight: Tensor) -> str:
    """Return the reason for leaving a matrix alone; empty if methods act on it."""
    if is_linear(module):
        if out_features(module) == 1:
            # such as that of a shared expert
            return "a gate"
        siblings = inside.get_submodule(path.rpartition(".")[0]).named_children()
        counts = [len(m) if is_list_of_experts(name, m) else experts_of(m) for name, m in siblings]
        return "a router" if out_features(module) in counts else ""
    if experts_of(module) is not None:
        return "" if weight.dim() == 3 else "a bias or a scale of experts"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "a convolution"
    return "a router" if "router" in type(module).__name__.lower() else "no plain product of a matrix"


def experts_of(module: nn.Module) -> int | None:
    """Return how many experts a module holds in tensors of three dimensions; None if it holds none."""
    own = [module, *(child for child in module.children() if isinstance(child, LowRankStack))]
    found = next((p for part in own for p in part.parameters(recurse=False) if p.dim() == 3), None)
    if found is None or not (hasattr(module, "num_experts") or type(module).__name__.endswith("Experts")):
        return None
    return getattr(module, "num_experts", len(found))


def is_list_of_experts(name: str, module: nn.Module) -> bool:
    """Return whether a module holds experts that are modules of their own."""
    return isinstance(module, nn.ModuleList) and "expert" in name


def is_linear(module: nn.Module) -> bool:
    """Return whether a module computes x W^T + b as nn.Linear does, or x W + b as the Conv1D of GPT-2."""
    if not isinstance(module, nn.Linear):
        return type(module) is Conv1D
    return type(module).forward.__module__.partition(".")[0] in LINEAR_PACKAGES or _multiplies(type(module))


@cache
def _multiplies(kind: type[nn.Linear]) -> bool:
    """Return whether a subclass of nn.Linear gives x W^T + b for a small x."""
    try:
        with torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.no_grad():
            small, x = kind(3, 2), torch.randn(1, 4, 3)
            y = small(x)
    except (TypeError, AttributeError):
        # made or called in another way, as routers and grouped products are
        return False
    return isinstance(y, Tensor) and torch.allclose(y, nn.functional.linear(x, small.weight, small.bias))


def out_features(module: nn.Module) -> int:
    """Return the number of outputs of a linear."""
    return module.nf if isinstance(module, Conv1D) else module.out_features


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """Return every linear that text goes through by its full name, in the model's order.

    Those are nn.Linear and the Conv1D of GPT-2; never one of a vision tower.
    """
    outside = outside_text(model) | _of_tensors(model)
    return {name: m for name, m in model.named_modules() if is_linear(m) and m not in outside}


def _of_tensors(model: nn.Module) -> set[nn.Module]:
    """Return the halves of PEFT's adapters of whole tensors: they are multiplied with each other, not with text."""
    wrappers = [m for m in model.modules() if type(m).__name__ == "ParamWrapper"]
    return {half for wrapper in wrappers for part in (wrapper.lora_A, wrapper.lora_B) for half in part.values()}


def select(model: nn.Module, patterns: Sequence[str] | None) -> dict[str, nn.Module]:
    """Return the linears that the patterns choose, by full name, in the model's order.

    Args:
        model: any model.
        patterns: parts of a name ("mlp", "q_proj") or shell globs on the full name ("*.layers.0.*_proj"); a linear
            is chosen if one of them matches. None takes the linears of every layer that `table` has no reason to
            leave alone: never the head, a classifier, a pooler or an embedding.
    Raises:
        UsageError: a pattern that matches no linear, no pattern, or a model without layers.
    """
    found = {name: module for name, module in linears(model).items() if not _is_head(model, name)}
    targets = {row.name.rpartition(".")[0] for row in table(model) if not row.why}
    return _chosen(model, found, {name: module for name, module in found.items() if name in targets}, patterns)


def matrices(model: nn.Module, patterns: Sequence[str] | None) -> dict[str, Tensor]:
    """Return the weights that the patterns choose, by the parameter's name: those of linears, and experts'.

    Args:
        model: any model.
        patterns: as for `select`; None takes all of `table` that has no reason to be left alone.
    Returns:
        (out, in), or (experts, out, in) for experts whose weights are one tensor.
    Raises:
        UsageError: as `select`.
    """
    weights = {f"{n}.weight": m.weight for n, m in linears(model).items() if not _is_head(model, n)}
    targets = {row.name: row.weight for row in table(model) if not row.why}
    return _chosen(model, weights | targets, targets, patterns)


def _chosen(model: nn.Module, found: dict, targets: dict, patterns: Sequence[str] | None) -> dict:
    """Return what the patterns choose of all that is found, or the targets."""
    if patterns is None:
        if not targets:
            raise UsageError(
                f"no linear of a repeating layer was recognised in {type(model).__name__}",
                f"name the linears yourself; {_listing(found)}",
            )
        return targets
    if isinstance(patterns, str):
        raise ValueError(f"patterns must be a list of texts, not the text {patterns!r}")
    if not patterns:
        raise UsageError("no target pattern was given", f"name the linears; {_listing(found)}")
    for pattern in patterns:
        if not any(matches(name, pattern) for name in found):
            close = get_close_matches(pattern, last_parts(found), n=1, cutoff=0.5)
            did_you_mean = f"did you mean '{close[0]}'? " if close else ""
            raise UsageError(
                f"target pattern '{pattern}' matches no linear of the model", did_you_mean + _listing(found)
            )
    return {name: value for name, value in found.items() if any(matches(name, p) for p in patterns)}


def _is_head(model: nn.Module, name: str) -> bool:
    """Return whether a linear is of a classifier's head or of a newly drawn pooler, which train as they are."""
    if "SequenceClassification" not in type(model).__name__:
        return False
    return not name.startswith(model.base_model_prefix + ".") or f"{name}.weight" in getattr(model, "newly_drawn", ())


ALL_LINEAR = "all-linear"


def parse(text: str) -> list[str] | None:
    """The patterns of a setting: all-linear (None: the default rule), or comma-separated ones."""
    return None if text.strip() == ALL_LINEAR else [part.strip() for part in text.split(",") if part.strip()]


def matches(name: str, pattern: str) -> bool:
    """Return whether a pattern, as `select` takes, means a weight or a linear of a name."""
    if any(c in pattern for c in "*?["):
        return fnmatchcase(name, pattern) or fnmatchcase(name.removesuffix(".weight"), pattern)
    return bool(pattern) and pattern in name


def last_parts(found: Iterable[str]) -> list[str]:
    """Return the last parts of the names of linears, weights or tensors of experts, in order."""
    return sorted({name.removesuffix(".weight").rpartition(".")[2] for name in found})


def _listing(found: dict) -> str:
    return f"linears of this model: {', '.join(last_parts(found)) or 'none'}"
