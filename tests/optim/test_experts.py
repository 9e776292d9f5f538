"""Experts, (E, m, n): each is trained as it would be by itself."""

import copy

import pytest
import torch

from lowrank_cli import GaLoreAdamW, GaLoreAdamW8bit, methods
from lowrank_cli.methods.gradnormlorp.space import Normalised
from lowrank_cli.optim.projected import Projected

pytestmark = pytest.mark.numerical

SPACES = {
    "projected": Projected,
    "normalised": Normalised,
    **{name: methods.get(name)(methods.get(name).Config()).space() for name in ("fira", "apollo")},
}
# float64 with an eps of 1e-8: rounding is 1e-16, and Adam may make 1e-8 of that
BOUND = 1e-7


def trained(space, shape, experts, steps=7, dtype=torch.float64, optimizer=GaLoreAdamW, **more) -> torch.Tensor:
    """Train (E, m, n) for some steps: as one tensor, or every expert in a tensor of its own; returns (E, m, n)."""
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(3, *shape, dtype=torch.float64, generator=draw).to(dtype)
    weights = [start.clone()] if experts else [one.clone() for one in start]
    params = [torch.nn.Parameter(w) for w in weights]
    group = {"params": params, "rank": 4, "update_proj_gap": 3, "scale": 0.25, "space": space, "batched": True, **more}
    made = optimizer([group], lr=0.1, weight_decay=0.1)
    for space in made.spaces.values():
        # what a random projection is drawn from
        space.name = "weight"
    for step in range(steps):
        grads = torch.randn(3, *shape, dtype=torch.float64, generator=draw).to(dtype)
        # the last expert gets no token now and then, and none in the first update
        grads[2] *= step % 3 == 1
        for p, grad in zip(params, [grads] if experts else grads, strict=True):
            p.grad = grad.clone()
        made.step()
        made.zero_grad()
    return params[0].detach() if experts else torch.stack([p.detach() for p in params])


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)], ids=str)
@pytest.mark.parametrize("kind", SPACES)
def test_experts_are_trained_as_matrices_by_themselves(kind, shape):
    # an expert whose first gradients are zeros asks for a basis at every update, alone; here it is two steps long
    together, apart = (trained(SPACES[kind], shape, experts, steps=3) for experts in (True, False))
    assert (together[:2] - apart[:2]).norm() < BOUND * (
        together[:2] - trained(SPACES[kind], shape, True, 0)[:2]
    ).norm()


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)], ids=str)
@pytest.mark.parametrize("kind", SPACES)
def test_one_experts_numbers_are_nothing_to_another(kind, shape):
    draw = torch.Generator().manual_seed(1)
    ends = []
    for factor in (1.0, 1e3):
        weight = torch.nn.Parameter(torch.ones(2, *shape, dtype=torch.float64))
        made = GaLoreAdamW([{"params": [weight], "rank": 4, "space": SPACES[kind], "batched": True}], lr=0.1)
        for step in range(3):
            draw.manual_seed(step)
            weight.grad = torch.randn(2, *shape, dtype=torch.float64, generator=draw)
            weight.grad[1] *= factor if step else 1.0
            made.step()
        ends.append(weight.detach())
    assert ends[0][0].equal(ends[1][0])
    assert not ends[0][1].equal(ends[1][1])


@pytest.mark.parametrize("kind", SPACES)
def test_an_expert_without_tokens_stays_and_learns_later(kind):
    end, start = trained(SPACES[kind], (12, 20), True), trained(SPACES[kind], (12, 20), True, steps=0)
    once = trained(SPACES[kind], (12, 20), True, steps=1, optimizer=without_decay)
    assert torch.allclose(once[2], start[2], atol=1e-12)
    assert not torch.allclose(end[2], start[2], atol=1e-3)
    assert end.isfinite().all()


def without_decay(groups, lr, weight_decay):
    return GaLoreAdamW(groups, lr=lr)


@pytest.mark.parametrize("kind", SPACES)
def test_16_bits_rounded_at_random_follow_64_in_the_mean(kind):
    shape = (64, 96)
    rounded = trained(SPACES[kind], shape, True, dtype=torch.bfloat16, optimizer=at_random)
    exact, start = trained(SPACES[kind], shape, True), trained(SPACES[kind], shape, True, steps=0)
    moved = (exact - start).flatten()
    share = float((rounded.double() - start.to(torch.bfloat16).double()).flatten() @ moved / (moved @ moved))
    # gradients of 16 bits are 2^-9 off; the direction stays
    assert 0.95 < share < 1.05


def at_random(groups, lr, weight_decay):
    return GaLoreAdamW(groups, lr=lr, weight_decay=weight_decay, stochastic_rounding=True)


@pytest.mark.parametrize("optimizer", [GaLoreAdamW, GaLoreAdamW8bit])
@pytest.mark.parametrize("kind", SPACES)
def test_a_saved_state_goes_on_bit_for_bit(kind, optimizer):
    def step(weight, made, number):
        weight.grad = torch.randn(3, 64, 96, generator=torch.Generator().manual_seed(number))
        made.step()

    def make(weight):
        return optimizer([{"params": [weight], "rank": 8, "update_proj_gap": 3, "space": SPACES[kind],
                           "batched": True}], lr=0.1)  # fmt: skip

    weight = torch.nn.Parameter(torch.ones(3, 64, 96))
    made = make(weight)
    for number in range(4):
        step(weight, made, number)
    again = torch.nn.Parameter(weight.detach().clone())
    other = make(again)
    other.load_state_dict(copy.deepcopy(made.state_dict()))
    for number in range(4, 8):
        step(weight, made, number)
        step(again, other, number)
    assert again.equal(weight)


def test_tensors_of_three_dimensions_are_projected_in_every_mode_unless_they_are_a_batch():
    weight = torch.nn.Parameter(torch.ones(3, 12, 20))
    weight.grad = torch.randn(3, 12, 20, generator=torch.Generator().manual_seed(0))
    shapes = []
    for batched in (False, True):
        made = GaLoreAdamW([{"params": [weight], "rank": 2, "batched": batched}], lr=0.1)
        made.step()
        shapes.append(tuple(made.state[weight]["exp_avg"].shape))
    assert shapes == [(2, 2, 2), (3, 2, 20)]
