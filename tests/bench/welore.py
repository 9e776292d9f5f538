"""A training step of the low-rank components alone against one of all parameters: speed in turn, memory in processes.

SmolLM2-135M by its shapes, with random weights and tokens, AdamW, float32. The ranks are about those of WeLore's rule
at half of the rank cut on the real model: q, o, gate and down low-rank, k, v and up dense. Peers: every parameter of
the same compressed model, and every parameter of the dense one, which is what the paper compares with.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from comparison import Bar, Comparison, Settings, answer, console, in_alternation, in_process
from shapes import SMOLLM2_135M, Shape, random_llama
from torch import nn

from lowrank_cli import methods
from lowrank_cli.models.lowrank_linear import replace_linear, shape_of
from lowrank_cli.models.targets import select
from lowrank_cli.run import peak_resident_bytes

OURS, ALL, DENSE = "low-rank components", "all of the compressed model", "all of the dense model"
FASTER = Bar(1.0)
LESS_MEMORY = Bar(0.9, at_most=True)
# share of full rank by the linear's name
RANKS = {"q_proj": 0.23, "o_proj": 0.34, "gate_proj": 0.32, "down_proj": 0.36}


@dataclass(frozen=True)
class Problem:
    """A model's shape, a micro-batch, updates in a measurement."""

    shape: Shape
    batch: int
    length: int
    steps: int


SMOLLM = Problem(SMOLLM2_135M, 1, 256, 2)
TINY = Problem(Shape(32, 64, 2, 4, 2, 64), 2, 32, 1)


def compare(settings: Settings) -> list[Comparison]:
    """Speed and memory."""
    torch.set_num_threads(settings.threads)
    problem = TINY if settings.smoke else SMOLLM
    steps = settings.steps or problem.steps
    console.print(f"welore: {settings.repeats} x {steps} updates of 3 sides")
    sides = {name: step_of(name, problem) for name in (OURS, ALL, DENSE)}
    for step in sides.values():
        step()  # state and memory

    def tokens_per_second(step: Callable[[], None]) -> float:
        gc.collect()
        start = time.perf_counter()
        for _ in range(steps):
            step()
        return steps * problem.batch * problem.length / (time.perf_counter() - start)

    speeds = in_alternation(
        {name: lambda step=step: tokens_per_second(step) for name, step in sides.items()}, settings.repeats
    )
    del sides
    smoke = json.dumps(settings.smoke)
    memory = in_alternation(
        {
            name: lambda name=name: in_process(Path(__file__), "memory", name, smoke, threads=settings.threads)
            for name in (OURS, ALL, DENSE)
        },
        settings.repeats,
    )
    return [
        Comparison("welore", f"speed of an update, {peer}", "tok/s", speeds[OURS], speeds[peer], FASTER)
        for peer in (ALL, DENSE)
    ] + [
        Comparison("welore", f"peak memory of training, {peer}", "MB", memory[OURS], memory[peer], LESS_MEMORY)
        for peer in (ALL, DENSE)
    ]


def step_of(side: str, problem: Problem) -> Callable[[], None]:
    """One update of a side: forward and backward pass, optimizer step."""
    model = model_of(side, problem)
    method = methods.get("welore")
    if side == OURS:
        method(method.Config()).wrap(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    tokens = torch.randint(problem.shape.vocabulary, (problem.batch, problem.length))

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def model_of(side: str, problem: Problem) -> nn.Module:
    """The dense model, or that with low-rank linears in it."""
    model = random_llama(problem.shape)
    for name, linear in select(model, None).items() if side != DENSE else ():
        share = RANKS.get(name.rpartition(".")[2])
        if share is not None:
            low = replace_linear(model, name, max(1, int(share * min(shape_of(linear)))), "factored")
            for p in low.parameters():
                nn.init.normal_(p, std=0.02)
    return model


def measure_memory() -> None:
    """A side's peak in this process over what there was before the model."""
    problem = TINY if json.loads(sys.argv[3]) else SMOLLM
    step_of(DENSE, TINY)()  # libraries and the kernels' own memory
    start = psutil.Process().memory_info().rss
    step = step_of(sys.argv[2], problem)
    for _ in range(3):
        step()
    print(json.dumps((peak_resident_bytes() - start) / 1e6))


if __name__ == "__main__":
    if sys.argv[1] == "memory":
        measure_memory()
    else:
        answer(compare)
