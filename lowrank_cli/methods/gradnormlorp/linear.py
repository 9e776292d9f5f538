"""A linear as magnitude times direction, beside a frozen weight: the adapter of GradNormLoRP, and of DoRA.

Shapes: the frozen weight W0 is (m, n), the factors are A = J (r, n) and B = I (m, r), the magnitude M is (m,); s is
alpha / r. x is (..., n), N tokens.

    V = W0 + s B A,   c_i = ||V_i||,   y = (M / c) * (x W0^T + s (x A^T) B^T) + bias

The norm needs no (m, n) matrix:

    c_i^2 = ||W0_i||^2 + 2 s (W0 A^T)_i . B_i + s^2 B_i (A A^T) B_i^T

GradNormLoRP, arXiv:2412.19616, eq. 5; DoRA, arXiv:2402.09353, eq. 5; the factored norm: arXiv:2603.22276. With
`detached` the norm counts as a constant in backward, DoRA's sec. 4.3; without, autograd takes it exactly. The tensors
have PEFT's names, and a saved adapter is PEFT's DoRA.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

# rows or columns of a matrix that are worked on at a time
BLOCK = 256
# a row without any weight: its norm is not divided by
SMALLEST = 1e-24


class WeightNormLinear(nn.Module):
    """Any linear with a magnitude and a low-rank direction beside its frozen weight.

    B is zero and M the norms of W0's rows, so that it begins as the linear that it wraps. The factors are float32
    where the weight is quantised or 16-bit. A row of W0 that is zero stays zero, for its magnitude is.

    Args:
        base: nn.Linear, Conv1D of GPT-2, or another module that computes x W^T + bias, such as one in 4 bits.
        rank: r.
        alpha: s is alpha / rank.
        dropout: of the input of A, in training.
        detached: leave the norm out of backward.
    """

    def __init__(self, base: nn.Module, rank: int, *, alpha: float, dropout: float = 0.0, detached: bool = False):
        super().__init__()
        self.base_layer, self.rank, self.scaling = base, rank, alpha / rank
        self.dropout, self.detached = dropout, detached
        base.requires_grad_(False)
        m, n = shape_of(base)
        weight = base.weight
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        make = {"dtype": wide, "device": weight.device}
        self.lora_A = nn.Parameter(torch.empty(rank, n, **make))
        self.lora_B = nn.Parameter(torch.zeros(m, rank, **make))
        if weight.device.type != "meta":
            # drawn on the CPU in float32, the same on every device and in every dtype
            self.lora_A.data.copy_(nn.init.kaiming_uniform_(torch.empty(rank, n), a=math.sqrt(5)))
        square = self._base_square(wide)
        self.register_buffer("base_square", square, persistent=False)  # ||W0_i||^2, (m,)
        self.lora_magnitude_vector = nn.Parameter(square.sqrt())
        self.merged_scale: Tensor | None = None  # M / c of a merged layer
        self._cached: tuple[tuple, Tensor] | None = None

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scaling={self.scaling}, dropout={self.dropout}, detached={self.detached}"

    def forward(self, x: Tensor) -> Tensor:
        """The linear's output, (..., m), in the dtype that the wrapped linear gives."""
        if self.merged_scale is not None:
            return self.base_layer(x)
        y, bias = self._product(x), self.base_layer.bias
        hidden = F.dropout(x, self.dropout, self.training) @ self.lora_A.mT.to(x.dtype)  # (..., r)
        flat = torch.addmm(
            y.reshape(-1, y.shape[-1]),
            hidden.reshape(-1, self.rank).to(y.dtype),
            self.lora_B.mT.to(y.dtype),
            alpha=self.scaling,
        )
        scale = self.row_scale().to(y.dtype)
        out = flat * scale if bias is None else torch.addcmul(bias.to(y.dtype), flat, scale)
        return out.view(y.shape)

    def row_scale(self) -> Tensor:
        """M / c, (m,); outside training it is kept until a parameter changes."""
        if torch.is_grad_enabled():
            return self.lora_magnitude_vector / self.norm()
        parameters = (self.lora_A, self.lora_B, self.lora_magnitude_vector)
        key = tuple((p.data_ptr(), p._version) for p in parameters)
        if self._cached is None or self._cached[0] != key:
            self._cached = key, self.lora_magnitude_vector / self.norm()
        return self._cached[1]

    def norm(self) -> Tensor:
        """c = ||W0 + s B A||, (m,), float32 or wider; without a gradient if detached."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detached):
            a, b = self.lora_A, self.lora_B
            cross = self._product(a.to(self._compute_dtype())).mT.to(a.dtype)  # W0 A^T (m, r)
            inner = (b @ (a @ a.mT)).mul(self.scaling).add(cross, alpha=2).mul(b).sum(1)
            return torch.add(self.base_square, inner, alpha=self.scaling).clamp(min=SMALLEST).sqrt()

    # ---- the base, whatever it is

    def _product(self, x: Tensor) -> Tensor:
        """x W0^T, (..., m), without the bias."""
        base = self.base_layer
        if type(base) is nn.Linear:
            return F.linear(x, base.weight)
        if isinstance(base, Conv1D):
            return x @ base.weight
        y = base(x)
        return y if base.bias is None else y - base.bias

    def _compute_dtype(self) -> torch.dtype:
        weight = self.base_layer.weight
        if weight.is_floating_point():
            return weight.dtype
        return getattr(self.base_layer, "compute_dtype", None) or torch.float32

    def _columns(self, start: int, stop: int) -> Tensor:
        """Columns of W0, (m, stop - start); of a weight in 4 bits what its own product makes of unit vectors."""
        base = self.base_layer
        if type(base) is nn.Linear:
            return base.weight[:, start:stop]
        if isinstance(base, Conv1D):
            return base.weight[start:stop].mT
        n = shape_of(base)[1]
        units = torch.zeros(stop - start, n, dtype=self._compute_dtype(), device=base.weight.device)
        units[torch.arange(stop - start), torch.arange(start, stop)] = 1
        return self._product(units).mT

    @torch.no_grad()
    def _base_square(self, dtype: torch.dtype) -> Tensor:
        m, n = shape_of(self.base_layer)
        total = torch.zeros(m, dtype=dtype, device=self.base_layer.weight.device)
        for start in range(0, n, BLOCK):
            total += self._columns(start, min(n, start + BLOCK)).to(dtype).square().sum(1)
        return total

    # ---- merging

    @torch.no_grad()
    def merge_(self) -> None:
        """W0 <- (M / c) V in place; the layer then computes with its base alone. Repeating it changes nothing.

        Raises:
            ValueError: the base's weight is quantised; `to_plain` makes a new linear of it.
        """
        if self.merged_scale is not None:
            return
        scale = self.lora_magnitude_vector / self.norm()
        self._rewrite_(lambda w, low_rank, rows: scale[rows, None] * (w + low_rank))
        self.merged_scale = scale

    @torch.no_grad()
    def unmerge_(self) -> None:
        """W0 back from a merged weight, up to rounding; the parameters have to be those of the merge.

        Raises:
            ValueError: a magnitude is zero, so that the weight of its row is lost.
        """
        if self.merged_scale is None:
            return
        scale = self.merged_scale
        lost = (scale == 0) & (self.base_square > 0)
        if bool(lost.any()):
            raise ValueError(f"{int(lost.sum())} rows have a magnitude of zero: their weight cannot be had back")
        inverse = torch.where(scale == 0, 1.0, 1 / scale)
        self._rewrite_(lambda w, low_rank, rows: inverse[rows, None] * w - low_rank)
        self.merged_scale = None

    def _rewrite_(self, new) -> None:
        weight = self.base_layer.weight
        if not weight.is_floating_point():
            raise ValueError("a quantised weight cannot be merged into")
        if isinstance(self.base_layer, Conv1D):
            weight = weight.mT
        for start in range(0, weight.shape[0], BLOCK):
            rows = slice(start, start + BLOCK)
            low_rank = (self.lora_B[rows] @ self.lora_A) * self.scaling
            weight[rows] = new(weight[rows].to(low_rank.dtype), low_rank, rows).to(weight.dtype)

    @torch.no_grad()
    def to_plain(self) -> nn.Module:
        """The merged linear: the wrapped one itself, changed in place, or a new one in place of a quantised one."""
        if self.base_layer.weight.is_floating_point():
            self.merge_()
            return self.base_layer
        (m, n), old = shape_of(self.base_layer), self.base_layer
        plain = nn.Linear(n, m, bias=False, device=old.weight.device, dtype=self._compute_dtype())
        scale = self.lora_magnitude_vector / self.norm()
        for start in range(0, n, BLOCK):
            columns = slice(start, min(n, start + BLOCK))
            v = self._columns(columns.start, columns.stop) + self.scaling * (self.lora_B @ self.lora_A[:, columns])
            plain.weight[:, columns] = (scale.unsqueeze(1) * v).to(plain.weight.dtype)
        if old.bias is not None:
            plain.bias = nn.Parameter(old.bias.detach().to(plain.weight.dtype))
        return plain.requires_grad_(False)


def shape_of(base: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear."""
    if isinstance(base, Conv1D):
        return base.weight.shape[1], base.weight.shape[0]
    return base.out_features, base.in_features


