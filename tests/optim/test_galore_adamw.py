"""GaLoreAdamW against galore-torch, against Adam in a rotated basis, and through save and load."""

import copy
import io

import pytest
import torch
from double import BOUND, exact_norm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lowrank_cli import GaLoreAdamW

pytestmark = pytest.mark.numerical

# float64, and an eps of 1e-6 that rounding of 1e-16 is divided by
EXACT = 1e-9


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_fifty_steps_equal_galore_torch_on_the_same_gradients(weight_decay, pair, galore_groups, reference):
    settings = {"lr": 1e-3, "weight_decay": weight_decay}
    ours = GaLoreAdamW(galore_groups(pair.ours), **settings)
    pair.run(ours, reference("GaLoreAdamW", galore_groups(pair.theirs), **settings), 50)
    assert pair.distance() < EXACT


def test_fifty_steps_of_training_follow_galore_torch(pair, galore_groups, reference, loss_of, monkeypatch):
    # each side trains on its own gradients, so rounding feeds back through five refreshes
    monkeypatch.setattr(LlamaRMSNorm, "forward", exact_norm)
    ours = GaLoreAdamW(galore_groups(pair.ours), lr=1e-3)
    theirs = reference("GaLoreAdamW", galore_groups(pair.theirs), lr=1e-3)
    for step in range(50):
        for model, optimizer in ((pair.ours, ours), (pair.theirs, theirs)):
            loss_of(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert pair.distance() < BOUND


def test_full_rank_with_scale_one_is_adam_in_a_rotated_basis():
    grads = [normal(63, 40, seed=step) for step in range(20)]
    weight = torch.nn.Parameter(normal(63, 40, seed=99))
    start = weight.detach().clone()
    optimizer = GaLoreAdamW([{"params": [weight], "rank": 40, "update_proj_gap": 1000, "scale": 1.0}], lr=0.01, eps=0)
    rotation = torch.linalg.svd(grads[0], full_matrices=False).Vh.mT  # (n, n)
    rotated = torch.nn.Parameter(start @ rotation)
    reference = torch.optim.AdamW([rotated], lr=0.01, eps=0, weight_decay=0.0)
    for grad in grads:
        weight.grad, rotated.grad = grad, grad @ rotation
        optimizer.step()
        reference.step()
    assert float((weight - rotated @ rotation.mT).detach().norm()) < EXACT * float((weight - start).detach().norm())


def test_groups_without_rank_are_plain_adamw():
    """With torch's convention eps and decay stand where torch.optim.AdamW has them."""
    ours, theirs = (torch.nn.Parameter(normal(7, 5)) for _ in range(2))
    settings = {"lr": 0.01, "eps": 0.1, "weight_decay": 0.1}
    a, b = GaLoreAdamW([ours], convention="torch", **settings), torch.optim.AdamW([theirs], **settings)
    for step in range(10):
        ours.grad = theirs.grad = normal(7, 5, seed=step)
        a.step()
        b.step()
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-14)


def test_keeps_float32_moments_for_bfloat16_weights():
    weight, bias = torch.nn.Parameter(torch.randn(32, 24).bfloat16()), torch.nn.Parameter(torch.randn(32).bfloat16())
    optimizer = GaLoreAdamW([{"params": [weight], "rank": 8}, {"params": [bias]}], lr=0.01)
    weight.grad, bias.grad = torch.randn_like(weight), torch.randn_like(bias)
    optimizer.step()
    assert optimizer.state[weight]["exp_avg"].dtype == torch.float32
    assert optimizer.state[bias]["exp_avg_sq"].dtype == torch.float32
    assert optimizer.state[weight]["basis_right"].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_inside_a_gap_continues_bit_for_bit(dtype, small_llama, galore_groups, loss_of):
    def run(model, optimizer, steps):
        for step in steps:
            loss_of(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()

    whole = small_llama().to(dtype)
    optimizer = GaLoreAdamW(galore_groups(whole, gap=4), lr=1e-3)
    run(whole, optimizer, range(6))
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    resumed = copy.deepcopy(whole)
    run(whole, optimizer, range(6, 11))
    buffer.seek(0)
    second = GaLoreAdamW(galore_groups(resumed, gap=4), lr=1e-3)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    run(resumed, second, range(6, 11))
    for p, q in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)


def test_state_bytes_are_the_papers_formula():
    m, n, r = 100, 63, 16
    weight = torch.nn.Parameter(torch.randn(m, n))
    optimizer = GaLoreAdamW([{"params": [weight], "rank": r}], lr=0.01)
    weight.grad = torch.randn(m, n)
    optimizer.step()
    held = sum(v.untyped_storage().nbytes() for v in optimizer.state[weight].values() if torch.is_tensor(v))
    # Table 1 with m as the shorter side: m r + 2 n r
    assert held == (n * r + 2 * m * r) * 4


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": 4, "update_proj_gap": 0}, "update_proj_gap is 0"),
        ({"rank": 4, "proj_type": "sideways"}, "proj_type is 'sideways'"),
    ],
)
def test_a_wrong_group_is_refused(group, message):
    with pytest.raises(ValueError, match=message):
        GaLoreAdamW([{"params": [torch.nn.Parameter(torch.zeros(4, 4))], **group}])


def test_a_vector_cannot_be_projected():
    with pytest.raises(ValueError, match=r"shape \(4,\)"):
        GaLoreAdamW([{"params": [torch.nn.Parameter(torch.zeros(4))], "rank": 2}])
