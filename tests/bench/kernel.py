"""The compiled step on a CPU: `GaLoreAdamW.step` with `kernel="cpu"` against galore-torch, the plain path, the floor.

As in optimizer_step.py, whose sides these are: one process, one thread, fixed random gradients, no refresh, every step
in turn with the others'. The kernel is built first, where it is not there yet.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from comparison import Bar, Comparison, Settings, answer, console, in_alternation
from optimizer_step import (
    LLAMA_7B_LAYER,
    LLAMA_60M,
    LR,
    SCALE,
    TINY_LAYER,
    Case,
    group_of,
    milliseconds,
    our_step,
    peer_step,
    products,
    random_basis,
    weights_of,
)
from torch import Tensor

from lowrank_cli.methods.velora.space import Factored
from lowrank_cli.ops import build
from lowrank_cli.optim.adamw import GaLoreAdamW
from lowrank_cli.optim.adamw8bit import GaLoreAdamW8bit

CASES = [
    Case("LLaMA-60M, rank 128", LLAMA_60M, 128, 20, False, Bar(1.3)),
    Case("LLaMA-60M, rank 256", LLAMA_60M, 256, 10, False),
    Case("LLaMA-7B layer, rank 128", LLAMA_7B_LAYER, 128, 1, False),
]
SMOKE_CASES = [Case("tiny, rank 16", TINY_LAYER, 16, 3, False, Bar(1.3))]
# VeLoRA on down projections of LLaMA-60M: features, groups
VELORA = (512, 1376, 86)


def compare(settings: Settings) -> list[Comparison]:
    """The comparisons of every case."""
    torch.set_num_threads(1)
    build.load("cpu")
    rows = []
    for case in SMOKE_CASES if settings.smoke else CASES:
        steps = settings.steps or case.steps
        console.print(f"kernel: {case.name}, {settings.repeats} x {steps} steps")
        rows += compare_case(case, settings.repeats, steps)
    return rows + compare_eight_bit(settings) + compare_velora(settings)


def alternated(sides: dict[str, Callable[[], object]], repeats: int, steps: int) -> dict[str, list[float]]:
    """Milliseconds of each side: the median of its steps, for every repeat."""
    for step in sides.values():
        step()
        step()
    calls = {name: lambda step=step: milliseconds(step) for name, step in sides.items()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, values in in_alternation(calls, steps).items():
            times[name].append(statistics.median(values))
    return times


def compare_case(case: Case, repeats: int, steps: int) -> list[Comparison]:
    """The projected step of a model's matrices."""
    torch.manual_seed(0)
    grads = [torch.randn(shape) * 1e-3 for shape in case.shapes]  # (m, n) each
    bases = [random_basis(min(shape), case.rank) for shape in case.shapes]
    sides = {
        "kernel": on_kernel(our_step(grads, bases, case)),
        "plain": our_step(grads, bases, case),
        "galore-torch": peer_step(grads, bases, case),
        "two products": products(grads, case.rank),
        "blocks": by_blocks(grads, bases, case),
    }
    times = alternated(sides, repeats, steps)
    return [
        speed(times, "galore-torch", case.name, case.galore_bar),
        speed(times, "plain", f"{case.name}, plain PyTorch path", None),
        Comparison("kernel", f"time, two products alone: {case.name}", "ms", times["kernel"], times["two products"],
                   Bar(1.15, at_most=True)),
        Comparison("kernel", f"time, a block of rows at a time: {case.name}", "ms", times["kernel"], times["blocks"]),
    ]  # fmt: skip


def speed(times: dict[str, list[float]], peer: str, what: str, bar: Bar | None) -> Comparison:
    """Steps a second, ours and the peer's."""
    ours, theirs = ([1000 / t for t in times[name]] for name in ("kernel", peer))
    return Comparison("kernel", f"speed, {peer}: {what}", "steps/s", ours, theirs, bar)


