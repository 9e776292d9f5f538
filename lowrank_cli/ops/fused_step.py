"""The projected Adam step as one op: projection, moments, and the update expanded straight into the weight.

Shapes: a weight W and its gradient G are (m, n); the basis is P (m, r) on the left, Q (n, r) on the right; R, the
moments M and V and the direction N are (r, n) on the left, (m, r) on the right.

    R = P^T G or G Q                                GaLore, arXiv:2403.03507, Alg. 2
    M <- b1 M + (1 - b1) R    V <- b2 V + (1 - b2) R o R
    N = M / (sqrt(V) + eps)
    W <- decay (W - step_size P N)  or  decay (W - step_size N Q^T)

The ops `torch.ops.lowrank.*` take lists of layers that share the numbers of the step. They run on the kernels of
`kernels/` once `build.load` has registered these, and on the reference below, which defines them, until then.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_cli import console
from lowrank_cli.errors import UsageError
from lowrank_cli.ops import build
from lowrank_cli.ops.precision import cut

KERNELS = ("auto", "cuda", "cpu", "torch")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# elements of 8-bit moments that share a scale, as in bitsandbytes
BLOCK = 256
# above this rank a step on a GPU is bound by its two products, which are then the library's; not measured yet
CUDA_LARGE_RANK = 256

_NUMBERS = "float beta1, float beta2, float eps, float step_size, float decay, Tensor? scalars=None"
torch.library.define(
    "lowrank::galore_step_",
    "(Tensor(a!)[] weights, Tensor[] grads, Tensor[] bases, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] exp_avg_scales, Tensor(e!)[] exp_avg_sq_scales, Tensor[] codes, bool left, bool projected, "
    f"bool whole, {_NUMBERS}) -> ()",
)
torch.library.define("lowrank::velora_compress", "(Tensor x, Tensor vector) -> Tensor")
torch.library.define(
    "lowrank::velora_step_",
    f"(Tensor(a!) weight, Tensor factor, Tensor vector, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, {_NUMBERS}) -> ()",
)


@dataclass(frozen=True)
class Choice:
    """A Choice says what the projected update runs on, and why.

    Attributes:
        name: "cuda", "cpu" or "torch".
        why: half a sentence.
        is_auto: nobody asked for this one: a resumed run goes on with its checkpoint's.
    """

    name: str
    why: str
    is_auto: bool = False

    def __str__(self) -> str:
        return f"kernel: {self.name} ({self.why})"


def choose(kernel: str, device: torch.device | str) -> Choice:
    """The kernel for a setting and a device, built and loaded; one that cannot be had is a warning, and torch.

    On a GPU `auto` builds at the first use. On a CPU it takes the kernel where somebody has built it with `cpu`
    before, and never makes a run wait for a compiler.

    Args:
        kernel: one of KERNELS.
        device: of the weights.
    Raises:
        UsageError: a kernel for another device.
    """
    kind = torch.device(device).type
    is_auto = kernel == "auto"
    if kernel not in KERNELS:
        raise ValueError(f"kernel is {kernel!r}; it is one of {', '.join(KERNELS)}")
    if kernel == "torch":
        return Choice("torch", "as asked")
    if kind == "meta":
        return Choice("torch", "nothing is computed", is_auto)
    if not is_auto and kernel != kind:
        raise UsageError(f"--kernel {kernel} cannot run on {kind} weights", "take --kernel auto, or --kernel torch")
    if kind not in build.SOURCES:
        return Choice("torch", f"there is no kernel for {kind}", is_auto)
    if is_auto and kind == "cpu" and not build.is_built("cpu"):
        return Choice("torch", "the CPU kernel is not built on this machine; --kernel cpu builds it once", is_auto)
    try:
        build.load(kind)
    except build.BuildError as error:
        console.warn(f"the {kind.upper()} kernel cannot be used, plain PyTorch goes on: {error}")
        return Choice("torch", f"the {kind.upper()} kernel cannot be used", is_auto)
    return Choice(kind, "built on this machine" if is_auto else "as asked", is_auto)


def follow(recorded: str, device: torch.device | str) -> bool:
    """Return whether a run can go on with its checkpoint's kernel, loading it; nothing is built or printed."""
    if recorded == "torch":
        return True
    if recorded != torch.device(device).type or not build.is_built(recorded):
        return False
    try:
        build.load(recorded)
    except build.BuildError:
        return False
    return True