def layers(model: nn.Module) -> dict[str, WeightNormLinear]:
    """The adapted linears by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, WeightNormLinear)}


def wrap(
    model: nn.Module, chosen: dict[str, nn.Module], *, rank: int, alpha: float, dropout: float, detached: bool
) -> None:
    """Freeze a model and put an adapter around the chosen linears, in place."""
    model.requires_grad_(False)
    for name, module in chosen.items():
        layer = WeightNormLinear(module, rank, alpha=alpha, dropout=dropout, detached=detached)
        _replace(model, name, layer.train(module.training))


def merge(model: nn.Module) -> None:
    """Merge every adapter and put plain linears back, in place."""
    for name, layer in layers(model).items():
        _replace(model, name, layer.to_plain())


def save(model: nn.Module, folder: Path, base: str) -> None:
    """Write adapter_config.json and adapter_model.safetensors, which `PeftModel.from_pretrained` loads as DoRA.

    Args:
        model: with adapters.
        folder: exists.
        base: folder or hub id of the base model.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    from lowrank_cli.models.adapted import shortest

    found = layers(model)
    first = next(iter(found.values()))
    config = LoraConfig(
        r=first.rank,
        lora_alpha=first.scaling * first.rank,
        lora_dropout=first.dropout,
        use_dora=True,
        target_modules=shortest(found, (name for name, _ in model.named_modules())),
        fan_in_fan_out=isinstance(first.base_layer, Conv1D),
        base_model_name_or_path=base,
        # what AutoPeftModelForCausalLM asks for
        task_type="CAUSAL_LM" if type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")) else None,
        inference_mode=True,
    )
    config.save_pretrained(folder)
    tensors = {}
    for name, layer in found.items():
        key = f"base_model.model.{name}"
        tensors[f"{key}.lora_A.weight"] = layer.lora_A
        tensors[f"{key}.lora_B.weight"] = layer.lora_B
        tensors[f"{key}.lora_magnitude_vector"] = layer.lora_magnitude_vector
    content = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
    save_file(content, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
