"""A training step with VB-LoRA against PEFT's VBLoRA and against PEFT's LoRA: speed in turn, memory in processes.

Two models by their shapes, with random weights, on random tokens: stories260K (the smallest, where what is not the
model's own work shows most) and SmolLM2-135M. All attention and feed-forward linears at rank 4, the longest vectors
that divide their sizes, an update of one micro-batch or of four (as in the paper's instruction tuning), torch's fused
AdamW, float32. All sides hold the same base weights. The last row of each group is the floor: the frozen model's own
forward and backward pass, without an adapter or a step.
"""

from __future__ import annotations

import copy
import gc
import json
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from comparison import Bar, Comparison, Settings, answer, console, in_alternation, in_process
from shapes import SMOLLM2_135M, Shape, random_llama
from torch import nn

from lowrank_cli import methods
from lowrank_cli.run import peak_resident_bytes

OURS, PEFT, LORA, NOTHING = "ours", "PEFT VBLoRA", "PEFT LoRA", "no adapter"
RANK = 4
# rates of bank and logits; they do not matter for the time
RATES = {"bank": 1e-3, "logits": 1e-2}
FASTER_THAN_PEFT = Bar(1.3)
AS_FAST_AS_LORA = Bar(0.9)
NO_MORE_MEMORY = Bar(1.0, at_most=True)
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Problem:
    """A model's shape, the sizes of the bank, a micro-batch, their numbers in an update, updates in a measurement."""

    name: str
    shape: Shape
    vector_length: int
    banks: tuple[int, ...]
    batch: int
    length: int
    passes: tuple[int, ...]
    steps: int


STORIES = Problem("stories260K", Shape(64, 172, 5, 8, 4, 512), 4, (90, 256), 4, 128, (1, 4), 4)
SMOLLM = Problem("SmolLM2-135M", SMOLLM2_135M, 192, (90, 256), 1, 128, (1, 4), 1)
TINY = Problem("tiny", Shape(32, 48, 1, 4, 2, 64), 8, (8,), 16, 256, (1,), 1)


def compare(settings: Settings) -> list[Comparison]:
    """Every model with every size of the bank."""
    torch.set_num_threads(settings.threads)
    problems = (TINY,) if settings.smoke else (STORIES, SMOLLM)
    found: list[Comparison] = []
    for problem in problems:
        for size in problem.banks:
            for passes in problem.passes:
                found += speed(problem, size, passes, settings)
            found += memory(problem, size, settings)
    return found


def speed(problem: Problem, num_vectors: int, passes: int, settings: Settings) -> list[Comparison]:
    """Tokens per second of an update, against both peers and the frozen model."""
    steps = settings.steps or problem.steps
    base = random_llama(problem.shape).requires_grad_(False)
    sides = {
        name: step_of(name, problem, num_vectors, passes, copy.deepcopy(base)) for name in (OURS, PEFT, LORA, NOTHING)
    }
    about = f"{problem.name}, {num_vectors} vectors, {passes} x {problem.batch * problem.length} tokens"
    console.print(f"vblora: {about}, {settings.repeats} x {steps} updates of {len(sides)} sides")
    for step in sides.values():
        step()  # state and memory

    def tokens_per_second(step: Callable[[], object]) -> float:
        gc.collect()
        start = time.perf_counter()
        for _ in range(steps):
            step()
        return steps * passes * problem.batch * problem.length / (time.perf_counter() - start)

    speeds = in_alternation(
        {name: lambda step=step: tokens_per_second(step) for name, step in sides.items()}, settings.repeats
    )
    bars = {PEFT: FASTER_THAN_PEFT, LORA: AS_FAST_AS_LORA, NOTHING: None}
    return [
        Comparison("vblora", f"speed of an update, {peer}: {about}", "tok/s", speeds[OURS], speeds[peer], bar)
        for peer, bar in bars.items()
    ]


