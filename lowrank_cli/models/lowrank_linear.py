"""Linears in low-rank form.

Shapes: the linear is y = W x + b with W (m, n) = (out, in), of rank r.

    LowRankLinear    W = A B               A (m, r), B (r, n)       r (m + n) parameters
    PivotLinear      W = S [I; C] W_p      W_p (r, n), C (m - r, r)  r (m + n - r) parameters

The second is PIFA, arXiv:2501.19090: r rows of a rank-r matrix, its pivots, span all others, so those need only their
coordinates C; S puts the rows back in order. It is lossless, and smaller than the dense weight at every r < min(m, n).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowrank_cli.models.lowrank_experts import LowRankStack, is_stack, replace_stack
from lowrank_cli.models.targets import Matrix


class LowRankLinear(nn.Module):
    """A linear of rank r as two linears, y = A (B x) + b.

    Args:
        in_features: n.
        out_features: m.
        rank: r.
        bias: whether it has one.
        device, dtype: of the parameters, which are not initialised.
    """

    form = "factored"
    was_conv1d = False

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = False, *, device=None, dtype=None):
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        empty = {"device": device, "dtype": dtype}
        self.B = nn.utils.skip_init(nn.Linear, in_features, rank, bias=False, **_given(empty))
        self.A = nn.utils.skip_init(nn.Linear, rank, out_features, bias=bias, **_given(empty))

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., m)."""
        return self.A(self.B(x))

    @torch.no_grad()
    def assign(self, first: Tensor, second: Tensor, bias: Tensor | None) -> None:
        """Take these factors, (m, r) and (r, n), and this bias."""
        self.A.weight.copy_(first)
        self.B.weight.copy_(second)
        if bias is not None:
            self.A.bias.copy_(bias)

    @property
    def bias(self) -> Tensor | None:
        """(m,) or None."""
        return self.A.bias

    @property
    def weight(self) -> Tensor:
        """The product, (m, n), computed in float32: for whoever wants the dense weight, not for the forward pass."""
        return (self.A.weight.float() @ self.B.weight.float()).to(self.A.weight.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class PivotLinear(nn.Module):
    """A linear of rank r as r of its rows and the other rows' coordinates in them.

    Args:
        in_features: n.
        out_features: m.
        rank: r < m.
        bias: whether it has one.
        device, dtype: of the parameters, which are not initialised.
    """

    form = "pifa"
    was_conv1d = False

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = False, *, device=None, dtype=None):
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        empty = {"device": device, "dtype": dtype}
        self.pivots = nn.utils.skip_init(nn.Linear, in_features, rank, bias=False, **_given(empty))
        self.others = nn.utils.skip_init(nn.Linear, rank, out_features - rank, bias=False, **_given(empty))
        self.bias = nn.Parameter(torch.empty(out_features, **_given(empty))) if bias else None
        # row i of W is row order[i] of [pivots; others]
        self.register_buffer("order", torch.empty(out_features, dtype=torch.int32, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., m)."""
        pivots = self.pivots(x)
        y = torch.cat([pivots, self.others(pivots)], -1).index_select(-1, self.order)
        return y if self.bias is None else y + self.bias

    @torch.no_grad()
    def assign(self, first: Tensor, second: Tensor, bias: Tensor | None) -> None:
        """Take the weight first @ second, (m, r) and (r, n), and this bias."""
        chosen, coordinates = pivot_rows(first)
        rest = torch.ones(self.out_features, dtype=torch.bool)
        rest[chosen] = False
        self.pivots.weight.copy_(first.double()[chosen] @ second.double())
        self.others.weight.copy_(coordinates[rest])
        self.order.copy_(torch.cat([chosen, rest.nonzero().squeeze(1)]).argsort())
        if bias is not None:
            self.bias.copy_(bias)

    @property
    def weight(self) -> Tensor:
        """The product, (m, n), computed in float32."""
        pivots = self.pivots.weight.float()
        rows = torch.cat([pivots, self.others.weight.float() @ pivots])[self.order]
        return rows.to(self.pivots.weight.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


FORMS: dict[str, type[LowRankLinear | PivotLinear]] = {cls.form: cls for cls in (LowRankLinear, PivotLinear)}


def pivot_rows(first: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of an (m, r) matrix of full rank that span the others, and every row's coordinates in them.

    The rows are the pivots of Gaussian elimination with partial pivoting; then rows whose coordinates are large are
    swapped in while that helps (Goreinov et al., "How to find a good submatrix"), so that no coordinate is far above 1
    and nothing is lost to rounding.

    Args:
        first: (m, r), m > r.
    Returns:
        (r,) row numbers and (m, r) coordinates, float64, the identity in the chosen rows.
    """
    # orthonormal columns span the same and make the elimination well conditioned
    columns = torch.linalg.qr(first.detach().double().cpu()).Q  # (m, r)
    pivots = torch.linalg.lu_factor(columns).pivots
    order = torch.arange(columns.shape[0])
    for i, j in enumerate((pivots - 1).tolist()):
        order[[i, j]] = order[[j, i]]
    chosen = order[: columns.shape[1]].clone()
    coordinates = torch.linalg.solve(columns[chosen].mT, columns.mT).mT  # (m, r)
    for _ in range(4 * columns.shape[1]):
        place = int(coordinates.abs().argmax())
        row, column = divmod(place, coordinates.shape[1])
        value = float(coordinates[row, column])
        if abs(value) < 1.5:
            break
        # row takes the place of pivot `column`: a rank-one update of the coordinates
        change = coordinates[row].clone()
        change[column] -= 1
        coordinates -= torch.outer(coordinates[:, column] / value, change)
        chosen[column] = row
    return chosen, coordinates


def replace_linear(model: nn.Module, name: str, rank: int, form: str, *, device=None, dtype=None) -> nn.Module:
    """Put an uninitialised low-rank linear in the place of a module's linear (or of GPT-2's Conv1D); returns it.

    It remembers in `was_conv1d` what it stands for, so that `densify` puts back what the architecture has.
    """
    parent, _, leaf = name.rpartition(".")
    old = model.get_submodule(name)
    out_features, in_features = shape_of(old)
    new = FORMS[form](
        in_features,
        out_features,
        rank,
        old.bias is not None,
        device=device or old.weight.device,
        dtype=dtype or old.weight.dtype,
    )
    new.was_conv1d = not hasattr(old, "out_features")
    setattr(model.get_submodule(parent), leaf, new)
    return new


def replace(model: nn.Module, name: str, rank: int, form: str) -> nn.Module:
    """Put an uninitialised low-rank form in the place of a linear, or of a parameter of experts; returns it.

    Experts are factored whatever the form: coordinates of other rows would have to be put in another order for every
    token, and the kernels that multiply tokens by their experts' matrices do not do that.
    """
    return replace_stack(model, name, rank) if is_stack(model, name) else replace_linear(model, name, rank, form)


def shape_of(target: nn.Module | Matrix) -> tuple[int, ...]:
    """(out, in) of a linear, a Conv1D, whose weight is (in, out), or a low-rank linear; (E, m, n) of experts."""
    if isinstance(target, Matrix):
        return tuple(target.weight.shape)
    if hasattr(target, "out_features"):
        return target.out_features, target.in_features
    n, m = target.weight.shape
    return m, n


def weight_of(target: nn.Module | Matrix) -> Tensor:
    """The weight as (out, in); of experts as it is stored."""
    is_plain = isinstance(target, Matrix) or hasattr(target, "out_features")
    return target.weight if is_plain else target.weight.mT


def low_rank_linears(model: nn.Module) -> dict[str, LowRankLinear | PivotLinear | LowRankStack]:
    """The low-rank linears of a model, and its low-rank stacks of experts, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, (LowRankLinear, PivotLinear, LowRankStack))}


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value is not None}
