"""Singular values and weighted truncation against torch's own decomposition and the error that they promise."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_cli.errors import LowrankError
from lowrank_cli.svd.spectrum import Decomposition, decompose, effective_rank, singular_values

pytestmark = pytest.mark.numerical

SHAPES = [(64, 64), (63, 100), (100, 63), (5, 1), (1, 7)]


def matrix(m: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def moment(size: int, seed: int) -> torch.Tensor:
    rows = matrix(4 * size, size, seed) * torch.logspace(0, -2, size)
    return (rows.T @ rows / len(rows)).double()


def damped(a: torch.Tensor, damping: float) -> torch.Tensor:
    return a + damping * a.diagonal().mean() * torch.eye(len(a), dtype=a.dtype)


def root(a: torch.Tensor) -> torch.Tensor:
    """The symmetric square root, by numpy: another one than the Cholesky factor of the code."""
    values, vectors = np.linalg.eigh(a.numpy())
    return torch.from_numpy(vectors * np.sqrt(values) @ vectors.T)


@settings(deadline=None, max_examples=40)
@given(m=st.integers(1, 60), n=st.integers(1, 60), scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e20]))
def test_values_are_torchs(m, n, scale):
    weight = matrix(m, n).double() * scale
    expected = torch.linalg.svdvals(weight)
    torch.testing.assert_close(singular_values(weight), expected, rtol=1e-6, atol=1e-7 * float(expected[0]))
    torch.testing.assert_close(decompose(weight).values, expected, rtol=1e-6, atol=1e-7 * float(expected[0]))


def test_small_values_are_right_to_a_thousandth():
    # a value of 1e-3 of the largest and one of 1e-5: float32 Gram matrices lose the second
    u, v = torch.linalg.qr(matrix(80, 80)).Q, torch.linalg.qr(matrix(120, 80, 1)).Q
    true = torch.logspace(0, -5, 80, dtype=torch.float64)
    found = singular_values((u.double() * true) @ v.double().T)
    assert float(((found - true) / true).abs().max()) < 1e-3


@pytest.mark.parametrize("shape", SHAPES)
def test_factors_have_the_error_of_the_values_that_were_cut(shape):
    weight = matrix(*shape)
    found = decompose(weight)
    for rank in {1, max(1, min(shape) // 2), min(shape)}:
        first, second = found.factors(weight, rank)
        assert first.shape == (shape[0], rank)
        assert second.shape == (rank, shape[1])
        error = float((first.double() @ second.double() - weight.double()).norm())
        cut = float(found.values[rank:].square().sum().sqrt())
        assert error == pytest.approx(cut, rel=1e-4, abs=1e-4)


def test_unweighted_factors_are_u_root_s_and_root_s_v():
    weight = matrix(30, 50)
    first, second = decompose(weight).factors(weight, 7)
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    signs = torch.sign((first.double() * u[:, :7]).sum(0))
    torch.testing.assert_close(first.double() * signs, u[:, :7] * s[:7].sqrt(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(second.double() * signs[:, None], s[:7].sqrt()[:, None] * vh[:7], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sides", ["input", "output", "both"])
@pytest.mark.parametrize("shape", [(40, 40), (40, 70), (70, 40)])
def test_weighted_truncation_is_the_optimum_of_the_weighted_error(shape, sides):
    m, n = shape
    weight = matrix(m, n).double()
    a = moment(n, 1) if sides != "output" else None
    b = moment(m, 2) if sides != "input" else None
    found = decompose(weight, a, b, damping=1e-4)
    left = torch.eye(m, dtype=torch.float64) if b is None else root(damped(b, 1e-4))
    right = torch.eye(n, dtype=torch.float64) if a is None else root(damped(a, 1e-4))
    expected = torch.linalg.svdvals(left @ weight @ right)
    torch.testing.assert_close(found.values, expected, rtol=1e-5, atol=1e-7 * float(expected[0]))
    first, second = found.factors(weight, 11)
    error = float((left @ (first.double() @ second.double() - weight) @ right).norm())
    # Eckart and Young: no matrix of rank 11 can do better
    assert error == pytest.approx(float(expected[11:].square().sum().sqrt()), rel=1e-4)


def test_weighting_is_better_on_the_inputs_that_occur():
    weight, a = matrix(40, 60), moment(60, 3)
    x = matrix(500, 60, 4).double() @ root(a)

    def error(found: Decomposition) -> float:
        first, second = found.factors(weight, 10)
        return float((x @ (first.double() @ second.double() - weight.double()).T).norm())

    assert error(decompose(weight, a)) < 0.8 * error(decompose(weight))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_refuses_what_is_not_finite(bad):
    weight = matrix(4, 4)
    weight[1, 2] = bad
    with pytest.raises(LowrankError, match="not finite"):
        decompose(weight)
    with pytest.raises(LowrankError, match="not finite"):
        singular_values(weight)
    with pytest.raises(LowrankError, match="not finite"):
        decompose(matrix(4, 4), input_moment=weight)


def test_zeros_have_zero_values_and_factors():
    weight = torch.zeros(5, 8)
    found = decompose(weight)
    first, second = found.factors(weight, 2)
    assert float(found.values.abs().max()) == 0
    assert float((first @ second).abs().max()) == 0


def test_a_moment_of_an_input_that_is_never_used_is_no_error():
    weight = matrix(6, 8)
    found = decompose(weight, torch.zeros(8, 8))
    torch.testing.assert_close(found.values, torch.linalg.svdvals(weight.double()), rtol=1e-6, atol=1e-9)


def test_effective_rank_of_equal_values_is_their_number():
    assert effective_rank(torch.ones(12)) == pytest.approx(12)
    assert effective_rank(torch.tensor([3.0, 0, 0])) == pytest.approx(1)
