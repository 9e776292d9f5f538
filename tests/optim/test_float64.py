"""Float64 weights are stepped in float64: moments, bases and arithmetic, against the papers' equations."""

import math

import pytest
import torch
from double import distance

from lowrank_cli import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit

pytestmark = pytest.mark.numerical

LR, DECAY, SCALE, RANK, GAP, EPS = 1e-2, 0.1, 0.25, 6, 20, 1e-3
# tall and wide, so that one is projected on the right and one on the left; a matrix and a vector that are not
PROJECTED = {"tall": (30, 20), "wide": (20, 30)}
PLAIN = {"matrix": (9, 7), "vector": (11,)}


def adam(state: dict, grad: torch.Tensor, step: int, *, eps_after_correction: bool) -> torch.Tensor:
    """Return Adam's direction, arXiv:1412.6980, with eps where galore-torch or bitsandbytes adds it."""
    state["m"] = 0.9 * state.get("m", 0) + 0.1 * grad
    state["v"] = 0.999 * state.get("v", 0) + 0.001 * grad**2
    mean, square = state["m"] / (1 - 0.9**step), state["v"] / (1 - 0.999**step)
    return mean / (square.sqrt() + (EPS if eps_after_correction else EPS / math.sqrt(1 - 0.999**step)))


def adafactor(state: dict, grad: torch.Tensor, step: int) -> torch.Tensor:
    """Return Adafactor's update, arXiv:1804.04235, Alg. 4 and 5, clipped to a root mean square of 1."""
    beta, square = 1 - step**-0.8, grad**2 + 1e-30
    if grad.dim() == 1:
        state["v"] = second = beta * state.get("v", 0) + (1 - beta) * square
    else:
        state["row"] = beta * state.get("row", 0) + (1 - beta) * square.mean(1)
        state["col"] = beta * state.get("col", 0) + (1 - beta) * square.mean(0)
        second = torch.outer(state["row"], state["col"]) / state["row"].mean()
    update = grad / second.sqrt()
    return update / max(1.0, float(update.square().mean().sqrt()))


ADAFACTOR = {"lr": LR, "weight_decay": DECAY, "scale_parameter": False, "relative_step": False}
# the optimizer, the rule, and whether decay comes before the update
RULES = {
    "adamw": (
        lambda groups: GaLoreAdamW(groups, lr=LR, eps=EPS, weight_decay=DECAY),
        lambda *args: adam(*args, eps_after_correction=False),
        False,
    ),
    # moments of so few elements are not quantized
    "adamw8bit": (
        lambda groups: GaLoreAdamW8bit(groups, lr=LR, eps=EPS, weight_decay=DECAY),
        lambda *args: adam(*args, eps_after_correction=True),
        False,
    ),
    "adafactor": (lambda groups: GaLoreAdafactor(groups, **ADAFACTOR), adafactor, True),
}


def random_weights() -> dict[str, torch.nn.Parameter]:
    torch.manual_seed(0)
    return {k: torch.nn.Parameter(torch.randn(s, dtype=torch.float64)) for k, s in (PROJECTED | PLAIN).items()}


def groups_of(weights: dict[str, torch.nn.Parameter]) -> list[dict]:
    tags = {"rank": RANK, "update_proj_gap": GAP, "scale": SCALE}
    return [{"params": [weights[k] for k in PROJECTED], **tags}, {"params": [weights[k] for k in PLAIN]}]


@pytest.mark.parametrize("rule", RULES)
def test_fifty_steps_equal_the_equations(rule):
    make, direction, decays_first = RULES[rule]
    weights = random_weights()
    start = {name: p.detach().clone() for name, p in weights.items()}
    exact, states, bases = {name: p.clone() for name, p in start.items()}, {name: {} for name in start}, {}
    optimizer = make(groups_of(weights))
    for step in range(1, 51):
        for name, p in weights.items():
            p.grad = torch.randn(p.shape, dtype=torch.float64)
            grad, tall = p.grad, name == "tall"
            if name in PROJECTED:
                if step % GAP == 1:
                    u, _, vh = torch.linalg.svd(grad, full_matrices=False)
                    bases[name] = vh[:RANK].mT if tall else u[:, :RANK]
                grad = grad @ bases[name] if tall else bases[name].mT @ grad
            update = direction(states[name], grad, step)
            if name in PROJECTED:
                update = SCALE * (update @ bases[name].mT if tall else bases[name] @ update)
            w = exact[name]
            exact[name] = (1 - LR * DECAY) * w - LR * update if decays_first else (1 - LR * DECAY) * (w - LR * update)
        optimizer.step()
    # sums of thirty products are off by 30 x 2^-53, over an eps of a thousandth
    assert distance({name: p.detach() for name, p in weights.items()}, exact, start) < 1e-12
    for state in optimizer.state.values():
        assert {v.dtype for v in state.values() if torch.is_tensor(v)} == {torch.float64}


def test_quantized_moments_move_float64_weights_by_a_float32_step():
    weights, narrow = random_weights(), {name: torch.nn.Parameter(p.detach().float()) for name, p in
                                         random_weights().items()}  # fmt: skip
    start = {name: p.detach().clone() for name, p in weights.items()}
    runs = [
        GaLoreAdamW8bit(groups_of(w), lr=LR, eps=EPS, weight_decay=DECAY, min_8bit_size=1) for w in (weights, narrow)
    ]
    for name, p in weights.items():
        p.grad = torch.randn(p.shape, dtype=torch.float64)
        narrow[name].grad = p.grad.float()
    for optimizer in runs:
        optimizer.step()
    # the update is float32's, and the float32 weights round their sum: 2^-24 of 4, over a step of 1e-3 and more
    got, wanted = ({name: p.detach().double() for name, p in w.items()} for w in (weights, narrow))
    assert distance(got, wanted, start) < 4 * 2**-24 / 1e-3
    for name, p in weights.items():
        assert not torch.equal(p, p.float().double())
        kinds = {key: v.dtype for key, v in runs[0].state[p].items() if torch.is_tensor(v)}
        assert kinds.pop("exp_avg") == kinds.pop("exp_avg_sq") == torch.uint8
        assert kinds.pop("exp_avg_scale") == kinds.pop("exp_avg_sq_scale") == torch.float32
        assert set(kinds.values()) == ({torch.float64} if name in PROJECTED else set())
