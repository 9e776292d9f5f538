"""The estimate: the peak of a run by what holds it, and how much of that one process of several has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lowrank_cli import console
from lowrank_cli.errors import LowrankError
from lowrank_cli.memory.layers import FEW, WHOLE, are_equal, extended
from lowrank_cli.memory.simulate import Parts, Run, simulated
from lowrank_cli.memory.tracker import BASES, GRADIENTS, LABELS, MOMENTS, WEIGHTS, Peak
from lowrank_cli.models.layers import layers_of

FRAGMENTATION = "fragmentation allowance"
# of what comes and goes: torch's CUDA allocator keeps blocks that are too small for the next tensor; not measured
FRAGMENTATION_SHARE = 0.05
SHARDED = (WEIGHTS, GRADIENTS, MOMENTS, BASES)
PARALLEL = ("ddp", "fsdp")


@dataclass(frozen=True)
class Estimate:
    """An Estimate holds the peak memory of one process of a run.

    Attributes:
        parts: the peak of every part of an update.
        allowance: share of temporaries and activations that is added for fragmentation.
    """

    parts: tuple[Peak, ...]
    allowance: float = 0.0

    @property
    def peak(self) -> Peak:
        """The most that is held at any time."""
        return max(self.parts, key=lambda part: part.total)

    @property
    def items(self) -> dict[str, int]:
        """Bytes at the peak, by what they are for."""
        held = {label: round(size) for label, size in self.peak.bytes_by_label.items()}
        passing = sum(size for label, size in held.items() if label not in SHARDED)
        extra = {FRAGMENTATION: round(self.allowance * passing)} if self.allowance else {}
        return {label: size for label, size in (held | extra).items() if size}

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.items.values())

    @property
    def optimizer_states(self) -> int:
        """Bytes of moments and bases after the last update."""
        last = self.parts[-1].bytes_by_label
        return round(last[MOMENTS] + last[BASES])

    @property
    def kept(self) -> int:
        """Bytes of weights, moments and bases in the last step: what is held between updates, or less."""
        return round(self.parts[-1].bytes_by_label[WEIGHTS]) + self.optimizer_states

    def most(self, label: str) -> int:
        """The most that is held for one thing, at whatever time."""
        return round(max(part.bytes_by_label[label] for part in self.parts))

    def by_update(self) -> dict[str, dict[str, int]]:
        """The peak of forward, loss, backward and step, for each kind of update."""
        found: dict[str, dict[str, int]] = {}
        for part in self.parts:
            kind, name, _ = part.at
            stage = name.partition(" ")[0]
            if stage in STAGES:
                row = found.setdefault(kind, dict.fromkeys(STAGES, 0))
                row[stage] = max(row[stage], round(part.total))
        return found


STAGES = ("forward", "loss", "backward", "step")


def estimate(
    run: Run,
    model: nn.Module,
    *,
    world_size: int = 1,
    parallel: str = "ddp",
    adapter: bool = False,
    limit: int | None = None,
) -> Estimate:
    """Estimate the peak memory of a run, in each process.

    Args:
        run: what decides it; its batch and its passes are those of one process.
        model: the whole model on the meta device, without methods; it is only looked at.
        world_size: processes.
        parallel: "ddp", where every process holds everything, or "fsdp", where it holds a share of weights,
            gradients and states, and gathers the weights of the layers that it is at.
        adapter: whether what trains is an adapter, which every process holds whole.
        limit: bytes; with it, no update is carried out after one that is over it. The total is then less than the
            run's, and over the limit all the same.
    Raises:
        ValueError: another way of being parallel.
        LowrankError: the model does what cannot be done without values.
    """
    if parallel not in PARALLEL:
        raise ValueError(f"parallel is {parallel!r}; it is one of {', '.join(PARALLEL)}")
    count = len(layers_of(model))
    allowance = FRAGMENTATION_SHARE if run.device == "cuda" else 0.0
    equal = count > WHOLE and are_equal(model)
    for found in zip(*(_peaks(run, model, few) for few in (FEW if equal else (None,))), strict=True):
        parts = extended(*found, count) if equal else found[0]
        if world_size > 1 and parallel == "fsdp":
            parts = sharded(parts, model, world_size, adapter=adapter)
        so_far = Estimate(tuple(parts), allowance)
        if limit is not None and so_far.total > limit:
            break
    return so_far


def _peaks(run: Run, model: nn.Module, num_layers: int | None) -> Iterator[list[Peak]]:
    """The peaks after each update of the run with so many layers; raises LowrankError where it cannot be known."""
    try:
        with console.muted():
            updates = simulated(run, run.parts(num_layers))
        while True:
            with console.muted():
                peaks = next(updates, None)
            if peaks is None:
                return
            yield peaks
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError) as error:
        # an architecture that looks at values, or does what the meta device cannot
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise LowrankError(
            f"the memory of a {model.config.model_type} model cannot be estimated: {reason}",
            "leave out --dry-run and --memory-budget; --debug shows where it failed",
        ) from error


def sharded(parts: Iterable[Peak], model: nn.Module, world_size: int, *, adapter: bool = False) -> list[Peak]:
    """The peaks of one process under FSDP with a unit for each layer and one for the rest.

    Weights, gradients, moments and bases are cut evenly. Forward and backward have the weights of the rest, of the
    layer at hand and of the next one whole. Whole are also the gradients of a unit and the copy that is sent, and
    those of the rest from the loss to the end of backward, for that is when its unit is done.
    """
    layers = layers_of(model)
    largest = max((_bytes(layer.parameters()) for layer in layers), default=0)
    rest = _bytes(model.parameters()) - sum(_bytes(layer.parameters()) for layer in layers)
    found = []
    for part in parts:
        held = dict(part.bytes_by_label)
        for label in (WEIGHTS,) if adapter else SHARDED:
            held[label] /= world_size
        stage = part.at[1].partition(" ")[0]
        if stage in ("forward", "loss", "backward"):
            held[WEIGHTS] += (rest + min(2, len(layers)) * largest) * (1 - 1 / world_size)
        if stage in ("loss", "backward") and not adapter:
            held[GRADIENTS] += rest * (1 - 1 / world_size)
        if stage == "backward" and not adapter:
            held[GRADIENTS] += max(rest, 2 * largest) * (1 - 1 / world_size)
        found.append(replace(part, bytes_by_label=held))
    return found


def by_formula(model: nn.Module, parts: Parts, optimizer: str) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer states as the methods' own formulas have them.

    Args:
        model: with the methods in it.
        parts: the methods and the groups that they have tagged.
        optimizer: the update rule.
    """
    from lowrank_cli.methods import Method

    by_name, plain = {part.name: part for part in parts.methods}, Method(None)
    items, trained = {WEIGHTS: 0, GRADIENTS: 0, "optimizer states": 0}, set()
    for group in parts.groups:
        for name, p in group["params"]:
            trained.add(name)
            memory = by_name.get(group["role"], plain).memory(tuple(p.shape), p.element_size(), optimizer, group)
            items[WEIGHTS] += memory.weights
            items[GRADIENTS] += memory.gradients
            items["optimizer states"] += memory.states
    items[WEIGHTS] += sum(p.nbytes for name, p in model.named_parameters() if name not in trained)
    return items


