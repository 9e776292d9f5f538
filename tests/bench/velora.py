"""VeLoRA's linear against the form that rebuilds its input, against a plain linear, and a run against checkpointing.

The layer is the down projection of LLaMA-60M, float32, on a random input of 16 sequences of 256 tokens; only backward
is timed, with the input's gradient in it. "Rebuilding" is Alg. 1 of arXiv:2405.17991 as it stands: X^ = zp v^T in
full, then dY^T X^. "For each sample" is what the authors' code does: such a product for every sequence, then their
sum. All sides are given the same compressed input, and the first three must agree.

The runs are `lowrank pretrain` in processes of their own, as in `end_to_end`: every side against `--method full`.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from comparison import Bar, Comparison, Settings, answer, console, in_alternation, in_process
from end_to_end import QUANTITIES, problem
from torch import Tensor, nn

from lowrank_cli import GaLoreAdamW
from lowrank_cli.methods.velora.linear import compress, velora_linear
from lowrank_cli.methods.velora.space import Factored

TRAINERS = Path(__file__).with_name("trainers.py")
# out, in, groups: LLaMA-60M's down projection with the authors' 86 groups of 16 features
LAYER, TINY = (512, 1376, 86), (64, 176, 11)
BATCH, LENGTH = 16, 256
OURS, REBUILT, SAMPLES, PLAIN = "ours", "rebuilding the input", "rebuilding, for each sample", "plain linear"
# what is run against `--method full`: its name, and its flags
RUNS = {
    "velora": ["--method", "velora"],
    "velora, every linear": ["--method", "velora", "--velora-layers", "qkvogud"],
    "full --activation-checkpointing": ["--method", "full", "--activation-checkpointing"],
}


def compare(settings: Settings) -> list[Comparison]:
    """The layer's rows, then those of whole runs."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return layer_rows(settings) + run_rows(settings)


# ---- the layer


class Rebuilding(torch.autograd.Function):
    """x W^T whose backward rebuilds the input from its compressed form: shapes as in `ops.velora_linear`."""

    @staticmethod
    def forward(ctx, x, weight, kept, vector, each):
        ctx.save_for_backward(kept, weight, vector)
        ctx.each = each
        return nn.functional.linear(x, weight)

    @staticmethod
    def backward(ctx, dy):
        kept, weight, vector = ctx.saved_tensors
        rebuilt = (kept.unsqueeze(-1) * vector).flatten(-2)  # (B, T, D)
        grad = (dy.mT @ rebuilt).sum(0) if ctx.each else dy.flatten(0, 1).mT @ rebuilt.flatten(0, 1)
        return dy @ weight, grad, None, None, None


