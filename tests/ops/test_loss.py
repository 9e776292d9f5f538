"""The chunked loss against torch's own cross-entropy in float64: values, gradients, and what it allocates."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowrank_cli.ops.loss import CHUNK_ELEMENTS, chunked_cross_entropy, num_targets

pytestmark = pytest.mark.numerical


def problem(n, d, v, *, ignored=0.3, dtype=torch.float64, seed=0, bias=False):
    """hidden (n, d), weight (v, d), labels (n,) with a share of -100, and a bias (v,) or None."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(v, d, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(v, (n,), generator=generator)
    labels[torch.rand(n, generator=generator) < ignored] = -100
    b = torch.randn(v, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() if bias else None
    return hidden, weight, labels, b


def reference(hidden, weight, labels, bias=None, scale=1.0, cap=None):
    """Value and gradients by F.cross_entropy in float64, of the same (rounded) inputs."""
    leaves = [x.detach().double().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    logits = scale * F.linear(*leaves)
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    total = F.cross_entropy(logits, labels, reduction="sum")
    loss = total / max(1, int((labels != -100).sum()))
    return loss.detach(), torch.autograd.grad(loss, leaves)


def value_and_grads(hidden, weight, labels, bias=None, **options):
    loss = chunked_cross_entropy(hidden, weight, labels, bias=bias, **options)
    return loss.detach(), torch.autograd.grad(loss, [x for x in (hidden, weight, bias) if x is not None])


def assert_equal(loss, grads, expected, expected_grads):
    """Check a float64 loss and its gradients."""
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(list(grads), list(expected_grads), rtol=1e-12, atol=1e-12)


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation made; a view makes none."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            self.numel = max([self.numel, *sizes])
        return result


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(1, 23),
    st.integers(1, 9),
    st.integers(2, 41),
    st.data(),
    st.booleans(),
    st.sampled_from([0.0, 0.4, 1.0]),
)
def test_equals_float64_cross_entropy_for_any_size_and_chunk(n, d, v, data, bias, ignored):
    chunk = data.draw(st.integers(1, n + 3), label="chunk_tokens")
    inputs = problem(n, d, v, ignored=ignored, bias=bias, seed=n * d + v)
    loss, grads = value_and_grads(*inputs, chunk_tokens=chunk)
    assert loss.shape == ()
    assert_equal(loss, grads, *reference(*inputs))


TAILS = [(1.0, None), (0.25, None), (-3.0, None), (1.0, 2.0), (0.7, 1.5), (-0.7, 1.5)]


@pytest.mark.parametrize(("scale", "cap"), TAILS)
@pytest.mark.parametrize("bias", [False, True])
def test_scaled_and_capped_logits(scale, cap, bias):
    inputs = problem(19, 4, 13, bias=bias)
    loss, grads = value_and_grads(*inputs, scale=scale, cap=cap, chunk_tokens=5)
    assert_equal(loss, grads, *reference(*inputs, scale=scale, cap=cap))


@pytest.mark.parametrize(("scale", "cap"), TAILS)
def test_scaled_and_capped_bfloat16_is_close(scale, cap):
    inputs = problem(129, 16, 50, dtype=torch.bfloat16)
    loss, grads = value_and_grads(*inputs, scale=scale, cap=cap)
    expected, expected_grads = reference(*inputs, scale=scale, cap=cap)
    # logits of 16 products are rounded to 8 bits once, their function is not
    torch.testing.assert_close(loss.double(), expected, rtol=2**-6, atol=0)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        assert (grad.double() - wanted).norm() <= 2**-5 * wanted.norm()


def test_a_head_of_262144_entries_holds_a_quarter_of_the_logits_of_256_tokens():
    n, v = 256, 2**18  # Gemma 3's vocabulary
    hidden, weight, labels, _ = problem(n, 1, v, dtype=torch.float32, ignored=0)
    with LargestTensor() as largest, torch.no_grad():
        chunked_cross_entropy(hidden, weight, labels, cap=30.0)
    # and as much for any number of tokens; the model's own are tokens x vocabulary
    assert largest.numel == CHUNK_ELEMENTS == n * v / 4


@pytest.mark.parametrize(("scale", "cap"), TAILS)
@pytest.mark.parametrize("chunk", [1, 3, 5, 64])
@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck(chunk, bias, scale, cap):
    hidden, weight, labels, b = problem(5, 3, 7, dtype=torch.float64, bias=bias)
    leaves = [x for x in (hidden, weight, b) if x is not None]

    def loss(hidden, weight, bias=None):
        return chunked_cross_entropy(hidden, weight, labels, bias=bias, scale=scale, cap=cap, chunk_tokens=chunk)

    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_one_large_and_odd_problem_in_the_default_chunk(dtype):
    inputs = problem(301, 63, 1001, dtype=dtype)
    loss, grads = value_and_grads(*inputs)
    assert loss.dtype == dtype
    # means of three hundred terms and sums of a thousand products, whose rounding adds up as its root
    limit = 1000**0.5 * torch.finfo(dtype).eps
    expected, expected_grads = reference(*inputs)
    for got, wanted in zip((loss, *grads), (expected, *expected_grads), strict=True):
        assert float((got.double() - wanted).norm()) < limit * float(wanted.norm())


def test_shifts_the_labels_of_a_batch_of_sequences():
    hidden, weight, labels, _ = problem(21, 8, 11)
    hidden, labels = hidden.detach().view(3, 7, 8).requires_grad_(), labels.view(3, 7)
    loss, grads = value_and_grads(hidden, weight, labels, chunk_tokens=4)
    flat = hidden[:, :-1].reshape(-1, 8)
    grads_of_rows = grads[0][:, :-1].reshape(-1, 8), grads[1]
    assert_equal(loss, grads_of_rows, *reference(flat, weight, labels[:, 1:].flatten()))
    assert not grads[0][:, -1].any()


def test_takes_hidden_states_that_are_not_contiguous():
    hidden, weight, labels, _ = problem(12, 6, 9, ignored=0)
    strided = hidden.detach().view(3, 4, 6).transpose(0, 1).requires_grad_()
    labels = labels.view(3, 4).t()
    assert not strided.is_contiguous()
    loss, grads = value_and_grads(strided, weight, labels)
    again, again_grads = value_and_grads(strided.detach().contiguous().requires_grad_(), weight, labels.contiguous())
    assert torch.equal(loss, again)
    assert all(map(torch.equal, grads, again_grads))


@pytest.mark.parametrize("chunk", [7, 1000])
def test_bfloat16_stays_close_and_adds_up_weight_gradients_in_float32(chunk):
    hidden, weight, labels, bias = problem(257, 32, 100, dtype=torch.bfloat16, bias=True)
    loss, grads = value_and_grads(hidden, weight, labels, bias, chunk_tokens=chunk)
    expected, expected_grads = reference(hidden, weight, labels, bias)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-2, atol=0)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        assert grad.dtype == torch.bfloat16
        assert (grad.double() - wanted).norm() <= 1e-2 * wanted.norm()