def corrected(
    *, step: int, lr: float, betas: tuple[float, float], eps: float, correct_bias: bool = True,
    eps_after_correction: bool = False,
) -> tuple[float, float]:  # fmt: skip
    """(step_size, eps) such that step_size * M / (sqrt(V) + eps) is Adam's bias-corrected update.

    Adam, arXiv:1412.6980: lr * sqrt(1-b2^t)/(1-b1^t) * M / (sqrt(V) + eps), as in galore-torch; with
    `eps_after_correction` lr / (1-b1^t) * M / (sqrt(V / (1-b2^t)) + eps), as in bitsandbytes.

    Args:
        step: t, counted from 1.
        lr: learning rate.
        betas: decay of M and V.
        eps: added to the root.
        correct_bias: False leaves out both corrections.
        eps_after_correction: where eps stands.
    """
    first, second = (1 - betas[0] ** step, 1 - betas[1] ** step) if correct_bias else (1.0, 1.0)
    root = math.sqrt(second)
    return lr * root / first, eps * root if eps_after_correction else eps


def prefers_library(device: torch.device, rank: int) -> bool:
    """Return whether the library computes a layer's two products, over the whole layer, with Adam fused between them.

    On a CPU it always does: a block of rows at a time was never measured to be faster (docs/kernels.md). On a GPU it
    does above a rank.
    """
    return device.type == "cpu" or rank > CUDA_LARGE_RANK


# ---- the reference


@torch.library.impl("lowrank::galore_step_", "CompositeExplicitAutograd")
def galore_step_(
    weights: list[Tensor], grads: list[Tensor], bases: list[Tensor], exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor], exp_avg_scales: list[Tensor], exp_avg_sq_scales: list[Tensor], codes: list[Tensor],
    left: bool, projected: bool, whole: bool, beta1: float, beta2: float, eps: float, step_size: float, decay: float,
    scalars: Tensor | None = None,
) -> None:  # fmt: skip
    """One projected Adam step of every layer, in place. The module's docstring has the equations.

    Args:
        weights: (m, n) each, float32, bfloat16 or float16; changed.
        grads: (m, n), of the weight's dtype; or, if `projected`, R in float32.
        bases: P (m, r) or Q (n, r), of the weight's dtype.
        exp_avgs: M, contiguous, float32; or uint8 codes, in blocks of 256 elements with a scale each. Changed.
        exp_avg_sqs: V, likewise.
        exp_avg_scales: scales of M, float32, (elements / 256,); none for float32 moments. Changed.
        exp_avg_sq_scales: of V.
        codes: the 256 sorted values of M's codes and of V's; none for float32 moments.
        left: the bases are P.
        projected: the gradients are R.
        whole: leave the products to the library; changes rounding only.
        beta1: decay of M.
        beta2: decay of V.
        eps: added to sqrt(V), as `corrected` gives it.
        step_size: learning rate times GaLore's scale times both bias corrections.
        decay: 1 - learning rate * weight decay.
        scalars: (3,) float32 on a GPU, in place of eps, step_size and decay: for replays of a captured CUDA graph.
    """
    for i, (weight, grad, basis) in enumerate(zip(weights, grads, bases, strict=True)):
        basis = basis.float()
        if not projected:
            grad = basis.mT @ grad.float() if left else grad.float() @ basis
        grad = cut(grad)
        moments, scales = (exp_avgs[i], exp_avg_sqs[i]), ()
        mean, square = moments
        if codes:
            scales = (exp_avg_scales[i], exp_avg_sq_scales[i])
            mean, square = (_dequantize(*part) for part in zip(moments, scales, codes, strict=True))
        mean = beta1 * mean + (1 - beta1) * grad
        square = beta2 * square + (1 - beta2) * grad.square()
        now = (eps, step_size, decay) if scalars is None else scalars.unbind()
        # the direction meets the basis in the weight's dtype
        direction = (mean / (square.sqrt() + now[0])).to(weight.dtype).float()
        product = basis @ direction if left else direction @ basis.mT
        weight.copy_(now[2] * (weight.float() - now[1] * product))
        if codes:
            for value, moment, scale, code in zip((mean, square), moments, scales, codes, strict=True):
                _quantize_(value, moment, scale, code)
        else:
            moments[0].copy_(mean)
            moments[1].copy_(square)