def show(found: Estimate, formula: dict[str, int], paper_bytes: int, dtype_bytes: int) -> None:
    """Print the peak by what holds it, beside the formulas, and when it is."""
    peak, items = found.peak, found.items
    rows = [[label, console.human_bytes(items[label])] for label in (*LABELS, FRAGMENTATION) if label in items]
    console.table(
        "Estimated memory at the peak", ["", "bytes"], [*rows, ["total", console.human_bytes(found.total)]], right=(1,)
    )
    stages = [
        [kind, *(console.human_bytes(row[stage]) for stage in STAGES)] for kind, row in found.by_update().items()
    ]
    console.table("The peak of each part", ["", *STAGES], stages, right=(1, 2, 3, 4))
    kind, part, _ = peak.at
    console.note(f"the peak is in the {part.partition(' ')[0]} of the {kind}; not in it: Python and its libraries")
    rows = ", ".join(f"{name} {console.human_bytes(size)}" for name, size in formula.items())
    console.note(f"by formula: {rows}")
    console.note(
        f"by the paper's formula (arXiv:2403.03507, Table 1: weights and optimizer states at {dtype_bytes} bytes a "
        f"number): {console.human_bytes(paper_bytes)}"
    )


def as_json(found: Estimate, paper_bytes: int) -> dict[str, Any]:
    """The estimate for a program: bytes by name; `at_peak` adds up to `total_bytes`."""
    kind, part, _ = found.peak.at
    return {
        "total_bytes": found.total,
        "at_peak": {f"{_key(label)}_bytes": size for label, size in found.items.items()},
        "peak_in": f"{part.partition(' ')[0]} of the {kind}",
        "by_update": {_key(k): {f"{s}_bytes": v for s, v in row.items()} for k, row in found.by_update().items()},
        "weights_bytes": found.most(WEIGHTS),
        "gradients_bytes": found.most(GRADIENTS),
        "optimizer_states_bytes": found.optimizer_states,
        "paper_bytes": paper_bytes,
    }


def _key(label: str) -> str:
    return label.replace(" ", "_")


def _bytes(parameters) -> int:
    return sum(p.nbytes for p in parameters)
