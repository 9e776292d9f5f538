"""Projection to a basis and back, for every shape and type."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from lowrank_cli.optim.projection import PROJ_TYPES, project, sides
from lowrank_cli.optim.refresh import find_basis as svd_basis
from lowrank_cli.optim.write import expand_add_

pytestmark = pytest.mark.numerical

shapes = st.tuples(st.integers(1, 40), st.integers(1, 40))


def normal(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def bases_of(grad, rank, proj_type):
    return {side: svd_basis(grad, rank, side) for side in sides(grad.shape, proj_type)}


def test_std_projects_the_shorter_side_and_a_square_on_the_right():
    assert sides((63, 100), "std") == ("left",)
    assert sides((100, 63), "std") == ("right",)
    assert sides((64, 64), "std") == ("right",)
    assert sides((64, 64), "reverse_std") == ("left",)
    with pytest.raises(ValueError, match="proj_type is 'up'"):
        sides((2, 2), "up")


@settings(max_examples=60, deadline=None)
@given(shape=shapes, rank=st.integers(1, 50), proj_type=st.sampled_from(PROJ_TYPES), seed=st.integers(0, 99))
def test_project_and_expand_is_the_orthogonal_projection(shape, rank, proj_type, seed):
    expected = grad = normal(shape, seed)
    bases = bases_of(grad, rank, proj_type)
    for side, basis in bases.items():
        size = shape[0] if side == "left" else shape[1]
        assert basis.shape == (size, min(rank, *shape))
        projector = basis @ basis.mT
        assert torch.allclose(basis.mT @ basis, torch.eye(basis.shape[1], dtype=torch.float64), atol=1e-12)
        expected = projector @ expected if side == "left" else expected @ projector
    before = normal(shape, seed + 100)
    back = expand_add_(before.clone(), project(grad, bases), bases, alpha=0.5)
    assert torch.allclose(back, before + 0.5 * expected, rtol=0, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(shape=shapes, rank=st.integers(1, 20), proj_type=st.sampled_from(PROJ_TYPES))
def test_svd_basis_keeps_the_most_energy_that_a_rank_can(shape, rank, proj_type):
    grad = normal(shape)
    kept = float(project(grad, bases_of(grad, rank, proj_type)).norm() ** 2)
    best = float((torch.linalg.svdvals(grad)[:rank] ** 2).sum())
    assert kept == pytest.approx(best, rel=1e-10)


def test_basis_owns_only_its_columns():
    basis = svd_basis(torch.randn(64, 48), 4, "right")
    assert basis.untyped_storage().nbytes() == 48 * 4 * 4
    basis = svd_basis(torch.randn(48, 64), 4, "left")
    assert basis.untyped_storage().nbytes() == 48 * 4 * 4


def test_bfloat16_gradient_is_decomposed_in_float32():
    grad = torch.randn(40, 24).bfloat16()
    basis = svd_basis(grad, 8, "right")
    assert basis.dtype == torch.bfloat16
    exact = svd_basis(grad.float(), 8, "right")
    assert torch.equal(basis, exact.bfloat16())
