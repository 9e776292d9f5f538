"""Every optimizer against galore-torch's of the same name, on the same gradients."""

import pytest
import torch
from double import BOUND
from torch.nn.utils import parameters_to_vector

from lowrank_cli import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit
from lowrank_cli.optim.adamw import rotate
from lowrank_cli.optim.projection import expand, project

pytestmark = pytest.mark.numerical

PROJ_TYPES = ["std", "left", "right", "full"]
MAKERS = {
    "adamw": lambda groups: GaLoreAdamW(groups, lr=1e-2),
    "adamw8bit": lambda groups: GaLoreAdamW8bit(groups, lr=1e-2, min_8bit_size=1),
    "adafactor": lambda groups: GaLoreAdafactor(groups, lr=1e-2, scale_parameter=False, relative_step=False),
}
every = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
# float64, and an eps of 1e-6 that rounding of 1e-16 is divided by
EXACT = 1e-9


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("rank", [1, 12, 48])
def test_adamw_of_every_projection_type(proj_type, rank, pair, galore_groups, reference):
    tags, settings = {"proj_type": proj_type, "rank": rank}, {"lr": 1e-3, "weight_decay": 0.1}
    ours = GaLoreAdamW(galore_groups(pair.ours, **tags), **settings)
    theirs = reference("GaLoreAdamW", galore_groups(pair.theirs, **tags), **settings)
    pair.run(ours, theirs, 25)
    assert pair.distance() < EXACT


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
def test_adafactor(settings, proj_type, pair, galore_groups, reference):
    ours = GaLoreAdafactor(galore_groups(pair.ours, proj_type=proj_type), **settings)
    theirs = reference("GaLoreAdafactor", galore_groups(pair.theirs, proj_type=proj_type), **settings)
    pair.run(ours, theirs, 25)
    assert pair.distance() < BOUND


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
def test_adamw8bit_within_the_quantization_error(proj_type, single_pair, galore_groups, reference, monkeypatch):
    """Each step from the same codes: in float32, which bitsandbytes computes in, the step is the same."""
    # galore-torch calls torch.cuda.synchronize for every tensor, and bitsandbytes moves its state to a GPU
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *args: None)
    # min_8bit_size 1: on a CPU, galore-torch leaves a projected tensor with 32-bit moments where it is. Rank 16 and an
    # eps: directions that hold hardly any gradient would have their rounding noise normalised to full steps
    tags = {"rank": 16, "proj_type": proj_type, "gap": 5}
    settings = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-4, "min_8bit_size": 1}
    groups = galore_groups(single_pair.ours, **tags), galore_groups(single_pair.theirs, **tags)
    for plain, _ in groups:
        # bitsandbytes' own decay comes before the update on a CPU, after it on a GPU
        plain["weight_decay"] = 0.0
    ours = GaLoreAdamW8bit(groups[0], **settings)
    theirs = reference("GaLoreAdamW8bit", groups[1], **settings)
    pairs = list(zip(single_pair.ours.parameters(), single_pair.theirs.parameters(), strict=True))
    for _ in single_pair.steps(ours, theirs, 12):
        # a weight of 1 is rounded twice on either side, by up to 2^-24, and moves by up to 1e-2
        assert single_pair.distance() < 4 * 2**-24 / 1e-2
        apart = [share for p, q in pairs for share in take_codes(ours.state[p], theirs.state[q])]
        assert sum(apart) / len(apart) < 0.01
        for p, q in pairs:
            p.data.copy_(q)
        single_pair.start = {name: q.detach().clone() for name, q in single_pair.theirs.named_parameters()}


def take_codes(ours: dict, theirs: dict) -> list[float]:
    """Take over the other side's moments; returns the shares of codes that were apart, each by one at most."""
    shares = []
    for mine, other in (("exp_avg", 1), ("exp_avg_sq", 2)):
        assert ours[mine].dtype == torch.uint8
        torch.testing.assert_close(ours[f"{mine}_scale"], theirs[f"absmax{other}"], rtol=1e-4, atol=0)
        apart = (ours[mine].int() - theirs[f"state{other}"].int()).abs()
        assert int(apart.max()) <= 1
        shares.append(float(apart.float().mean()))
        ours[mine].copy_(theirs[f"state{other}"])
        ours[f"{mine}_scale"].copy_(theirs[f"absmax{other}"])
    return shares


def test_8bit_stays_near_32bit(pair, galore_groups):
    ours = GaLoreAdamW8bit(galore_groups(pair.ours, rank=40), lr=1e-3, weight_decay=0.0, min_8bit_size=1)
    theirs = GaLoreAdamW(galore_groups(pair.theirs, rank=40), lr=1e-3, eps=1e-8)
    start, *models = parameters_to_vector(pair.ours.parameters()).detach().clone(), pair.ours, pair.theirs
    pair.run(ours, theirs, 50)
    coarse, exact = (parameters_to_vector(model.parameters()).detach() for model in models)
    # the code of each of the two moments is off by up to 2^-5 of it
    assert float((coarse - exact).norm()) < 2 * 2**-5 * float((exact - start).norm())


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (40, 40)])
@pytest.mark.parametrize("rank", [1, 8, 40, 64])
@every
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
    grad = normal(6, 5, 3, 3)
    weight = torch.nn.Parameter(torch.zeros_like(grad))
    optimizer = GaLoreAdamW([{"params": [weight], "rank": 6, "scale": 1.0}], lr=0.1, eps=0.0)
    weight.grad = grad
    optimizer.step()
    bases = optimizer.spaces[weight].bases()
    assert torch.allclose(expand(project(grad, bases), bases), grad, rtol=0, atol=1e-12)
    # the first step of Adam is the sign, here of the core, taken back
    assert torch.allclose(weight.detach(), -0.1 * expand(project(grad, bases).sign(), bases), rtol=0, atol=1e-12)


