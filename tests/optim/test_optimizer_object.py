"""The optimizers as objects: groups added later, copies, pickles, state from elsewhere, hostile gradients."""

import copy
import io
import pickle

import pytest
import torch
from double import BOUND
from torch import nn

from lowrank_cli import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit
from lowrank_cli.optim.gradients import Gradients

MAKERS = {
    "adamw": lambda groups: GaLoreAdamW(groups, lr=1e-2),
    "adamw8bit": lambda groups: GaLoreAdamW8bit(groups, lr=1e-2, weight_decay=0.0, min_8bit_size=1),
    "adafactor": lambda groups: GaLoreAdafactor(groups, lr=1e-2, scale_parameter=False, relative_step=False),
}
every = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
pytestmark = pytest.mark.numerical


def step(model: nn.Module, optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()


@every
def test_a_group_added_later_is_projected_too(make):
    first, second = nn.Parameter(torch.randn(20, 32)), nn.Parameter(torch.randn(24, 32))
    optimizer = make([{"params": [first], "rank": 4}])
    optimizer.add_param_group({"params": [second], "rank": 4})
    for p in (first, second):
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert optimizer.state[second]["basis_left"].shape == (24, 4)
    with pytest.raises(ValueError, match="rank is 0"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.randn(4, 4))], "rank": 0})


@every
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
def test_a_copy_goes_on_as_the_original(make, duplicate):
    torch.manual_seed(0)
    model = nn.Linear(32, 20)
    optimizer = make([{"params": [model.weight], "rank": 4, "update_proj_gap": 3}, {"params": [model.bias]}])
    for i in range(4):
        step(model, optimizer, i)
    other, second = duplicate((model, optimizer))
    for i in range(4, 9):
        step(model, optimizer, i)
        step(other, second, i)
    assert torch.equal(model.weight, other.weight)
    assert torch.equal(model.bias, other.bias)


def test_loaded_state_brings_its_groups():
    weight = nn.Parameter(torch.randn(32, 20))
    left = GaLoreAdamW([{"params": [weight], "rank": 4, "proj_type": "left"}], lr=1e-2)
    weight.grad = torch.randn(32, 20)
    left.step()
    buffer = io.BytesIO()
    torch.save(left.state_dict(), buffer)
    buffer.seek(0)
    other = GaLoreAdamW([{"params": [weight], "rank": 4}], lr=1e-2)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    other.step()
    assert other.param_groups[0]["proj_type"] == "left"
    assert other.state[weight]["step"] == 2


@every
@pytest.mark.parametrize("scale", [1e25, 1e30])
def test_huge_gradients_neither_break_nor_freeze_a_projected_weight(make, scale):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.ones(20, 32))
    optimizer = make([{"params": [weight], "rank": 4, "update_proj_gap": 2}])
    for _ in range(3):
        weight.grad = torch.randn(20, 32) * scale
        before = weight.detach().clone()
        optimizer.step()
        assert torch.isfinite(weight).all()
        assert not torch.equal(weight, before)


@every
def test_a_gradient_of_another_layout_is_the_same_gradient(make):
    torch.manual_seed(0)
    a, b = (nn.Parameter(torch.ones(7, 5, dtype=torch.float64)) for _ in range(2))
    first, second = make([a]), make([b])
    for _ in range(3):
        grad = torch.randn(5, 7, dtype=torch.float64)
        a.grad, b.grad = grad.mT, grad.mT.contiguous()
        first.step()
        second.step()
    assert torch.allclose(a, b, rtol=0, atol=1e-12)


def test_a_gradient_of_zeros_leaves_the_refresh_due():
    weight = nn.Parameter(torch.ones(20, 32))
    optimizer = GaLoreAdamW([{"params": [weight], "rank": 4, "update_proj_gap": 100}], lr=1e-2)
    weight.grad = torch.zeros(20, 32)
    optimizer.step()
    assert optimizer.spaces[weight].is_due
    weight.grad = torch.randn(20, 32)
    optimizer.step()
    assert not optimizer.spaces[weight].is_due
    projected = optimizer.spaces[weight].bases()["left"].mT @ weight.grad
    assert float(projected.norm() ** 2) > 4 / 20 * float(weight.grad.norm() ** 2)


def test_galore_torchs_arguments_are_accepted_or_refused_by_name():
    weight = nn.Parameter(torch.ones(4, 4))
    GaLoreAdamW8bit([weight], 1e-3, (0.9, 0.999), 1e-8, 1e-2, False, 32, None, 4096, 100, True, False)
    with pytest.raises(ValueError, match="not supported"):
        GaLoreAdamW8bit([weight], amsgrad=True)


class Twice(nn.Module):
    """A linear that runs twice in one forward pass."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(16, 16, bias=False)

    def forward(self, x):
        return self.linear(torch.tanh(self.linear(x)))


class Both(Twice):
    """A weight that is used through its module and beside it."""

    def forward(self, x):
        return self.linear(x) + torch.nn.functional.linear(torch.tanh(x), self.linear.weight)


@pytest.mark.parametrize(("kind", "per_layer"), [(Twice, False), (Twice, True), (Both, False)])
def test_weights_that_are_used_twice(kind, per_layer):
    plain, ours = kind().double(), kind().double()
    start = plain.linear.weight.detach().clone()
    tags = {"rank": 4, "update_proj_gap": 3, "scale": 1.0}
    reference = GaLoreAdamW([{"params": [plain.linear.weight], **tags}], lr=1e-2)
    optimizer = GaLoreAdamW([{"params": [ours.linear.weight], **tags, "in_backward": True}], lr=1e-2)
    gradients = Gradients(ours, optimizer, per_layer=per_layer, clipping=0.0)
    for _ in range(6):
        x = torch.randn(5, 16, dtype=torch.float64)
        plain(x).square().sum().backward()
        reference.step()
        reference.zero_grad()
        gradients.begin(measuring=False)
        ours(x).square().sum().backward()
        gradients.step()
    a, b = ours.linear.weight.detach(), plain.linear.weight.detach()
    assert float((a - b).norm()) < BOUND * float((b - start).norm())
    assert optimizer.state[ours.linear.weight]["step"] == 6
    gradients.close()
    assert type(ours.linear) is nn.Linear
