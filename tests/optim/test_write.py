"""How an update and weight decay become a weight: rounded once, in the mean the exact number, by one convention."""

import functools

import pytest
import torch

from lowrank_cli import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit
from lowrank_cli.methods.gradnormlorp.space import Normalised
from lowrank_cli.methods.velora.space import Factored
from lowrank_cli.optim import build
from lowrank_cli.optim.write import stochastic_round
from lowrank_cli.settings.training import OptimConfig

pytestmark = pytest.mark.numerical

SIZE, RANK, UPDATES, LR, DECAY = 64, 4, 2000, 2e-4, 0.5
KINDS = {
    "plain": {},
    "projected": {"rank": RANK, "update_proj_gap": 500, "scale": 1.0},
    "projected twice": {"rank": RANK, "update_proj_gap": 500, "scale": 1.0, "proj_type": "full"},
    "projected on the left": {"rank": RANK, "update_proj_gap": 500, "scale": 1.0, "proj_type": "left"},
    "normalised": {"rank": RANK, "update_proj_gap": 500, "scale": 1.0, "space": Normalised},
    "factored": {"space": Factored, "num_groups": 8},
}
RULES = {
    "adamw": GaLoreAdamW,
    "adamw8bit": functools.partial(GaLoreAdamW8bit, min_8bit_size=1),
    "adafactor": functools.partial(GaLoreAdafactor, relative_step=False, scale_parameter=False),
}


def trained(make, group: dict, dtype: torch.dtype, rounding: bool, **more) -> torch.Tensor:
    """A matrix of ones after UPDATES of the same gradients, whatever the dtype."""
    weight = torch.nn.Parameter(torch.ones(SIZE, SIZE, dtype=dtype))
    optimizer = make([{"params": [weight], **group}], lr=LR, weight_decay=DECAY, stochastic_rounding=rounding, **more)
    draw = torch.Generator().manual_seed(0)
    base = torch.randn(SIZE, RANK, generator=draw) @ torch.randn(RANK, SIZE, generator=draw)
    vector = torch.nn.functional.normalize(torch.randn(SIZE // 8, generator=draw), dim=0)
    for _ in range(UPDATES):
        if "num_groups" in group:
            optimizer.spaces[weight].vector = lambda: vector.to(dtype if dtype == torch.float64 else torch.float32)
            optimizer.spaces[weight].accumulate([(base[:, :8] + torch.randn(SIZE, 8, generator=draw)).to(dtype)])
        else:
            weight.grad = (base + torch.randn(SIZE, SIZE, generator=draw)).to(dtype)
        optimizer.step()
    return weight.detach().double()


# the rules write through the same lines: one of them here, the others in the long tests
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "rule", [rule if rule == "adamw" else pytest.param(rule, marks=pytest.mark.slow) for rule in RULES]
)
def test_rounded_at_random_the_mean_is_that_of_64_bits(rule, kind):
    exact = trained(RULES[rule], KINDS[kind], torch.float64, False)
    rounded = trained(RULES[rule], KINDS[kind], torch.bfloat16, True)
    # each update rounds by at most a spacing, 2^-8 below 1 and 2^-7 above: a walk of UPDATES steps, here in the mean
    # of all elements, and five standard deviations of it. Gradients of 16 bits turn a basis by as little as their
    # spacing, and codes of 8 bits add their own error to each update of LR
    walk = 5 * UPDATES**0.5 * 2**-7 / 2 / SIZE
    codes = 2**-5 * LR * UPDATES / 5 if rule == "adamw8bit" else 0.0
    assert abs(float((rounded - exact).mean())) < walk + codes + 2**-8
    # without it the decay alone, of 1e-4 an update, would be lost: 0.18 of the weights
    assert 5 * (walk + codes + 2**-8) < 1 - (1 - LR * DECAY) ** UPDATES


def test_decay_alone_is_not_lost_to_the_nearest_either():
    # 2^-6 an update is two spacings above 1/2
    weight = torch.nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16))
    optimizer = GaLoreAdamW([{"params": [weight], "rank": 2}], lr=2**-3, weight_decay=2**-3)
    for _ in range(20):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    assert float(weight.detach().double().mean()) == pytest.approx((1 - 2**-6) ** 20, rel=20 * 2**-9)


def test_roundings_follow_from_tensor_and_step_alone():
    weights = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        weight = torch.nn.Parameter(torch.ones(16, 16, dtype=torch.bfloat16))
        optimizer = GaLoreAdamW([weight], lr=1e-4, stochastic_rounding=True)
        before = torch.get_rng_state()
        for _ in range(3):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        assert torch.equal(torch.get_rng_state(), before)
        weights.append(weight.detach())
    assert torch.equal(*weights)
    assert len(weights[0].unique()) > 1


def test_stochastic_rounding_keeps_the_mean():
    noise = torch.Generator().manual_seed(0)
    exact = torch.full((200_000,), 1.0 + 2**-10)
    rounded = stochastic_round(exact, noise)
    assert set(rounded.float().unique().tolist()) == {1.0, 1.0 + 2**-7}
    assert float(rounded.double().mean()) == pytest.approx(1 + 2**-10, abs=2e-5)
    whole = torch.tensor([0.0, -1.5, 2.0])
    assert torch.equal(stochastic_round(whole, noise), whole.bfloat16())


def reference(weight: torch.Tensor, grads: list[torch.Tensor], lr: float, eps: float, decay: float) -> torch.Tensor:
    """torch.optim.AdamW's weight."""
    weight = torch.nn.Parameter(weight.clone())
    optimizer = torch.optim.AdamW([weight], lr=lr, eps=eps, weight_decay=decay)
    for grad in grads:
        weight.grad = grad.clone()
        optimizer.step()
    return weight.detach()


# at full rank, in the coordinates of the identity, a projected update is that of the whole gradient
@pytest.mark.parametrize(
    "tags", [{}, {"rank": 6, "scale": 1.0}, {"space": Factored, "num_groups": 2}], ids=["plain", "rank", "factored"]
)
@pytest.mark.parametrize("setting", [{}, {"per_layer": True}], ids=["whole", "per layer"])
def test_every_class_that_a_command_builds_has_the_adam_of_torch(tags, setting, monkeypatch):
    lr, eps, decay = 1e-2, 1e-1, 0.5
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(6, 6, dtype=torch.float64, generator=draw)
    factors = [torch.randn(6, 2, dtype=torch.float64, generator=draw) for _ in range(8)]
    vector = torch.nn.functional.normalize(torch.randn(3, dtype=torch.float64, generator=draw), dim=0)
    grads = [torch.kron(factor, vector[None]) for factor in factors]
    monkeypatch.setattr("lowrank_cli.optim.projected.find_basis", lambda *a, **k: torch.eye(6, dtype=torch.float64))
    weight = torch.nn.Parameter(start.clone())
    config = OptimConfig(lr=lr, eps=eps, kernel="torch", **setting)
    optimizer = build(config, [{"params": [("w", weight)], "weight_decay": decay, **tags}])
    for factor, grad in zip(factors, grads, strict=True):
        if "num_groups" in tags:
            optimizer.spaces[weight].vector = lambda: vector
            optimizer.spaces[weight].accumulate([factor])
        else:
            weight.grad = grad.clone()
        optimizer.step()
    expected = reference(start, grads, lr, eps, decay)
    assert float((weight.detach() - expected).norm() / (expected - start).norm()) < 1e-12
