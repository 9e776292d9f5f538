"""AdamW on projected gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowrank_cli.ops.precision import wide
from lowrank_cli.optim.optimizer import LowRankOptimizer
from lowrank_cli.optim.projection import project
from lowrank_cli.optim.rules import Decaying


def adamw_(
    targets: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    correct_bias: bool = True,
) -> None:
    """Add Adam's update to each target in place: -lr * sqrt(1-b2^t)/(1-b1^t) * M / (sqrt(V) + eps).

    Adam, arXiv:1412.6980, with eps outside the bias correction (sec. 2, "more efficient order"), which is the form of
    galore-torch. PyTorch's fused kernel corrects the root before it adds eps, so it is given eps / sqrt(1-b2^t): the
    same number. No weight decay here.

    Args:
        targets: float32 or float64 tensors to change: weights, or zeros that then hold the update itself.
        grads: one for each target, of its shape and dtype.
        exp_avgs: first moments M, updated in place.
        exp_avg_sqs: second moments V, updated in place.
        step: t, counted from 1.
        lr: learning rate.
        betas: decay of M and V.
        eps: added to sqrt(V).
        correct_bias: False leaves out both corrections.
    """
    tensors = [(t, g, m, v) for t, g, m, v in zip(targets, grads, exp_avgs, exp_avg_sqs, strict=True)]
    if not all(alike(*four) for four in tensors):
        for four in tensors:
            _adamw_one_(*four, step=step, lr=lr, betas=betas, eps=eps, correct_bias=correct_bias)
        return
    # a step so late that both corrections are 1 in float32
    clock = float(step) if correct_bias else 1e9
    root = math.sqrt(1 - betas[1] ** clock)
    clocks = [torch.full((), clock, dtype=torch.float32, device=targets[0].device)] * len(targets)
    torch._fused_adamw_(
        targets, grads, exp_avgs, exp_avg_sqs, [], clocks, lr=lr, beta1=betas[0], beta2=betas[1], weight_decay=0.0,
        eps=eps / root, amsgrad=False, maximize=False, grad_scale=None, found_inf=None,
    )  # fmt: skip


def alike(first: Tensor, *others: Tensor) -> bool:
    """Return whether a kernel that walks over memory may take these together: dense, and of the same strides.

    Raises:
        ValueError: they have not the same shape.
    """
    for other in others:
        if other.shape != first.shape:
            raise ValueError(
                f"moments of {tuple(other.shape)} for a gradient of {tuple(first.shape)}: has the group's rank "
                "changed?"
            )
    if any(other.stride() != first.stride() for other in others):
        return False
    return first.is_contiguous() or torch._prims_common.is_non_overlapping_and_dense(first)


def _adamw_one_(
    target: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, step: int, lr: float,
    betas: tuple[float, float], eps: float, correct_bias: bool,
) -> None:  # fmt: skip
    """`adamw_` of one tensor in any layout."""
    first, second = (1 - betas[0] ** step, 1 - betas[1] ** step) if correct_bias else (1.0, 1.0)
    exp_avg.lerp_(grad, 1 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    target.addcdiv_(exp_avg, exp_avg_sq.sqrt().add_(eps), value=-lr * math.sqrt(second) / first)


def rotate(
    exp_avg: Tensor, exp_avg_sq: Tensor, change: dict[str, Tensor], *, step: int, betas: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Adam's moments in the coordinates of a new basis. LDAdam, arXiv:2410.16103, Alg. 1, with C = P_new^T P_old:
    M <- C M and V <- (1 - b2^t) |(C o C)(V^ - M^2) + (C M^)^2|, the hats meaning bias-corrected.

    Args:
        exp_avg: M, (r, n) for a left basis, (m, r) for a right one.
        exp_avg_sq: V, of the same shape.
        change: old^T new for each side, (r, r).
        step: t, the updates so far.
        betas: decay of M and V.
    Returns:
        The new M and V.
    """
    corrections = 1 - betas[0] ** step, 1 - betas[1] ** step
    mean, square = exp_avg / corrections[0], exp_avg_sq / corrections[1]

    def turn(tensor: Tensor, power: int) -> Tensor:
        bases = {side: (matrix**power).contiguous() for side, matrix in change.items()}
        return project(tensor, bases)

    turned = turn(mean, 1)
    square = (turn(square - mean.square(), 2) + turned.square()).abs()
    return turned * corrections[0], square * corrections[1]


