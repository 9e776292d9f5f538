"""The engines that find a basis: how much of the gradient they keep, and what they do with hostile ones."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from lowrank_cli import GaLoreAdamW
from lowrank_cli.optim.refresh import ENGINES, EXACT, align, engine_for, find_basis, overlap, subspace

pytestmark = pytest.mark.numerical


def decaying(m: int, n: int, seed: int = 0, rate: float = 0.9) -> torch.Tensor:
    """A matrix whose singular values fall by `rate` from one to the next."""
    generator = torch.Generator().manual_seed(seed)
    k = min(m, n)
    u = torch.linalg.qr(torch.randn(m, k, generator=generator)).Q
    v = torch.linalg.qr(torch.randn(n, k, generator=generator)).Q
    return u * rate ** torch.arange(k) @ v.mT


def kept(grad: torch.Tensor, basis: torch.Tensor, side: str) -> float:
    """The energy in the basis, as a share of the most that its rank can hold."""
    projected = basis.mT @ grad if side == "left" else grad @ basis
    return float(projected.norm() ** 2 / (torch.linalg.svdvals(grad)[: basis.shape[1]] ** 2).sum())


@settings(max_examples=80, deadline=None)
@given(
    m=st.integers(1, 40), n=st.integers(1, 40), rank=st.integers(1, 50), side=st.sampled_from(["left", "right"]),
    engine=st.sampled_from(list(ENGINES)), seed=st.integers(0, 9),
)  # fmt: skip
def test_every_engine_returns_an_orthonormal_basis_of_its_own(m, n, rank, side, engine, seed):
    grad = torch.randn(m, n, generator=torch.Generator().manual_seed(seed))
    basis = find_basis(grad, rank, side, engine)
    size, width = (m if side == "left" else n), min(rank, m, n)
    assert basis.shape == (size, width)
    assert torch.allclose(basis.mT @ basis, torch.eye(width), atol=1e-4)
    assert basis.untyped_storage().nbytes() == 4 * size * width
    again = find_basis(grad + 0.01 * grad.flip(0), rank, side, engine, old=basis)
    assert torch.allclose(again.mT @ again, torch.eye(width), atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", [(63, 100), (100, 63), (64, 64)])
@pytest.mark.parametrize("engine", list(ENGINES))
def test_engines_keep_what_the_svd_keeps(engine, shape, side):
    grad = decaying(*shape)
    basis = find_basis(grad, 16, side, engine)
    assert kept(grad, basis, side) > 0.98
    # and a gradient that has moved on is followed from the old basis
    moved = grad + 0.3 * decaying(*shape, seed=1)
    for _ in range(3):
        basis = find_basis(moved, 16, side, engine, old=basis)
    assert kept(moved, basis, side) > 0.98


@pytest.mark.parametrize("engine", list(ENGINES))
def test_aligned_engines_keep_the_old_basis_of_the_same_gradient(engine):
    # apart enough for power iterations to tell the directions from each other
    grad = decaying(48, 80, rate=0.5)
    old = find_basis(grad, 8, "left", engine)
    new = find_basis(grad, 8, "left", engine, old=old, keep_signs=True)
    # kept moments keep their meaning: column i is still about column i, with its sign
    assert float((new * old).sum(0).min()) > 0.99


def test_align_turns_every_vector_to_its_predecessors_side():
    torch.manual_seed(0)
    old = torch.linalg.qr(torch.randn(30, 5)).Q
    flipped = old * torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0])
    assert torch.equal(align(flipped, old), old)
    other = torch.linalg.qr(torch.randn(30, 5)).Q
    aligned = align(other, old)
    assert ((aligned * old).sum(0) >= 0).all()
    assert overlap(aligned, other) == pytest.approx(1, abs=1e-5)


def test_randomized_leaves_the_global_generator_alone_and_repeats():
    grad = decaying(40, 60)
    before = torch.get_rng_state()
    a, b = (find_basis(grad, 4, "left", "randomized", seed=3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a, b)


@pytest.mark.parametrize("engine", list(ENGINES))
@pytest.mark.parametrize("scale", [1e30, 1e-30, 3e38, 1e-38])
def test_scale_does_not_matter(engine, scale):
    grad = decaying(20, 30)
    if scale > 1e38:
        grad = grad / grad.abs().max()
    basis = find_basis(grad * scale, 4, "left", engine)
    assert torch.isfinite(basis).all()
    assert kept(grad, basis, "left") > 0.98


@pytest.mark.parametrize("engine", list(ENGINES))
def test_zero_and_rank_one_gradients(engine):
    zero = torch.zeros(20, 30)
    said = []
    assert torch.equal(find_basis(zero, 4, "left", engine, warn=said.append), torch.eye(20, 4))
    old = find_basis(decaying(20, 30), 4, "left", engine)
    assert torch.equal(find_basis(zero, 4, "left", engine, old=old, warn=said.append), old)
    assert said == []
    one = torch.outer(torch.arange(20.0), torch.ones(30))
    basis = find_basis(one, 4, "left", engine)
    assert torch.allclose(basis.mT @ basis, torch.eye(4), atol=1e-4)
    assert kept(one, basis, "left") > 0.999


@pytest.mark.parametrize("engine", list(ENGINES))
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_finite_is_named(engine, value):
    grad = decaying(20, 30)
    grad[3, 4] = value
    with pytest.raises(FloatingPointError, match="the gradient of layers.3.q_proj is not finite"):
        find_basis(grad, 4, "left", engine, name="layers.3.q_proj")


@pytest.mark.parametrize("engine", list(ENGINES))
def test_a_failing_decomposition_falls_back_and_says_so(engine, monkeypatch):
    grad = decaying(20, 30)
    old = find_basis(grad, 4, "left", engine)

    def fail(*args, **kwargs):
        raise torch.linalg.LinAlgError("did not converge")

    for name in ("svd", "qr"):
        monkeypatch.setattr(torch.linalg, name, fail)
    if engine != "gram":
        # the eigenproblem in float64 is left
        assert kept(grad, find_basis(grad, 4, "left", engine), "left") > 0.98
    monkeypatch.setattr(torch.linalg, "eigh", fail)
    said = []
    assert torch.equal(find_basis(grad, 4, "left", engine, old=old, name="q_proj", warn=said.append), old)
    assert said == [f"{engine} found no basis for q_proj: the old one stays"]


def test_bfloat16_gradients():
    grad = decaying(20, 30)
    for engine in ENGINES:
        basis = find_basis(grad.bfloat16(), 4, "right", engine)
        assert basis.dtype == torch.bfloat16
        assert kept(grad, basis.float(), "right") > 0.97


def test_warm_start_improves_on_a_flat_spectrum():
    torch.manual_seed(0)
    grad = torch.randn(60, 90, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(60, 15, dtype=torch.float64)).Q
    shares = [kept(grad, basis, "left")]
    for _ in range(12):
        basis = subspace(grad, "left", 15, basis, 0)
        shares.append(kept(grad, basis, "left"))
    assert shares == sorted(shares)
    assert shares[-1] > 0.9


def test_a_long_series_of_refreshes_says_how_far_it_is(monkeypatch):
    from lowrank_cli import GaLoreAdamW
    from lowrank_cli.optim import projected

    said = []
    monkeypatch.setattr(projected.console, "note", said.append)
    monkeypatch.setattr(projected, "TELL_EVERY_S", 0.0)
    weights = [torch.nn.Parameter(torch.randn(6, 4)) for _ in range(4)]
    optimizer = GaLoreAdamW([{"params": weights, "rank": 2}], lr=1e-3)
    for weight in weights:
        weight.grad = torch.randn(6, 4)
    optimizer.step()
    assert said == [f"refreshing bases (svd): {left} of 4 to go" for left in (3, 2, 1)]


def test_auto_is_exact_up_to_a_size():
    assert [engine_for("auto", shape) for shape in ((EXACT, 9999), (9999, EXACT + 1))] == ["gram", "randomized"]
    assert engine_for("subspace", (9999, 9999)) == "subspace"
    ends = []
    for engine in ("auto", "gram"):
        weight = torch.nn.Parameter(torch.zeros(20, 30))
        optimizer = GaLoreAdamW([{"params": [weight], "rank": 4, "refresh": engine}], lr=0.1)
        weight.grad = decaying(20, 30)
        optimizer.step()
        ends.append(weight.detach())
    assert ends[0].equal(ends[1])
