"""Per-layer updates and projection inside backward, in GaLore's own settings: the same update, with less memory."""

from itertools import count
from pathlib import Path

import pytest
import torch
from double import BOUND, distance, use_double
from safetensors.torch import load_file
from watched import watch

GALORE = "--method galore --galore-rank 8 --galore-update-proj-gap 4 --max-steps 10 --batch-size 4"
PLAIN = f"{GALORE} --no-galore-in-backward"


@pytest.fixture
def flags(tiny_flags) -> list[str]:
    """Return the flags of a tiny run without those that a test's line gives."""
    pairs = zip(tiny_flags[:-1:2], tiny_flags[1::2], strict=True)
    return [f for pair in pairs if pair[0] not in ("--batch-size", "--save-every") for f in pair] + tiny_flags[-1:]


@pytest.fixture
def pretrain(lowrank, flags):
    """Pretrain a tiny model: returns what its file holds."""

    def call(line: str, out: str = "run") -> dict[str, torch.Tensor]:
        code, _, err = lowrank(f"pretrain {line} --out {out}", *flags)
        assert code == 0, err
        return load_file(Path(out, "model", "model.safetensors"))

    return call


@pytest.fixture
def apart(lowrank, flags, monkeypatch):
    """Train two lines in float64: returns how far apart they end, over how far the second has gone."""

    names = count()

    def call(line: str, other: str) -> float:
        seen = {}
        use_double(monkeypatch.setattr)
        for text in (line, other):
            seen[text] = {}
            with monkeypatch.context() as patch:
                watch(patch.setattr, seen[text])
                code, _, err = lowrank(f"pretrain {text} --out {next(names)}", *flags)
                assert code == 0, err
        return distance(seen[line]["end"], seen[other]["end"], seen[other]["start"])

    return call


# the contract's tests have the modes one by one
TOGETHER = "--per-layer --galore-in-backward"


@pytest.mark.parametrize(
    ("mode", "optimizer"),
    [
        pytest.param(mode, optimizer, marks=() if (mode, optimizer) == (TOGETHER, "adamw") else pytest.mark.slow)
        for mode in ("--per-layer", "--galore-in-backward", TOGETHER)
        for optimizer in ("adamw", "adamw8bit", "adafactor")
    ],
)
def test_every_mode_gives_the_plain_update(mode, optimizer, apart):
    rule = f"--optimizer {optimizer} --total-batch-size 16"
    assert apart(f"{PLAIN} {rule} {mode}", f"{PLAIN} {rule}".replace("--batch-size 4", "--batch-size 16")) < BOUND


@pytest.mark.parametrize(
    "proj_type", ["left", "full", *(pytest.param(t, marks=pytest.mark.slow) for t in ("std", "reverse_std", "right"))]
)
def test_every_side_in_backward_gives_the_plain_update(proj_type, apart):
    side = f"--galore-proj-type {proj_type} --total-batch-size 4"
    assert apart(f"{GALORE} {side} --galore-in-backward --batch-size 2", f"{PLAIN} {side}") < BOUND


@pytest.mark.parametrize("mode", ["--per-layer --galore-in-backward", pytest.param("", marks=pytest.mark.slow)])
def test_clipping_works_in_every_mode(mode, apart):
    free = f"{PLAIN} {mode}"
    assert apart(f"{free} --grad-clipping 1e6", free) < BOUND
    # an eps above the clipped gradients, so that Adam does not take the factor back
    assert apart(f"{free} --grad-clipping 1e-2 --eps 1e-3", f"{free} --eps 1e-3") > 0.1


@pytest.mark.parametrize(
    "line",
    [
        "--per-layer --optimizer adamw8bit --galore-stagger --galore-lazy-refresh",
        "--galore-in-backward --galore-refresh subspace --galore-moments rotate",
        "--per-layer --galore-refresh randomized --galore-moments reset --optimizer adafactor",
        "--dtype bfloat16 --stochastic-rounding --per-layer --galore-in-backward",
    ],
    ids=["8bit", "subspace", "adafactor", "bfloat16"],
)
def test_resumed_in_the_middle_of_a_gap_is_bit_identical(line, lowrank, pretrain):
    more = "--galore-update-proj-gap 5 --max-steps 14 --total-batch-size 8 --save-every 7"
    whole = pretrain(f"{GALORE} {more} {line}")
    code, _, err = lowrank("pretrain --resume run/checkpoints/step-000007")
    assert code == 0, err
    again = load_file("run/model/model.safetensors")
    assert all(whole[key].equal(again[key]) for key in whole)


def test_per_layer_holds_the_gradient_of_one_layer(monkeypatch, pretrain):
    from lowrank_cli.optim.gradients import Gradients

    held = []
    original = Gradients._complete

    def complete(self, space):
        held.append(sum(q.grad.numel() for q in self.parameters if q.grad is not None))
        return original(self, space)

    monkeypatch.setattr(Gradients, "_complete", complete)
    pretrain(f"{PLAIN} --per-layer")
    # the largest tensor is an embedding of 512 x 32; two projected 88 x 32 gradients would already show
    assert max(held) <= 512 * 32
    assert len(held) > 10 * 16


def test_in_backward_forms_no_full_gradient_between_refreshes(monkeypatch, pretrain):
    from lowrank_cli.optim.projected import Projected

    full, due = [], []
    original = Projected.gradient

    def gradient(self):
        (due if self.is_due else full).append(self.weight.grad is not None)
        return original(self)

    monkeypatch.setattr(Projected, "gradient", gradient)
    pretrain(f"{GALORE} --galore-in-backward")
    assert due
    assert all(due)
    assert full
    assert not any(full)


def test_staggered_refreshes_are_spread_over_the_gap(monkeypatch, pretrain):
    from lowrank_cli.optim.projected import Projected

    at = []
    original = Projected.refresh

    def refresh(self):
        if self.weight.device.type != "meta":  # where the estimate of memory carries out updates of its own
            at.append(self.state.get("step", 0))
        return original(self)

    monkeypatch.setattr(Projected, "refresh", refresh)
    pretrain(f"{GALORE} --galore-stagger --galore-update-proj-gap 7 --max-steps 8")
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
        if optimizer.spaces[weight].is_due:
            refreshes.append(step)
        weight.grad = grad.clone()
        optimizer.step()
    # still at 2 and 4, then every 4; still twice more, then every 8
    assert refreshes == [0, 2, 4, 8, 12, 20, 28]


def test_stochastic_rounding_moves_what_rounding_loses(pretrain):
    line = "--method galore --dtype bfloat16 --lr 2e-4 --max-steps 6 --batch-size 4"
    plain, rounded = pretrain(line, "plain"), pretrain(f"{line} --stochastic-rounding", "rounded")
    ones = torch.ones_like(plain["model.norm.weight"])
    assert torch.equal(plain["model.norm.weight"], ones)
    assert not torch.equal(rounded["model.norm.weight"], ones)
