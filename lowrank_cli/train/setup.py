"""Build what a run and a dry run have in common: methods, parameter groups and the head of a task."""

from __future__ import annotations

from typing import Any

from torch import nn

from lowrank_cli import methods, optim
from lowrank_cli.config import RunConfig
from lowrank_cli.errors import UsageError
from lowrank_cli.models.load import Head
from lowrank_cli.models.share import Inventory, Share
from lowrank_cli.models.targets import ALL_LINEAR, matrices


def apply_methods(config: RunConfig, model: nn.Module) -> tuple[list[methods.Method], list[dict]]:
    """The chosen methods, which have changed the model in place, and the parameter groups that they have tagged."""
    parts = [methods.get(name)(part) for name, part in config.methods.items()]
    rate = config.optim.lr_other
    # before a method wraps them, by the names that the model gives their modules: an adapter of experts is
    # beside their tensors and not below them
    inside = tuple(f"{name.rpartition('.')[0]}." for name in matrices(model, None)) if rate is not None else ()
    for part in parts:
        part.command = config.command
        part.wrap(model)
        if part.is_adapter:
            # the base is frozen, but the head of a task is new and has to learn
            for p in head_parameters(model).values():
                p.requires_grad_(True)
    groups = optim.base_groups(model, config.optim)
    for part in parts:
        groups = part.param_groups(model, groups)
    return parts, groups if rate is None else with_other_rate(groups, inside, rate)


def reached(
    config: RunConfig, before: Inventory, model: nn.Module, parts: list[methods.Method], groups: list[dict]
) -> Share:
    """Say what share of the layers' parameters the methods act on.

    Args:
        config: the resolved configuration.
        before: the model's layers as they were without methods.
        model: with the methods in it.
        parts: the methods.
        groups: that they have tagged.
    Raises:
        UsageError: a method acts on nothing; or all were to be reached, and less than half of the layers is.
    """
    names: set[str] = set()
    for part in parts:
        own = part.treated(model, groups)
        if not own:
            raise UsageError(
                f"{part.name} finds no tensor to act on in this model", "leave it out, or take another model"
            )
        names |= own
    # beside an adapter all is frozen, and what has none is left alone
    share = (before if adapter_of(parts) is not None else before.freezing(model)).share(names)
    whole = any(getattr(part.config, "target_modules", None) == ALL_LINEAR for part in parts)
    share.say(config.method, "acts on", check=whole and not config.model.allow_partial)
    return share


def with_other_rate(groups: list[dict], inside: tuple[str, ...], rate: float) -> list[dict]:
    """Return the groups with a learning rate of its own for what is outside the layers' linears.

    Args:
        groups: those that have a rate of their own keep it.
        inside: beginnings of the names of what is inside.
        rate: the peak.
    Raises:
        UsageError: nothing is outside.
    """
    found, split = False, []
    for group in groups:
        outside = [] if "lr" in group else [pair for pair in group["params"] if not pair[0].startswith(inside)]
        names = {name for name, _ in outside}
        others = [pair for pair in group["params"] if pair[0] not in names]
        split += [group | {"params": others}] if others else []
        split += [group | {"params": outside, "lr": rate}] if outside else []
        found = found or bool(outside)
    if not found:
        raise UsageError("--lr-other is for what trains outside the layers' linears, and nothing does", "leave it out")
    return split


def head_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a sequence classifier that no base model brings, by name: its head, and a pooler that was
    drawn anew. None for a language model."""
    if "SequenceClassification" not in type(model).__name__:
        return {}
    inner = model.base_model_prefix + "."
    drawn = getattr(model, "newly_drawn", frozenset())
    return {name: p for name, p in model.named_parameters() if not name.startswith(inner) or name in drawn}


def head_of(data: Any) -> Head | None:
    """The classification head that a run's data want; None for a language model."""
    kind = getattr(data, "kind", "causal")
    if kind == "causal":
        return None
    return Head(tuple(data.label_names), regression=kind == "regression", pad_token_id=data.tokenizer.pad_token_id)


def adapter_of(parts: list[methods.Method]) -> methods.Method | None:
    """The method that trains an adapter, if one does."""
    return next((part for part in parts if part.is_adapter), None)
