"""A basis found by each engine against `torch.linalg.svd` as galore-torch calls it, on real gradients: time, energy.

A LLaMA of 60M's layer shapes, two layers deep, is trained on the standard library's text with AdamW, one thread. The
gradients are those of its last layer at the end. The engines start from a basis of the gradient some updates before,
found by a cold `subspace`; only that engine iterates from it, the other two turn their basis towards it, as they do at
every refresh but the first. Energy is the share of the squared singular values of the gradient that a basis captures,
relative to the r largest ones. The bar on the speed is for one engine a shape, the fastest of those that reach the bar
on the energy.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from comparison import Bar, Comparison, Settings, answer, console, in_alternation
from galore_torch.galore_projector import GaLoreProjector
from torch import Tensor
from trainers import beginning

from lowrank_cli.models import load as models
from lowrank_cli.models.forward import causal_lm_loss
from lowrank_cli.optim.projection import sides
from lowrank_cli.optim.refresh import ENGINES, find_basis

FASTER, ENERGY = Bar(10.0), Bar(0.98)
LAYERS = 2
# the shapes of a LLaMA's layer: square, tall, wide
TENSORS = ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
# seconds that the calls of one measurement take together, at least
LONG_ENOUGH = 0.1


@dataclass(frozen=True)
class Case:
    """A real gradient, (m, n), and the basis of an earlier one of the same tensor."""

    name: str
    grad: Tensor
    side: str
    old: Tensor
    rank: int


def compare(settings: Settings) -> list[Comparison]:
    """Every engine on every shape."""
    torch.set_num_threads(1)
    rows = []
    for case in cases(settings):
        m, n = case.grad.shape
        kept = float(energy(case.grad, case.old, case.side) / best_energy(case.grad, case.rank))
        console.print(f"refresh: {m} x {n} ({case.name}), the old basis holds {kept:.3f} of the energy")
        rows += compare_case(case, settings.repeats)
    return rows


def problem(settings: Settings, folder: str) -> dict:
    """What is trained, in the words of `trainers.py`; `warmup` is where the old basis comes from."""
    smoke = settings.smoke
    return {
        "folder": folder,
        "model": "llama-9m" if smoke else "llama-60m",
        "batch_size": 2 if smoke else 4,
        "max_length": 32 if smoke else 256,
        "vocab_size": 512 if smoke else 4096,
        "warmup": 1 if smoke else 5,
        "timed": settings.steps or (1 if smoke else 20),
        "smoke": smoke,
        "rank": 32 if smoke else 128,
        "lr": 1e-3,
        "min_lr_ratio": 0.1,
    }


def cases(settings: Settings) -> list[Case]:
    """Gradients of a model in training."""
    with tempfile.TemporaryDirectory(prefix="lowrank-bench-") as folder:
        given = problem(settings, folder)
        rank, total = given["rank"], given["warmup"] + given["timed"]
        console.print(f"refresh: {total} updates of a two-layer model, bases from update {given['warmup']}")
        run, batches, architecture = beginning(given)
        architecture.num_hidden_layers = LAYERS
        model = models.load(run.model, config=architecture, dtype=torch.float32, device="cpu", seed=0, offline=True)
        layer = model.model.layers[-1]
        weights = {name: layer.get_submodule(name).weight for name in TENSORS}
        # each is ("left",) or ("right",)
        wanted = {name: sides(weight.shape, "std")[0] for name, weight in weights.items()}
        optimizer = torch.optim.AdamW(model.parameters(), lr=given["lr"], weight_decay=0.0, fused=True)
        old: dict[str, Tensor] = {}
        for step in range(1, total + 1):
            optimizer.zero_grad()
            loss = sum(causal_lm_loss(model, batch) for batch in batches.train.next_update())
            loss.backward()
            if step == given["warmup"]:
                old = {name: find_basis(w.grad, rank, wanted[name], "subspace") for name, w in weights.items()}
            if step < total:
                optimizer.step()
        console.print(f"refresh: the loss is {float(loss):.2f}")
        return [Case(name, w.grad.clone(), wanted[name], old[name], rank) for name, w in weights.items()]


def compare_case(case: Case, repeats: int) -> list[Comparison]:
    """One gradient: seconds a basis for each engine, all in turn, and the energy that each captures."""
    projector = GaLoreProjector(case.rank)
    calls: dict[str, Callable[[], Tensor]] = {
        "svd": lambda: projector.get_orthogonal_matrix(case.grad, case.rank, type=case.side),
        **{
            engine: lambda engine=engine: find_basis(case.grad, case.rank, case.side, engine, case.old)
            for engine in ENGINES
            if engine != "svd"
        },
    }
    exact = calls["svd"]()
    exact = exact.mT if case.side == "right" else exact
    best = best_energy(case.grad, case.rank)
    shares = {"svd": float(energy(case.grad, exact, case.side) / best)}
    for engine in list(calls)[1:]:
        shares[engine] = float(energy(case.grad, calls[engine](), case.side) / best)
    times = in_alternation({name: lambda call=call: seconds(call) for name, call in calls.items()}, repeats)
    good = [engine for engine in list(calls)[1:] if ENERGY.met(shares[engine] / shares["svd"])]
    fastest = min(good, key=lambda engine: statistics.median(times[engine]), default=None)
    m, n = case.grad.shape
    rows = []
    for engine in list(calls)[1:]:
        what = f"{engine}, full SVD: {m} x {n}, rank {case.rank}"
        speeds = [[1 / t for t in times[name]] for name in (engine, "svd")]
        shared = [[100 * shares[name]] * repeats for name in (engine, "svd")]
        rows += [
            Comparison("refresh", f"speed, {what}", "/s", *speeds, FASTER if engine == fastest else None),
            Comparison("refresh", f"energy, {what}", "%", *shared, ENERGY),
        ]
    return rows


def energy(grad: Tensor, basis: Tensor, side: str) -> Tensor:
    """The squared norm of the projected gradient, in float64."""
    grad, basis = grad.double(), basis.double()
    return (basis.mT @ grad if side == "left" else grad @ basis).square().sum()


def best_energy(grad: Tensor, rank: int) -> Tensor:
    """The most that `rank` directions can capture."""
    return torch.linalg.svdvals(grad.double())[:rank].square().sum()


def seconds(call: Callable[[], object]) -> float:
    """How long a call takes: the median of as many as make a measurement long enough."""
    times: list[float] = []
    while sum(times) < LONG_ENOUGH:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


if __name__ == "__main__":
    answer(compare)
