"""Weights trained as magnitude times direction: the gradients in float64, the step, and every way of collecting."""

import copy
import io

import pytest
import torch
from double import BOUND, distance
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lowrank_cli import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit
from lowrank_cli.methods.gradnormlorp.space import Direction, Normalised, compose_, row_norms
from lowrank_cli.ops.projected_linear import projected_linear
from lowrank_cli.optim.gradients import Gradients
from lowrank_cli.optim.projection import project

MAKERS = {
    "adamw": lambda groups, **more: GaLoreAdamW(groups, lr=1e-2, **more),
    "adamw8bit": lambda groups, **more: GaLoreAdamW8bit(groups, lr=1e-2, min_8bit_size=1, **more),
    "adafactor": lambda groups, **more: GaLoreAdafactor(
        groups, lr=1e-2, scale_parameter=False, relative_step=False, **more
    ),
}
every = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
pytestmark = pytest.mark.numerical
BASES = [("left",), ("right",), ("left", "right")]


def point(m=20, n=33, dtype=torch.float64):
    """A magnitude of either sign, a direction whose length is not the magnitude's, and the weight that they make."""
    magnitude, direction = torch.randn(m, dtype=dtype), torch.randn(m, n, dtype=dtype)
    magnitude = magnitude + 0.2 * magnitude.sign()
    return magnitude, direction, magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True)


def bases_of(shape, sides, rank=4, dtype=torch.float64):
    sizes = {"left": shape[0], "right": shape[1]}
    return {side: torch.linalg.qr(torch.randn(sizes[side], rank, dtype=dtype)).Q for side in sides}


def test_gradients_are_those_of_finite_differences():
    torch.manual_seed(0)
    magnitude, direction, weight = point(m=5, n=7)
    target = torch.randn(5, 7, dtype=torch.float64)

    def loss(g, v):
        return ((g[:, None] * v / v.norm(dim=1, keepdim=True)) ** 3 * target).sum()

    grad = 3 * weight**2 * target  # dL/dW, all that is known in training
    at = Direction(weight, magnitude, direction.norm(dim=1))
    dg, dv = at.magnitude_grad((grad * weight).sum(1)), at.dense(grad)
    step = 1e-6
    for i in range(5):
        e = torch.zeros(5, dtype=torch.float64)
        e[i] = step
        slope = (loss(magnitude + e, direction) - loss(magnitude - e, direction)) / (2 * step)
        assert float(dg[i]) == pytest.approx(float(slope), rel=1e-6, abs=1e-7)
        for j in range(7):
            e = torch.zeros(5, 7, dtype=torch.float64)
            e[i, j] = step
            slope = (loss(magnitude, direction + e) - loss(magnitude, direction - e)) / (2 * step)
            assert float(dv[i, j]) == pytest.approx(float(slope), rel=1e-6, abs=1e-7)
    assert float((dv * direction).sum(1).abs().max()) < 1e-12


def test_detached_leaves_the_tangent_part_out():
    torch.manual_seed(0)
    magnitude, direction, weight = point()
    grad, norm = torch.randn_like(weight), direction.norm(dim=1)
    at = Direction(weight, magnitude, norm, detached=True)
    assert torch.allclose(at.dense(grad), (magnitude / norm)[:, None] * grad)