def test_hidden_states_of_another_dtype_than_the_weight():
    hidden, weight, labels, _ = problem(19, 8, 13, dtype=torch.float32)
    hidden = hidden.detach().bfloat16().requires_grad_()
    loss, (grad_hidden, grad_weight) = value_and_grads(hidden, weight, labels)
    expected, expected_grads = reference(hidden, weight, labels)
    assert (grad_hidden.dtype, grad_weight.dtype) == (torch.bfloat16, torch.float32)
    # sums of thirteen in float32; gradients of hidden states are rounded to bfloat16
    assert float(loss) == pytest.approx(float(expected), rel=13 * 2**-24)
    assert (grad_weight.double() - expected_grads[1]).norm() <= 13 * 2**-24 * expected_grads[1].norm()
    assert (grad_hidden.double() - expected_grads[0]).norm() <= 2**-8 * expected_grads[0].norm()


def test_autocast_around_it_changes_nothing():
    inputs = problem(19, 8, 13, dtype=torch.float32)
    plain = value_and_grads(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = value_and_grads(*inputs)
    torch.testing.assert_close(cast, plain, rtol=0, atol=0)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_micro_batches_with_the_updates_number_of_targets_add_up(as_tensor):
    hidden, weight, labels, _ = problem(24, 8, 11, ignored=0)
    hidden, labels = hidden.detach().view(4, 6, 8), labels.view(4, 6)
    labels[0, 1:] = -100
    labels[1, 3:] = -100
    total = num_targets(labels)
    assert num_targets(labels[:2]) != num_targets(labels[2:])
    whole, whole_grads = value_and_grads(hidden.requires_grad_(), weight, labels)
    parts = []
    for rows in (slice(0, 2), slice(2, 4)):
        part = hidden.detach()[rows].requires_grad_()
        count = total if as_tensor else int(total)
        parts.append(value_and_grads(part, weight, labels[rows], num_targets=count, chunk_tokens=3))
    (first, (hidden_a, weight_a)), (second, (hidden_b, weight_b)) = parts
    assert_equal(first + second, (torch.cat([hidden_a, hidden_b]), weight_a + weight_b), whole, whole_grads)


@pytest.mark.parametrize("count", [None, 0, 5, torch.tensor(0)])
def test_no_target_is_a_loss_of_zero_with_zero_gradients(count):
    hidden, weight, labels, bias = problem(9, 4, 6, ignored=1.0, bias=True)
    loss, grads = value_and_grads(hidden, weight, labels, bias, num_targets=count)
    assert loss.item() == 0
    assert not any(grad.any() for grad in grads)


def test_a_second_backward_gives_the_same_gradients():
    hidden, weight, labels, _ = problem(9, 4, 6)
    loss = chunked_cross_entropy(hidden, weight, labels)
    first = torch.autograd.grad(3 * loss, [hidden, weight], retain_graph=True)
    second = torch.autograd.grad(3 * loss, [hidden, weight])
    assert all(map(torch.equal, first, second))


def test_only_the_gradients_that_are_needed_are_formed():
    hidden, weight, labels, bias = problem(9, 4, 6, bias=True)
    expected, (wanted_hidden, wanted_weight, _) = reference(hidden, weight, labels, bias)
    loss = chunked_cross_entropy(hidden, weight.detach(), labels, bias=bias.detach())
    assert_equal(loss, torch.autograd.grad(loss, [hidden]), expected, [wanted_hidden])
    loss = chunked_cross_entropy(hidden.detach(), weight, labels, bias=bias.detach())
    assert_equal(loss, torch.autograd.grad(loss, [weight]), expected, [wanted_weight])
    assert not chunked_cross_entropy(hidden.detach(), weight.detach(), labels).requires_grad


def test_never_holds_tokens_by_vocabulary():
    n, d, v, chunk = 200, 8, 500, 16
    hidden, weight, labels, _ = problem(n, d, v)
    with LargestTensor() as largest:
        chunked_cross_entropy(hidden, weight, labels, chunk_tokens=chunk).backward()
    assert largest.numel == chunk * v  # the logits of a chunk; n x v would be 12 times that
    with LargestTensor() as plain:
        F.cross_entropy(hidden @ weight.t(), labels)
    assert plain.numel == n * v


def test_default_chunk_bounds_the_logits():
    v = CHUNK_ELEMENTS // 3  # three tokens fill a chunk
    hidden, weight, labels, _ = problem(8, 1, v, ignored=0)
    with LargestTensor() as largest, torch.no_grad():
        chunked_cross_entropy(hidden, weight, labels)
    assert largest.numel == 3 * v <= CHUNK_ELEMENTS


def test_padding_costs_nothing():
    hidden, weight, labels, _ = problem(64, 4, 50, ignored=0)
    labels[8:] = -100
    with LargestTensor() as largest:
        chunked_cross_entropy(hidden, weight, labels).backward()
    assert largest.numel == 8 * 50


def test_without_gradients_no_buffer_for_them_is_made():
    hidden, weight, labels, _ = problem(64, 32, 50)
    with LargestTensor() as largest, torch.no_grad():
        loss = chunked_cross_entropy(hidden, weight, labels, chunk_tokens=2)
    assert largest.numel < min(hidden.numel(), weight.numel())
    torch.testing.assert_close(loss, reference(hidden, weight, labels)[0], rtol=1e-12, atol=0)


def test_large_logits_do_not_overflow():
    hidden, weight, labels, _ = problem(9, 4, 6, ignored=0)
    loss, grads = value_and_grads((hidden * 1e4).detach().requires_grad_(), weight, labels)
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in grads)


