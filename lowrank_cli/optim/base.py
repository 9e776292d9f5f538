"""One step loop for every optimizer that can work on projected gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lowrank_cli.optim.projection import expand_add_, project, sides, svd_basis


class ProjectedOptimizer(torch.optim.Optimizer):
    """An optimizer whose groups may carry GaLore's keys: `rank`, `update_proj_gap`, `scale`, `proj_type`.

    A group without `rank` is an ordinary one. In a group with `rank` the update rule runs on the projected gradient
    and its result is expanded straight into the weight. A subclass gives the rule (`_rule`) and its empty state
    (`_init_state`). State holds tensors and numbers only, so that it loads with `weights_only=True`:
    `step`, what the rule keeps, and `basis_left` and/or `basis_right`.
    """

    GROUP_DEFAULTS = {"update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}

    def __init__(self, params, defaults: dict):
        super().__init__(params, defaults)
        for group in self.param_groups:
            if "rank" in group:
                self._check_group(group)

    def _check_group(self, group: dict) -> None:
        if int(group["rank"]) < 1:
            raise ValueError(f"rank is {group['rank']}; it must be at least 1")
        for key, value in self.GROUP_DEFAULTS.items():
            group.setdefault(key, value)
        if int(group["update_proj_gap"]) < 1:
            raise ValueError(f"update_proj_gap is {group['update_proj_gap']}; it must be at least 1")
        for p in group["params"]:
            if p.dim() != 2:
                raise ValueError(f"a group with `rank` holds a tensor of shape {tuple(p.shape)}; it takes matrices")
            sides(p.shape, group["proj_type"])

    def _init_state(self, state: dict, grad: Tensor) -> None:
        raise NotImplementedError

    def _rule(self, targets: list[Tensor], grads: list[Tensor], states: list[dict], group: dict, lr: float) -> None:
        """Adds -lr times the rule's direction to each target in place; all states are at the same step."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None):
        """One update of every parameter that has a gradient; returns the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if "rank" in group:
                for p in group["params"]:
                    if p.grad is not None:
                        self._step_projected(p, group)
            else:
                self._step_plain([p for p in group["params"] if p.grad is not None], group)
        return loss

    def _step_projected(self, p: Tensor, group: dict) -> None:
        state, grad = self.state[p], p.grad
        step = state.get("step", 0)
        if step % group["update_proj_gap"] == 0:
            for side in sides(p.shape, group["proj_type"]):
                state[f"basis_{side}"] = svd_basis(grad, group["rank"], side)
        bases = {side: state[f"basis_{side}"] for side in sides(p.shape, group["proj_type"])}
        # the moments, and the arithmetic on them, are float32 whatever the dtype of the weight
        low_rank_grad = project(grad, bases).float()
        if not step:
            state["step"] = 0
            self._init_state(state, low_rank_grad)
        state["step"] += 1
        update = torch.zeros_like(low_rank_grad)
        self._rule([update], [low_rank_grad], [state], group, group["lr"])
        expand_add_(p, update, bases, alpha=group["scale"])
        self._decay([p], group)

    def _step_plain(self, params: list[Tensor], group: dict) -> None:
        by_step: dict[int, list[Tensor]] = {}
        for p in params:
            state = self.state[p]
            if not state:
                state["step"] = 0
                self._init_state(state, p.grad)
            state["step"] += 1
            by_step.setdefault(state["step"], []).append(p)
        for same in by_step.values():
            exact = [p for p in same if p.dtype == torch.float32]
            if exact:
                self._rule(exact, [p.grad for p in exact], [self.state[p] for p in exact], group, group["lr"])
            for p in same:
                if p.dtype != torch.float32:
                    # the rule runs in float32 and the weight is rounded once
                    update = torch.zeros_like(p, dtype=torch.float32)
                    self._rule([update], [p.grad.float()], [self.state[p]], group, group["lr"])
                    p.add_(update)
        self._decay(params, group)

    def _decay(self, params: list[Tensor], group: dict) -> None:
        # decoupled, after the update and without `scale`, as in galore-torch
        if group["weight_decay"] and params:
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's, but every tensor keeps its own dtype: torch casts state to the parameter's, and float32 moments
        of a bfloat16 weight would come back rounded."""
        super().load_state_dict(state_dict)
        indices = (i for group in state_dict["param_groups"] for i in group["params"])
        for index, p in zip(indices, (p for group in self.param_groups for p in group["params"]), strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    self.state[p][key] = value.detach().to(p.device, copy=True)
