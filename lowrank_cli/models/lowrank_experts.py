"""Experts in low-rank form: what stands in the place of a weight that an architecture's own code multiplies by.

Shapes: Transformers keeps the weights of E experts as one parameter W, (E, m, n), as the architecture's code stores
them: (E, out, in), or (E, in, out). Of rank r,

    LowRankStack     W[e] = A[e] B[e]      A (E, m, r), B (E, r, n)      E r (m + n) parameters

No forward of an architecture is written anew. Its code goes on to take `weight[expert]` or `weight.transpose(1, 2)`
and to multiply by that; torch asks an object that is no tensor what to do (`__torch_function__`), and it answers a
product by two small ones. Whatever else is done with it is done with the whole weight, so that it is always right.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

# functions that multiply a tensor and a matrix, or a stack of them, by their names: not every torch has all
PRODUCTS = frozenset({"linear", "matmul", "mm", "bmm", "_grouped_mm", "grouped_mm", "grouped_mm_fallback"})
# what the kernels of grouped products take, and the bytes that their rows have to be multiples of
GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GROUPED_ROW = 16


class StandIn(ABC):
    """A StandIn is multiplied by in the place of a matrix (m, n), or of a stack of them (E, m, n)."""

    @abstractmethod
    def whole(self) -> Tensor:
        """Return the tensor that it stands for."""

    @abstractmethod
    def picked(self, index: Any) -> StandIn:
        """Return what stands for some of a stack's matrices: an index of its first dimension."""

    @abstractmethod
    def flipped(self) -> StandIn:
        """Return what stands for the transposed matrices."""

    @abstractmethod
    def product(self, func, place: int, args: tuple, kwargs: dict) -> Tensor:
        """Return what a function of `PRODUCTS` gives; `place` is this object's among its two factors."""

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """The tensor's, as is what follows."""

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None):
        return self.shape if dim is None else self.shape[dim]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any):
        is_of_matrices = self.ndim == 3 and not isinstance(index, tuple) and index is not None and index is not ...
        return self.picked(index) if is_of_matrices else self.whole()[index]

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def transpose(self, one: int, other: int):
        last = {self.ndim - 2, self.ndim - 1}
        return self.flipped() if {one % self.ndim, other % self.ndim} == last else self.whole().transpose(one, other)

    def permute(self, *dims):
        return self.whole().permute(*dims)

    @property
    def mT(self) -> StandIn:
        return self.flipped()

    @property
    def T(self):
        return self.flipped() if self.ndim == 2 else self.whole().T

    def t(self) -> StandIn:
        return self.flipped()

    def __matmul__(self, other):
        return torch.matmul(self, other)

    def __rmatmul__(self, other):
        return torch.matmul(other, self)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        places = [i for i, value in enumerate(args[:2]) if isinstance(value, StandIn)]
        if getattr(func, "__name__", "") in PRODUCTS and len(places) == 1 and len(args) > 1:
            return args[places[0]].product(func, places[0], args, kwargs)
        args, kwargs = tree_map(lambda x: x.whole() if isinstance(x, StandIn) else x, (args, kwargs))
        return func(*args, **kwargs)


def _of_whole(name: str):
    return lambda self, *others: getattr(self.whole(), name)(*others)


# arithmetic with what stands left of it, which torch does not see first
for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "neg"):
    setattr(StandIn, f"__{_name}__", _of_whole(f"__{_name}__"))


class Factors(StandIn):
    """Factors stand for their product, which nothing that only multiplies by it makes.

    Args:
        first: (m, r) or (E, m, r).
        second: (r, n) or (E, r, n).
    """

    def __init__(self, first: Tensor, second: Tensor):
        self.first, self.second = first, second

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.first.shape[:-1], self.second.shape[-1]))

    def whole(self) -> Tensor:
        return self.first @ self.second

    def picked(self, index: Any) -> Factors:
        return Factors(self.first[index], self.second[index])

    def flipped(self) -> Factors:
        return Factors(self.second.mT, self.first.mT)

    def data_ptr(self) -> int:
        """Return an address that is a multiple of what those of both factors are."""
        return self.first.data_ptr() | self.second.data_ptr()

    def product(self, func, place: int, args: tuple, kwargs: dict) -> Tensor:
        first, second = self.first, self.second
        if place == 0:
            return func(first, func(second, *args[1:], **kwargs), *args[2:], **kwargs)
        if func.__name__ == "linear":
            return F.linear(F.linear(args[0], second), first, *args[2:], **kwargs)
        if "grouped" in func.__name__:
            func, first, second = _grouped(func, args[0].dtype, first, second)
        # a bias is of the result
        inner = {key: value for key, value in kwargs.items() if key != "bias"}
        return func(func(args[0], first, *args[2:], **inner), second, *args[2:], **kwargs)

    def __getattr__(self, name: str):
        # dtype and device are the factors'; what else a tensor has is the product's
        if name in ("dtype", "device", "is_cuda"):
            return getattr(self.first, name)
        if name.startswith("_") or not hasattr(Tensor, name):
            raise AttributeError(name)
        return getattr(self.whole(), name)


