"""What a run and a dry run build alike."""

from __future__ import annotations

from torch import nn

from lowrank_cli import methods, optim
from lowrank_cli.config import RunConfig


def apply_methods(config: RunConfig, model: nn.Module) -> tuple[list[methods.Method], list[dict]]:
    """The chosen methods, which have changed the model in place, and the parameter groups that they have tagged."""
    parts = [methods.get(name)(part) for name, part in config.methods.items()]
    for part in parts:
        part.wrap(model)
    groups = optim.base_groups(model, config.optim)
    for part in parts:
        groups = part.param_groups(model, groups)
    return parts, groups