@torch.library.impl("lowrank::velora_compress", "CompositeExplicitAutograd")
def velora_compress(x: Tensor, vector: Tensor) -> Tensor:
    """z[.., g] = sum_j x[.., g M + j] v[j]: (..., G M) and (M,) to (..., G), in float32, rounded to x's dtype once.

    VeLoRA, arXiv:2405.17991, Alg. 1.
    """
    return (x.float().unflatten(-1, (-1, vector.shape[0])) @ vector.float()).to(x.dtype)


@torch.library.impl("lowrank::velora_step_", "CompositeExplicitAutograd")
def velora_step_(
    weight: Tensor, factor: Tensor, vector: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, beta1: float, beta2: float,
    eps: float, step_size: float, decay: float, scalars: Tensor | None = None,
) -> None:  # fmt: skip
    """Adam's step along the factored gradient F (x) v: its moments, then W <- decay (W - step_size U) with
    U[o, g M + j] = M[o, g] v[j] / (sqrt(V[o, g]) |v[j]| + eps), the dense Adam of F (x) v for a fixed v.

    Args:
        weight: (m, G M), contiguous; changed.
        factor: F (m, G), float32, contiguous.
        vector: v (M,), float32.
        exp_avg: M (m, G), float32, contiguous; changed.
        exp_avg_sq: V, likewise.
        beta1: decay of M.
        beta2: decay of V.
        eps: added to the root, as `corrected` gives it.
        step_size: learning rate times both bias corrections.
        decay: 1 - learning rate * weight decay.
        scalars: as for `galore_step_`.
    """
    factor = cut(factor)
    exp_avg.mul_(beta1).add_(factor, alpha=1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(factor, factor, value=1 - beta2)
    now = (eps, step_size, decay) if scalars is None else scalars.unbind()
    move = exp_avg.unsqueeze(-1) * vector / (exp_avg_sq.sqrt().unsqueeze(-1) * vector.abs() + now[0])
    weight.copy_(now[2] * (weight.float() - now[1] * move.flatten(1)))


@torch.library.register_fake("lowrank::galore_step_")
def _galore_step_fake(*args, **kwargs) -> None:
    return None


@torch.library.register_fake("lowrank::velora_compress")
def _velora_compress_fake(x: Tensor, vector: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // vector.shape[0]))


@torch.library.register_fake("lowrank::velora_step_")
def _velora_step_fake(*args, **kwargs) -> None:
    return None


def _dequantize(moment: Tensor, scale: Tensor, code: Tensor) -> Tensor:
    values = code[moment.flatten().long()]
    return (values * scale.repeat_interleave(BLOCK)[: values.numel()]).view(moment.shape)


def _quantize_(values: Tensor, moment: Tensor, scale: Tensor, code: Tensor) -> None:
    """Nearest codes of each block relative to its largest magnitude; a tie goes to the smaller code."""
    flat = values.flatten()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    most = blocks.abs().amax(1)
    scaled = blocks * torch.where(most == 0, 0.0, 1 / most).unsqueeze(1)
    nearest = torch.bucketize(scaled, (code[1:] + code[:-1]) / 2)
    moment.copy_(nearest.flatten()[: flat.numel()].view(moment.shape))
    scale.copy_(most)
