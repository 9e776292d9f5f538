"""Composition from a vector bank and the linear that uses it: values and gradients against plain references."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.nn.functional import linear

from lowrank_cli.methods.vblora.bank import compose, compose_backward, pack, select, unpack
from lowrank_cli.ops.adapted_linear import Factors, adapted_linear, add_low_rank

pytestmark = pytest.mark.numerical


def by_hand(bank, logits, topk):
    """The paper's equations, one sub-vector after the other."""
    rows = []
    for row in logits:
        order = sorted(range(len(row)), key=lambda i: -float(row.detach()[i]))[:topk]
        weights = torch.softmax(torch.stack([row[i] for i in order]), 0)
        rows.append(sum(w * bank[i] for w, i in zip(weights, order, strict=True)))
    return torch.stack(rows)


@settings(max_examples=40, deadline=None)
@given(
    vectors=st.integers(1, 12), length=st.integers(1, 9), rows=st.integers(1, 15), topk=st.integers(1, 4),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_composition_and_its_backward_are_the_equations(vectors, length, rows, topk, seed):
    torch.manual_seed(seed)
    topk = min(topk, vectors)
    bank = torch.randn(vectors, length, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(rows, vectors, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(rows, length, dtype=torch.float64)
    expected = by_hand(bank, logits, topk)
    expected.backward(grad)
    indices, weights = select(logits.detach(), topk)
    assert torch.allclose(compose(bank.detach(), indices, weights), expected)
    grad_bank, grad_selected = compose_backward(grad, bank.detach(), indices, weights)
    assert torch.allclose(grad_bank, bank.grad)
    assert torch.allclose(torch.zeros_like(logits).scatter(1, indices, grad_selected), logits.grad)


def test_backward_agrees_with_finite_differences():
    torch.manual_seed(0)
    bank, logits = torch.randn(7, 5, dtype=torch.float64), torch.randn(11, 7, dtype=torch.float64)
    grad = torch.randn(11, 5, dtype=torch.float64)

    def loss(bank, logits):
        return float((compose(bank, *select(logits, 2)) * grad).sum())

    indices, weights = select(logits, 2)
    grad_bank, grad_selected = compose_backward(grad, bank, indices, weights)
    grad_logits = torch.zeros_like(logits).scatter(1, indices, grad_selected)
    eps = 1e-6
    for tensor, found, call in (
        (bank, grad_bank, lambda t: loss(t, logits)),
        (logits, grad_logits, lambda t: loss(bank, t)),
    ):
        for i in range(tensor.numel()):
            shift = torch.zeros(tensor.numel(), dtype=torch.float64)
            shift[i] = eps
            shift = shift.view_as(tensor)
            slope = (call(tensor + shift) - call(tensor - shift)) / (2 * eps)
            assert slope == pytest.approx(float(found.flatten()[i]), abs=1e-8)


@pytest.mark.parametrize(
    ("num_vectors", "dtype"),
    [(90, torch.uint8), (256, torch.uint8), (257, torch.int16), (2048, torch.int16), (2**15 + 1, torch.int32)],
)
@pytest.mark.parametrize("topk", [1, 2, 5])
def test_packed_selection_comes_back(num_vectors, dtype, topk):
    torch.manual_seed(0)
    indices, weights = select(torch.randn(40, num_vectors, dtype=torch.float64), topk)
    packed = pack(indices, weights, num_vectors)
    assert packed[0].dtype == dtype
    assert packed[1].shape == (40, topk - 1)
    again = unpack(*packed)
    assert torch.equal(again[0], indices)
    assert torch.allclose(again[1], weights, rtol=0, atol=1e-15)


def test_packed_weights_leave_a_last_one_that_is_not_negative():
    # softmax rounds: these sum to more than 1 in float32
    weights = torch.tensor([[0.6, 0.4000001, 0.0], [1.0, 0.0, 0.0], [0.5, 0.3, 0.2]])
    assert float(weights[0, :2].sum()) > 1
    kept = pack(torch.zeros(3, 3, dtype=torch.long), weights, 10)[1]
    assert bool((1 - kept.sum(-1) >= 0).all())
    assert torch.allclose(kept, weights[:, :2], atol=1e-6)
    assert torch.equal(kept[1:], weights[1:, :2])


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9)), n=st.integers(1, 13), m=st.integers(1, 11),
    rank=st.integers(1, 5), bias=st.booleans(), needs_dx=st.booleans(), in_place=st.booleans(),
    passes=st.integers(1, 3),
)  # fmt: skip
def test_adapted_linear_is_lora_without_its_factor(shape, n, m, rank, bias, needs_dx, in_place, passes):
    torch.manual_seed(0)
    double = {"dtype": torch.float64}
    weight, offset = torch.randn(m, n, **double), torch.randn(m, **double) if bias else None
    a, b = torch.randn(rank, n, **double), torch.randn(rank, m, **double)
    anchor = torch.zeros(1, requires_grad=True)
    factors = Factors(a, b, torch.zeros_like(a), torch.zeros_like(b), anchor)
    plain_a, plain_b = a.clone().requires_grad_(), b.clone().requires_grad_()
    for _ in range(passes):
        x = torch.randn(*shape, n, **double, requires_grad=needs_dx)
        x2 = x.detach().clone().requires_grad_()
        dy = torch.randn(*shape, m, **double)
        ours = (
            add_low_rank(linear(x, weight, offset), x, factors)
            if in_place
            else adapted_linear(x, weight, offset, factors)
        )
        expected = linear(x2, weight, offset) + linear(linear(x2, plain_a), plain_b.mT)
        assert torch.allclose(ours, expected)
        ours.backward(dy)
        expected.backward(dy)
        if needs_dx:
            assert torch.allclose(x.grad, x2.grad)
    # the sum over all passes
    assert torch.allclose(factors.grad_a, plain_a.grad)
    assert torch.allclose(factors.grad_b, plain_b.grad)
    assert anchor.grad is None


