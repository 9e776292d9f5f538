"""The compiled step against float64 arithmetic and against its reference; runs on each kernel, see conftest.py."""

import math
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowrank_cli.ops import fused_step

OPS = torch.ops.lowrank
BETAS, LR, SCALE = (0.9, 0.999), 1e-2, 0.25
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# above what float32 makes of a hundred products of gradients of up to 1, so that no direction is made of rounding
EPS = {torch.float32: 1e-5, torch.bfloat16: 1e-8, torch.float16: 1e-8}
examples = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
pytestmark = [pytest.mark.numerical, pytest.mark.usefixtures("kernel_device")]


def low_shape(m, n, rank, left):
    return (rank, n) if left else (m, rank)


def laid_out(matrix, by_columns, pad=0):
    """The matrix with its rows or its columns dense, `pad` elements between the lines, NaN in the gaps."""
    matrix = matrix.mT if by_columns else matrix
    lines = torch.full((matrix.shape[0], matrix.shape[1] + pad), math.nan, dtype=matrix.dtype, device=matrix.device)
    lines[:, : matrix.shape[1]] = matrix
    lines = lines[:, : matrix.shape[1]]
    return lines.mT if by_columns else lines


class Layer:
    """A weight with a basis and moments, all random, and the same in float64."""

    def __init__(self, m, n, rank, left, dtype, device, columns=(False, False, False), pad=0, seed=0, eight_bit=False):
        torch.manual_seed(seed)
        side = m if left else n
        self.rank, self.left = min(rank, side), left
        basis = torch.linalg.qr(torch.randn(side, self.rank, dtype=torch.float64)).Q
        self.weight = laid_out((torch.randn(m, n) * 0.05).to(dtype).to(device), columns[0], pad)
        self.basis = laid_out(basis.to(dtype).to(device), columns[2], pad)
        self.columns, self.pad, self.seed = columns, pad, seed
        low = low_shape(m, n, self.rank, left)
        blocks = math.ceil(math.prod(low) / fused_step.BLOCK)
        kind = torch.uint8 if eight_bit else torch.float32
        self.moments = [torch.zeros(low, dtype=kind, device=device) for _ in range(2)]
        self.scales = [torch.zeros(blocks, device=device) for _ in range(2)] if eight_bit else []
        self.exact = [torch.zeros(low, dtype=torch.float64) for _ in range(2)]
        self.exact_weight = self.weight.double().cpu()
        self.start = self.exact_weight.clone()

    def gradient(self, step, projected=False):
        torch.manual_seed(1000 * self.seed + step)
        shape = self.moments[0].shape if projected else self.weight.shape
        grad = torch.randn(shape) * 10 ** (step % 3 - 2.0)
        grad = grad if projected else grad.to(self.weight.dtype)
        return laid_out(grad.to(self.weight.device), self.columns[1] and not projected, self.pad)

    def exact_step(self, grad, step, decay, projected=False):
        """The same step in float64; the weight is kept in its own dtype, as it is on the device."""
        basis, grad = self.basis.double().cpu(), grad.double().cpu()
        low = grad if projected else (basis.mT @ grad if self.left else grad @ basis)
        mean, square = self.exact
        mean.mul_(BETAS[0]).add_(low, alpha=1 - BETAS[0])
        square.mul_(BETAS[1]).add_(low.square(), alpha=1 - BETAS[1])
        update = (
            mean / (1 - BETAS[0] ** step) / (square.sqrt() + EPS[self.weight.dtype]) * math.sqrt(1 - BETAS[1] ** step)
        )
        full = basis @ update if self.left else update @ basis.mT
        exact = decay * (self.exact_weight - LR * SCALE * full)
        self.exact_weight = exact.to(self.weight.dtype).double()

    def error(self):
        """How far the weight's movement is from the exact one, relative to it."""
        moved = self.exact_weight - self.start
        return float((self.weight.double().cpu() - self.exact_weight).norm() / moved.norm())


def take_step(layers, grads, step, *, projected=False, whole=False, decay=1.0, codes=(), op=None):
    step_size, eps = fused_step.corrected(step=step, lr=LR, betas=BETAS, eps=EPS[layers[0].weight.dtype])
    scales = [[x.scales[i] for x in layers] if codes else [] for i in range(2)]
    (op or OPS.galore_step_)(
        [x.weight for x in layers], grads, [x.basis for x in layers], [x.moments[0] for x in layers],
        [x.moments[1] for x in layers], *scales, list(codes), layers[0].left, projected, whole, *BETAS, eps,
        step_size * SCALE, decay,
    )  # fmt: skip