class AdamW(Decaying):
    """Adam with float32 or float64 moments; groups say `lr`, `betas`, `eps`, `correct_bias` and `convention`."""

    advances = True

    def eps_after_correction(self, group: dict) -> bool:
        """Say whether eps is added to the corrected root, as in torch.optim, or before it, as in galore-torch."""
        return group["convention"] == "torch"

    def init(self, state: dict, grad: Tensor, group: dict, height: int | None = None) -> None:
        """Make both moments."""
        state["exp_avg"] = torch.zeros_like(grad, dtype=wide(grad.dtype))
        state["exp_avg_sq"] = torch.zeros_like(grad, dtype=wide(grad.dtype))

    def __call__(
        self, targets: list[Tensor], grads: list[Tensor], states: list[dict], group: dict, params: list[Tensor]
    ) -> None:
        """Add Adam's update, see `adamw_`."""
        step, eps = states[0]["step"], group["eps"]
        if self.eps_after_correction(group):
            # adamw_ takes it before the correction
            eps *= math.sqrt(1 - group["betas"][1] ** step)
        adamw_(
            targets,
            grads,
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            step=step,
            lr=group["lr"],
            betas=group["betas"],
            eps=eps,
            correct_bias=group["correct_bias"],
        )

    def advance_(self, grad: Tensor, state: dict, group: dict) -> tuple[float, float]:
        """Take a gradient into the moments; returns (step_size, eps) of step_size * M / (sqrt(V) + eps)."""
        (beta1, beta2), step = group["betas"], state["step"]
        state["exp_avg"].lerp_(grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        corrections = (1 - beta1**step, 1 - beta2**step) if group["correct_bias"] else (1.0, 1.0)
        eps = group["eps"]
        if self.eps_after_correction(group):
            eps *= math.sqrt(corrections[1])
        return group["lr"] * math.sqrt(corrections[1]) / corrections[0], eps

    def rotate(self, state: dict, change: dict[str, Tensor], group: dict) -> None:
        """Take the moments to a new basis, see `rotate`."""
        state["exp_avg"], state["exp_avg_sq"] = rotate(
            state["exp_avg"], state["exp_avg_sq"], change, step=state["step"], betas=group["betas"]
        )


class GaLoreAdamW(LowRankOptimizer):
    """AdamW whose groups may be projected; takes the groups of the PyPI package `galore-torch`.

    GaLore, arXiv:2403.03507, Alg. 2. Moments are float32, or float64 for float64 weights, and kept as they are when
    the basis is refreshed. Unlike galore-torch: the basis owns only its r columns, no full-size temporary is made, and
    the state is plain tensors.

    Args:
        params: parameters or groups; a group with `rank` is projected: `update_proj_gap` (200) steps between
            refreshes of the basis, `scale` (0.25, the paper's alpha), `proj_type` ("std").
        lr: learning rate.
        betas: decay of the moments.
        eps: 1e-6 as in galore-torch (the paper says 1e-8).
        weight_decay: decoupled, applied after the update.
        correct_bias: Adam's bias correction.
        no_deprecation_warning: accepted for galore-torch's sake, without effect.
        stochastic_rounding: round bfloat16 weights up or down at random, keeping the mean.
        kernel: what the projected and the factored update run on: "torch", or "cpu" or "cuda" as
            `ops.fused_step.choose` gave it.
        convention: where eps and decay stand: "galore-torch", or "torch" as in torch.optim.AdamW, with eps added to
            the corrected root and decay before the update.
    """

    make_rule = AdamW

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        no_deprecation_warning: bool = False,
        stochastic_rounding: bool = False,
        kernel: str = "torch",
        convention: str = "galore-torch",
    ):
        if lr < 0 or eps < 0 or not all(0 <= b < 1 for b in betas):
            raise ValueError(f"lr {lr}, betas {betas}, eps {eps}: lr and eps must be >= 0 and betas in [0, 1)")
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": tuple(betas),
                "eps": eps,
                "weight_decay": weight_decay,
                "correct_bias": correct_bias,
                "stochastic_rounding": stochastic_rounding,
                "kernel": kernel,
                "convention": convention,
            },
        )
