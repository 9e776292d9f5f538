"""GaLoreAdamW against galore-torch, against Adam in a rotated basis, and through save and load."""

import copy
import io
import warnings

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lowrank_cli import GaLoreAdamW


def small_llama(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=100,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config)


def galore_groups(model, rank=12, gap=10, scale=0.25):
    projected = [p for name, p in model.named_parameters() if ("attn" in name or "mlp" in name) and p.dim() == 2]
    ids = {id(p) for p in projected}
    plain = [p for p in model.parameters() if id(p) not in ids]
    return [
        {"params": plain},
        {"params": projected, "rank": rank, "update_proj_gap": gap, "scale": scale, "proj_type": "std"},
    ]


def reference_optimizer(groups, **kwargs):
    from galore_torch import GaLoreAdamW as Reference

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Reference(groups, no_deprecation_warning=True, **kwargs)


def train_step(model, step):
    tokens = torch.randint(0, 97, (4, 32), generator=torch.Generator().manual_seed(step))
    model(input_ids=tokens, labels=tokens).loss.backward()


def relative_difference(a, b):
    return max(float((p - q).norm() / q.norm()) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_fifty_steps_equal_galore_torch_on_the_same_gradients(weight_decay):
    ours, theirs = small_llama(), small_llama()
    a = GaLoreAdamW(galore_groups(ours), lr=1e-3, weight_decay=weight_decay)
    b = reference_optimizer(galore_groups(theirs), lr=1e-3, weight_decay=weight_decay)
    start = copy.deepcopy(theirs)
    for step in range(50):
        train_step(theirs, step)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad = q.grad.clone()
        a.step()
        b.step()
        b.zero_grad()
    assert relative_difference(start, theirs) > 1e-2
    assert relative_difference(ours, theirs) < 1e-6


def test_fifty_steps_of_training_follow_galore_torch():
    # each side trains on its own gradients, so rounding feeds back through five refreshes
    ours, theirs = small_llama(), small_llama()
    a, b = GaLoreAdamW(galore_groups(ours), lr=1e-3), reference_optimizer(galore_groups(theirs), lr=1e-3)
    for step in range(50):
        for model, optimizer in ((ours, a), (theirs, b)):
            train_step(model, step)
            optimizer.step()
            optimizer.zero_grad()
    assert relative_difference(ours, theirs) < 1e-5


def test_full_rank_with_scale_one_is_adam_in_a_rotated_basis():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(63, 40))
    optimizer = GaLoreAdamW(
        [{"params": [weight], "rank": 40, "update_proj_gap": 1000, "scale": 1.0}], lr=0.01, eps=1e-8
    )
    grads = [torch.randn(63, 40) for _ in range(20)]
    rotation = torch.linalg.svd(grads[0].double(), full_matrices=False).Vh.mT  # (n, n)
    rotated = torch.nn.Parameter(weight.detach().double() @ rotation)
    reference = torch.optim.AdamW([rotated], lr=0.01, eps=0, weight_decay=0.0)
    for grad in grads:
        weight.grad, rotated.grad = grad, grad.double() @ rotation
        optimizer.step()
        reference.step()
    assert float((weight - rotated @ rotation.mT).norm() / weight.norm()) < 1e-5


def test_groups_without_rank_are_plain_adamw():
    torch.manual_seed(0)
    ours, theirs = torch.nn.Parameter(torch.randn(7, 5)), torch.nn.Parameter(torch.zeros(7, 5))
    theirs.data.copy_(ours.data)
    a, b = GaLoreAdamW([ours], lr=0.01, eps=0.0), torch.optim.AdamW([theirs], lr=0.01, eps=0.0, weight_decay=0.0)
    for _ in range(10):
        ours.grad = theirs.grad = torch.randn(7, 5)
        a.step()
        b.step()
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-7)


def test_keeps_float32_moments_for_bfloat16_weights():
    weight, bias = torch.nn.Parameter(torch.randn(32, 24).bfloat16()), torch.nn.Parameter(torch.randn(32).bfloat16())
    optimizer = GaLoreAdamW([{"params": [weight], "rank": 8}, {"params": [bias]}], lr=0.01)
    weight.grad, bias.grad = torch.randn_like(weight), torch.randn_like(bias)
    optimizer.step()
    assert optimizer.state[weight]["exp_avg"].dtype == torch.float32
    assert optimizer.state[bias]["exp_avg_sq"].dtype == torch.float32
    assert optimizer.state[weight]["basis_right"].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_inside_a_gap_continues_bit_for_bit(dtype):
    def run(model, optimizer, steps):
        for step in steps:
            train_step(model, step)
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