def test_num_targets_counts_what_the_loss_sees():
    labels = torch.tensor([[5, 1, -100], [-100, -100, 2]])
    assert num_targets(labels).item() == 2
    assert num_targets(labels[0]).item() == 2
    assert num_targets(labels).dtype == torch.int64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(3, dtype=torch.long)}, r"hidden is \(4, 2\) and labels \(3,\)"),
        ({"hidden": torch.zeros(2), "labels": torch.tensor(0)}, r"allowed are \(N, D\)"),
        ({"weight": torch.zeros(5, 3)}, r"weight is \(5, 3\); for this hidden size it must be \(V, 2\)"),
        ({"bias": torch.zeros(4)}, r"bias is \(4,\); for this weight it must be \(5,\)"),
        ({"chunk_tokens": 0}, "chunk_tokens is 0; it must be at least 1"),
    ],
)
def test_says_what_does_not_fit(change, message):
    fitting = {"hidden": torch.zeros(4, 2), "weight": torch.zeros(5, 2), "labels": torch.zeros(4, dtype=torch.long)}
    with pytest.raises(ValueError, match=message):
        chunked_cross_entropy(**(fitting | change))


def test_a_label_outside_the_vocabulary_is_an_error():
    with pytest.raises(RuntimeError, match="out of bounds"):
        chunked_cross_entropy(torch.zeros(2, 3), torch.zeros(5, 3), torch.tensor([0, 5]))


def test_a_derivative_of_the_gradient_is_refused():
    hidden, weight, labels, _ = problem(5, 3, 7)
    (grad,) = torch.autograd.grad(chunked_cross_entropy(hidden, weight, labels), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        grad.sum().backward()
