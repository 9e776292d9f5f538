"""One step for every method: each tensor has a space, each optimizer a rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_cli.ops.precision import wide
from lowrank_cli.optim import kernels
from lowrank_cli.optim.loading import Loading
from lowrank_cli.optim.projected import Projected
from lowrank_cli.optim.rules import Rule, count_
from lowrank_cli.optim.space import Space

# options of torch's optimizers that no optimizer here has
UNSUPPORTED = ("maximize", "amsgrad", "capturable", "differentiable", "momentum", "nesterov", "dampening", "centered")


@dataclass
class Clock:
    """When a series of refreshes last went on, and was last spoken of; seconds."""

    refreshed: float = 0.0
    told: float = 0.0


class LowRankOptimizer(Loading, torch.optim.Optimizer):
    """An optimizer whose tensors may be trained in smaller spaces.

    A group says `space`, a class of optim/space.py; without it, a group with `rank` is projected as galore-torch's
    groups are (optim/projected.py), and any other is an ordinary one. A space's class says which further keys its
    groups have. Any group may say `stochastic_rounding`, for bfloat16 weights.

    The gradient of a tensor is its `.grad`, and what its space has collected: then the full gradient need not exist.
    State holds tensors and numbers only, so that it loads with `weights_only=True`: `step`, what the rule keeps, and
    what the space does. A subclass gives the rule.
    """

    make_rule: Callable[[], Rule]

    def __init__(self, params, defaults: dict):
        self._begin()
        super().__init__(params, defaults)

    def _begin(self) -> None:
        """Make what is neither state nor groups; a copy or an unpickled optimizer has it anew."""
        self.rule = type(self).make_rule()
        self.spaces: dict[Tensor, Space] = {}
        self.clock = Clock()
        self.steps_in_backward = False
        # whether the kernel was nobody's wish: see fused_step.Choice
        self.kernel_is_auto = False

    def _index(self) -> None:
        """Give every tensor its space; called whenever the groups change."""
        spaces: dict[Tensor, Space] = {}
        for group in self.param_groups:
            foreign = next((key for key in UNSUPPORTED if group.get(key)), None)
            if foreign is not None:
                raise ValueError(f"a group says {foreign}={group[foreign]!r}, which {type(self).__name__} has not")
            if any(hasattr(p, "device_mesh") for p in group["params"]):
                raise ValueError(
                    "a parameter is a DTensor, as FSDP2 makes them; projected steps on cut weights are those of "
                    "`lowrank ... --parallel fsdp`"
                )
            kind = space_from_group(group)
            kind.check(group)
            self.rule.check(group)
            for p, name in zip(group["params"], group.get("param_names", group["params"]), strict=True):
                known = self.spaces.get(p)
                space = known if type(known) is kind else kind(p, group, self)
                space.group = group
                space.name = name if isinstance(name, str) else f"tensor {len(spaces)}"
                spaces[p] = space
        self.spaces = spaces
        for place, space in enumerate(self.projected):
            space.place = place

    @property
    def projected(self) -> list[Projected]:
        """The spaces that have a basis."""
        return [space for space in self.spaces.values() if isinstance(space, Projected)]

    @property
    def low_rank_grads(self) -> dict[Tensor, Tensor]:
        """The small gradients that have been collected: the first part of each tensor's."""
        return {p: space.small[0] for p, space in self.spaces.items() if space.small}

    def add_param_group(self, param_group: dict) -> None:
        """Add a group as torch's optimizers do, and check its keys."""
        super().add_param_group(param_group)
        try:
            self._index()
        except ValueError:
            # one that is refused does not stay
            self.param_groups.pop()
            raise

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        if not self.loading:
            self._begin()
            self._index()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients as torch's optimizers do, and the small gradients too."""
        super().zero_grad(set_to_none)
        for space in self.spaces.values():
            space.clear()

    # the compiler would trace the loop over tensors and drop what it does to the state
    @torch.compiler.disable
    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None):
        """Update every tensor that has a gradient; returns the closure's loss, if there is one.

        Raises:
            FloatingPointError: a gradient is not finite where a space cannot take that; nothing has moved.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if any(p not in self.spaces for group in self.param_groups for p in group["params"]):
            # somebody has put it there without add_param_group
            self._index()
        for space in self.spaces.values():
            space.ready()
        for group in self.param_groups:
            self._step_some([self.spaces[p] for p in group["params"]], group)
        return loss

    @torch.no_grad()
    def step_one(self, p: Tensor) -> None:
        """Update one tensor, if it has a gradient; a step within backward is one."""
        space = self.spaces[p]
        self._step_some([space], space.group)

    def _step_some(self, spaces: list[Space], group: dict) -> None:
        """Update tensors of a group: with a kernel where one takes them, those without a smaller space together."""
        together: dict[tuple, list[Space]] = {}
        moving = [space for space in spaces if space.has_gradient]
        with without_autocast():
            for space in kernels.step_(self.rule, moving, group):
                p = space.weight
                if type(space) is Space and self.rule.in_place and p.dtype == wide(p.dtype):
                    state = space.state
                    count_(self.rule, state, p.grad, group, space.layout.height(p.grad, {}))
                    together.setdefault((state["step"], p.device, p.dtype), []).append(space)
                else:
                    space.step_(self.rule)
            for same in together.values():
                self._step_together([space.weight for space in same], group)
        for space in moving:
            space.settle()

    def _step_together(self, params: list[Tensor], group: dict) -> None:
        """Let the rule change weights of 32 bits or more themselves."""
        states = [self.state[p] for p in params]
        kept = [self.rule.kept(p, state, group) for p, state in zip(params, states, strict=True)]
        first = self.rule.decays_first(group)
        if group["weight_decay"] and first:
            torch._foreach_mul_(params, kept)
        # the kernel walks over memory, so a gradient has to be laid out as its weight is
        grads = [p.grad if p.grad.stride() == p.stride() else torch.empty_like(p).copy_(p.grad) for p in params]
        self.rule(params, grads, states, group, params)
        if group["weight_decay"] and not first:
            torch._foreach_mul_(params, kept)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Return False: GradScaler, which asks before each step, divides `.grad` itself.

        Raises:
            ValueError: there are gradients that it does not see.
        """
        if self.steps_in_backward or any(space.small for space in self.spaces.values()):
            raise ValueError(
                "GradScaler sees `.grad` only, and neither gradients that were projected in backward nor steps within "
                "it: take bfloat16, which needs no scaling, or in_backward=False and per_layer=False"
            )
        return False

    def take_kernels(self, recorded: list[str] | None) -> None:
        """Go on with the kernels of a checkpoint, see `kernels.take`."""
        kernels.take(self, recorded)


def space_from_group(group: dict) -> type[Space]:
    """Return the class of a group's spaces; galore-torch's groups say `rank` and no class."""
    return group.get("space") or (Projected if "rank" in group else Space)


@contextmanager
def without_autocast() -> Iterator[None]:
    """Inside, products have the precision of their factors, as in a step of torch's own optimizers."""
    with ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