def bitsandbytes_codes(device):
    from bitsandbytes import functional

    return [functional.create_dynamic_map(signed=signed).to(device) for signed in (True, False)]


# float32: sums of a hundred products, 2^-24 each, and the weight's own rounding after each step; 16 bit: the projected
# gradient, the direction and the weight are rounded to 2^-9 or 2^-12
BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 5e-3}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_hundred_steps_agree_with_float64(kernel_device, dtype, left, whole):
    # the library's product of 16 bit into float32 is CUDA's alone
    whole = whole and runs_library(dtype)
    layer = Layer(70, 45, 12, left, dtype, kernel_device)
    for step in range(1, 201):
        grad = layer.gradient(step)
        layer.exact_step(grad, step, 1 - 1e-3)
        take_step([layer], [grad], step, whole=whole, decay=1 - 1e-3)
    assert layer.error() < BOUND[dtype]
    for moment, exact in zip(layer.moments, layer.exact, strict=True):
        assert float((moment.double().cpu() - exact).norm() / exact.norm()) < BOUND[dtype]


def runs_library(dtype):
    return dtype == torch.float32 or os.environ.get("LOWRANK_TEST_KERNEL", "cpu") in ("cpu", "cuda")


@given(
    m=st.integers(1, 150), n=st.integers(1, 150), rank=st.integers(1, 40), left=st.booleans(),
    columns=st.tuples(st.booleans(), st.booleans(), st.booleans()), pad=st.sampled_from([0, 1, 8]),
    dtype=st.sampled_from(DTYPES), projected=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@examples
def test_any_shape_side_and_layout(kernel_device, m, n, rank, left, columns, pad, dtype, projected, seed):
    layer = Layer(m, n, rank, left, dtype, kernel_device, columns, pad, seed)
    for step in (1, 2):
        grad = layer.gradient(step, projected)
        layer.exact_step(grad, step, 0.999, projected)
        take_step([layer], [grad], step, projected=projected, decay=0.999)
    # of two steps the rounding of 16-bit weights is a tenth
    assert layer.error() < (BOUND[dtype] if dtype == torch.float32 else 0.1)
    for moment, exact in zip(layer.moments, layer.exact, strict=True):
        assert float((moment.double().cpu() - exact).norm() / exact.norm()) < (
            1e-5 if dtype == torch.float32 else 1e-2
        )


@pytest.mark.parametrize(("m", "n", "rank"), [(128, 256, 128), (129, 257, 65), (300, 40, 33), (512, 256, 16)])
@pytest.mark.parametrize("left", [False, True])
def test_sizes_around_the_tiles(kernel_device, m, n, rank, left):
    for dtype in (torch.float32, torch.bfloat16):
        layer = Layer(m, n, rank, left, dtype, kernel_device)
        grad = layer.gradient(1)
        layer.exact_step(grad, 1, 1.0)
        take_step([layer], [grad], 1)
        assert float((layer.moments[0].double().cpu() - layer.exact[0]).norm() / layer.exact[0].norm()) < 5e-3
        assert layer.error() < (BOUND[dtype] if dtype == torch.float32 else 3e-2)


def test_layers_of_one_call_are_those_of_many_calls(kernel_device):
    shapes = [(40, 30), (64, 64), (40, 30), (33, 70)] * 10
    together = [Layer(*shape, 8, False, torch.float32, kernel_device, seed=i) for i, shape in enumerate(shapes)]
    apart = [Layer(*shape, 8, False, torch.float32, kernel_device, seed=i) for i, shape in enumerate(shapes)]
    take_step(together, [x.gradient(1) for x in together], 1)
    for layer in apart:
        take_step([layer], [layer.gradient(1)], 1)
    assert all(torch.equal(x.weight, y.weight) for x, y in zip(together, apart, strict=True))


def test_threads_do_not_change_the_step(kernel_device):
    """Also with weights that require gradients: the threads do not inherit `no_grad`."""
    results = []
    threads = torch.get_num_threads()
    for count in (1, 3):
        layers = [Layer(600, 300, 16, left, torch.float32, kernel_device, seed=3) for left in (False, True)]
        torch.set_num_threads(count)
        try:
            for layer in layers:
                layer.weight = torch.nn.Parameter(layer.weight)
                with torch.no_grad():
                    take_step([layer], [layer.gradient(1)], 1)
        finally:
            torch.set_num_threads(threads)
        results.append([x.weight.detach() for x in layers])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("whole", [False, True])
def test_the_same_step_gives_the_same_bits(kernel_device, whole):
    layers = [Layer(150, 90, 20, False, torch.float32, kernel_device) for _ in range(3)]
    for layer in layers:
        for step in range(1, 6):
            take_step([layer], [layer.gradient(step)], step, whole=whole)
    assert all(torch.equal(layers[0].weight, x.weight) for x in layers[1:])


@given(
    m=st.integers(1, 140), n=st.integers(1, 140), rank=st.integers(1, 40), left=st.booleans(),
    projected=st.booleans(), whole=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@examples
def test_eight_bit_moments_are_the_references(kernel_device, m, n, rank, left, projected, whole, seed):
    codes = bitsandbytes_codes(kernel_device)
    ours, reference = (
        Layer(m, n, rank, left, torch.float32, kernel_device, seed=seed, eight_bit=True) for _ in range(2)
    )
    for step in (1, 2, 3):
        for layer, op in ((ours, None), (reference, fused_step.galore_step_)):
            take_step([layer], [layer.gradient(step, projected)], step, projected=projected, whole=whole,
                      codes=codes, op=op)  # fmt: skip
        for a, b in zip(ours.scales, reference.scales, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-4, atol=1e-12)
        # rounding decides between neighbours where a moment lies half way
        apart = [(a.int() - b.int()).abs() for a, b in zip(ours.moments, reference.moments, strict=True)]
        assert all(int(x.max()) <= 1 and float(x.float().mean()) < 0.02 for x in apart)
        # the next step begins from the same codes
        for a, b in zip(ours.moments, reference.moments, strict=True):
            a.copy_(b)


def test_eight_bit_moments_cost_no_more_than_those_of_bitsandbytes(kernel_device):
    """200 steps: the distance from the run with exact moments, ours and bitsandbytes' on the plain path."""
    from lowrank_cli.optim.adamw8bit import GaLoreAdamW8bit

    codes = bitsandbytes_codes(kernel_device)
    layer = Layer(96, 64, 16, False, torch.float32, kernel_device, eight_bit=True)
    weight = torch.nn.Parameter(layer.weight.clone())
    group = {"params": [weight], "rank": 16, "update_proj_gap": 1000, "scale": SCALE, "proj_type": "right"}
    peer = GaLoreAdamW8bit([group], lr=LR, eps=EPS[torch.float32], weight_decay=0.0, min_8bit_size=1)
    weight.grad = torch.zeros_like(weight)
    for step in range(1, 201):
        grad = layer.gradient(step)
        weight.grad = grad.clone()
        if step == 1:
            # the same basis on both sides
            peer.state[weight] = {"until_refresh": 1000, "basis_right": layer.basis.clone()}
        peer.step()
        layer.exact_step(grad, step, 1.0)
        take_step([layer], [grad], step, codes=codes)
    moved = (layer.exact_weight - layer.start).norm()
    theirs = float((weight.detach().double().cpu() - layer.exact_weight).norm() / moved)
    assert 0 < layer.error() < 1.1 * theirs


@pytest.mark.parametrize("eight_bit", [False, True])
def test_a_broken_gradient_shows_and_a_huge_one_is_cut(kernel_device, eight_bit):
    codes = bitsandbytes_codes(kernel_device) if eight_bit else ()
    layer = Layer(40, 40, 8, False, torch.float32, kernel_device, eight_bit=eight_bit)
    grad = layer.gradient(1)
    grad[3, 5] = 1e30
    take_step([layer], [grad], 1, codes=codes)
    assert bool(layer.weight.isfinite().all())
    grad[7, 2] = math.nan
    take_step([layer], [grad], 2, codes=codes)
    assert bool(layer.weight[7].isnan().all())
    state = layer.scales[0][7 * 8 // fused_step.BLOCK] if eight_bit else layer.moments[0][7]
    assert bool(state.isnan().all())


def test_wrong_arguments_are_refused(kernel_device):
    layer = Layer(40, 30, 8, False, torch.float32, kernel_device)
    grad = layer.gradient(1)
    for wrong in (grad[:20], grad.double(), grad.expand(2, 40, 30), grad[:, ::2].repeat(1, 2)[:, ::2]):
        with pytest.raises(RuntimeError, match="gradient"):
            take_step([layer], [wrong], 1)
    with pytest.raises(RuntimeError, match="strides"):
        take_step([layer], [grad.repeat(1, 2)[:, ::2]], 1)
    layer.moments[0] = layer.moments[0].mT.contiguous().mT
    with pytest.raises(RuntimeError, match="contiguous"):
        take_step([layer], [grad], 1)
    layer.moments[0] = layer.moments[0].contiguous().half()
    with pytest.raises(RuntimeError, match="moment"):
        take_step([layer], [grad], 1)


@given(
    m=st.integers(1, 40), groups=st.integers(1, 9), size=st.integers(1, 70), dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)  # fmt: skip
@examples
def test_velora_is_float64s(kernel_device, m, groups, size, dtype, seed):
    torch.manual_seed(seed)
    x = torch.randn(m, groups * size).to(dtype).to(kernel_device)
    vector = torch.nn.functional.normalize(torch.randn(size), dim=0).to(kernel_device)
    exact = x.double().unflatten(-1, (groups, size)) @ vector.double()
    bound = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}[dtype]
    got = OPS.velora_compress(x, vector)
    assert got.dtype == dtype
    assert float((got.double() - exact).norm()) <= bound * float(x.double().norm())

    weight, mean, square = x.clone(), *(torch.zeros(m, groups, device=kernel_device) for _ in range(2))
    exact_weight, exact_mean, exact_square = (t.double() for t in (weight, mean, square))
    for step in (1, 2):
        factor = torch.randn(m, groups, device=kernel_device)
        step_size, eps = fused_step.corrected(step=step, lr=LR, betas=BETAS, eps=1e-8)
        OPS.velora_step_(weight, factor, vector, mean, square, *BETAS, eps, step_size, 0.99)
        # Adam on the dense gradient, in float64
        exact_mean = BETAS[0] * exact_mean + (1 - BETAS[0]) * factor.double()
        exact_square = BETAS[1] * exact_square + (1 - BETAS[1]) * factor.double().square()
        v = vector.double()
        move = (exact_mean.unsqueeze(-1) * v) / ((exact_square.unsqueeze(-1) * v.square()).sqrt() + eps)
        exact_weight = 0.99 * (exact_weight - step_size * move.flatten(1))
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-5, atol=1e-7)
    # each step rounds the weight once
    rounding = torch.finfo(dtype).eps * exact_weight.norm()
    assert float((weight.double() - exact_weight).norm()) <= float(rounding + 1e-5 * (exact_weight - x).norm())


def test_opcheck_passes(kernel_device):
    layers = [Layer(20, 30, 4, True, torch.float32, kernel_device, seed=i) for i in range(2)]
    args = (
        [x.weight for x in layers], [x.gradient(1) for x in layers], [x.basis for x in layers],
        [x.moments[0] for x in layers], [x.moments[1] for x in layers], [], [], [], True, False, True,
        *BETAS, 1e-8, 1e-3, 1.0,
    )  # fmt: skip
    torch.library.opcheck(OPS.galore_step_.default, args)
    x, vector = torch.randn(6, 20, device=kernel_device), torch.randn(5, device=kernel_device)
    torch.library.opcheck(OPS.velora_compress.default, (x, vector))
    factor, moments = torch.randn(6, 4, device=kernel_device), torch.zeros(2, 6, 4, device=kernel_device)
    args = (x, factor, vector, moments[0].clone(), moments[1].clone(), *BETAS, 1e-8, 1e-3, 1.0)
    torch.library.opcheck(OPS.velora_step_.default, args)


def test_compile_traces_through_the_step(kernel_device):
    eager, traced = (Layer(20, 30, 4, False, torch.float32, kernel_device) for _ in range(2))

    def step(weight, grad, basis, mean, square):
        OPS.galore_step_([weight], [2 * grad], [basis], [mean], [square], [], [], [], False, False, True, *BETAS, 1e-8,
                         1e-3, 1.0)  # fmt: skip
        return weight.sum()

    grad = eager.gradient(1)
    expected = step(eager.weight, grad, eager.basis, *eager.moments)
    # the graph and its functional form, without a code generator
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(traced.weight, grad, traced.basis, *traced.moments), expected)
    assert torch.equal(traced.weight, eager.weight)
    assert torch.equal(traced.moments[1], eager.moments[1])
