"""One step for every optimizer that can work on projected gradients, whole models or one tensor at a time."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from lowrank_cli.ops.precision import cut, wide
from lowrank_cli.ops.shards import layout
from lowrank_cli.optim.factored import factored_sign_
from lowrank_cli.optim.loading import Loading
from lowrank_cli.optim.projection import project, sides
from lowrank_cli.optim.refresh import ENGINES
from lowrank_cli.optim.subspaces import Subspaces
from lowrank_cli.optim.weight_norm import Direction, compose_, row_norms
from lowrank_cli.optim.write import add_, expand_add_

MOMENTS = ("keep", "align", "rotate", "reset")
WEIGHT_NORMS = ("exact", "detached")


# options of torch's optimizers that no optimizer here has
UNSUPPORTED = ("maximize", "amsgrad", "capturable", "differentiable", "momentum", "nesterov", "dampening", "centered")


class ProjectedOptimizer(Subspaces, Loading, torch.optim.Optimizer):
    """An optimizer whose groups may carry GaLore's keys: `rank`, `update_proj_gap`, `scale`, `proj_type`.

    A group without `rank` is an ordinary one. In a group with `rank` the update rule runs on the projected gradient
    and its result is expanded straight into the weight. Further keys of such a group, with galore-torch's behaviour as
    the default: `refresh` (an engine of optim/refresh.py), `moments` (keep, align, rotate or reset at a refresh),
    `stagger` (spread the refreshes over the gap), `lazy_refresh` (double the gap of a basis that has stopped moving).
    Any group may say `stochastic_rounding`, for bfloat16 weights. A group of matrices with `rank` may say
    `weight_norm` ("exact" or "detached"): each is then trained as magnitude times direction (optim/weight_norm.py),
    the direction projected, the magnitude by the plain rule with `magnitude_scale` (1.0) times the learning rate;
    weight decay acts on the magnitude, which is decay of the weight.

    The gradient of a projected parameter is its `.grad`, or what `accumulate` has summed: then the full gradient never
    exists. State holds tensors and numbers only, so that it loads with `weights_only=True`: `step`, what the rule
    keeps, `basis_*`, the refresh clock, and for `weight_norm` `magnitude`, `norm` and `magnitude_*`, what the rule
    keeps of the magnitude. A subclass gives the rule.
    """

    GROUP_DEFAULTS = {
        "update_proj_gap": 200, "scale": 0.25, "proj_type": "std", "refresh": "svd", "moments": "keep",
        "stagger": False, "lazy_refresh": False,
    }  # fmt: skip

    def __init__(self, params, defaults: dict):
        self._begin()
        super().__init__(params, defaults)

    def _begin(self) -> None:
        """What is neither state nor groups: it is made anew in a copy or an unpickled optimizer."""
        self.low_rank_grads: dict[Tensor, Tensor] = {}
        self.magnitude_grads: dict[Tensor, Tensor] = {}
        self._directions: dict[Tensor, Direction] = {}
        self.vectors: dict[Tensor, Callable[[], Tensor]] = {}
        self._refreshed = self._told = 0.0

    def _index(self) -> None:
        """The tables that follow from the groups; made anew whenever those change."""
        for group in self.param_groups:
            foreign = next((key for key in UNSUPPORTED if group.get(key)), None)
            if foreign is not None:
                raise ValueError(f"a group says {foreign}={group[foreign]!r}, which {type(self).__name__} has not")
            if any(hasattr(p, "device_mesh") for p in group["params"]):
                raise ValueError(
                    "a parameter is a DTensor, as FSDP2 makes them; projected steps on cut weights are those of "
                    "`lowrank ... --parallel fsdp`"
                )
        projected = [group for group in self.param_groups if "rank" in group]
        for group in projected:
            self._check_group(group)
        self.projected = {p: group for group in projected for p in group["params"]}
        # weights whose gradient is F (x) v; `vectors` tells v
        self.factored = {p for group in self.param_groups if "num_groups" in group for p in group["params"]}
        self.normalised = {p for group in projected if "weight_norm" in group for p in group["params"]}
        # a tensor may be one process's rows of a larger one
        self.layouts = {p: layout(p) for group in self.param_groups for p in group["params"]}
        self.sides = {p: sides(self.layouts[p].shape, group["proj_type"]) for p, group in self.projected.items()}
        named = [
            pair
            for g in self.param_groups
            for pair in zip(g["params"], g.get("param_names", g["params"]), strict=True)
        ]
        self.names = {p: n if isinstance(n, str) else f"tensor {i}" for i, (p, n) in enumerate(named)}
        # position among the projected tensors: for staggering and seeds
        self.places = {p: i for i, p in enumerate(self.projected)}

    def add_param_group(self, param_group: dict) -> None:
        """As torch's, with the group's keys checked."""
        super().add_param_group(param_group)
        try:
            self._index()
        except ValueError:
            # one that is refused does not stay
            self.param_groups.pop()
            raise

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._begin()
        self._index()

    def _check_group(self, group: dict) -> None:
        if int(group["rank"]) < 1:
            raise ValueError(f"rank is {group['rank']}; it must be at least 1")
        for key, value in self.GROUP_DEFAULTS.items():
            group.setdefault(key, value)
        if int(group["update_proj_gap"]) < 1:
            raise ValueError(f"update_proj_gap is {group['update_proj_gap']}; it must be at least 1")
        for key, known in (("refresh", ENGINES), ("moments", MOMENTS)):
            if group[key] not in known:
                raise ValueError(f"{key} is {group[key]!r}; it is one of {', '.join(known)}")
        if group.get("weight_norm", "exact") not in WEIGHT_NORMS:
            raise ValueError(f"weight_norm is {group['weight_norm']!r}; it is one of {', '.join(WEIGHT_NORMS)}")
        for p in group["params"]:
            sides(layout(p).shape, group["proj_type"])
            if "weight_norm" in group and p.dim() != 2:
                raise ValueError(f"weight_norm takes matrices, not a tensor of shape {tuple(p.shape)}")

    # ---- what a subclass gives

    # whether the rule may change a weight of 32 bits or more itself
    in_place = True

    def _init_state(self, state: dict, grad: Tensor, group: dict, height: int | None = None) -> None:
        """Makes the rule's state for a gradient; `height` is the rows of the whole one that it is a part of."""
        raise NotImplementedError

    def _rule(
        self, targets: list[Tensor], grads: list[Tensor], states: list[dict], group: dict, params: list[Tensor]
    ) -> None:
        """Adds -lr times the rule's direction to each float32 or float64 target in place; all states are at the same
        step.

        A target is the weight itself, or zeros of the projected gradient's shape; `params` are the weights.
        """
        raise NotImplementedError

    def _rotate(self, state: dict, change: dict[str, Tensor], group: dict) -> None:
        """Takes the moments to the coordinates of a new basis; `change` holds old^T new for each side."""
        raise NotImplementedError

    def _factored_rule(self, p: Tensor, factor: Tensor, state: dict, group: dict, vector: Tensor) -> None:
        """The rule on F, taken to the weight: right for any rule that does not depend on the gradient's scale."""
        update = torch.zeros_like(factor)
        self._rule([update], [factor], [state], group, [p])
        alpha, beta = self._factors(p, group)
        factored_sign_(p, update, vector, alpha=alpha, beta=beta, noise=self._noise(p, group))

    # ---- the step

    # the compiler would trace the loop over tensors and drop what it does to the state
    @torch.compiler.disable
    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None):
        """One update of every parameter that has a gradient; returns the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for p in self.projected:
            # before anything moves; a refresh would stop at it half-way through the model
            if p.grad is not None and self.is_due(p) and not bool(p.grad.isfinite().all()):
                raise FloatingPointError(f"the gradient of {self.names[p]} is not finite at a refresh")
        with without_autocast():
            for group in self.param_groups:
                if "rank" in group or "num_groups" in group:
                    self._step_all(group["params"], group)
                else:
                    self._step_plain([p for p in group["params"] if p.grad is not None], group)
        return loss

    def _step_all(self, params: list[Tensor], group: dict) -> None:
        for p in params:
            self.step_one(p, group)

    @torch.no_grad()
    def step_one(self, p: Tensor, group: dict) -> None:
        """One update of one parameter, if it has a gradient."""
        with without_autocast():
            if p in self.projected:
                if p.grad is not None or p in self.low_rank_grads:
                    self._step_projected(p, group)
            elif p in self.factored:
                if p in self.low_rank_grads:
                    self._step_factored(p, group)
            elif p.grad is not None:
                self._step_plain([p], group)

    def collect(self, p: Tensor, bases: dict[str, Tensor] | None = None) -> None:
        """Adds the projection of `.grad` to the buffer; the basis must not be due. `.grad` stays as it is. `bases` are
        those of `bases()`, if they are at hand."""
        bases, layout = self.bases(p) if bases is None else bases, self.layouts[p]
        if p in self.normalised:
            magnitude_grad, low_rank_grad = self._direction(p).collect(p.grad, bases)
            self._add_normalised(p, magnitude_grad, layout.settled(low_rank_grad, bases))
        else:
            self._add(p, layout.settled(project(p.grad, bases), bases))

    def accumulate(self, p: Tensor, low_rank_grad: Tensor, row_dots: Tensor | None = None) -> None:
        """Adds the projected gradient of a micro-batch: sum_i P^T G_i = P^T sum_i G_i.

        Args:
            p: the parameter.
            low_rank_grad: its gradient in the coordinates of `gradient_bases`.
            row_dots: for a parameter with `weight_norm`, the products <G_i, W_i> of the rows, (m,).
        """
        layout = self.layouts[p]
        if p not in self.normalised:
            self._add(p, layout.summed(low_rank_grad))
            return
        direction, bases, row_dots = self._direction(p), self.bases(p), layout.summed(row_dots)
        if "left" not in bases:
            low_rank_grad = layout.summed(low_rank_grad)
        projected = direction.projected(low_rank_grad, row_dots, bases)
        self._add_normalised(p, direction.magnitude_grad(row_dots), layout.settled(projected, bases))

    def _add_normalised(self, p: Tensor, magnitude_grad: Tensor, low_rank_grad: Tensor) -> None:
        total = self.magnitude_grads.get(p)
        self.magnitude_grads[p] = magnitude_grad if total is None else total.add_(magnitude_grad)
        self._add(p, low_rank_grad)

    def _add(self, p: Tensor, low_rank_grad: Tensor) -> None:
        total = self.low_rank_grads.get(p)
        if total is None:
            self.low_rank_grads[p] = low_rank_grad.to(wide(low_rank_grad.dtype))
        else:
            total.add_(low_rank_grad)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; the accumulated projected gradients go too."""
        super().zero_grad(set_to_none)
        self.low_rank_grads.clear()
        self.magnitude_grads.clear()
        self._directions.clear()

    def _step_projected(self, p: Tensor, group: dict) -> None:
        state = self.state[p]
        if self.is_due(p):
            self._refresh(p, state, group)
        bases = self.bases(p)
        # the moments, and the arithmetic on them, are never narrower than float32
        if p.grad is not None:
            # the whole gradient, or the part of it that did not come through a projected linear
            self.collect(p, bases)
        grad = cut(self.low_rank_grads.pop(p))
        if "step" not in state:
            state["step"] = 0
            self._init_state(state, grad, group, self.layouts[p].height(grad, bases))
        state["step"] += 1
        state["until_refresh"] -= 1
        update = torch.zeros_like(grad)
        self._rule([update], [grad], [state], group, [p])
        update = self.layouts[p].expandable(update, bases)
        if p in self.normalised:
            self._step_normalised(p, update, bases, group)
            return
        alpha, beta = self._factors(p, group)
        expand_add_(p, update, bases, alpha=group["scale"] * alpha, beta=beta, noise=self._noise(p, group))

    def _direction(self, p: Tensor) -> Direction:
        """Magnitude and direction of a weight as it stands between two steps; the first call gives it both."""
        if p not in self._directions:
            state = self.state[p]
            if "magnitude" not in state:
                state["norm"] = row_norms(p)
                state["magnitude"] = state["norm"].clone()
            detached = self.projected[p]["weight_norm"] == "detached"
            self._directions[p] = Direction(p.detach(), state["magnitude"], state["norm"], detached=detached)
        return self._directions[p]

    def _step_normalised(self, p: Tensor, update: Tensor, bases: dict[str, Tensor], group: dict) -> None:
        """The magnitude by the plain rule, then the weight from it and from the direction's update."""
        state, grad = self.state[p], cut(self.magnitude_grads.pop(p))
        magnitude, direction = state["magnitude"], self._direction(p)
        own = {key.removeprefix("magnitude_"): value for key, value in state.items() if key.startswith("magnitude_")}
        if not own:
            own["step"] = 0
            self._init_state(own, grad, group, self.layouts[p].height(grad, {}))
        own["step"] += 1
        scaled = group | {"lr": group["lr"] * group.get("magnitude_scale", 1.0)}
        change = torch.zeros_like(magnitude)
        self._rule([change], [grad], [own], scaled, [magnitude])
        alpha, beta = self._factors(magnitude, group, own)
        add_(magnitude, change, alpha=alpha, beta=beta, noise=None)
        state.update({f"magnitude_{key}": value for key, value in own.items()})
        compose_(
            p,
            magnitude,
            state["norm"],
            update,
            bases,
            alpha=group["scale"],
            direction=direction,
            noise=self._noise(p, group),
        )
        del self._directions[p]

    def _step_factored(self, p: Tensor, group: dict) -> None:
        state, factor = self.state[p], cut(self.low_rank_grads.pop(p))
        if not state:
            state["step"] = 0
            self._init_state(state, factor, group, self.layouts[p].height(factor, {}))
        state["step"] += 1
        self._factored_rule(p, factor, state, group, self.vectors[p]())

    def _step_plain(self, params: list[Tensor], group: dict) -> None:
        together: dict[tuple, list[Tensor]] = {}
        for p in params:
            state = self.state[p]
            if not state:
                state["step"] = 0
                self._init_state(state, p.grad, group, self.layouts[p].height(p.grad, {}))
            state["step"] += 1
            if self.in_place and p.dtype == wide(p.dtype):
                together.setdefault((state["step"], p.device, p.dtype), []).append(p)
            else:
                self._step_apart(p, state, group)
        for same in together.values():
            self._decay(same, group, before=True)
            # the kernel walks over memory, so a gradient has to be laid out as its weight is
            grads = [p.grad if p.grad.stride() == p.stride() else torch.empty_like(p).copy_(p.grad) for p in same]
            self._rule(same, grads, [self.state[p] for p in same], group, same)
            self._decay(same, group, before=False)

    def _step_apart(self, p: Tensor, state: dict, group: dict) -> None:
        """The rule beside the weight, which is written once."""
        update = torch.zeros_like(p, dtype=wide(p.dtype))
        self._rule([update], [p.grad.to(update.dtype)], [state], group, [p])
        alpha, beta = self._factors(p, group)
        add_(p, update, alpha=alpha, beta=beta, noise=self._noise(p, group))

    def _decays_first(self, group: dict) -> bool:
        """Whether weight decay acts on the weight before the update, as in torch.optim, or on what the update made of
        it, as in galore-torch."""
        return group.get("convention") == "torch"

    def _kept(self, p: Tensor, state: dict, group: dict) -> float:
        """What decoupled weight decay leaves of a weight; GaLore's `scale` has no part in it."""
        return 1 - group["lr"] * group["weight_decay"]

    def _factors(self, p: Tensor, group: dict, state: dict | None = None) -> tuple[float, float]:
        """(alpha, beta) of W <- alpha U + beta W, for the update U of a weight that is written once."""
        kept = self._kept(p, self.state[p] if state is None else state, group) if group["weight_decay"] else 1.0
        return (1.0, kept) if self._decays_first(group) else (kept, kept)

    def _decay(self, params: list[Tensor], group: dict, *, before: bool) -> None:
        """Weight decay of weights that the rule changes in place, before it or after it."""
        if group["weight_decay"] and before == self._decays_first(group):
            torch._foreach_mul_(params, [self._kept(p, self.state[p], group) for p in params])

    def _noise(self, p: Tensor, group: dict) -> torch.Generator | None:
        """What rounds a bfloat16 weight at random; None where it is rounded to the nearest.

        It follows from the tensor and the step, so that replicas draw alike, a resumed run draws what the unbroken one
        would have drawn, and nobody else's random numbers move.
        """
        if not (group["stochastic_rounding"] and p.dtype == torch.bfloat16):
            return None
        state, layout = self.state[p], self.layouts[p]
        rank = layout.replicas.rank if layout.is_cut else 0
        text = f"{self.names[p]} {rank} {state.get('refreshes', 0)} {state['step']}"
        return torch.Generator(p.device).manual_seed(zlib.crc32(text.encode()))


@contextmanager
def without_autocast() -> Iterator[None]:
    """Inside, products have the precision of their factors, as in a step of torch's own optimizers."""
    with ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
