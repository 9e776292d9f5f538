"""Let a compiled kernel step the tensors that it takes, before the rule steps the others.

Tensors that no kernel takes, such as those with two-sided projections or stochastic rounding, are left to the rule in
plain PyTorch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowrank_cli import console
from lowrank_cli.ops import build, fused_step
from lowrank_cli.optim.projected import Projected
from lowrank_cli.optim.rules import count_

if TYPE_CHECKING:
    from lowrank_cli.optim.optimizer import LowRankOptimizer
    from lowrank_cli.optim.rules import Rule
    from lowrank_cli.optim.space import Space


def step_(rule: Rule, spaces: list[Space], group: dict) -> list[Space]:
    """Update the tensors of a group that its kernel takes, and return the others.

    The group's key `kernel` says "cuda", "cpu" or "torch". Layers of one call share the numbers of the step.

    Args:
        rule: kernels are for Adam.
        spaces: with gradients.
        group: its settings.
    """
    if not at_hand(group):
        return spaces
    left, together = [], {}
    for space in spaces:
        if not (type(space) is Projected and takes(space, group)):
            left.append(space)
            continue
        _make_ready(space, rule)
        state, p = space.state, space.weight
        key = (state["step"], "left" in space.sides, bool(space.small), state["exp_avg"].dtype, p.dtype, p.device)
        together.setdefault((*key, group["rank"]), []).append(space)
    for same in together.values():
        galore_(same, rule, group)
    return left


def at_hand(group: dict) -> bool:
    """Say whether the group runs on a kernel, which is loaded if it is not yet."""
    kernel = group.get("kernel", "torch")
    if kernel != "torch" and group["params"] and not build.is_loaded(kernel):
        # an optimizer that came out of a pickle or a copy from another process
        group["kernel"] = kernel = fused_step.choose(kernel, group["params"][0].device).name
    return kernel != "torch"


def takes(space: Projected, group: dict) -> bool:
    """Say whether the kernel does all of this tensor's step."""
    p, grad = space.weight, space.weight.grad
    return (
        p.dim() == 2
        and not space.layout.is_cut
        and len(space.sides) == 1
        and p.dtype in fused_step.DTYPES
        and p.device.type == group["kernel"]
        and not (group["stochastic_rounding"] and p.dtype == torch.bfloat16)
        and is_dense(p)
        # a gradient that came both ways is added up first
        and (bool(space.small) if grad is None else not space.small and grad.dtype == p.dtype and is_dense(grad))
    )


def _make_ready(space: Projected, rule: Rule) -> None:
    """Basis, state and clocks of a tensor that is about to step."""
    if space.is_due:
        space.refresh()
    p, state = space.weight, space.state
    rank, left = next(iter(space.bases().values())).shape[1], "left" in space.sides
    shape = (rank, p.shape[1]) if left else (p.shape[0], rank)
    if "step" in state and state["exp_avg"].shape != shape:
        raise ValueError(
            f"moments of {tuple(state['exp_avg'].shape)} for a gradient of {shape}: has the group's rank changed?"
        )
    count_(rule, state, torch.empty(shape, device=p.device), space.group)
    state["until_refresh"] -= 1


def galore_(spaces: list[Projected], rule: Rule, group: dict) -> None:
    """Project, update the moments and expand into the weights, in one op for all layers."""
    params, states = [space.weight for space in spaces], [space.state for space in spaces]
    (side,), first = spaces[0].sides, states[0]
    projected = bool(spaces[0].small)
    quantized = first["exp_avg"].dtype == torch.uint8
    step_size, eps = fused_step.corrected(
        step=first["step"],
        lr=group["lr"],
        betas=group["betas"],
        eps=group["eps"],
        correct_bias=group.get("correct_bias", True),
        eps_after_correction=rule.eps_after_correction(group),
    )
    alpha, beta = rule.factors(params[0], first, group)
    bases = [s[f"basis_{side}"] for s in states]
    torch.ops.lowrank.galore_step_(
        params,
        [space.taken() if projected else space.weight.grad for space in spaces],
        [b if b.dtype == p.dtype else b.to(p.dtype) for b, p in zip(bases, params, strict=True)],
        [s["exp_avg"] for s in states],
        [s["exp_avg_sq"] for s in states],
        [s["exp_avg_scale"] for s in states] if quantized else [],
        [s["exp_avg_sq_scale"] for s in states] if quantized else [],
        list(rule.codes(params[0].device)) if quantized else [],
        side == "left",
        projected,
        fused_step.prefers_library(params[0].device, bases[0].shape[1]),
        *group["betas"],
        eps,
        # the kernel's decay acts on what the update made of the weight
        step_size * group["scale"] * alpha / beta,
        beta,
    )


def factored_(weight: Tensor, factor: Tensor, vector: Tensor, state: dict, rule: Rule, group: dict) -> bool:
    """Update a weight from the factor of its gradient; says whether the kernel takes it."""
    takes_it = weight.is_contiguous() and weight.dtype in fused_step.DTYPES
    rounded = group["stochastic_rounding"] and weight.dtype == torch.bfloat16
    if rounded or not rule.advances or not (takes_it and weight.device.type == group.get("kernel") and at_hand(group)):
        return False
    step_size, eps = fused_step.corrected(
        step=state["step"],
        lr=group["lr"],
        betas=group["betas"],
        eps=group["eps"],
        correct_bias=group["correct_bias"],
        eps_after_correction=rule.eps_after_correction(group),
    )
    alpha, beta = rule.factors(weight, state, group)
    torch.ops.lowrank.velora_step_(
        weight, factor.contiguous(), vector.float().contiguous(), state["exp_avg"], state["exp_avg_sq"],
        *group["betas"], eps, step_size * alpha / beta, beta,
    )  # fmt: skip
    return True


def take(optimizer: LowRankOptimizer, recorded: list[str] | None) -> None:
    """Go on with the kernels that a checkpoint was made with, one for each group, or say that the numbers differ.

    A run whose kernel was nobody's wish (`kernel_is_auto`) goes on with its checkpoint's, bit for bit.

    Args:
        optimizer: whose groups say the kernels.
        recorded: None of a checkpoint that names none.
    """
    groups = [group for group in optimizer.param_groups if "kernel" in group]
    if not groups:
        return
    if recorded is None:
        console.warn("the checkpoint names no kernel: the run goes on with the same numbers up to rounding")
        return
    for group, kernel in zip(optimizer.param_groups, recorded, strict=False):
        # a group may be empty: a model without biases
        if optimizer.kernel_is_auto and all(fused_step.follow(kernel, p.device) for p in group["params"][:1]):
            group["kernel"] = kernel
    if now := {group["kernel"] for group in groups} - set(recorded):
        console.warn(
            f"the checkpoint was made with another kernel than {', '.join(sorted(now))}: the run goes on with "
            "the same numbers up to rounding, not bit for bit"
        )


def is_dense(matrix: Tensor) -> bool:
    """Say whether one dimension is dense and no two elements share memory: the strides that the kernels take."""
    (rows, cols), (down, right) = matrix.shape, matrix.stride()
    return min(rows, cols) <= 1 or (right == 1 and down >= cols) or (down == 1 and right >= rows)