@pytest.mark.parametrize("detached", [False, True])
@pytest.mark.parametrize("sides", BASES, ids="+".join)
def test_projection_of_the_directions_gradient_needs_only_that_of_the_weights(sides, detached):
    torch.manual_seed(0)
    magnitude, direction, weight = point(m=300)
    grad, bases = torch.randn_like(weight), bases_of(weight.shape, sides)
    at = Direction(weight, magnitude, direction.norm(dim=1), detached=detached)
    wanted, dots = project(at.dense(grad), bases), (grad * weight).sum(1)
    low_rank = at.projected(project(grad, at.row_scaled(bases)), dots, bases)
    assert torch.allclose(low_rank, wanted, atol=1e-12)
    dg, low_rank = at.collect(grad, bases)
    assert torch.allclose(low_rank, wanted, atol=1e-12)
    assert torch.allclose(dg, at.magnitude_grad(dots), atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(
    m=st.integers(1, 600),
    n=st.integers(1, 40),
    sides=st.sampled_from(BASES),
    alpha=st.floats(-2, 2),
    seed=st.integers(0, 5),
)
def test_composing_is_weight_normalisation_of_the_moved_direction(m, n, sides, alpha, seed):
    torch.manual_seed(seed)
    magnitude, direction, weight = point(m, n)
    bases = bases_of((m, n), sides, rank=min(m, n, 3))
    update = torch.randn(project(weight, bases).shape, dtype=torch.float64)
    moved = direction + alpha * project(update, {s: b.mT for s, b in bases.items()})
    new = magnitude + 0.1
    norm = direction.norm(dim=1)
    at = Direction(weight, magnitude, norm)
    compose_(weight, new, norm, update, bases, alpha=alpha, direction=at)
    assert torch.allclose(norm, moved.norm(dim=1), rtol=1e-9)
    assert torch.allclose(weight, new[:, None] * moved / moved.norm(dim=1, keepdim=True), atol=1e-9)


@pytest.mark.parametrize("sides", BASES, ids="+".join)
def test_row_products_come_out_of_backward(sides):
    torch.manual_seed(0)
    x, weight = torch.randn(3, 10, 33, dtype=torch.float64), torch.randn(20, 33, dtype=torch.float64)
    bias, dy = torch.randn(20, dtype=torch.float64), torch.randn(3, 10, 20, dtype=torch.float64)
    weight.requires_grad_()
    bases = bases_of(weight.shape, sides)
    shapes = project(weight.detach(), bases).shape, weight.shape[:1]
    leaves = [torch.zeros(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    projected_linear(x, weight, bias, bases, *leaves).backward(dy)
    got = [leaf.grad for leaf in leaves]
    grad = dy.flatten(0, 1).mT @ x.flatten(0, 1)
    assert torch.allclose(got[0], project(grad, bases))
    assert torch.allclose(got[1], (grad * weight).sum(1))


class Reference:
    """Weight normalisation with both tensors kept, projected by given bases, Adam in textbook form, in float64."""

    def __init__(self, weight, lr, scale, weight_decay, betas=(0.9, 0.999), eps=1e-3):
        self.v, self.g = weight.clone(), weight.norm(dim=1)
        self.lr, self.scale, self.decay, self.betas, self.eps = lr, scale, weight_decay, betas, eps
        self.t, self.moments = 0, {}

    def adam(self, name, grad):
        first, second = self.moments.get(name, (0, 0))
        first = self.betas[0] * first + (1 - self.betas[0]) * grad
        second = self.betas[1] * second + (1 - self.betas[1]) * grad**2
        self.moments[name] = first, second
        root = (1 - self.betas[1] ** self.t) ** 0.5
        return root / (1 - self.betas[0] ** self.t) * first / (second.sqrt() + self.eps)

    def step(self, grad, bases):
        self.t += 1
        norm = self.v.norm(dim=1)
        dg = (grad * self.v).sum(1) / norm
        dv = (self.g / norm)[:, None] * (grad - dg[:, None] * self.v / norm[:, None])
        update = self.adam("v", project(dv, bases))
        self.v -= self.lr * self.scale * project(update, {side: basis.mT for side, basis in bases.items()})
        self.g -= self.lr * self.adam("g", dg)
        self.g *= 1 - self.lr * self.decay

    def weight(self):
        return self.g[:, None] * self.v / self.v.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "full"])
@pytest.mark.parametrize("shape", [(300, 40), (40, 63)])
def test_fifty_steps_equal_a_plain_reference_that_keeps_the_direction(shape, proj_type, weight_decay):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    start = weight.detach().clone()
    reference = Reference(start, lr=0.1, scale=0.5, weight_decay=weight_decay)
    tags = {"rank": 8, "update_proj_gap": 7, "scale": 0.5, "proj_type": proj_type, "space": Normalised}
    optimizer = GaLoreAdamW([{"params": [weight], **tags}], lr=0.1, eps=1e-3, weight_decay=weight_decay)
    for _ in range(50):
        weight.grad = torch.randn_like(weight)
        grad = weight.grad
        optimizer.step()
        # the reference is given the bases, since signs of singular vectors are free
        reference.step(grad, optimizer.spaces[weight].bases())
    exact = reference.weight()
    # rounding of 1e-16, over an eps of 1e-3
    assert float((weight.detach() - exact).norm()) < 1e-10 * float((start - exact).norm())
    assert torch.allclose(optimizer.state[weight]["norm"], reference.v.norm(dim=1), rtol=1e-10)


def test_basis_is_that_of_the_directions_gradient():
    torch.manual_seed(0)
    weight = torch.randn(24, 40, dtype=torch.float64) * torch.logspace(-2, 1, 24)[:, None]
    weight = nn.Parameter(weight)
    optimizer = GaLoreAdamW([{"params": [weight], "rank": 6, "space": Normalised}], lr=1e-2)
    size, grad = weight.detach().norm(dim=1, keepdim=True), torch.randn_like(weight)
    weight.grad = grad.clone()
    unit = weight.detach() / size
    dv = grad - (grad * unit).sum(1, keepdim=True) * unit  # the magnitude and the norm begin alike
    optimizer.step()
    wanted = torch.linalg.svd(dv, full_matrices=False).U[:, :6]
    got = optimizer.spaces[weight].bases()["left"]
    assert float((wanted.mT @ got).square().sum()) == pytest.approx(6, rel=1e-12)


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_rows_have_the_magnitudes_length_after_every_step(make, dtype, weight_decay):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(65, 40).to(dtype))
    optimizer = make(
        [{"params": [weight], "rank": 8, "update_proj_gap": 3, "space": Normalised}], weight_decay=weight_decay
    )
    first = row_norms(weight)
    for _ in range(12):
        weight.grad = torch.randn(65, 40).to(dtype)
        optimizer.step()
        magnitude = optimizer.state[weight]["magnitude"]
        # entries are rounded to the dtype, and a norm of forty squares to the magnitude's
        limit = (torch.finfo(dtype).eps + 20 * torch.finfo(magnitude.dtype).eps) / 2
        assert float((weight.detach().double().norm(dim=1) / magnitude.double().abs() - 1).abs().max()) < limit
    # it is trained, and not set back to where it was
    assert float((magnitude - first).abs().max()) > 0.03


