"""Checks that a run trains what it says it trains: the table of targets before it, a look at every tensor after the
first update, and the name of the tensor when numbers break."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowrank_cli import console
from lowrank_cli.errors import LowrankError
from lowrank_cli.ops.finite import first_non_finite
from lowrank_cli.optim.space import collected
from lowrank_cli.parallel.replicas import Alone, Replicas
from lowrank_cli.parallel.sharding import local_tensor
from lowrank_cli.parallel.shards import layout

# elements of a tensor that are compared before and after the first update
SAMPLE = 1 << 16
# gradients of a model are often no larger than this
LARGE_EPS = 1e-5
FROZEN = "does not require a gradient"


def targets(model: nn.Module, groups: list[dict]) -> list[dict[str, Any]]:
    """Return what happens to each tensor: its shape, its role, its rank if it has one, and why nothing more does."""
    roles = {name: group for group in groups for name, _ in group["params"]}
    rows = []
    for name, p in model.named_parameters():
        group = roles.get(name)
        row = {"name": name, "shape": list(p.shape), "role": group["role"] if group else "frozen"}
        if row["role"] == "full" and "adapter" in group:
            row["role"] = group["adapter"]
        if group is None:
            row["why"] = FROZEN if not p.requires_grad else "left out by the method"
        else:
            row |= {key: group[key] for key in ("rank", "why") if key in group}
        rows.append(row)
    return rows


def show_targets(rows: list[dict[str, Any]]) -> None:
    """Print the table of targets, one line for each shape and role."""
    kinds: dict[tuple, dict[str, int]] = {}
    for row in rows:
        # model.layers.0.self_attn.q_proj.weight is one of the q_proj
        name = row["name"].removesuffix(".weight").removesuffix(".default").rpartition(".")[2] or row["name"]
        names = kinds.setdefault((tuple(row["shape"]), row["role"], row.get("rank"), row.get("why", "")), {})
        names[name] = names.get(name, 0) + 1
    frozen = [row for row in rows if row["role"] == "frozen" and row.get("why") == FROZEN]
    kinds = {key: names for key, names in kinds.items() if key[1:] != ("frozen", None, FROZEN)}
    table = [
        [" ".join(names), sum(names.values()), " x ".join(map(str, shape)), role, rank or "", why]
        for (shape, role, rank, why), names in kinds.items()
    ]
    if frozen:
        table.append(["the rest", len(frozen), "", "frozen", "", ""])
    console.table(
        "What is trained, and how", ["tensors", "count", "shape", "method", "rank", "note"], table, right=(1, 4)
    )


class Snapshot:
    """A sample of every trainable tensor before the first update, to see afterwards that each one moved."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.before = [(name, sample(p).clone()) for name, p in named(optimizer)]

    def check(self, optimizer: torch.optim.Optimizer, zeros: set[Tensor]) -> None:
        """Every tensor with a gradient changed, and every step counter is 1.

        Args:
            optimizer: after its first step.
            zeros: parameters whose gradient was zero.
        Raises:
            LowrankError: names the tensors that did not.
        """
        groups = {name: group for group in optimizer.param_groups for name in group["param_names"]}
        rounded = []
        for (name, before), (_, p) in zip(self.before, named(optimizer), strict=True):
            if not optimizer.state.get(p):
                raise LowrankError(
                    f"{name} is in the optimizer but got no gradient in the first update",
                    "freeze it, or choose a method that trains it",
                )
            step = optimizer.state[p].get("step")
            if step is None or int(step) != 1:
                raise LowrankError(
                    f"the optimizer counts step {step} for {name} after one update",
                    "this is a bug: please report it with run.json",
                )
            if p in zeros or not torch.equal(before, sample(p)):
                continue
            if not may_round_away(before, groups[name]["lr"], groups[name]["eps"]):
                raise LowrankError(
                    f"{name} has a gradient but did not change in the first update",
                    "this is a bug: please report it with run.json and targets.json",
                )
            rounded.append(name)
        if rounded:
            console.note(
                f"{len(rounded)} tensors did not change in the first update ({rounded[0]} is one): a step of this "
                "learning rate rounds to nothing there; --dtype float32 would train them from the first step"
            )


def check_replicas(replicas: Replicas, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Every rank has the same bits in every trained weight that it holds whole; raises LowrankError with the first
    that differs."""
    pairs = [(name, p) for name, p in named(optimizer) if not layout(p).is_cut]
    if not pairs:
        return
    place = replicas.first_difference(p for _, p in pairs)
    if place is not None:
        raise LowrankError(
            f"the ranks have different weights in {pairs[place][0]} after step {step}",
            "go on from the last checkpoint, with the same hardware and versions on every rank",
        )


def named(optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
    """The optimizer's parameters with their names."""
    return [
        (name, p)
        for group in optimizer.param_groups
        for name, p in zip(group["param_names"], group["params"], strict=True)
    ]


def may_round_away(values: Tensor, lr: float, eps: float | tuple[float, ...]) -> bool:
    """Return whether Adam's first step may round to nothing in every element: it is at most about `lr`, and less where
    gradients are not much larger than `eps`."""
    if isinstance(eps, float) and eps > LARGE_EPS and values.element_size() < 4:
        return True
    return lr <= float(values.abs().min()) * torch.finfo(values.dtype).eps / 2


def sample(p: Tensor) -> Tensor:
    """At most SAMPLE evenly spaced elements."""
    flat = p.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // SAMPLE)]


def first_broken(
    model: nn.Module, optimizer: torch.optim.Optimizer, replicas: Alone, states: dict[str, Tensor]
) -> str:
    """Return which value of a run is the first that is not finite; "" if all are.

    Looked at are the weights, what the optimizer and the methods keep, small gradients and gradients, in this order.
    Where weights are cut over processes all of them have to ask.

    Args:
        model: frozen weights were looked at when they were loaded.
        optimizer: of the rest.
        replicas: the processes.
        states: the methods' own tensors, by name.
    """
    trained = named(optimizer)
    spaces = getattr(optimizer, "spaces", {})
    small = [(f"the projected gradient of {space.name}", part) for space, part in collected(spaces)]
    tensors = [
        *((f"the weight {name}", local_tensor(p)) for name, p in model.named_parameters() if p.requires_grad),
        *(
            (f"{key} of {name}", value)
            for name, p in trained
            for key, value in optimizer.state.get(p, {}).items()
            if isinstance(value, Tensor)
        ),
        *((f"the method's {name}", value) for name, value in states.items()),
        *small,
        *((f"the gradient of {name}", p.grad) for name, p in trained if p.grad is not None),
    ]
    broken = first_non_finite(tensors)
    if replicas.sharded:
        # each has its own parts: the first that any of them has found
        found = [name for name, _ in tensors]
        flags = replicas.numbers(*(name == broken for name in found))
        broken = next((name for name, flag in zip(found, flags, strict=True) if flag), "")
    return broken
