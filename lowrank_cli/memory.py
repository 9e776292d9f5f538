"""What a run will hold in memory, worked out from the configuration alone."""

from __future__ import annotations

from torch import nn

from lowrank_cli import console
from lowrank_cli.config import RunConfig
from lowrank_cli.errors import PreflightError
from lowrank_cli.methods import Method


def estimate(
    model: nn.Module, groups: list[dict], parts: list[Method], dtype_bytes: int, optimizer: str = "adamw"
) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer states, by item. Activations are not in it.

    Args:
        model: the model, which may be on the meta device.
        groups: the tagged groups of its parameters.
        parts: the chosen methods; each tells the bytes of its own tensors.
        dtype_bytes: bytes of one weight.
        optimizer: the update rule.
    """
    by_name = {part.name: part for part in parts}
    plain = Method(None)
    items = {"weights": 0, "gradients": 0, "optimizer states": 0}
    trained = set()
    for group in groups:
        for name, p in group["params"]:
            trained.add(name)
            memory = by_name.get(group["role"], plain).memory(tuple(p.shape), dtype_bytes, optimizer, group)
            items["weights"] += memory.weights
            items["gradients"] += memory.gradients
            items["optimizer states"] += memory.states
    items["weights"] += sum(p.numel() * dtype_bytes for name, p in model.named_parameters() if name not in trained)
    return items


def show(items: dict[str, int]) -> int:
    """Print the estimate; returns its sum in bytes."""
    total = sum(items.values())
    rows = [[name, console.human_bytes(value)] for name, value in items.items()]
    console.table(
        "Estimated memory, without activations",
        ["", "bytes"],
        [*rows, ["total", console.human_bytes(total)]],
        right=(1,),
    )
    return total


def check_budget(total: int, budget: int, config: RunConfig) -> None:
    """Raises PreflightError if the estimate is over the budget, with what would help, the cheapest first."""
    if total <= budget:
        return
    knobs = []
    if config.model.dtype != "bfloat16":
        knobs.append("--dtype bfloat16")
    if config.method == "full":
        knobs.append("--method galore")
    knobs += ["a smaller rank", "a smaller --model"] if config.method != "full" else ["a smaller --model"]
    raise PreflightError(
        f"the estimate of {console.human_bytes(total)} is over the budget of {console.human_bytes(budget)}",
        f"what would help, in order of what it costs: {', '.join(knobs)}",
    )
