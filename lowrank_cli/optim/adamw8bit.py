"""AdamW on projected gradients with block-wise 8-bit moments, through bitsandbytes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowrank_cli.errors import MissingError
from lowrank_cli.ops.precision import cut, wide
from lowrank_cli.optim.adamw import adamw_, alike, rotate
from lowrank_cli.optim.optimizer import LowRankOptimizer
from lowrank_cli.optim.rules import Decaying

# bitsandbytes quantizes moments in blocks of this many elements, each with a float32 scale
BLOCK = 256


class AdamW8bit(Decaying):
    """Adam with 8-bit moments; groups say `lr`, `betas`, `eps`, `min_8bit_size` and `convention`.

    Raises:
        MissingError: bitsandbytes is not installed.
    """

    def __init__(self):
        self.functional = import_bitsandbytes()
        self._codes: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def eps_after_correction(self, group: dict) -> bool:
        """Say yes: bitsandbytes adds eps to the corrected root."""
        return True

    def init(self, state: dict, grad: Tensor, group: dict, height: int | None = None) -> None:
        """Make both moments, in blocks with a scale each."""
        # every part of a tensor is kept alike
        size = grad.numel() if height is None else height * math.prod(grad.shape[1:])
        for key in ("exp_avg", "exp_avg_sq"):
            if size < group["min_8bit_size"]:
                state[key] = torch.zeros_like(grad, dtype=wide(grad.dtype))
            else:
                # zero is an entry of the signed code and of the unsigned one, so the first scale does not matter
                blocks = -(-grad.numel() // BLOCK)
                state[f"{key}_scale"] = torch.zeros(blocks, dtype=torch.float32, device=grad.device)
                state[key] = torch.zeros_like(grad, dtype=torch.uint8)

    def __call__(
        self, targets: list[Tensor], grads: list[Tensor], states: list[dict], group: dict, params: list[Tensor]
    ) -> None:
        """Add Adam's update."""
        for target, grad, state in zip(targets, grads, states, strict=True):
            if state["exp_avg"].dtype == torch.uint8:
                self._update(target, cut(grad), state, group)
                continue
            # bitsandbytes adds eps to the corrected root; adamw_ takes it before the correction
            eps = group["eps"] * (1 - group["betas"][1] ** state["step"]) ** 0.5
            adamw_([target], [grad], [state["exp_avg"]], [state["exp_avg_sq"]], step=state["step"], lr=group["lr"],
                   betas=group["betas"], eps=eps)  # fmt: skip

    def _update(self, target: Tensor, grad: Tensor, state: dict, group: dict) -> None:
        if not grad.numel():
            # a process may have no rows of a tensor
            return
        signed, unsigned = self.codes(grad.device)
        # bitsandbytes walks over memory, in the order of the moments; it has no float64, which codes do not need
        simple = target.dtype == torch.float32 and alike(target, grad, state["exp_avg"])
        narrow = target if simple else torch.zeros_like(state["exp_avg"], dtype=torch.float32)
        grad = grad.float() if simple else torch.empty_like(narrow).copy_(grad)
        self.functional.optimizer_update_8bit_blockwise(
            "adam", grad, narrow, state["exp_avg"], state["exp_avg_sq"], *group["betas"], 0.0, 0.0,
            group["eps"], state["step"], group["lr"], signed, unsigned, state["exp_avg_scale"],
            state["exp_avg_sq_scale"], 0.0, 1.0,
        )  # fmt: skip
        if narrow is not target:
            target.add_(narrow)

    def rotate(self, state: dict, change: dict[str, Tensor], group: dict) -> None:
        """Take the moments to a new basis, by way of float32."""
        keys = ("exp_avg", "exp_avg_sq")
        quantized = state["exp_avg"].dtype == torch.uint8
        codes = dict(zip(keys, self.codes(state["exp_avg"].device), strict=True))
        moments = [self._read(state, key, codes[key]) if quantized else state[key] for key in keys]
        turned = rotate(*moments, change, step=state["step"], betas=group["betas"])
        for key, moment in zip(keys, turned, strict=True):
            if quantized:
                values, scale = torch.ops.bitsandbytes.quantize_blockwise(moment.contiguous(), codes[key], BLOCK)
                state[key].copy_(values.view_as(state[key]))
                state[f"{key}_scale"].copy_(scale)
            else:
                state[key] = moment

    def _read(self, state: dict, key: str, code: Tensor) -> Tensor:
        return torch.ops.bitsandbytes.dequantize_blockwise(
            state[key], state[f"{key}_scale"], code, BLOCK, torch.float32
        ).view_as(state[key])

    def codes(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return bitsandbytes' 256 code values for signed and for unsigned moments."""
        if device not in self._codes:
            make = self.functional.create_dynamic_map
            self._codes[device] = (make(signed=True).to(device), make(signed=False).to(device))
        return self._codes[device]


class GaLoreAdamW8bit(LowRankOptimizer):
    """AdamW whose moments are 8-bit (Dettmers et al., arXiv:2110.02861), of projected gradients where a group says so.

    Takes the groups and the arguments of galore-torch's class of this name. The update is computed in float32 and
    added to the weight once; galore-torch rounds it to the weight's dtype before it is expanded, clones the weight and
    synchronises the device for every tensor. Tensors of fewer than `min_8bit_size` elements keep float32 moments.

    Args:
        params: parameters or groups, as for GaLoreAdamW.
        lr: learning rate.
        betas: decay of the moments.
        eps: added to the bias-corrected root of the second moment.
        weight_decay: decoupled, applied after the update; galore-torch's default.
        amsgrad, args, percentile_clipping, block_wise, is_paged: only galore-torch's defaults are supported.
        optim_bits: without effect, as there.
        min_8bit_size: elements from which on moments are 8-bit.
        stochastic_rounding: round bfloat16 weights up or down at random, keeping the mean.
        kernel: what the projected update runs on: "torch", or "cpu" or "cuda" as `ops.fused_step.choose` gave it.
        convention: "galore-torch", decay after the update, or "torch" as in torch.optim.AdamW, decay before it.

    Raises:
        MissingError: bitsandbytes is not installed.
    """

    make_rule = AdamW8bit

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: object = None,
        min_8bit_size: int = 4096,
        percentile_clipping: int = 100,
        block_wise: bool = True,
        is_paged: bool = False,
        stochastic_rounding: bool = False,
        kernel: str = "torch",
        convention: str = "galore-torch",
    ):
        if amsgrad or args is not None or percentile_clipping != 100 or not block_wise or is_paged:
            raise ValueError("amsgrad, args, percentile_clipping, block_wise=False and is_paged are not supported")
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": tuple(betas),
                "eps": eps,
                "weight_decay": weight_decay,
                "min_8bit_size": min_8bit_size,
                "stochastic_rounding": stochastic_rounding,
                "kernel": kernel,
                "convention": convention,
            },
        )


def import_bitsandbytes():
    """bitsandbytes.functional; raises MissingError with the install command."""
    try:
        import bitsandbytes.functional
    except ImportError:
        raise MissingError(
            "8-bit moments need bitsandbytes, which is not installed", "pip install bitsandbytes"
        ) from None
    return bitsandbytes.functional
