"""VB-LoRA inside a model: the vector bank of an adapter, and the linears that take their factors from it.

An adapter is one module, `VectorBank`, registered with the model as `vblora.NAME`: its parameters are the bank (h x b)
and one logits tensor (S x h) for all sub-vectors of all linears. A linear keeps its class and its name; only its
`forward` is replaced, so a quantised base stays as it is, and so do the names of its weights.

The sub-vectors of a linear (d1 inputs, d2 outputs) are the rows of A (r, d1), then those of B^T (r, d2): both factors
are then plain views of the composed (S, b) buffer, and so are their gradients of the gradient buffer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lowrank_cli.methods.vblora.bank import compose, compose_backward, select
from lowrank_cli.ops.adapted_linear import Factors, adapted_linear, add_low_rank
from lowrank_cli.ops.precision import wide

# the attribute of the model that holds its adapters
ATTRIBUTE = "vblora"


@dataclass(frozen=True)
class Shape:
    """The numbers of an adapter, in PEFT's words but for `rank` (r)."""

    rank: int
    num_vectors: int
    vector_length: int
    topk: int


class Slot(NamedTuple):
    """A Slot gives the rows of a linear's sub-vectors: from `start` to `middle` those of A, to `end` those of B^T."""

    in_features: int
    out_features: int
    start: int
    middle: int
    end: int


class VectorBank(nn.Module):
    """One adapter: the bank, the logits, and what is composed of them.

    `compose` has to follow every change of the parameters; a change that autograd's version counters have seen is
    noticed by the next forward pass. Backward adds the gradients of the composed factors to a buffer, over any number
    of micro-batches, and `collect` sends them to the parameters' `.grad`.

    Args:
        sizes: (in, out) of each linear, by name.
        shape: the adapter's numbers; `vector_length` divides every size.
        dropout: of the adapter's input, in training.
        compute_dtype: of the composed factors: the model's. Parameters and gradient sums are float32,
            or float64 for a float64 model.
        device: of everything; random values are drawn on the CPU, whatever it is.
        bound: the bank is drawn from U(-bound, bound).
        std: the logits are drawn from N(0, std^2).
        selection: indices and weights (S, k) instead of logits, which are then never made: good for inference and
            merging, not for training.
    """

    def __init__(
        self,
        sizes: dict[str, tuple[int, int]],
        shape: Shape,
        *,
        dropout: float = 0.0,
        compute_dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        bound: float = 0.02,
        std: float = 0.1,
        selection: tuple[Tensor, Tensor] | None = None,
    ):
        super().__init__()
        self.shape, self.dropout = shape, dropout
        self.head: frozenset[str] = frozenset()  # parameters of the model that were loaded with the adapter
        self.slots: dict[str, Slot] = {}
        precision = wide(compute_dtype)
        end = 0
        for name, (n, m) in sizes.items():
            start, middle = end, end + shape.rank * n // shape.vector_length
            end = middle + shape.rank * m // shape.vector_length
            self.slots[name] = Slot(n, m, start, middle, end)
        drawn_on = device if torch.device(device).type == "meta" else "cpu"
        bank = torch.empty(shape.num_vectors, shape.vector_length, device=drawn_on).uniform_(-bound, bound)
        self.vector_bank = nn.Parameter(bank.to(device, precision), requires_grad=selection is None)
        if selection is None:
            logits = torch.empty(end, shape.num_vectors, device=drawn_on).normal_(0, std)
            self.logits = nn.Parameter(logits.to(device, precision))
        else:
            self.register_parameter("logits", None)
        self.register_buffer("indices", selection and selection[0].to(device))
        self.register_buffer("weights", selection and selection[1].to(device, precision))
        size = (end, shape.vector_length)
        self.register_buffer("composed", torch.empty(size, dtype=compute_dtype, device=device), persistent=False)
        self.register_buffer("accumulated", torch.zeros(size, dtype=precision, device=device), persistent=False)
        self._changed()

    @property
    def num_subvectors(self) -> int:
        """S."""
        return self.composed.shape[0]

    @property
    def is_fixed(self) -> bool:
        """Return whether the bank has a selection alone, without logits."""
        return self.logits is None

    @torch.no_grad()
    def selection(self) -> tuple[Tensor, Tensor]:
        """Indices and weights of every sub-vector, (S, k)."""
        if self.is_fixed:
            return self.indices, self.weights
        return select(self.logits, self.shape.topk)

    @torch.no_grad()
    def compose(self) -> None:
        """Compose all factors anew from the parameters."""
        self._composed_at = self._versions()
        self._selected = self.selection()
        self.composed.copy_(compose(self.vector_bank, *self._selected))

    @torch.no_grad()
    def collect(self) -> None:
        """Send the summed gradients of the factors to the parameters' `.grad`, and forget them."""
        if self._selected is None or not self.vector_bank.requires_grad:
            return
        grad_bank, grad_selected = compose_backward(self.accumulated, self.vector_bank, *self._selected)
        grad_logits = torch.zeros_like(self.logits).scatter_(1, self._selected[0], grad_selected)
        for p, grad in ((self.vector_bank, grad_bank), (self.logits, grad_logits)):
            p.grad = grad if p.grad is None else p.grad + grad
        self.accumulated.zero_()

    def factors(self, name: str) -> Factors:
        """A (r, n) and B^T (r, m) of a linear, views of what is composed, with views of the gradient buffer."""
        if self._composed_at != self._versions():
            self.compose()
        found = self._factors.get(name)
        if found is None:
            slot, rank = self.slots[name], self.shape.rank
            parts = [
                buffer[begin:end].view(rank, -1)
                for buffer in (self.composed, self.accumulated)
                for begin, end in ((slot.start, slot.middle), (slot.middle, slot.end))
            ]
            found = self._factors[name] = Factors(*parts, self.vector_bank)
        return found

    def _versions(self) -> tuple[int, int]:
        """Counters that every change in place of the parameters moves."""
        return self.vector_bank._version, -1 if self.logits is None else self.logits._version

    def _changed(self) -> None:
        """Forget what was derived from the tensors."""
        self._factors: dict[str, Factors] = {}
        self._composed_at: tuple[int, int] | None = None
        self._selected: tuple[Tensor, Tensor] | None = None

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._changed()
        return self

    def extra_repr(self) -> str:
        s = self.shape
        return (
            f"{len(self.slots)} linears, rank={s.rank}, num_vectors={s.num_vectors}, "
            f"vector_length={s.vector_length}, topk={s.topk}"
        )


