"""The search for values that are not finite, over dtypes and shapes."""

import math

import pytest
import torch

from lowrank_cli.ops.finite import first_non_finite

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (63, 100), (3, 5, 7), (70_000,)])
def test_names_the_tensor(dtype, shape, value):
    sound = torch.full(shape, -2.0, dtype=dtype)
    broken = sound.clone()
    broken.view(-1)[-1] = value
    assert first_non_finite([("a", sound), ("b", broken), ("c", sound)]) == "b"
    assert first_non_finite([("a", sound), ("c", sound.clone())]) == ""


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_value_is_finite(dtype):
    assert first_non_finite([("a", torch.full((9,), torch.finfo(dtype).max, dtype=dtype))]) == ""


def test_the_first_of_several_dtypes():
    nan = torch.tensor([math.nan])
    tensors = [("a", torch.ones(3)), ("b", nan.double()), ("c", nan), ("d", nan.bfloat16())]
    assert first_non_finite(tensors) == "b"


def test_a_view_that_is_not_contiguous():
    whole = torch.zeros(6, 8)
    whole[3, 5] = math.nan
    assert first_non_finite([("a", whole[:, ::2]), ("b", whole.mT[1::2])]) == "b"


def test_leaves_out_what_has_no_values_or_cannot_be_broken():
    tensors = [
        ("empty", torch.empty(0, 4)),
        ("integers", torch.ones(3, dtype=torch.int8)),
        ("flags", torch.ones(3, dtype=torch.bool)),
        ("meta", torch.empty(3, device="meta")),
        ("fp8", torch.ones(3).to(torch.float8_e4m3fn)),
    ]
    assert first_non_finite(tensors) == ""
    assert first_non_finite([*tensors, ("last", torch.tensor(math.nan))]) == "last"
    assert first_non_finite([]) == ""


def test_parameters_that_train():
    p = torch.nn.Parameter(torch.tensor([1.0, math.nan]))
    assert first_non_finite([("p", p)]) == "p"
    assert p.grad is None
