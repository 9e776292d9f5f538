"""Select the linears that a method acts on, by a default rule for decoders and encoders or by name patterns."""

import re
from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn
from transformers.pytorch_utils import Conv1D

from lowrank_cli.errors import UsageError
from lowrank_cli.models.layers import outside_text

# GaLore's rule is "attn" or "mlp"; the rest says the same of BERT and its relatives, MPT, OPT and BART
_LAYER_PARTS = ("attn", "attention", "mlp", "feed_forward", "ffn", "intermediate", "output.dense", ".fc1", ".fc2")
_OUTSIDE = ("embed", "lm_head", "classifier", "pooler")
# a layer is an entry of a list: model.layers.3., transformer.h.0., bert.encoder.layer.11.
_IN_LAYER = re.compile(r"(^|\.)\d+\.(?P<within>.+)")


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear by its full name, in the model's order: nn.Linear and the Conv1D of GPT-2. Never an embedding,
    nor what text does not go through."""
    outside = outside_text(model)
    linear = (nn.Linear, Conv1D)
    return {name: m for name, m in model.named_modules() if isinstance(m, linear) and m not in outside}


def select(model: nn.Module, patterns: Sequence[str] | None) -> dict[str, nn.Module]:
    """The linears that the patterns choose, by full name, in the model's order.

    Args:
        model: any model.
        patterns: parts of a name ("mlp", "q_proj") or shell globs on the full name ("*.layers.0.*_proj"); a linear
            is chosen if one of them matches. None takes the attention and feed-forward linears of every layer:
            never the head, a classifier, a pooler or an embedding.
    Raises:
        UsageError: a pattern that matches no linear, no pattern, or a model whose layers the default does not know.
    """
    found = {name: module for name, module in linears(model).items() if not _is_head(model, name)}
    if patterns is None:
        chosen = {name: module for name, module in found.items() if _is_layer_linear(name)}
        if not chosen:
            raise UsageError(
                f"no attention or feed-forward linear was recognised in {type(model).__name__}",
                f"name the linears yourself; {_listing(found)}",
            )
        return chosen
    if isinstance(patterns, str):
        raise ValueError(f"patterns must be a list of texts, not the text {patterns!r}")
    if not patterns:
        raise UsageError("no target pattern was given", f"name the linears; {_listing(found)}")
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in found):
            close = get_close_matches(pattern, _last_parts(found), n=1, cutoff=0.5)
            did_you_mean = f"did you mean '{close[0]}'? " if close else ""
            raise UsageError(
                f"target pattern '{pattern}' matches no linear of the model", did_you_mean + _listing(found)
            )
    return {name: module for name, module in found.items() if any(_matches(name, p) for p in patterns)}


def _is_head(model: nn.Module, name: str) -> bool:
    """Return whether a linear is of a classifier's head or of a newly drawn pooler, which train as they are."""
    if "SequenceClassification" not in type(model).__name__:
        return False
    return not name.startswith(model.base_model_prefix + ".") or f"{name}.weight" in getattr(model, "newly_drawn", ())


ALL_LINEAR = "all-linear"


def parse(text: str) -> list[str] | None:
    """The patterns of a setting: all-linear (None: the default rule), or comma-separated ones."""
    return None if text.strip() == ALL_LINEAR else [part.strip() for part in text.split(",") if part.strip()]


def named_targets(model: nn.Module, text: str) -> list[str]:
    """The names that make PEFT adapt exactly the linears that a setting chooses: short ones where those are enough.

    Args:
        model: any model.
        text: all-linear, or comma-separated patterns as `select` takes.
    Raises:
        UsageError: as `select`.
    """
    chosen = set(select(model, parse(text)))
    short = sorted({name.rpartition(".")[2] for name in chosen})
    matched = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in short}
    return short if matched == chosen else sorted(chosen)


def _is_layer_linear(name: str) -> bool:
    layer = _IN_LAYER.search(name)
    if layer is None or any(part in name for part in _OUTSIDE):
        return False
    return any(part in f".{layer['within']}" for part in _LAYER_PARTS)


def _matches(name: str, pattern: str) -> bool:
    if any(c in pattern for c in "*?["):
        return fnmatchcase(name, pattern)
    return bool(pattern) and pattern in name


def _last_parts(found: dict[str, nn.Module]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in found})


def _listing(found: dict[str, nn.Module]) -> str:
    return f"linears of this model: {', '.join(_last_parts(found)) or 'none'}"