class Adapters(nn.ModuleDict):
    """The adapters of a model, by name; the active ones add to the linears' outputs."""

    def __init__(self):
        super().__init__()
        self.active: list[str] = []


class Adapted:
    """An Adapted takes the place of a linear's forward, and adds what the active adapters give.

    Args:
        name: of the linear, which the banks know it by.
        module: nn.Linear, Transformers' Conv1D, or a quantised linear.
        adapters: the model's.
    """

    def __init__(self, name: str, module: nn.Module, adapters: Adapters):
        self.name, self.module, self.adapters = name, module, adapters
        self.is_plain = type(module) in (nn.Linear, Conv1D)
        module.forward = self.forward

    def forward(self, x: Tensor) -> Tensor:
        """The frozen linear's output plus that of every active adapter that has this linear."""
        module, name = self.module, self.name
        banks = [bank for key in self.adapters.active if name in (bank := self.adapters[key]).slots]
        if len(banks) == 1 and self._can_fuse(x, banks[0]):
            weight = module.weight if type(module) is nn.Linear else module.weight.mT
            return adapted_linear(x, weight, module.bias, banks[0].factors(name).to(x.dtype))
        out = type(module).forward(module, x)
        for bank in banks:
            given = nn.functional.dropout(x, bank.dropout, module.training) if bank.dropout else x
            out = add_low_rank(out, given, bank.factors(name))
        return out

    def _can_fuse(self, x: Tensor, bank: VectorBank) -> bool:
        module = self.module
        return (
            self.is_plain
            and x.dtype == module.weight.dtype
            and not module.weight.requires_grad
            and (module.bias is None or not module.bias.requires_grad)
            and not (bank.dropout and module.training)
            and not torch.is_autocast_enabled(x.device.type)
        )


def sizes_of(module: nn.Module) -> tuple[int, int]:
    """(in, out) features of a linear."""
    if isinstance(module, Conv1D):
        return tuple(module.weight.shape)
    return module.in_features, module.out_features


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype that the model computes in: that of its first floating weight, which is never a quantised one."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def adapters_of(model: nn.Module) -> Adapters:
    """The model's adapters, none of them if it has not been wrapped."""
    return getattr(model, ATTRIBUTE, None) or Adapters()


def attach(model: nn.Module, name: str, bank: VectorBank) -> None:
    """Register an adapter and make it the only active one; linears that were plain get their new forward."""
    adapters = getattr(model, ATTRIBUTE, None)
    if adapters is None:
        adapters = Adapters()
        model.add_module(ATTRIBUTE, adapters)
    adapters[name] = bank
    adapters.active = [name]
    for target in bank.slots:
        module = model.get_submodule(target)
        if not isinstance(getattr(module.forward, "__self__", None), Adapted):
            Adapted(target, module, adapters)


def activate(model: nn.Module, *names: str) -> None:
    """Choose the adapters that add to the model's output; none of them gives the base model.

    Raises:
        ValueError: there is no adapter of a name.
    """
    adapters = adapters_of(model)
    missing = [name for name in names if name not in adapters]
    if missing:
        raise ValueError(f"no adapter {', '.join(missing)}; there are: {', '.join(adapters) or 'none'}")
    adapters.active = list(names)


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Add the active adapters into the weights and remove all adapters; quantised linears become plain ones."""
    adapters = adapters_of(model)
    for name, module in list(model.named_modules()):
        is_adapted = isinstance(getattr(module.forward, "__self__", None), Adapted)
        if is_adapted:
            del module.forward
        if hasattr(getattr(module, "weight", None), "quant_state"):
            module = dequantized(module, dtype_of(model))
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module)
        for key in adapters.active if is_adapted else ():
            if name in adapters[key].slots:
                # a sum in 16 bit would round twice
                precision = wide(module.weight.dtype)
                factors = adapters[key].factors(name).to(precision)
                delta = factors.b.mT @ factors.a  # (m, n)
                module.weight.copy_(module.weight.to(precision) + (delta.mT if isinstance(module, Conv1D) else delta))
    if hasattr(model, ATTRIBUTE):
        delattr(model, ATTRIBUTE)


def dequantized(module: nn.Module, dtype: torch.dtype) -> nn.Linear:
    """A plain linear with the values of one in 4 bit (bitsandbytes)."""
    from bitsandbytes.functional import dequantize_4bit

    values = dequantize_4bit(module.weight.data, module.weight.quant_state).to(dtype)
    plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
    plain.weight = nn.Parameter(values, requires_grad=False)
    if module.bias is not None:
        plain.bias = module.bias
    return plain.train(module.training)
