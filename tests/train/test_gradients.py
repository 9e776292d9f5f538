"""Per-layer updates and projection inside backward: the same weights as the ordinary way, with less memory."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


def weights(run: str, folder: str = "model") -> dict[str, torch.Tensor]:
    return load_file(Path(run, folder, "model.safetensors"))


def assert_same_training(a: str, b: str, quantized: bool = False) -> None:
    """Equal to rounding at the first projected update; ten updates of Adam and two refreshes later, nearly so."""
    second = "checkpoints/step-000002"
    assert largest_difference(weights(a, second), weights(b, second)) < (1e-3 if quantized else 1e-6)
    assert largest_difference(weights(a), weights(b)) < (5e-3 if quantized else 2e-5)


def largest_difference(a: dict, b: dict) -> float:
    return max(float((a[k].double() - b[k].double()).norm() / b[k].double().norm()) for k in b)


def run(lowrank, out: str, flags: list[str], *more: object) -> dict[str, torch.Tensor]:
    code, _, err = lowrank("pretrain", *flags, *more, "--out", out)
    assert code == 0, err
    return weights(out)


# Adam normalises entries that hold nothing but rounding; an eps over those keeps the comparison about the method
GALORE = [
    "--method",
    "galore",
    "--galore-rank",
    8,
    "--galore-update-proj-gap",
    4,
    "--eps",
    1e-3,
    "--max-steps",
    10,
    "--save-every",
    2,
    "--keep",
    9,
]


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "adafactor"])
@pytest.mark.parametrize("mode", [["--per-layer"], ["--galore-in-backward"], ["--per-layer", "--galore-in-backward"]])
@pytest.mark.parametrize("batch", [16, 4, 1])
def test_every_mode_gives_the_plain_update(optimizer, mode, batch, lowrank, tiny_flags):
    flags = [*tiny_flags, *GALORE, "--optimizer", optimizer, "--total-batch-size", 16]
    run(lowrank, "plain", flags, "--no-galore-in-backward", "--batch-size", 16)
    run(lowrank, "other", flags, "--no-galore-in-backward", *mode, "--batch-size", batch)
    assert_same_training("other", "plain", quantized=optimizer == "adamw8bit")
    losses = [
        [m["loss"] for m in map(json.loads, Path(out, "metrics.jsonl").read_text().splitlines()) if "loss" in m]
        for out in ("plain", "other")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right", "full"])
def test_every_side_in_backward_gives_the_plain_update(proj_type, lowrank, tiny_flags):
    flags = [*tiny_flags, *GALORE, "--galore-proj-type", proj_type]
    run(lowrank, "plain", flags, "--no-galore-in-backward")
    run(lowrank, "other", flags, "--galore-in-backward", "--batch-size", 2, "--total-batch-size", 4)
    assert_same_training("other", "plain")


@pytest.mark.parametrize("mode", [["--per-layer"], ["--galore-in-backward"], []])
def test_clipping_works_in_every_mode(mode, lowrank, tiny_flags):
    flags = [*tiny_flags, *GALORE, "--no-galore-in-backward", *mode]
    free = run(lowrank, "free", flags)
    loose = run(lowrank, "loose", flags, "--grad-clipping", 1e6)
    tight = run(lowrank, "tight", flags, "--grad-clipping", 1e-2, "--eps", 1e-3)
    assert largest_difference(loose, free) < 1e-5
    assert largest_difference(tight, free) > 1e-2


def test_full_per_layer_is_full(lowrank, tiny_flags):
    flags = [*tiny_flags, "--max-steps", 10, "--eps", 1e-12]
    plain = run(lowrank, "plain", flags)
    other = run(lowrank, "other", flags, "--per-layer", "--batch-size", 2, "--total-batch-size", 4)
    assert largest_difference(other, plain) < 1e-3


@pytest.mark.parametrize(
    "flags",
    [
        ["--per-layer", "--optimizer", "adamw8bit", "--galore-stagger", "--galore-lazy-refresh"],
        ["--galore-in-backward", "--galore-refresh", "subspace", "--galore-moments", "rotate"],
        ["--per-layer", "--galore-refresh", "randomized", "--galore-moments", "reset", "--optimizer", "adafactor"],
        ["--dtype", "bfloat16", "--stochastic-rounding", "--per-layer", "--galore-in-backward"],
    ],
    ids=["8bit", "subspace", "adafactor", "bfloat16"],
)
def test_resumed_in_the_middle_of_a_gap_is_bit_identical(flags, lowrank, tiny_flags):
    flags = [*tiny_flags, "--method", "galore", "--galore-rank", 8, "--galore-update-proj-gap", 5, "--max-steps", 14,
             "--total-batch-size", 8, "--save-every", 7, *flags]  # fmt: skip
    whole = run(lowrank, "whole", flags)
    code, _, err = lowrank("pretrain", "--resume", "whole/checkpoints/step-000007")
    assert code == 0, err
    again = weights("whole")
    assert all(whole[key].equal(again[key]) for key in whole)


def test_per_layer_holds_the_gradient_of_one_layer(monkeypatch, lowrank, tiny_flags):
    from lowrank_cli.optim.gradients import Gradients

    held = []
    original = Gradients._complete

    def complete(self, p):
        held.append(sum(q.grad.numel() for q in self.groups if q.grad is not None))
        return original(self, p)

    monkeypatch.setattr(Gradients, "_complete", complete)
    run(lowrank, "run", [*tiny_flags, *GALORE, "--per-layer", "--no-galore-in-backward"])
    # the largest tensor is an embedding of 512 x 32; two projected 88 x 32 gradients would already show
    assert max(held) <= 512 * 32
    assert len(held) > 10 * 16


def test_in_backward_forms_no_full_gradient_between_refreshes(monkeypatch, lowrank, tiny_flags):
    from lowrank_cli.optim.base import ProjectedOptimizer

    full, due = [], []
    original = ProjectedOptimizer._step_projected

    def step(self, p, group):
        (due if self.is_due(p) else full).append(p.grad is not None)
        return original(self, p, group)

    monkeypatch.setattr(ProjectedOptimizer, "_step_projected", step)
    run(lowrank, "run", [*tiny_flags, *GALORE, "--galore-in-backward"])
    assert due
    assert all(due)
    assert full
    assert not any(full)


def test_staggered_refreshes_are_spread_over_the_gap(monkeypatch, lowrank, tiny_flags):
    from lowrank_cli.optim.base import ProjectedOptimizer

    at = []
    original = ProjectedOptimizer._refresh

    def refresh(self, p, state, group):
        if p.device.type != "meta":  # where the estimate of memory carries out updates of its own
            at.append(state.get("step", 0))
        return original(self, p, state, group)

    monkeypatch.setattr(ProjectedOptimizer, "_refresh", refresh)
    run(lowrank, "run", [*tiny_flags, *GALORE, "--galore-stagger", "--galore-update-proj-gap", 7, "--max-steps", 8])
    # 14 matrices: all at the first update, then two at each of seven
    assert [at.count(step) for step in range(8)] == [14, 2, 2, 2, 2, 2, 2, 2]


def test_lazy_refresh_doubles_the_gap_of_a_still_basis():
    from lowrank_cli import GaLoreAdamW

    torch.manual_seed(0)
    grad = torch.outer(torch.randn(20), torch.randn(30))
    weight = torch.nn.Parameter(torch.randn(20, 30))
    optimizer = GaLoreAdamW([{"params": [weight], "rank": 1, "update_proj_gap": 2, "lazy_refresh": True}], lr=1e-3)
    refreshes = []
    for step in range(40):
        if optimizer.is_due(weight):
            refreshes.append(step)
        weight.grad = grad.clone()
        optimizer.step()
    # still at 2 and 4, then every 4; still twice more, then every 8
    assert refreshes == [0, 2, 4, 8, 12, 20, 28]


def test_stochastic_rounding_keeps_the_mean():
    from lowrank_cli.optim.projection import stochastic_round

    torch.manual_seed(0)
    exact = torch.full((200_000,), 1.0 + 2**-10)
    rounded = stochastic_round(exact)
    assert set(rounded.float().unique().tolist()) == {1.0, 1.0 + 2**-7}
    assert float(rounded.double().mean()) == pytest.approx(1 + 2**-10, abs=2e-5)
    assert torch.equal(stochastic_round(torch.tensor([0.0, -1.5, 2.0])), torch.tensor([0.0, -1.5, 2.0]).bfloat16())


def test_stochastic_rounding_moves_what_rounding_loses(lowrank, tiny_flags):
    flags = [*tiny_flags, "--method", "galore", "--dtype", "bfloat16", "--lr", 2e-4, "--max-steps", 6]
    plain = run(lowrank, "plain", flags)
    rounded = run(lowrank, "rounded", flags, "--stochastic-rounding")
    ones = torch.ones_like(plain["model.norm.weight"])
    assert torch.equal(plain["model.norm.weight"], ones)
    assert not torch.equal(rounded["model.norm.weight"], ones)
