"""Adafactor on projected gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowrank_cli.ops.precision import cut, wide
from lowrank_cli.optim.optimizer import LowRankOptimizer
from lowrank_cli.optim.rules import Decaying


def adafactor_(update: Tensor, state: dict, *, beta2: float, floor: float, clip_threshold: float, lr: float,
               beta1: float | None) -> Tensor:  # fmt: skip
    """Adafactor's update of a gradient, in place of it: Shazeer & Stern, arXiv:1804.04235, Alg. 4 and 5.

    A matrix keeps the row and column means of its squared gradient instead of the whole; the update is divided by its
    root mean square where that is over `clip_threshold`.

    Args:
        update: the gradient, float32; overwritten.
        state: `exp_avg_sq_row` and `exp_avg_sq_col`, or `exp_avg_sq`; with beta1 also `exp_avg`. Updated in place.
        beta2: decay of the second moment at this step.
        floor: added to the squared gradient (eps_1).
        clip_threshold: largest root mean square of the update (d).
        lr: learning rate of this step.
        beta1: decay of a first moment, or None for none.
    Returns:
        What to subtract from the weight.
    """
    square = update.square().add_(floor)
    if "exp_avg_sq_row" in state:
        row, col = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
        row.mul_(beta2).add_(square.mean(dim=-1), alpha=1 - beta2)
        col.mul_(beta2).add_(square.mean(dim=-2), alpha=1 - beta2)
        update.mul_((row / row.mean(dim=-1, keepdim=True)).rsqrt_().unsqueeze(-1)).mul_(col.rsqrt().unsqueeze(-2))
    else:
        state["exp_avg_sq"].mul_(beta2).add_(square, alpha=1 - beta2)
        update.mul_(state["exp_avg_sq"].rsqrt())
    update.div_((rms(update) / clip_threshold).clamp_(min=1.0)).mul_(lr)
    if beta1 is None:
        return update
    return state["exp_avg"].mul_(beta1).add_(update, alpha=1 - beta1)


def rms(tensor: Tensor) -> Tensor:
    """Root mean square."""
    return tensor.to(wide(tensor.dtype)).norm() / tensor.numel() ** 0.5


class Adafactor(Decaying):
    """Adafactor; groups say `lr`, `eps` (a pair), `clip_threshold`, `decay_rate`, `beta1` and how lr is scaled."""

    in_place = False

    def check(self, group: dict) -> None:
        """Refuse moments that cannot be rotated."""
        if group.get("moments") == "rotate":
            raise ValueError("Adafactor's factored moments cannot be rotated: take moments='keep' or 'reset'")

    def init(self, state: dict, grad: Tensor, group: dict, height: int | None = None) -> None:
        """Make the row and column means, or the whole second moment of a vector, and a first one if wanted."""
        make = {"dtype": wide(grad.dtype), "device": grad.device}
        if group["beta1"] is not None:
            state["exp_avg"] = torch.zeros(grad.shape, **make)
        if grad.dim() >= 2:
            state["exp_avg_sq_row"] = torch.zeros(grad.shape[:-1], **make)
            state["exp_avg_sq_col"] = torch.zeros(grad.shape[:-2] + grad.shape[-1:], **make)
        else:
            state["exp_avg_sq"] = torch.zeros(grad.shape, **make)

    def __call__(
        self, targets: list[Tensor], grads: list[Tensor], states: list[dict], group: dict, params: list[Tensor]
    ) -> None:
        """Subtract Adafactor's update, see `adafactor_`."""
        for target, grad, state, p in zip(targets, grads, states, params, strict=True):
            step = state["step"]
            target.sub_(
                adafactor_(
                    cut(grad),
                    state,
                    beta2=1 - step ** group["decay_rate"],
                    floor=group["eps"][0],
                    clip_threshold=group["clip_threshold"],
                    lr=self._lr(p, state, group),
                    beta1=group["beta1"],
                )
            )

    def _lr(self, p: Tensor, state: dict, group: dict) -> float | Tensor:
        """The learning rate of this step and weight."""
        step, lr = state["step"], group["lr"]
        # unless somebody has written one: torch takes a step at 0 to make the state that it loads
        if lr is None:
            lr = min(1e-6 * step if group["warmup_init"] else 1e-2, 1 / math.sqrt(step))
        return lr * rms(p).clamp(min=group["eps"][1]) if group["scale_parameter"] else lr

    def decays_first(self, group: dict) -> bool:
        """Say yes, as in galore-torch."""
        return True

    def kept(self, p: Tensor, state: dict, group: dict) -> float:
        """Return 1 - lr * weight_decay with this step's and this weight's own learning rate."""
        return float(1 - group["weight_decay"] * self._lr(p, state, group))


class GaLoreAdafactor(LowRankOptimizer):
    """Adafactor whose groups may be projected; takes the arguments and groups of galore-torch's class of this name.

    Args:
        params: parameters or groups, as for GaLoreAdamW.
        lr: learning rate; None with `relative_step`.
        eps: floors of the squared gradient and of the parameter's scale.
        clip_threshold: largest root mean square of an update.
        decay_rate: the second moment's decay is 1 - step ** decay_rate.
        beta1: decay of a first moment; None keeps none.
        weight_decay: decoupled, applied before the update and with this step's own learning rate.
        scale_parameter: multiply the learning rate by the weight's root mean square.
        relative_step: the learning rate falls with 1 / sqrt(step).
        warmup_init: with `relative_step`, begin at 1e-6 * step.
        stochastic_rounding: round bfloat16 weights up or down at random, keeping the mean.
    """

    make_rule = Adafactor

    def __init__(
        self,
        params,
        lr: float | None = None,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
        relative_step: bool = True,
        warmup_init: bool = False,
        stochastic_rounding: bool = False,
    ):
        if lr is not None and relative_step:
            raise ValueError("give lr or relative_step=True, not both")
        if warmup_init and not relative_step:
            raise ValueError("warmup_init=True needs relative_step=True")
        super().__init__(params, {
            "lr": lr, "eps": tuple(eps), "clip_threshold": clip_threshold, "decay_rate": decay_rate, "beta1": beta1,
            "weight_decay": weight_decay, "scale_parameter": scale_parameter, "relative_step": relative_step,
            "warmup_init": warmup_init, "stochastic_rounding": stochastic_rounding,
        })  # fmt: skip