def memory(problem: Problem, num_vectors: int, settings: Settings) -> list[Comparison]:
    """Megabytes that an update of the most micro-batches needs beyond the base model, each in a fresh process."""
    given = json.dumps([problem.name, num_vectors, max(problem.passes)])

    def megabytes(side: str) -> float:
        return in_process(Path(__file__), "memory", side, given, threads=settings.threads)

    found = in_alternation({name: lambda name=name: megabytes(name) for name in (OURS, PEFT)}, settings.repeats)
    what = f"peak memory of training, {PEFT}: {problem.name}, {num_vectors} vectors"
    return [Comparison("vblora", what, "MB", found[OURS], found[PEFT], NO_MORE_MEMORY)]


def step_of(side: str, problem: Problem, num_vectors: int, passes: int, model: nn.Module) -> Callable[[], None]:
    """One update of a side, which changes the model in place: forward and backward passes, optimizer step."""
    torch.manual_seed(1)
    tokens = torch.randint(problem.shape.vocabulary, (problem.batch, problem.length))

    def backward() -> None:
        for _ in range(passes):
            model(input_ids=tokens, labels=tokens).loss.backward()

    if side == NOTHING:
        # something has to ask for a gradient, or there is no backward pass
        model.get_input_embeddings().register_forward_hook(lambda _module, _given, out: out.requires_grad_())
        return backward
    if side == OURS:
        before, after, groups = ours(problem, num_vectors, model)
    else:
        before, after, groups = peft(side, problem, num_vectors, model)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)

    def step() -> None:
        backward()
        before()
        optimizer.step()
        optimizer.zero_grad()
        after()

    return step


def ours(problem: Problem, num_vectors: int, model: nn.Module) -> tuple:
    """lowrank's, with the hooks that its loop calls."""
    cls = methods.get("vblora")
    method = cls(cls.Config(num_vectors=num_vectors, vector_length=str(problem.vector_length), rank=RANK))
    method.wrap(model)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for _, p in group["params"]], "lr": group["lr"]}
        for group in method.param_groups(model, [{"params": named, "role": "full"}])
    ]
    return lambda: method.before_step(model), lambda: method.after_step(model, 1), groups


def peft(side: str, problem: Problem, num_vectors: int, model: nn.Module) -> tuple:
    """PEFT's, both of its methods."""
    import peft as library

    common = {"task_type": "CAUSAL_LM", "r": RANK, "target_modules": LINEARS}
    if side == PEFT:
        config = library.VBLoRAConfig(**common, num_vectors=num_vectors, vector_length=problem.vector_length)
    else:
        config = library.LoraConfig(**common)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library.get_peft_model(model, config)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    kinds = {kind: [p for n, p in named if ("bank" in n) == (kind == "bank")] for kind in RATES}
    groups = [{"params": params, "lr": RATES[kind]} for kind, params in kinds.items() if params]
    return lambda: None, lambda: None, groups


def measure_memory() -> None:
    """The other end of `memory`."""
    side, (name, num_vectors, passes) = sys.argv[2], json.loads(sys.argv[3])
    problem = next(p for p in (STORIES, SMOLLM, TINY) if p.name == name)
    base = random_llama(problem.shape).requires_grad_(False)
    # libraries, threads and the kernels' own memory are there before the count begins
    probe(base)
    start = psutil.Process().memory_info().rss
    step = step_of(side, problem, num_vectors, passes, base)
    for _ in range(3):
        step()
    print(json.dumps((peak_resident_bytes() - start) / 1e6))


def probe(base: nn.Module) -> None:
    """A forward pass of a few tokens, and the import of the peer."""
    import peft as _  # noqa: F401

    with torch.no_grad():
        base(input_ids=torch.zeros(1, 8, dtype=torch.long))


if __name__ == "__main__":
    if sys.argv[1] == "memory":
        measure_memory()
    else:
        answer(compare)