def test_factors_that_are_not_trained_collect_nothing():
    x = torch.randn(4, 3, requires_grad=True)
    factors = Factors(torch.randn(2, 3), torch.randn(2, 5), torch.zeros(2, 3), torch.zeros(2, 5), torch.zeros(1))
    adapted_linear(x, torch.randn(5, 3), None, factors).sum().backward()
    assert x.grad is not None
    assert not bool(factors.grad_a.any() | factors.grad_b.any())


def test_sixteen_bit_factors_collect_in_float32():
    torch.manual_seed(0)
    x, weight = torch.randn(8, 6).bfloat16(), torch.randn(5, 6).bfloat16()
    a, b = torch.randn(2, 6), torch.randn(2, 5)
    anchor = torch.zeros(1, requires_grad=True)
    factors = Factors(a.bfloat16(), b.bfloat16(), torch.zeros(2, 6), torch.zeros(2, 5), anchor)
    dy = torch.randn(8, 5)
    out = adapted_linear(x, weight, None, factors)
    assert out.dtype == torch.bfloat16
    out.backward(dy.bfloat16())
    assert torch.allclose(factors.grad_b, (x.float() @ a.mT).mT @ dy, rtol=0.05, atol=0.3)
    # what float32 sums keep and 16-bit ones lose: a small addition to a large sum
    before = factors.grad_b.clone()
    factors.grad_b.add_(1000)
    adapted_linear(x, weight, None, factors).backward(1e-3 * dy.bfloat16())
    assert not torch.equal(factors.grad_b, before + 1000)


def test_changed_factors_are_noticed_in_backward():
    x = torch.randn(4, 3, requires_grad=True)
    anchor = torch.zeros(1, requires_grad=True)
    factors = Factors(torch.randn(2, 3), torch.randn(2, 5), torch.zeros(2, 3), torch.zeros(2, 5), anchor)
    out = adapted_linear(x, torch.randn(5, 3), None, factors)
    factors.a.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