def test_a_magnitude_goes_through_zero_and_keeps_its_direction():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(6, 9, dtype=torch.float64) * 0.01)
    optimizer = GaLoreAdamW([{"params": [weight], "rank": 3, "space": Normalised, "scale": 1e-9}], lr=0.005)
    unit = nn.functional.normalize(weight.detach().clone(), dim=1)
    for _ in range(20):
        weight.grad = unit.clone()
        optimizer.step()
        assert torch.isfinite(weight).all()
    assert bool((optimizer.state[weight]["magnitude"] < 0).all())
    assert torch.allclose(nn.functional.normalize(weight.detach(), dim=1), -unit, atol=1e-7)


def test_a_magnitude_of_exactly_zero_is_moved_off_it():
    torch.manual_seed(0)
    _, _, weight = point(4, 6, torch.float32)
    norm = row_norms(weight)
    at = Direction(weight.clone(), norm.clone(), norm)
    bases = bases_of((4, 6), ("left",), rank=2, dtype=torch.float32)
    unit = nn.functional.normalize(weight, dim=1)
    compose_(weight, magnitude := torch.zeros(4), norm, torch.zeros(2, 6), bases, alpha=1.0, direction=at)
    assert (magnitude != 0).all()
    assert torch.allclose(nn.functional.normalize(weight, dim=1, eps=1e-30), unit, atol=1e-5)


def test_a_row_of_zeros_is_trained_until_it_has_a_magnitude():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(12, 20))
    weight.data[3] = 0
    optimizer = GaLoreAdamW([{"params": [weight], "rank": 6, "space": Normalised}], lr=1e-2)
    for _ in range(3):
        weight.grad = torch.randn(12, 20)
        optimizer.step()
        assert torch.isfinite(weight).all()
    state = optimizer.state[weight]
    assert float(state["magnitude"][3]) > 0
    assert torch.allclose(row_norms(weight), state["magnitude"], rtol=1e-5)


def model_of(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 24, bias=False), nn.Tanh(), nn.Linear(24, 40)
    return nn.Sequential(*layers).to(dtype)


def groups_of(model, **more) -> list[dict]:
    weights = [p for p in model.parameters() if p.dim() == 2]
    tags = {"rank": 4, "update_proj_gap": 3, "space": Normalised, **more}
    return [{"params": weights, **tags}, {"params": [p for p in model.parameters() if p.dim() < 2]}]


def train(model, optimizer, updates, *, per_layer=False, passes=1, clipping=0.0):
    gradients = Gradients(model, optimizer, per_layer=per_layer, clipping=clipping)
    norms = []
    for update in updates:
        x = torch.randn(16, 32, generator=torch.Generator().manual_seed(update)).to(model[0].weight.dtype)
        gradients.begin(measuring=True)
        for i, part in enumerate(x.chunk(passes)):
            gradients.last = i == passes - 1
            (model(part).square().sum() / 16).backward()
        norms.append(float(gradients.norm()))
        gradients.step()
    gradients.close()
    return norms


