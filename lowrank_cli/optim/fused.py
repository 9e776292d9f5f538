"""The projected Adam step on a compiled kernel, for the optimizers whose rule is Adam.

What a kernel does not take, such as two-sided projections or stochastic rounding, goes the way of plain PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_cli import console
from lowrank_cli.ops import build, fused_step


class FusedAdam:
    """Mixed into a ProjectedOptimizer in front of it; the group's key `kernel` says "cuda", "cpu" or "torch".

    The key is part of a checkpoint. A run whose kernel was not asked for goes on with its checkpoint's, bit for bit;
    another one says that the numbers will differ by rounding.
    """

    # whether the kernel was nobody's wish: see fused_step.Choice
    kernel_is_auto = False
    # bitsandbytes adds eps to the corrected root, galore-torch to the uncorrected one
    eps_after_correction = False

    def _kernel_codes(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The codes of 8-bit moments; asked for only if there are such."""
        raise NotImplementedError

    def _step_all(self, params: list[Tensor], group: dict) -> None:
        if "rank" not in group or not self._kernel_at_hand(group):
            super()._step_all(params, group)
            return
        together: dict[tuple, list[Tensor]] = {}
        for p in params:
            if not self._kernel_takes(p, group):
                self.step_one(p, group)
                continue
            self._ready(p, group)
            state = self.state[p]
            # layers of one call share the numbers of the step
            left, projected = "left" in self.sides[p], p in self.low_rank_grads
            key = (state["step"], left, projected, state["exp_avg"].dtype, p.dtype, p.device, group["rank"])
            together.setdefault(key, []).append(p)
        for same in together.values():
            self._step_fused(same, group)

    def _step_projected(self, p: Tensor, group: dict) -> None:
        if self._kernel_at_hand(group) and self._kernel_takes(p, group):
            self._ready(p, group)
            self._step_fused([p], group)
        else:
            super()._step_projected(p, group)

    def _kernel_at_hand(self, group: dict) -> bool:
        kernel = group["kernel"]
        if kernel == "torch" or build.is_loaded(kernel):
            return kernel != "torch"
        # an optimizer that came out of a pickle or a copy from another process
        group["kernel"] = fused_step.choose(kernel, group["params"][0].device).name
        return group["kernel"] != "torch"

    def _kernel_takes(self, p: Tensor, group: dict) -> bool:
        """Whether the kernel does all of this tensor's step."""
        grad, collected = p.grad, p in self.low_rank_grads
        return (
            p.dim() == 2
            and not self.layouts[p].is_cut
            and len(self.sides[p]) == 1
            and p.dtype in fused_step.DTYPES
            and p.device.type == group["kernel"]
            and "weight_norm" not in group
            and not (group["stochastic_rounding"] and p.dtype == torch.bfloat16)
            and is_dense(p)
            # a gradient that came both ways is added up first
            and (collected if grad is None else not collected and grad.dtype == p.dtype and is_dense(grad))
        )

    def _ready(self, p: Tensor, group: dict) -> None:
        """Basis, state and clocks of a tensor that is about to step."""
        if self.is_due(p):
            self._refresh(p, self.state[p], group)
        state = self.state[p]
        rank, left = next(iter(self.bases(p).values())).shape[1], "left" in self.sides[p]
        shape = (rank, p.shape[1]) if left else (p.shape[0], rank)
        if "step" in state and state["exp_avg"].shape != shape:
            raise ValueError(f"moments of {tuple(state['exp_avg'].shape)} for a gradient of {shape}: has the group's "
                             "rank changed?")  # fmt: skip
        if "step" not in state:
            state["step"] = 0
            self._init_state(state, torch.empty(shape, device=p.device), group)
        state["step"] += 1
        state["until_refresh"] -= 1

    def _step_fused(self, params: list[Tensor], group: dict) -> None:
        states = [self.state[p] for p in params]
        (side,), first = self.sides[params[0]], states[0]
        projected = params[0] in self.low_rank_grads
        quantized = first["exp_avg"].dtype == torch.uint8
        step_size, eps = fused_step.corrected(
            step=first["step"],
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            correct_bias=group.get("correct_bias", True),
            eps_after_correction=self.eps_after_correction or self._decays_first(group),
        )
        alpha, beta = self._factors(params[0], group)
        bases = [s[f"basis_{side}"] for s in states]
        torch.ops.lowrank.galore_step_(
            params,
            [self.low_rank_grads.pop(p) if projected else p.grad for p in params],
            [b if b.dtype == p.dtype else b.to(p.dtype) for b, p in zip(bases, params, strict=True)],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [s["exp_avg_scale"] for s in states] if quantized else [],
            [s["exp_avg_sq_scale"] for s in states] if quantized else [],
            list(self._kernel_codes(params[0].device)) if quantized else [],
            side == "left",
            projected,
            fused_step.prefers_library(params[0].device, bases[0].shape[1]),
            *group["betas"],
            eps,
            # the kernel's decay acts on what the update made of the weight
            step_size * group["scale"] * alpha / beta,
            beta,
        )

    def _step_along(self, p: Tensor, factor: Tensor, state: dict, group: dict, vector: Tensor) -> bool:
        """The step of a weight with a factored gradient; False if it is not the kernel's."""
        takes = p.is_contiguous() and p.dtype in fused_step.DTYPES and p.device.type == group["kernel"]
        rounded = group["stochastic_rounding"] and p.dtype == torch.bfloat16
        if rounded or not (takes and self._kernel_at_hand(group)):
            return False
        step_size, eps = fused_step.corrected(
            step=state["step"],
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            correct_bias=group["correct_bias"],
            eps_after_correction=self._decays_first(group),
        )
        alpha, beta = self._factors(p, group)
        torch.ops.lowrank.velora_step_(
            p, factor.contiguous(), vector.float().contiguous(), state["exp_avg"], state["exp_avg_sq"],
            *group["betas"], eps, step_size * alpha / beta, beta,
        )  # fmt: skip
        return True

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's; the checkpoint's kernel is taken over or told apart, see the class."""
        mine = [group["kernel"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, kernel in zip(self.param_groups, mine, strict=True):
            group["kernel"] = kernel
        self.take_kernels([group.get("kernel", "torch") for group in state_dict["param_groups"]])

    def take_kernels(self, recorded: list[str] | None) -> None:
        """Go on with the kernels that a checkpoint was made with, one for each group, or say that the numbers differ.

        Args:
            recorded: None of a checkpoint that names none.
        """
        if recorded is None:
            console.warn("the checkpoint names no kernel: the run goes on with the same numbers up to rounding")
            return
        for group, kernel in zip(self.param_groups, recorded, strict=False):
            # a group may be empty: a model without biases
            if self.kernel_is_auto and all(fused_step.follow(kernel, p.device) for p in group["params"][:1]):
                group["kernel"] = kernel
        if now := {group["kernel"] for group in self.param_groups} - set(recorded):
            console.warn(
                f"the checkpoint was made with another kernel than {', '.join(sorted(now))}: the run goes on with "
                "the same numbers up to rounding, not bit for bit"
            )


def is_dense(matrix: Tensor) -> bool:
    """Whether one dimension is dense and no two elements share memory: the strides that the kernels take."""
    (rows, cols), (down, right) = matrix.shape, matrix.stride()
    return min(rows, cols) <= 1 or (right == 1 and down >= cols) or (down == 1 and right >= rows)