class LowRankStack(nn.Module, StandIn):
    """A parameter (E, m, n) of a module of experts as E products of rank r, under the parameter's name.

    Args:
        shape: (E, m, n).
        rank: r.
        device, dtype: of the factors, which are not initialised.
    """

    # an architecture's own initialisation is for the parameter, and would be drawn into its product
    _is_hf_initialized = True

    def __init__(self, shape: tuple[int, int, int], rank: int, *, device=None, dtype=None):
        super().__init__()
        self.num_experts, m, n = shape
        self.rank = rank
        empty = {"device": device, "dtype": dtype}
        self.A = nn.Parameter(torch.empty(self.num_experts, m, rank, **empty))
        self.B = nn.Parameter(torch.empty(self.num_experts, rank, n, **empty))

    @torch.no_grad()
    def assign(self, first: Tensor, second: Tensor, bias: None = None) -> None:
        """Take these factors, (E, m, r) and (E, r, n); the experts' biases are parameters of their module."""
        self.A.copy_(first)
        self.B.copy_(second)

    @property
    def factors(self) -> Factors:
        """The object that an expert's forward multiplies by."""
        return Factors(self.A, self.B)

    @property
    def weight(self) -> Tensor:
        """The product, (E, m, n), computed in float32."""
        return (self.A.float() @ self.B.float()).to(self.A.dtype)

    @property
    def shape(self) -> torch.Size:
        return self.factors.shape

    def whole(self) -> Tensor:
        return self.factors.whole()

    def picked(self, index: Any) -> Factors:
        return self.factors.picked(index)

    def flipped(self) -> Factors:
        return self.factors.flipped()

    def product(self, func, place: int, args: tuple, kwargs: dict) -> Tensor:
        return self.factors.product(func, place, args, kwargs)

    def __getattr__(self, name: str):
        if name.startswith("_") or name in ("A", "B") or not hasattr(Tensor, name):
            return super().__getattr__(name)
        return getattr(self.factors, name)

    def extra_repr(self) -> str:
        return f"{tuple(self.shape)}, rank={self.rank}"


def replace_stack(model: nn.Module, name: str, rank: int, *, device=None, dtype=None) -> LowRankStack:
    """Put an uninitialised low-rank stack in the place of a parameter of experts; returns it.

    Raises:
        AttributeError: there is no such parameter.
    """
    parent, _, leaf = name.rpartition(".")
    old = model.get_parameter(name)
    new = LowRankStack(tuple(old.shape), rank, device=device or old.device, dtype=dtype or old.dtype)
    delattr(model.get_submodule(parent), leaf)
    setattr(model.get_submodule(parent), leaf, new)
    return new


def is_stack(model: nn.Module, name: str) -> bool:
    """Return whether a name is that of a parameter (E, m, n)."""
    parent, _, leaf = name.rpartition(".")
    p = model.get_submodule(parent)._parameters.get(leaf)
    return p is not None and p.dim() == 3


def _grouped(func, dtype: torch.dtype, first: Tensor, second: Tensor):
    """Return a product of groups of rows and factors that it takes: a rank is any number, a row of memory is not."""
    if func.__name__ == "grouped_mm_fallback":
        return func, first, second
    laid = [_laid_out(factor) for factor in (first, second)]
    if dtype not in GROUPED_DTYPES or any(factor is None for factor in laid):
        return _by_groups, first, second
    return func, *laid


def _laid_out(factor: Tensor) -> Tensor | None:
    """Return a factor whose rows or columns begin at multiples of GROUPED_ROW bytes, a copy if need be; None if its
    shape has none."""
    for candidate in (lambda: factor, lambda: factor.mT.contiguous().mT, factor.contiguous):
        found = candidate()
        near, far = sorted(found.stride()[-2:])
        if near == 1 and far * found.element_size() % GROUPED_ROW == 0:
            return found
    return None


def _by_groups(x: Tensor, matrices: Tensor, *, offs: Tensor, **_: Any) -> Tensor:
    """Multiply the rows of each group, (N, k), by its matrix, (E, k, n), one after the other; rows after the last
    group give zeros."""
    *groups, left = x.tensor_split(offs.tolist())
    parts = [rows @ matrix for rows, matrix in zip(groups, matrices, strict=True)]
    return torch.cat([*parts, x.new_zeros(len(left), matrices.shape[-1])])
