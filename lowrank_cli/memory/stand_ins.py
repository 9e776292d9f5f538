"""Replace what the meta device lacks: fused attention and AdamW, grouped products, dropout, 4-bit linears, workspace.

Each stand-in takes and keeps the memory that the real one does, and computes nothing.
"""

from __future__ import annotations

import math
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function

# bitsandbytes' 4-bit weights: elements that share a scale of one byte, and scales that share one in float32
SCALE_BLOCK, NESTED_BLOCK, CODE_ENTRIES = 64, 256, 256 + 16

EIGHT_BIT = "optimizer_update_8bit_blockwise"
# chunks of the loss that are carried out
CHUNKS = 3
# what a simulation replaces while it runs
PATCHED = (
    (F, "scaled_dot_product_attention"),
    (F, "dropout"),
    (F, "grouped_mm"),
    (torch.autocast, "__init__"),
    (torch, "is_autocast_enabled"),
)


class RealKernels(TorchFunctionMode):
    """Functions that choose their kernel by the device act as on the one that is meant.

    Args:
        device: "cpu" or "cuda".
    """

    def __init__(self, device: str):
        super().__init__()
        self.on_cuda = device == "cuda"

    def __enter__(self):
        # these by name, since a recomputation inside backward runs without the mode
        self._replaced = [(owner, name, getattr(owner, name)) for owner, name in PATCHED]
        attention, dropout, _, begin, is_enabled = (function for _, _, function in self._replaced)

        def fused_attention(query, key, value, attn_mask=None, dropout_p=0.0, *args, **kwargs):
            if not self.on_cuda and (dropout_p or query.shape[-1] != value.shape[-1]):
                # the CPU has no fused attention with dropout or values of another size: the weights' matrix is there
                return attention(query, key, value, attn_mask, dropout_p, *args, **kwargs)
            if attn_mask is not None and attn_mask.dtype == torch.bool:
                # the kernels add a mask
                attn_mask = query.new_empty(attn_mask.shape)
            return _FusedAttention.apply(query, key, value, attn_mask)

        def fused_dropout(input, p=0.5, training=True, inplace=False):
            if not (training and p and self.on_cuda):
                return dropout(input, p, training, inplace)
            return torch.native_dropout(input, p, True)[0]

        # on the meta device torch takes products of groups of rows in bfloat16 alone
        def grouped_product(mat_a, mat_b, **kwargs):
            if has_torch_function((mat_b,)):
                # low-rank experts make two products of it
                return handle_torch_function(grouped_product, (mat_b,), mat_a, mat_b, **kwargs)
            return _GroupedProduct.apply(mat_a, mat_b)

        grouped_product.__name__ = "grouped_mm"

        # torch has no autocast on the meta device, and asks for it even to turn it off
        def init(autocast, device_type, *args, **kwargs):
            begin(autocast, "cpu" if device_type == "meta" else device_type, *args, **kwargs)

        def enabled(device_type="cuda"):
            return is_enabled("cpu" if device_type == "meta" else device_type)

        stand_ins = fused_attention, fused_dropout, grouped_product, init, enabled
        for (owner, name), function in zip(PATCHED, stand_ins, strict=True):
            setattr(owner, name, function)
        return super().__enter__()

    def __exit__(self, *error):
        for owner, name, function in self._replaced:
            setattr(owner, name, function)
        return super().__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if self.on_cuda and getattr(func, "__self__", None) is Tensor.is_cuda:
            return True
        result = func(*args, **(kwargs or {}))
        if func is Tensor.split and args[0].dtype == torch.int64 and args[0].dim() == 1:
            # the loss goes over its targets in chunks that are all alike: a few stand for hundreds
            return result[:CHUNKS]
        return result


class _FusedAttention(torch.autograd.Function):
    """Keeps the inputs, the output (B, H, T, d), laid out as (B, T, H, d), and the log-sum-exp of every row."""

    @staticmethod
    def forward(ctx, query, key, value, mask):
        batch, heads, length, _ = query.shape
        out = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        logsumexp = query.new_empty(batch, heads, length, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, mask, out, logsumexp)
        return out

    @staticmethod
    def backward(ctx, dout):
        query, key, value = ctx.saved_tensors[:3]
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


