"""Every optimizer against galore-torch's of the same name, on the same gradients."""

import warnings

import pytest
import torch

from lowrank_cli import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit

PROJ_TYPES = ["std", "left", "right", "full"]


def reference(name: str, groups: list[dict], **kwargs):
    import galore_torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(galore_torch, name)(groups, **kwargs)


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("rank", [1, 12, 48])
def test_adamw_of_every_projection_type(proj_type, rank, pair, galore_groups):
    tags = {"proj_type": proj_type, "rank": rank}
    ours = GaLoreAdamW(galore_groups(pair.ours, **tags), lr=1e-3)
    pair.run(
        ours, reference("GaLoreAdamW", galore_groups(pair.theirs, **tags), lr=1e-3, no_deprecation_warning=True), 25
    )
    assert pair.moved() > 1e-2
    assert pair.difference() < 1e-6


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize(
    "settings",
    [
        {"lr": 1e-3, "scale_parameter": False, "relative_step": False},
        {"lr": 1e-3, "scale_parameter": False, "relative_step": False, "beta1": 0.9, "weight_decay": 0.1},
        {"warmup_init": True},
        {"lr": 1e-2, "scale_parameter": True, "relative_step": False, "clip_threshold": 0.5},
    ],
    ids=["papers", "first moment", "relative step", "scaled"],
)
def test_adafactor(settings, proj_type, pair, galore_groups):
    ours = GaLoreAdafactor(galore_groups(pair.ours, proj_type=proj_type), **settings)
    theirs = reference("GaLoreAdafactor", galore_groups(pair.theirs, proj_type=proj_type), **settings)
    pair.run(ours, theirs, 25)
    assert pair.moved() > 5e-5
    assert pair.difference() < 2e-6


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
def test_adamw8bit_within_the_quantization_error(proj_type, pair, galore_groups, monkeypatch):
    # galore-torch calls torch.cuda.synchronize for every tensor, and bitsandbytes moves its state to a GPU
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *args: None)
    # min_8bit_size 1: on a CPU, galore-torch leaves a projected tensor with 32-bit moments where it is. Rank 16:
    # directions that hold no gradient at all would have their rounding noise normalised to full steps by either side
    tags = {"rank": 16, "proj_type": proj_type, "gap": 50}
    ours = GaLoreAdamW8bit(galore_groups(pair.ours, **tags), lr=1e-3, weight_decay=0.01, min_8bit_size=1)
    theirs = reference(
        "GaLoreAdamW8bit", galore_groups(pair.theirs, **tags), lr=1e-3, weight_decay=0.01, min_8bit_size=1
    )
    pair.run(ours, theirs, 200)
    assert {v.dtype for s in ours.state.values() for k, v in s.items() if k == "exp_avg"} == {torch.uint8}
    assert pair.moved() > 0.1
    assert pair.difference() < 2e-3


def test_8bit_stays_near_32bit(pair, galore_groups):
    ours = GaLoreAdamW8bit(galore_groups(pair.ours, rank=40), lr=1e-3, weight_decay=0.0, min_8bit_size=1)
    theirs = GaLoreAdamW(galore_groups(pair.theirs, rank=40), lr=1e-3, eps=1e-8)
    pair.run(ours, theirs, 200)
    assert pair.difference() < 0.1 * pair.moved()


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (40, 40)])
@pytest.mark.parametrize("rank", [1, 8, 40, 64])
@pytest.mark.parametrize("make", [
    lambda groups: GaLoreAdamW(groups, lr=1e-2),
    lambda groups: GaLoreAdamW8bit(groups, lr=1e-2, min_8bit_size=1),
    lambda groups: GaLoreAdafactor(groups, lr=1e-2, scale_parameter=False, relative_step=False),
], ids=["adamw", "adamw8bit", "adafactor"])  # fmt: skip
def test_reverse_std_works_where_the_reference_crashes(shape, rank, make):
    # galore-torch chooses the side again from the projected shape, which is wrong where m < n and r >= m
    torch.manual_seed(0)
    target = torch.randn(shape)
    weight = torch.nn.Parameter(torch.zeros(shape))
    optimizer = make(
        [{"params": [weight], "rank": rank, "proj_type": "reverse_std", "update_proj_gap": 5, "scale": 1.0}]
    )
    start = float((weight - target).detach().norm())
    for _ in range(20):
        weight.grad = (weight - target).detach()
        optimizer.step()
    assert float((weight - target).detach().norm()) < start


@pytest.mark.parametrize("shape", [(16, 8, 3, 3), (6, 20, 5), (32, 4, 1, 1)])
def test_a_convolution_is_projected_in_every_mode(shape):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(shape))
    target = torch.randn(shape)
    optimizer = GaLoreAdamW([{"params": [weight], "rank": 4, "update_proj_gap": 5, "scale": 1.0}], lr=0.05)
    start = float(target.norm())
    for _ in range(60):
        weight.grad = (weight - target).detach()
        optimizer.step()
    state = optimizer.state[weight]
    assert state["exp_avg"].shape == tuple(min(4, size) for size in shape)
    assert float((weight - target).detach().norm()) < 0.9 * start


def test_a_convolution_at_full_rank_is_adam_in_rotated_modes():
    from lowrank_cli.optim.projection import expand, project

    torch.manual_seed(0)
    grad = torch.randn(6, 5, 3, 3)
    weight = torch.nn.Parameter(torch.zeros(6, 5, 3, 3))
    optimizer = GaLoreAdamW([{"params": [weight], "rank": 6, "scale": 1.0}], lr=0.1, eps=1e-12)
    weight.grad = grad
    optimizer.step()
    bases = optimizer.bases(weight)
    assert torch.allclose(expand(project(grad, bases), bases), grad, atol=1e-5)
    # the first step of Adam is the sign, here of the core, taken back
    assert torch.allclose(weight.detach(), -0.1 * expand(project(grad, bases).sign(), bases), atol=1e-4)