@every
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "full"])
@pytest.mark.parametrize("passes", [1, 4])
@pytest.mark.parametrize(("per_layer", "in_backward"), [(True, False), (False, True), (True, True)])
def test_every_mode_gives_the_plain_update(make, per_layer, in_backward, passes, proj_type):
    plain, other, start = model_of(), model_of(), dict(model_of().named_parameters())
    more = {} if make is MAKERS["adafactor"] else {"eps": 1e-3}
    train(plain, make(groups_of(plain, proj_type=proj_type), **more), range(8))
    optimizer = make(groups_of(other, proj_type=proj_type, in_backward=in_backward), **more)
    train(other, optimizer, range(8), per_layer=per_layer, passes=passes)
    with torch.no_grad():
        assert distance(dict(other.named_parameters()), dict(plain.named_parameters()), start) < BOUND


def test_clipping_scales_magnitude_and_direction_alike():
    free, tight = model_of(), model_of()
    a, b = GaLoreAdamW(groups_of(free), lr=0.0), GaLoreAdamW(groups_of(tight), lr=0.0)
    seen = []

    def watch(optimizer):
        def look(space):
            original = space.gradient

            def gradient():
                parts = original()
                seen.append(parts[1].grad.clone())
                return parts

            space.gradient = gradient

        for space in optimizer.projected:
            look(space)

    watch(a)
    watch(b)
    norms = train(free, a, range(1))
    train(tight, b, range(1), clipping=norms[0] / 4)
    half = len(seen) // 2
    for whole, clipped in zip(seen[:half], seen[half:], strict=True):
        # clipping divides by the norm plus a millionth
        assert torch.allclose(clipped, whole / 4, rtol=2e-6 / norms[0])


@every
def test_save_and_load_inside_a_gap_continues_bit_for_bit(make):
    whole = model_of(torch.float32)
    optimizer = make(groups_of(whole))
    train(whole, optimizer, range(5))
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    resumed = copy.deepcopy(whole)
    train(whole, optimizer, range(5, 11))
    buffer.seek(0)
    second = make(groups_of(resumed))
    second.load_state_dict(torch.load(buffer, weights_only=True))
    train(resumed, second, range(5, 11))
    for p, q in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)


def test_no_tensor_of_the_weights_size_is_held_or_made():
    m, n, r = 100, 630, 16
    weight = nn.Parameter(torch.randn(m, n))
    optimizer = GaLoreAdamW([{"params": [weight], "rank": r, "space": Normalised}], lr=0.01)
    for _ in range(2):
        weight.grad = torch.randn(m, n)
        optimizer.step()
    held = sum(v.untyped_storage().nbytes() for v in optimizer.state[weight].values() if torch.is_tensor(v))
    # basis and two moments as GaLore; magnitude, norm, and two moments of the magnitude
    assert held == (m * r + 2 * n * r + 4 * m) * 4
    weight = nn.Parameter(torch.randn(1000, 400))
    optimizer = GaLoreAdamW([{"params": [weight], "rank": 4, "space": Normalised}], lr=0.01)
    weight.grad = torch.randn(1000, 400)
    optimizer.step()
    weight.grad.normal_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        optimizer.step()
    largest = max((event.cpu_memory_usage for event in profile.events()), default=0)
    assert 0 < largest < weight.numel() * 4 / 2


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({"rank": 2, "space": Normalised, "weight_norm": "no"}, "weight_norm is 'no'"),
        ({"rank": 2, "space": Normalised}, "takes matrices"),
    ],
)
def test_a_wrong_group_is_refused(tags, message):
    with pytest.raises(ValueError, match=message):
        GaLoreAdamW([{"params": [nn.Parameter(torch.zeros(4, 4, 4))], **tags}])


def test_the_magnitude_has_a_rate_of_its_own():
    moved, norms = [], []
    for factor in (1.0, 0.25):
        torch.manual_seed(0)
        weight = nn.Parameter(point()[2])
        weight.grad = torch.randn(weight.shape, dtype=weight.dtype, generator=torch.Generator().manual_seed(5))
        group = {"params": [weight], "rank": 4, "space": Normalised, "magnitude_scale": factor}
        optimizer = GaLoreAdamW([group], lr=0.01)
        start = row_norms(weight)
        optimizer.step()
        moved.append(optimizer.state[weight]["magnitude"] - start)
        norms.append(optimizer.state[weight]["norm"])
    # the direction moves as before
    assert torch.equal(*norms)
    assert (moved[1] - 0.25 * moved[0]).abs().max() < 1e-12 * moved[0].abs().max()
