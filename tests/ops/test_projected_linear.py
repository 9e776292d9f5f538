"""The linear that projects in backward, against an ordinary linear and the projection of its full gradient."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from lowrank_cli.ops.projected_linear import projected_linear
from lowrank_cli.optim.projection import project

pytestmark = pytest.mark.numerical


def leaf(weight: torch.Tensor, bases: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return zeros that stand for a weight (m, n) in the coordinates of its bases."""
    return torch.zeros(project(weight.detach(), bases).shape, dtype=torch.promote_types(weight.dtype, torch.float32),
                       requires_grad=True)  # fmt: skip


def orthonormal(size: int, rank: int, dtype=torch.float64) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(size, rank, dtype=torch.float64)).Q.to(dtype)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from([(7,), (1, 7), (3, 5, 7), (2, 1, 4, 7)]), m=st.integers(1, 9), rank=st.integers(1, 7),
    used=st.sampled_from([("left",), ("right",), ("left", "right")]), bias=st.booleans(),
)  # fmt: skip
def test_output_and_every_gradient(shape, m, rank, used, bias):
    torch.manual_seed(0)
    n = shape[-1]
    bases = {side: orthonormal(m if side == "left" else n, min(rank, m, n)) for side in used}
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(m, n, dtype=torch.float64, requires_grad=True)
    b = torch.randn(m, dtype=torch.float64, requires_grad=True) if bias else None
    dy = torch.randn(*shape[:-1], m, dtype=torch.float64)
    y = torch.nn.functional.linear(x, weight, b)
    expected = torch.autograd.grad(y, [t for t in (x, weight, b) if t is not None], dy)
    z = leaf(weight, bases)
    ours = projected_linear(x, weight, b, bases, z)
    assert torch.equal(ours, y)
    ours.backward(dy)
    assert torch.allclose(x.grad, expected[0])
    assert weight.grad is None
    if bias:
        assert torch.allclose(b.grad, expected[2])
    assert torch.allclose(z.grad, project(expected[1], bases), atol=1e-12)


def test_bfloat16_within_its_precision():
    torch.manual_seed(0)
    x, weight, dy = torch.randn(64, 100), torch.randn(63, 100), torch.randn(64, 63)
    basis = orthonormal(100, 16, torch.float32)
    exact = project(dy.mT @ x, {"right": basis})
    half = weight.bfloat16().requires_grad_()
    bases = {"right": basis.bfloat16()}
    z = leaf(half, bases)
    y = projected_linear(x.bfloat16().requires_grad_(), half, None, bases, z)
    y.backward(dy.bfloat16())
    assert float((z.grad - exact).norm() / exact.norm()) < 1e-2


def test_right_side_keeps_the_projected_input_alone():
    torch.manual_seed(0)
    x, weight = torch.randn(50, 64, requires_grad=True), torch.randn(32, 64, requires_grad=True)
    basis, kept = orthonormal(64, 8, torch.float32), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        projected_linear(x, weight, None, {"right": basis}, leaf(weight, {"right": basis}))
    assert sorted(kept) == [(32, 64), (50, 8)]


def test_no_second_derivative_is_pretended():
    x, weight = torch.randn(4, 6, requires_grad=True), torch.randn(3, 6, requires_grad=True)
    bases = {"right": orthonormal(6, 2, torch.float32)}
    y = projected_linear(x, weight, None, bases, leaf(weight, bases))
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        dx.sum().backward()
