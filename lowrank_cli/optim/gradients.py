"""Collect the gradients of an update in `.grad` or in the spaces, or step with them within backward."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from lowrank_cli.optim.exchange import Exchange
from lowrank_cli.optim.optimizer import LowRankOptimizer
from lowrank_cli.optim.space import Space, collected


class Gradients:
    """Collects the gradients of an update's micro-batches and steps, holding no more than it must.

    * As usual: every micro-batch adds to `.grad`, and the step comes after the last one.
    * In backward: layers give the small gradients that spaces take, and the full ones exist only for a tensor whose
      space wants it, such as one whose basis is due for a refresh.
    * Per layer: as soon as the last micro-batch has given a tensor its gradient, the tensor is updated and the
      gradient freed; those of earlier micro-batches wait in small form. The full gradient of one layer exists at a
      time.

    All three give the same update, up to rounding.

    Args:
        model: the model.
        optimizer: any; only a LowRankOptimizer has spaces. A wrapper that has it as `optimizer`, as Accelerate's, is
            looked into.
        per_layer: step within backward.
        clipping: largest norm, 0 for none. A norm is over what is collected, small gradients where there are no
            others; per layer, clipping makes the step wait for the last tensor.
        exchange: with other processes (optim/exchange.py).
    Raises:
        ValueError: a model in DistributedDataParallel, whose sums do not see small gradients or early steps; or an
            optimizer that cannot step one tensor.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        per_layer: bool,
        clipping: float,
        exchange: Exchange | None = None,
    ):
        self.outer, inner = optimizer, optimizer
        while not isinstance(inner, LowRankOptimizer) and hasattr(inner, "optimizer"):
            inner = inner.optimizer
        self.optimizer = inner if isinstance(inner, LowRankOptimizer) else optimizer
        if per_layer and not isinstance(inner, LowRankOptimizer):
            raise ValueError(f"{type(inner).__name__} cannot step one tensor: per_layer takes a GaLoreAdamW")
        self.per_layer, self.clipping = per_layer, clipping
        self.exchange = exchange or Exchange()
        self.last = True
        self.measuring = False
        # of what has been stepped within backward; a sum would be of tensors from several streams
        self.squares: list[Tensor] = []
        self.zeros: set[Tensor] = set()
        self._attached: list[tuple[Space, nn.Module]] = []
        self._completed: set[Tensor] = set()
        self._hooks: list = []
        self._zero_grad = ZeroGrad(model, self)
        self.exchange.enter(self)
        self._attach(model)
        if exchange is None and (per_layer or self._attached):
            self._refuse_foreign_sums(model)
        watched = self.parameters if per_layer else []
        self._hooks = [p.register_post_accumulate_grad_hook(self.arrived) for p in watched]
        for space, _ in self._attached:
            space.on_arrival = partial(self._complete, space) if per_layer else self._nothing
        self.exchange.start(model)
        self._zero_grad.put()
        if per_layer:
            self.optimizer.steps_in_backward = True

    @property
    def spaces(self) -> dict[Tensor, Space]:
        """The spaces of the optimizer's tensors; none of an optimizer that is not ours."""
        return getattr(self.optimizer, "spaces", {})

    @property
    def parameters(self) -> list[Tensor]:
        """The optimizer's tensors, as its groups are now."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _refuse_foreign_sums(self, model: nn.Module) -> None:
        """Raise ValueError where several processes sum `.grad`, and nobody what does not go through it."""
        parallel = any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules())
        dist = torch.distributed
        if parallel or (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            self.close()
            raise ValueError(
                "DistributedDataParallel sums `.grad` only, and neither steps within backward nor small gradients: "
                "leave it out and give exchange=Replicated(...), or per_layer=False and in_backward=False; processes "
                "that train models of their own say exchange=Exchange()"
            )

    def close(self) -> None:
        """Leave the model as it was found: no hooks, no layers of ours."""
        for hook in self._hooks:
            hook.remove()
        for space, module in self._attached:
            space.detach(module)
            space.on_arrival, space.is_attached = self._nothing, False
        self._hooks, self._attached = [], []
        self.exchange.leave()
        self._zero_grad.remove()
        if self.per_layer:
            self.optimizer.steps_in_backward = False

    def begin(self, *, measuring: bool) -> None:
        """Forget the last update; `measuring` keeps what a per-layer step would free: the norm, and `zeros`, the
        parameters whose gradient is there and zero throughout."""
        self.optimizer.zero_grad(set_to_none=True)
        self.measuring = measuring
        self.squares.clear()
        self.zeros.clear()
        self._completed.clear()
        self.exchange.begin()

    def reduce(self) -> None:
        """All micro-batches have had their backward. With several processes their sums are made here."""
        self.exchange.reduce()

    def norm(self) -> Tensor:
        """Return the global norm of the update's gradients, and clip them to the limit."""
        left = [(p, p.grad) for p in self.parameters if p.grad is not None]
        left += [(space.weight, part) for space, part in collected(self.spaces)]
        if self.measuring:
            self.zeros |= {p for p in self.parameters if p.grad is not None and not bool(p.grad.any())}
            first = {space.weight: space.small[0] for space in self.spaces.values() if space.small}
            self.zeros |= {p for p, part in first.items() if p.grad is None and not bool(part.any())}
        norm = self.exchange.total_norm(left, self.squares)
        if self.clipping and left:
            factor = (self.clipping / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_([part for _, part in left], factor)
        return norm

    def step(self) -> None:
        """Update what has not been updated yet, and free its gradients."""
        self.outer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._completed.clear()

    @torch.no_grad()
    def arrived(self, p: Tensor) -> None:
        """The hook of per-layer mode: backward has just finished the gradient of a tensor."""
        space = self.spaces[p]
        if not space.wants_full_gradient:
            space.collect(p.grad)
            p.grad = None
        self._complete(space)

    def _complete(self, space: Space) -> None:
        """Step within backward, if this was the last micro-batch and nobody waits for the norm.

        Raises:
            ValueError: the tensor has been stepped with a part of its gradient.
        """
        if self.last and not self.clipping:
            if space.weight in self._completed:
                raise ValueError(
                    f"{space.name} gets its gradient in several parts of one backward pass, as under reentrant "
                    "checkpointing: take use_reentrant=False, or per_layer=False"
                )
            self._completed.add(space.weight)
            self.exchange.complete(space)

    def take(self, space: Space) -> None:
        """Step one tensor within backward, after which its gradient is gone."""
        p = space.weight
        if self.measuring:
            parts = space.small or [p.grad]
            if not bool(parts[0].any()):
                self.zeros.add(p)
            self.squares += [self.exchange.square(p, part) for part in parts]
        self.optimizer.step_one(p)
        p.grad = None

    def _attach(self, model: nn.Module) -> None:
        owners: dict[Tensor, list[nn.Module]] = {}
        for module in model.modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and self.exchange.held(weight) in self.spaces:
                owners.setdefault(self.exchange.held(weight), []).append(module)
        for weight, modules in owners.items():
            space = self.spaces[weight]
            attached = [space.attach(module, clipping=self.clipping) for module in modules]
            if all(attached):
                self._attached += [(space, module) for module in modules]
                space.is_attached = True
            else:
                # a weight that is an embedding too gets a full gradient from there
                for module in modules:
                    space.detach(module)

    @staticmethod
    def _nothing() -> None:
        """Do nothing on arrival: no step is made within backward."""


class ZeroGrad:
    """A model's `zero_grad` that drops the small gradients too; a copy of the model has its own, the usual one."""

    def __init__(self, model: nn.Module, gradients: Gradients):
        self.model, self.gradients = model, gradients
        self.before = vars(model).get("zero_grad")

    def __call__(self, set_to_none: bool = True) -> None:
        if self.before is not None:
            self.before(set_to_none=set_to_none)
        else:
            type(self.model).zero_grad(self.model, set_to_none=set_to_none)
        for space in self.gradients.spaces.values():
            space.clear()

    def put(self) -> None:
        """Take the place of the model's own."""
        self.model.zero_grad = self

    def remove(self) -> None:
        """Give the place back."""
        if vars(self.model).get("zero_grad") is self:
            del self.model.zero_grad
            if self.before is not None:
                self.model.zero_grad = self.before

    def __deepcopy__(self, memo: dict) -> partial:
        twin = memo[id(self.model)]
        return partial(type(twin).zero_grad, twin)

    def __reduce__(self) -> tuple:
        return partial, (type(self.model).zero_grad, self.model)
