"""Updates of a run on the meta device: its own model, methods, loss, optimizer and order of calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lowrank_cli import optim
from lowrank_cli.memory.stand_ins import RealKernels, fused_adamw_
from lowrank_cli.memory.tracker import (
    ACTIVATIONS,
    BASES,
    CUDA_BLOCK,
    GRADIENTS,
    LOSS,
    MOMENTS,
    REFRESH,
    TEMPORARY,
    WEIGHTS,
    Peak,
    Tracker,
)
from lowrank_cli.methods import Method
from lowrank_cli.models.layers import layers_of
from lowrank_cli.optim.gradients import Gradients
from lowrank_cli.optim.projected import Projected
from lowrank_cli.optim.space import collected
from lowrank_cli.settings.training import OptimConfig

Batch = dict[str, Tensor]

# updates that differ: states do not exist yet; they do; and every basis is due again
FIRST, ORDINARY, REFRESHING = "first update", "update", "update with a refresh"


@dataclass(frozen=True)
class Parts:
    """A model on the meta device with its methods in it, and the groups that they have tagged."""

    model: nn.Module
    methods: list[Method]
    groups: list[dict]


@dataclass(frozen=True)
class Run:
    """A Run holds what the memory of an update depends on.

    Attributes:
        parts: makes the parts of the run, with so many layers, or all of them for None.
        loss: of a model and a batch, as the training loop computes it.
        batch: a micro-batch on the meta device.
        passes: micro-batches in an update.
        optim: settings of the optimizer.
        device: "cpu" or "cuda", which the run is for.
        refreshes: whether the run is long enough for a second refresh of the bases.
        sampled: elements of each trainable tensor that the loop copies during the first update.
    """

    parts: Callable[[int | None], Parts]
    loss: Callable[[nn.Module, Batch], Tensor]
    batch: Batch
    passes: int
    optim: OptimConfig
    device: str = "cpu"
    refreshes: bool = True
    sampled: int = 0


@dataclass
class _Simulation:
    run: Run
    parts: Parts
    tracker: Tracker
    layers: list[nn.Module]
    trained: list[Tensor] = field(default_factory=list)


def simulate(run: Run, parts: Parts) -> list[Peak]:
    """The peaks of a run's updates, part by part; names are (kind of update, part, layer or -1)."""
    *_, peaks = simulated(run, parts)
    return peaks


def simulated(run: Run, parts: Parts) -> Iterator[list[Peak]]:
    """Carry out the updates one by one; after each come the peaks so far, as of `simulate`.

    Args:
        run: what decides the memory.
        parts: of `run.parts`; its model and groups are used up.
    """
    on_cuda = run.device == "cuda"
    tracker = Tracker(block=CUDA_BLOCK if on_cuda else 1, on_cuda=on_cuda)
    model, layers = parts.model, layers_of(parts.model)
    for tensor in (*model.parameters(), *model.buffers()):
        tracker.label(tensor, WEIGHTS)
    for name, buffer in model.named_buffers():
        if name.endswith("accumulated"):
            tracker.label(buffer, GRADIENTS)
    sim = _Simulation(run, parts, tracker, layers)
    optimizer = optim.build(replace(run.optim, kernel="torch"), parts.groups)
    fused_adamw_(optimizer)
    sim.trained = [p for group in optimizer.param_groups for p in group["params"]]
    # before those of Gradients, which may free what arrives
    for p in sim.trained:
        p.register_post_accumulate_grad_hook(lambda p: tracker.label(p.grad, GRADIENTS))
    _watch(sim)
    gradients = Gradients(model, optimizer, per_layer=run.optim.per_layer, clipping=run.optim.grad_clipping)
    projected = getattr(optimizer, "projected", [])
    for space in projected:
        _watch_refresh(space, tracker)
    kinds = [FIRST, ORDINARY, *([REFRESHING] if run.refreshes and projected else [])]
    model.train()
    for kind in kinds:
        if kind == REFRESHING:
            # staggered, they are due one by one
            staggered = any(space.group["stagger"] for space in projected)
            for space in [max(projected, key=lambda s: s.weight.numel())] if staggered else projected:
                space.state["until_refresh"] = 0
        _update(sim, kind, optimizer, gradients)
        if kind == kinds[-1]:
            tracker.mark("end", "end", -1)
        yield tracker.peaks()


def _update(sim: _Simulation, kind: str, optimizer: torch.optim.Optimizer, gradients: Gradients) -> None:
    run, tracker, model = sim.run, sim.tracker, sim.parts.model
    # after two micro-batches the third finds what the second found
    passes = min(run.passes, 2)
    with tracker, RealKernels(run.device):
        tracker.mark(kind, "start", -1)
        tracker.phase = TEMPORARY
        sampled = [p.detach().flatten()[: run.sampled].clone() for p in sim.trained] if kind == FIRST else []
        gradients.begin(measuring=True)
        for index in range(passes):
            gradients.last = index == passes - 1
            tracker.mark(kind, f"forward {index}", -1)
            sim.current = (kind, index)
            tracker.phase = ACTIVATIONS
            batch = {key: torch.empty_like(value) for key, value in run.batch.items()}
            tracker.pad(batch.get("attention_mask"))
            loss = run.loss(model, batch)
            tracker.phase = TEMPORARY
            tracker.mark(kind, f"backward {index}", -1)
            # not the method of the tensor: it would turn the function mode off
            torch.autograd.backward(loss)
            del loss, batch
            for _, part in collected(gradients.spaces):
                tracker.label(part, GRADIENTS)
        tracker.mark(kind, "step", -1)
        for part in sim.parts.methods:
            part.before_step(model)
        for p in sim.trained:
            tracker.label(p.grad, GRADIENTS)
        gradients.norm()
        gradients.step()
        for part in sim.parts.methods:
            part.after_step(model, 1)
        del sampled
    for state in optimizer.state.values():
        for key, value in state.items():
            tracker.label(value, BASES if key.startswith("basis_") else MOMENTS)


def _watch(sim: _Simulation) -> None:
    """Mark where layers begin and end, forward and backward, and where the loss takes over from the model's body."""
    tracker, base = sim.tracker, sim.parts.model.base_model

    def in_backward() -> bool:
        return torch._C._current_graph_task_id() != -1

    def mark(part: str, index: int) -> None:
        kind, number = sim.current
        tracker.mark(kind, f"{part} {number}", index)

    def enter(index: int):
        def hook(module, args):
            # a recomputation inside backward keeps activations for a moment
            tracker.phase = ACTIVATIONS
            if not in_backward():
                mark("forward", index)

        return hook

    def leave(index: int):
        def hook(module, args, output):
            if in_backward():
                tracker.phase = TEMPORARY
                return
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, Tensor) and first.requires_grad:
                first.register_hook(lambda grad: mark("backward", index))

        return hook

    for index, layer in enumerate(sim.layers):
        layer.register_forward_pre_hook(enter(index))
        layer.register_forward_hook(leave(index))

    def enter_loss(module, args, output):
        mark("loss", -1)
        tracker.phase = LOSS

    if base is not sim.parts.model:
        base.register_forward_hook(enter_loss)


def _watch_refresh(space: Projected, tracker: Tracker) -> None:
    """Give the refresh's temporaries their own label, and the basis that it makes."""
    plain = space.refresh

    def refresh() -> None:
        with tracker.during(REFRESH):
            plain()
        for key, value in space.state.items():
            if key.startswith("basis_"):
                tracker.label(value, BASES)

    space.refresh = refresh