@pytest.mark.parametrize("moments", ["rotate", "reset"])
def test_moments_at_a_refresh(moments):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(20, 30))
    group = {"params": [weight], "rank": 20, "update_proj_gap": 6, "scale": 1.0, "moments": moments, "refresh": "svd"}
    optimizer = GaLoreAdamW([group], lr=1e-3, eps=1e-8)
    grads = [torch.randn(20, 30) for _ in range(7)]
    for grad in grads[:6]:
        weight.grad = grad
        optimizer.step()
    state = optimizer.state[weight]
    before, old = state["exp_avg"].clone(), optimizer.bases(weight)["left"]
    weight.grad = grads[6]
    optimizer.step()
    new = optimizer.bases(weight)["left"]
    assert not torch.allclose(old, new, atol=1e-2)
    projected = new.mT @ grads[6]
    if moments == "reset":
        assert torch.allclose(state["exp_avg"], 0.1 * projected, atol=1e-5)
        assert state["step"] == 1
    else:
        # at full rank nothing is lost: the first moment is the same matrix, in the new coordinates
        assert torch.allclose(new @ state["exp_avg"], 0.9 * old @ before + 0.1 * grads[6], atol=1e-5)
        assert (state["exp_avg_sq"] >= 0).all()
        assert state["step"] == 7


def test_rotation_by_the_identity_changes_nothing():
    from lowrank_cli.optim.adamw import rotate

    torch.manual_seed(0)
    m, v = torch.randn(8, 30), torch.rand(8, 30) + 1
    turned = rotate(m, v, {"left": torch.eye(8)}, step=5, betas=(0.9, 0.999))
    assert torch.allclose(turned[0], m, atol=1e-6)
    assert torch.allclose(turned[1], v, atol=1e-6)
    flipped = rotate(m, v, {"left": -torch.eye(8)}, step=5, betas=(0.9, 0.999))
    assert torch.allclose(flipped[0], -m, atol=1e-6)
    assert torch.allclose(flipped[1], v, atol=1e-6)


def test_8bit_moments_rotate_too():
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(40, 60)) for _ in range(2)]
    weights[1].data.copy_(weights[0].data)
    tags = {"rank": 10, "update_proj_gap": 3, "scale": 1.0, "moments": "rotate", "refresh": "subspace"}
    exact = GaLoreAdamW([{"params": [weights[0]], **tags}], lr=1e-2, eps=1e-8)
    coarse = GaLoreAdamW8bit([{"params": [weights[1]], **tags}], lr=1e-2, weight_decay=0.0, min_8bit_size=1)
    start = weights[0].detach().clone()
    base = torch.randn(40, 60)
    for _ in range(9):
        weights[0].grad = weights[1].grad = base + 0.1 * torch.randn(40, 60)
        exact.step()
        coarse.step()
    moved = float((weights[0] - start).detach().norm())
    assert float((weights[0] - weights[1]).detach().norm()) < 0.05 * moved


def test_adafactor_refuses_to_rotate():
    group = {"params": [torch.nn.Parameter(torch.zeros(4, 4))], "rank": 2, "moments": "rotate"}
    with pytest.raises(ValueError, match="cannot be rotated"):
        GaLoreAdafactor([group], lr=1e-3, scale_parameter=False, relative_step=False)


@pytest.mark.parametrize("make", [
    lambda groups: GaLoreAdamW(groups, lr=1e-2),
    lambda groups: GaLoreAdamW8bit(groups, lr=1e-2),
    lambda groups: GaLoreAdafactor(groups, lr=1e-2, scale_parameter=False, relative_step=False),
], ids=["adamw", "adamw8bit", "adafactor"])  # fmt: skip
def test_step_makes_no_full_size_temporary(make):
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    m, n, rank = 96, 80, 8
    weight = torch.nn.Parameter(torch.randn(m, n))
    optimizer = make([{"params": [weight], "rank": rank, "update_proj_gap": 100}])
    weight.grad = torch.randn(m, n)
    optimizer.step()
    known = {weight.untyped_storage().data_ptr(), weight.grad.untyped_storage().data_ptr()}

    class Watch(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in tree_leaves(out):
                if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in known:
                    Watch.largest = max(Watch.largest, t.numel())
            return out

    with Watch():
        optimizer.step()
    assert Watch.largest <= m * rank


@pytest.mark.parametrize("engine", ["svd", "gram", "randomized", "subspace"])
def test_nan_in_one_tensor_is_named_and_changes_nothing(engine):
    weight = torch.nn.Parameter(torch.ones(8, 6))
    optimizer = GaLoreAdamW(
        [{"params": [("layers.0.mlp.up_proj.weight", weight)], "rank": 2, "refresh": engine}], lr=0.1
    )
    weight.grad = torch.full((8, 6), float("nan"))
    with pytest.raises(FloatingPointError, match="the gradient of layers.0.mlp.up_proj.weight is not finite"):
        optimizer.step()
    assert torch.equal(weight.detach(), torch.ones(8, 6))


@pytest.mark.parametrize("scale", [0.0, 1e30, 1e-30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("engine", ["svd", "gram", "randomized", "subspace"])
def test_hostile_scales_never_make_a_nan(scale, dtype, engine):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.ones(12, 20, dtype=dtype))
    optimizer = GaLoreAdamW([{"params": [weight], "rank": 3, "refresh": engine, "update_proj_gap": 2}], lr=1e-3)
    for _ in range(5):
        weight.grad = (torch.randn(12, 20) * scale).to(dtype)
        optimizer.step()
    assert torch.isfinite(weight).all()