def layer_rows(settings: Settings) -> list[Comparison]:
    """Backward of one layer in each form; what it keeps, and what its optimizer does."""
    m, n, groups = TINY if settings.smoke else LAYER
    length = 16 if settings.smoke else LENGTH
    weight = nn.Parameter(torch.randn(m, n) * 0.02)
    x, dy = torch.randn(BATCH, length, n), torch.randn(BATCH, length, m) / (BATCH * length)
    vector = nn.functional.normalize(x.reshape(-1, n // groups).mean(0), dim=0)
    kept = compress(x, vector)  # (B, T, G)
    leaf = torch.zeros((), dtype=torch.float32).expand(m, groups).requires_grad_()

    def forward(side: str, x: Tensor) -> Tensor:
        if side == OURS:
            return velora_linear(x, weight, None, kept, vector, 1.0, leaf)
        if side == PLAIN:
            return nn.functional.linear(x, weight)
        return Rebuilding.apply(x, weight, kept, vector, side == SAMPLES)

    def seconds(side: str) -> float:
        weight.grad = leaf.grad = None
        y = forward(side, x.detach().requires_grad_())
        start = time.perf_counter()
        y.backward(dy)
        return time.perf_counter() - start

    sides = (OURS, REBUILT, SAMPLES, PLAIN)
    grads = {}
    for side in sides:
        seconds(side)
        grads[side] = weight.grad if side != OURS else (leaf.grad.unsqueeze(-1) * vector).flatten(1)
    for side in (REBUILT, SAMPLES):
        if not torch.allclose(grads[side], grads[OURS], atol=1e-5 * float(grads[OURS].abs().max())):
            raise RuntimeError(f"the gradient of {side} is another one")
    steps = settings.steps or (2 if settings.smoke else 20)
    console.print(f"velora: backward, {settings.repeats} x {steps} of {len(sides)} sides")
    calls = {side: lambda side=side: sum(seconds(side) for _ in range(steps)) / steps for side in sides}
    times = in_alternation(calls, settings.repeats)
    name = f"{m} x {n}, {BATCH * length:,} tokens, {groups} groups"

    def speed(peer: str, bar: Bar) -> Comparison:
        rates = ([1 / t for t in times[side]] for side in (OURS, peer))
        return Comparison("velora", f"speed of backward, {peer}: {name}", "1/s", *rates, bar)

    saved = {side: saved_bytes(lambda side=side: forward(side, x.detach().requires_grad_()), weight) for side in sides}
    states = [state_bytes(weight, groups, vector), 8 * weight.numel()]
    eighth = Bar(0.125, at_most=True)
    return [
        speed(REBUILT, Bar(2.0)),
        speed(SAMPLES, Bar(2.0)),
        speed(PLAIN, Bar(1.0)),
        Comparison(
            "velora", f"kept for backward, {PLAIN}: {name}", "KiB", [saved[OURS] / 1024], [saved[PLAIN] / 1024], eighth
        ),
        Comparison(
            "velora", f"optimizer state, AdamW: {m} x {n}", "KiB", [states[0] / 1024], [states[1] / 1024], eighth
        ),
    ]


def saved_bytes(forward: Callable[[], Tensor], weight: Tensor) -> int:
    """Bytes of what a forward pass keeps for backward, without the weight."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() != weight.untyped_storage().data_ptr():
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(sizes.values())


def state_bytes(weight: nn.Parameter, groups: int, vector: Tensor) -> int:
    """Bytes that our optimizer holds for the layer after a step."""
    optimizer = GaLoreAdamW([{"params": [weight], "space": Factored, "num_groups": groups}], lr=0.0)
    optimizer.spaces[weight].vector = lambda: vector
    optimizer.spaces[weight].accumulate([torch.randn(weight.shape[0], groups)])
    optimizer.step()
    tensors = [value for value in optimizer.state[weight].values() if isinstance(value, Tensor)]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


# ---- whole runs


def run_rows(settings: Settings) -> list[Comparison]:
    """Speed and memory of `lowrank pretrain` with less kept for backward, each way against `--method full`."""
    with tempfile.TemporaryDirectory(prefix="lowrank-bench-") as folder:
        common = {**problem(settings, folder), "lr": 0.003}
        common |= {} if settings.smoke or settings.steps else {"timed": 10}
        environment = {"LOWRANK_CACHE": f"{folder}/cache"} if settings.smoke else {}

        def call(role: str, flags: list[str]) -> dict:
            arguments = json.dumps({**common, "method": flags[1], "flags": flags[2:]})
            return in_process(TRAINERS, role, arguments, threads=settings.threads, environment=environment)

        full = ["--method", "full"]
        call("prepare", full)
        console.print(f"velora: {settings.repeats} x {len(RUNS) + 1} runs of {common['model']}")
        sides = {"full": full, **RUNS}
        calls = {name: lambda flags=flags: call("lowrank", flags) for name, flags in sides.items()}
        results = in_alternation(calls, settings.repeats)
    return [
        Comparison(
            "velora",
            f"{label}: {common['model']}, {name}, full",
            unit,
            *([run[key] / factor for run in results[side]] for side in (name, "full")),
        )
        for name in RUNS
        for label, (key, unit, factor) in QUANTITIES.items()
    ]


if __name__ == "__main__":
    answer(compare)