@pytest.mark.parametrize("moments", ["rotate", "reset"])
def test_moments_at_a_refresh(moments):
    weight, *grads = (normal(20, 30, seed=seed) for seed in range(8))
    weight = torch.nn.Parameter(weight)
    group = {"params": [weight], "rank": 20, "update_proj_gap": 6, "scale": 1.0, "moments": moments, "refresh": "svd"}
    optimizer = GaLoreAdamW([group], lr=1e-3, eps=1e-8)
    for grad in grads[:6]:
        weight.grad = grad
        optimizer.step()
    state = optimizer.state[weight]
    before, old = state["exp_avg"].clone(), optimizer.spaces[weight].bases()["left"]
    weight.grad = grads[6]
    optimizer.step()
    new = optimizer.spaces[weight].bases()["left"]
    assert not torch.allclose(old, new, atol=1e-2)
    if moments == "reset":
        assert torch.allclose(state["exp_avg"], 0.1 * new.mT @ grads[6], rtol=0, atol=1e-12)
        assert state["step"] == 1
    else:
        # at full rank nothing is lost: the first moment is the same matrix, in the new coordinates
        expected = 0.9 * old @ before + 0.1 * grads[6]
        assert torch.allclose(new @ state["exp_avg"], expected, rtol=0, atol=1e-12)
        assert state["step"] == 7


def test_rotated_moments_are_those_of_rotated_gradients():
    """LDAdam, arXiv:2410.16103: coordinates are taken for uncorrelated, with the mean and square that Adam kept."""
    m, v = normal(8, 30), normal(8, 30, seed=1).square() + 0.1 + normal(8, 30).square()
    change = torch.linalg.qr(normal(8, 8)).Q  # old^T new
    turned = rotate(m, v, {"left": change}, step=5, betas=(0.9, 0.999))
    mean, square = m / (1 - 0.9**5), v / (1 - 0.999**5)
    for row, weights in enumerate(change.mT):
        expected = sum(w * x for w, x in zip(weights, mean, strict=True))
        spread = sum(w**2 * (y - x**2) for w, x, y in zip(weights, mean, square, strict=True))
        assert torch.allclose(turned[0][row], expected * (1 - 0.9**5), rtol=0, atol=1e-12)
        assert torch.allclose(turned[1][row], (spread + expected**2).abs() * (1 - 0.999**5), rtol=0, atol=1e-12)
    same = rotate(m, v, {"left": -torch.eye(8, dtype=m.dtype)}, step=5, betas=(0.9, 0.999))
    assert torch.allclose(same[0], -m, rtol=0, atol=1e-12)
    assert torch.allclose(same[1], v, rtol=0, atol=1e-12)


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
    # the code of each of the two moments is off by up to 2^-5 of it
    assert float((weights[0] - weights[1]).detach().norm()) < 0.05 * moved


def test_8bit_moments_that_rotate_get_the_scales_of_their_new_values():
    # a row of 256 columns is one block: where the leading two directions change places, so do the scales
    rows = torch.tensor([100.0, 1.0])[:, None] * torch.randn(2, 256, generator=torch.Generator().manual_seed(0))
    weight = torch.nn.Parameter(torch.zeros(2, 256))
    group = {"params": [weight], "rank": 2, "update_proj_gap": 2, "moments": "rotate", "refresh": "svd"}
    optimizer = GaLoreAdamW8bit([group], lr=1e-3, betas=(0.9, 0.99), min_8bit_size=1)
    grads = [rows, rows, rows.flip(0)]
    for grad in grads:
        weight.grad = grad.clone()
        optimizer.step()
    state, moment = optimizer.state[weight], torch.zeros(2, 256)
    for grad in grads:
        moment = 0.9 * moment + 0.1 * grad
    scales = state["exp_avg_scale"][:, None]
    codes = optimizer.rule.codes(weight.device)[0][state["exp_avg"].long()]
    held = optimizer.spaces[weight].bases()["left"] @ (codes * scales)
    # written three times; a code is off by up to 2^-5 of the largest of its block
    torch.testing.assert_close(held, moment, rtol=0, atol=3 * 2**-5 * float(scales.max()))
    assert float((held - moment)[1].norm() / moment[1].norm()) < 0.1


def test_adafactor_refuses_to_rotate():
    group = {"params": [torch.nn.Parameter(torch.zeros(4, 4))], "rank": 2, "moments": "rotate"}
    with pytest.raises(ValueError, match="cannot be rotated"):
        GaLoreAdafactor([group], lr=1e-3, scale_parameter=False, relative_step=False)


@every
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
