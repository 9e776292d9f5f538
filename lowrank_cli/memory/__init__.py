"""What a run will hold in memory, worked out from the configuration alone."""

from __future__ import annotations

from torch import nn

from lowrank_cli import console
from lowrank_cli.config import RunConfig
from lowrank_cli.errors import PreflightError
from lowrank_cli.methods import Method


def estimate(
    model: nn.Module, groups: list[dict], parts: list[Method], dtype_bytes: int, config: RunConfig
) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer states, by item. Activations are not in it.

    Args:
        model: the model, which may be on the meta device.
        groups: the tagged groups of its parameters.
        parts: the chosen methods; each tells the bytes of its own tensors.
        dtype_bytes: bytes of one weight.
        config: tells the update rule, and whether gradients are freed one by one.
    Returns:
        Bytes at their most: that is the first update, in which every projected tensor needs its full gradient.
    """
    # a per-layer step waits for nobody only if one pass makes an update and no norm is clipped
    train = config.train
    passes = (train.total_batch_size or train.batch_size) // train.batch_size
    one_by_one = config.optim.per_layer and passes == 1 and not config.optim.grad_clipping
    by_name = {part.name: part for part in parts}
    plain = Method(None)
    items = {"weights": 0, "gradients": 0, "optimizer states": 0}
    trained = set()
    for group in groups:
        for name, p in group["params"]:
            trained.add(name)
            memory = by_name.get(group["role"], plain).memory(
                tuple(p.shape), dtype_bytes, config.optim.optimizer, group
            )
            items["weights"] += memory.weights
            held = items["gradients"]
            items["gradients"] = max(held, memory.gradients) if one_by_one else held + memory.gradients
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
    if not config.optim.per_layer:
        knobs.append("--per-layer")
    if config.optim.optimizer == "adamw":
        knobs.append("--optimizer adamw8bit")
    knobs += ["a smaller rank", "a smaller --model"] if config.method != "full" else ["a smaller --model"]
    raise PreflightError(
        f"the estimate of {console.human_bytes(total)} is over the budget of {console.human_bytes(budget)}",
        f"what would help, in order of what it costs: {', '.join(knobs)}",
    )