class _GroupedProduct(torch.autograd.Function):
    """Rows (N, k) times the matrices (E, k, n) of their experts; keeps of each what the other's gradient takes."""

    @staticmethod
    def forward(ctx, rows, matrices):
        of_rows, of_matrices = ctx.needs_input_grad
        ctx.save_for_backward(rows if of_matrices else None, matrices if of_rows else None)
        ctx.shapes = rows.shape, matrices.shape
        return rows.new_empty(rows.shape[0], matrices.shape[-1])

    @staticmethod
    def backward(ctx, grad):
        pairs = zip(ctx.needs_input_grad, ctx.shapes, strict=True)
        return tuple(grad.new_empty(shape) if needed else None for needed, shape in pairs)


def fused_adamw_(optimizer: torch.optim.Optimizer) -> None:
    """Let torch's fused AdamW, which has no meta kernel, make its state and nothing else; others stay as they are."""
    if type(optimizer) is torch.optim.AdamW:
        optimizer.step = MethodType(_make_state, optimizer)


@torch.no_grad()
def _make_state(optimizer: torch.optim.AdamW) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None and not optimizer.state[p]:
                optimizer.state[p].update({key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")})


class _Dequantized(torch.autograd.Function):
    """x W^T with W in 4 bits: written out for the product, in forward and again in backward; x is not kept."""

    @staticmethod
    def forward(ctx, x, weight, shape):
        ctx.save_for_backward(weight)
        ctx.shape = shape
        return x @ x.new_empty(shape).mT

    @staticmethod
    def backward(ctx, dy):
        return dy @ dy.new_empty(ctx.shape), None, None


def quantize_(model: nn.Module, dtype: torch.dtype) -> None:
    """Put 4-bit linears with nested scales in place of all linears but the head, as Transformers does on loading.

    Args:
        model: on the meta device.
        dtype: that products are computed in.
    """
    from bitsandbytes.nn import Linear4bit

    class Linear(Linear4bit):
        def forward(self, x: Tensor) -> Tensor:
            y = _Dequantized.apply(x.to(self.compute_dtype), self.weight, (self.out_features, self.in_features))
            return (y if self.bias is None else y + self.bias).to(x.dtype)

    head = model.get_output_embeddings()
    outside = {name for name, _ in model.named_children() if name != model.base_model_prefix}
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or module is head or name.partition(".")[0] in outside:
            continue
        size = module.weight.numel()
        new = Linear(module.in_features, module.out_features, bias=False, compute_dtype=dtype, device="meta")
        new.weight = nn.Parameter(_bytes(size // 2, 1), requires_grad=False)
        new.bias = module.bias
        blocks = math.ceil(size / SCALE_BLOCK)
        new.register_buffer("scales", _bytes(blocks), persistent=False)
        tables = 4 * (math.ceil(blocks / NESTED_BLOCK) + CODE_ENTRIES)
        new.register_buffer("tables", _bytes(tables), persistent=False)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)


def _bytes(*shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.uint8, device="meta")


def workspace(packet, args: tuple, *, on_cuda: bool) -> int:
    """Bytes that the kernel of an op takes inside, which no tensor shows.

    Measured on CPU kernels: tests/memory/test_stand_ins.py compares. A GPU's decompositions are taken to need as much.

    Args:
        packet: the op.
        args: of the op.
        on_cuda: whether the kernel is a GPU's.
    """
    if packet.__name__ == EIGHT_BIT:
        # on a CPU bitsandbytes works on moments and update in float32
        return 0 if on_cuda else 20 * args[1].numel()
    if packet not in WORKSPACE:
        return 0
    m, n = args[0].shape[-2:]
    return int(WORKSPACE[packet](max(m, n), min(m, n)) * args[0].element_size())


_aten = torch.ops.aten
# elements of workspace for a (large, small) matrix
WORKSPACE = {
    _aten._linalg_svd: lambda m, n: m * n,
    _aten.linalg_qr: lambda m, n: 65 * n,
    _aten._linalg_eigh: lambda m, n: 2 * n * n,
}
