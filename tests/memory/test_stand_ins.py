"""The tracker and the workspace of kernels, each against what torch's allocator gives out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.profiler import ProfilerActivity, profile

from lowrank_cli.memory.shapes import result_of
from lowrank_cli.memory.tracker import TEMPORARY, Tracker


def allocated(work) -> int:
    """The most that torch's CPU allocator gave out inside `work`, in bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def tracked(work) -> float:
    """The same of a Tracker."""
    tracker = Tracker()
    tracker.mark("all")
    with tracker:
        work()
    return tracker.peaks()[0].total


@pytest.mark.parametrize("engine", [torch.linalg.svd, torch.linalg.qr, torch.linalg.eigh])
@pytest.mark.parametrize("shape", [(256, 256), (688, 256), (256, 688)])
def test_decompositions_take_their_workspace(engine, shape):
    if engine is torch.linalg.eigh:
        shape = (min(shape), min(shape))
    more = {"full_matrices": False} if engine is torch.linalg.svd else {}
    real = torch.randn(shape)
    real = real @ real.mT if engine is torch.linalg.eigh else real
    meta = real.to("meta")
    assert tracked(lambda: engine(meta, **more)) == pytest.approx(allocated(lambda: engine(real, **more)), rel=0.1)


def test_8_bit_moments_take_their_workspace():
    from bitsandbytes import functional

    codes = [functional.create_dynamic_map(signed=signed) for signed in (True, False)]

    def step(device):
        n = 1 << 16
        grad, p = torch.zeros(n, device=device), torch.zeros(n, device=device)
        moments = [torch.zeros(n, dtype=torch.uint8, device=device) for _ in range(2)]
        scales = [torch.zeros(n // 256, device=device) for _ in range(2)]
        numbers = (0.9, 0.99, 0.0, 0.0, 1e-8, 1, 1e-3)
        tables = [code.to(device) for code in codes]
        torch.ops.bitsandbytes.optimizer_update_8bit_blockwise(
            "adam", grad, p, *moments, *numbers, *tables, *scales, 0.0, 1.0, False
        )

    step("cpu")
    assert tracked(lambda: step("meta")) == pytest.approx(allocated(lambda: step("cpu")), rel=0.02)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=4),
    tokens=st.integers(1, 64),
    bias=st.booleans(),
    activation=st.sampled_from([nn.ReLU, nn.SiLU, nn.Tanh, nn.Identity]),
)
def test_counts_what_autograd_saves_and_frees(sizes, tokens, bias, activation):
    def passes(device):
        layers = [nn.Linear(m, n, bias=bias, device="meta") for m, n in zip([7, *sizes], sizes, strict=False)]
        net = nn.Sequential(*(part for layer in layers for part in (layer, activation()))).to_empty(device=device)
        for _ in range(2):
            net(torch.zeros(tokens, 7, device=device)).square().sum().backward()

    real, ours = allocated(lambda: passes("cpu")), tracked(lambda: passes("meta"))
    assert ours == pytest.approx(real, abs=64)


def test_a_storage_counts_once_until_its_last_tensor_dies():
    tracker = Tracker()
    with tracker:
        tracker.mark("first")
        whole = torch.empty(100, device="meta")
        view = whole[:10]
        del whole
        tracker.mark("view")
        more = torch.empty(50, device="meta")
        del view, more
        tracker.mark("after")
        torch.empty(10, device="meta")
    assert [peak.total for peak in tracker.peaks()] == [400, 600, 40]
    assert tracker.peaks()[2].bytes_by_label[TEMPORARY] == 40


def test_cuda_allocations_are_rounded_up():
    tracker = Tracker(block=512)
    tracker.mark("all")
    with tracker:
        kept = [torch.empty(1, device="meta"), torch.empty(129, device="meta")]
    assert tracker.peaks()[0].total == 512 + 1024
    del kept


def test_a_result_is_made_again_only_where_it_is_a_new_tensor():
    x = torch.empty(6, 4, device="meta")
    ops = torch.ops.aten
    calls = [
        (ops.mul.Tensor, (x, x)), (ops.mm.default, (x, x.mT)), (ops.t.default, (x,)), (ops.view.default, (x, [24])),
        (ops._to_copy.default, (x,), {"dtype": torch.bfloat16}), (ops.clone.default, (x.mT,)),
        (ops.native_layer_norm.default, (x, [4], None, None, 1e-5)), (ops.sum.dim_IntList, (x, [0], True)),
        (ops.add.Tensor, (x, 1)), (ops.add.Tensor, (x, 1.0)), (ops.eq.Scalar, (x, True)),
    ]  # fmt: skip
    for func, args, *more in calls:
        expected = func(*args, **(more[0] if more else {}))
        for _ in range(2):
            found = result_of(func, args, more[0] if more else {})
            pairs = zip(found, expected, strict=True) if isinstance(expected, tuple) else [(found, expected)]
            for one, other in pairs:
                assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)
                assert one.untyped_storage().nbytes() == other.untyped_storage().nbytes()
        if func in (ops.t.default, ops.view.default):
            assert found.untyped_storage()._cdata == x.untyped_storage()._cdata
    # values are read, not remembered
    for value in (1.0, 2.0):
        assert result_of(ops.mul.Tensor, (torch.tensor(value), 3), {}).item() == 3 * value


def test_a_mask_of_padding_is_not_all_set_and_other_flags_are():
    mask, grad = torch.empty(2, 5, dtype=torch.int64, device="meta"), torch.empty(2, 5, device="meta")
    tracker = Tracker()
    with tracker:
        tracker.pad(mask)
        assert not mask.all()
        assert not mask.to(torch.bool)[:, :3].all()
        assert grad.isfinite().all()
        assert (grad == grad).all()