def on_kernel(step: Callable[[], object]) -> Callable[[], object]:
    """The step of an optimizer, from now on with its groups on the CPU kernel."""
    for group in step.__self__.param_groups:
        group["kernel"] = "cpu"
    return step


def by_blocks(grads: list[Tensor], bases: list[Tensor], case: Case) -> Callable[[], object]:
    """The op with products over a block of rows or columns at a time; the optimizer takes whole layers."""
    sides: dict[bool, list[tuple[Tensor, ...]]] = {}
    for weight, basis in zip(weights_of(grads), bases, strict=True):
        m, n = weight.shape
        low = (m, case.rank) if m >= n else (case.rank, n)
        sides.setdefault(m < n, []).append(
            (weight.detach(), weight.grad, basis.contiguous(), torch.zeros(low), torch.zeros(low))
        )

    def step() -> None:
        for left, layers in sides.items():
            torch.ops.lowrank.galore_step_(
                *map(list, zip(*layers, strict=True)),
                [],
                [],
                [],
                left,
                False,
                False,
                0.9,
                0.999,
                1e-6,
                LR * SCALE,
                1.0,
            )

    return step


def compare_eight_bit(settings: Settings) -> list[Comparison]:
    """8-bit moments, which the plain path leaves to bitsandbytes."""
    shapes = TINY_LAYER if settings.smoke else LLAMA_60M[:7]
    rank = 16 if settings.smoke else 128
    grads = [torch.randn(shape) * 1e-3 for shape in shapes]
    bases = [random_basis(min(shape), rank) for shape in shapes]

    def side(kernel: str) -> Callable[[], object]:
        optimizer = GaLoreAdamW8bit(group_of(weights_of(grads), rank), lr=LR, min_8bit_size=256, kernel=kernel)
        for weight, basis in zip(optimizer.param_groups[0]["params"], bases, strict=True):
            m, n = weight.shape
            key = "basis_right" if m >= n else "basis_left"
            optimizer.state[weight] = {"until_refresh": 10**9, key: basis.contiguous()}
        return optimizer.step

    times = alternated({"kernel": side("cpu"), "plain": side("torch")}, settings.repeats, settings.steps or 10)
    return [speed(times, "plain", f"8-bit moments, a layer of LLaMA-60M, rank {rank}, plain PyTorch path", None)]


def compare_velora(settings: Settings) -> list[Comparison]:
    """VeLoRA's factored step, and its sub-token projection of 4,096 tokens."""
    m, features, groups = (16, 32, 4) if settings.smoke else VELORA
    vector = torch.nn.functional.normalize(torch.randn(features // groups), dim=0)
    factor = torch.randn(m, groups)

    def side(kernel: str) -> Callable[[], object]:
        weight = torch.nn.Parameter(torch.randn(m, features) * 0.02)
        optimizer = GaLoreAdamW([{"params": [weight], "space": Factored, "num_groups": groups}], lr=LR, kernel=kernel)
        optimizer.spaces[weight].vector = lambda: vector

        def step() -> None:
            optimizer.spaces[weight].accumulate([factor])
            optimizer.step()

        return step

    steps = settings.steps or 50
    times = alternated({"kernel": side("cpu"), "plain": side("torch")}, settings.repeats, steps)
    rows = [speed(times, "plain", f"VeLoRA's update of {m} x {features}, plain PyTorch path", None)]
    tokens = torch.randn(64 if settings.smoke else 4096, features)
    sides = {
        "kernel": lambda: torch.ops.lowrank.velora_compress(tokens, vector),
        "plain": lambda: tokens.unflatten(-1, (-1, vector.shape[0])) @ vector,
    }
    times = alternated(sides, settings.repeats, steps)
    return [
        *rows,
        speed(times, "plain", f"VeLoRA's projection of {len(tokens)} x {features}, plain PyTorch path", None),
    ]


if __name__ == "__main__":
    answer(compare)
