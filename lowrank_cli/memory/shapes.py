"""The results of ops on the meta device, remembered by the shapes of the arguments.

Torch works the shape of a result out in Python, which takes up to a hundred times as long as making the tensor. The
updates of a run consist of the same few hundred calls over and over.
"""

from __future__ import annotations

import torch
from torch import Tensor

# (op, arguments) -> whether the result is a tuple, and size, stride and dtype of its tensors; None: ask the op
_known: dict[tuple, tuple[bool, tuple] | None] = {}


def result_of(func, args: tuple, kwargs: dict):
    """Call an op, or make its result anew if it has been called with arguments of the same shapes before.

    Only results that are new meta tensors are remembered: a view of an argument is made by the op each time.
    """
    given: list[Tensor] = []
    try:
        key = (
            (func, _shapes(args, given), _shapes(tuple(kwargs.items()), given))
            if kwargs
            else (func, _shapes(args, given))
        )
        known = _known.get(key, ())
    except TypeError:
        # an argument with values, or one that cannot be a key, such as a random generator
        return func(*args, **kwargs)
    if known:
        several, shapes = known
        made = tuple([_empty(*shape) for shape in shapes])
        return made if several else made[0]
    result = func(*args, **kwargs)
    if known is not None:
        _known[key] = _remembered(result, {_storage(tensor) for tensor in given})
    return result


def _remembered(result, storages: set[int]) -> tuple[bool, tuple] | None:
    """Return what is remembered of a result; None unless it is new tensors alone, each with a storage of its own."""
    several = isinstance(result, tuple)
    shapes = []
    for tensor in result if several else (result,):
        if not isinstance(tensor, Tensor) or tensor.device.type != "meta" or _storage(tensor) in storages:
            return None
        shape = tensor.size(), tensor.stride(), tensor.dtype
        if _empty(*shape).untyped_storage().nbytes() != tensor.untyped_storage().nbytes():
            return None
        storages.add(_storage(tensor))
        shapes.append(shape)
    return several, tuple(shapes)


def _shapes(values: tuple | list, given: list[Tensor]) -> tuple:
    """A key that is equal for arguments of equal shapes; adds the tensors among them to `given`."""
    key = []
    for value in values:
        if isinstance(value, Tensor):
            if not value.is_meta:
                raise TypeError("a tensor with values")
            given.append(value)
            key += value.size(), value.stride(), value.dtype
        elif isinstance(value, (tuple, list)):
            key.append(_shapes(value, given))
        else:
            # 1, 1.0 and True are equal, but do not give results of the same type
            key += type(value), value
    return tuple(key)


def _empty(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device="meta")


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
