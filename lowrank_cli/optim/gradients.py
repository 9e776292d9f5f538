"""Where the gradients of an update go: into `.grad`, into projected buffers, or straight into the step."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from lowrank_cli.ops.precision import wide
from lowrank_cli.ops.projected_linear import projected_linear
from lowrank_cli.ops.shards import layout


class Gradients:
    """Collects the gradients of an update's micro-batches and steps, holding no more than it must.

    * As usual: every micro-batch adds to `.grad`, and the step comes after the last one.
    * In backward (groups with `in_backward`): linears add their projected gradients to small buffers, and the full
      ones exist only for a tensor whose basis is due for a refresh.
    * Per layer: as soon as the last micro-batch has given a tensor its gradient, the tensor is updated and the
      gradient freed; those of earlier micro-batches wait projected. The full gradient of one layer exists at a time.

    All three give the same update, up to rounding.

    Args:
        model: the model.
        optimizer: any; only a ProjectedOptimizer has projected buffers.
        per_layer: step within backward.
        clipping: largest norm, 0 for none. A norm is over what is collected, projected gradients where there are no
            others; per layer, clipping makes the step wait for the last tensor.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, per_layer: bool, clipping: float):
        self.optimizer, self.per_layer, self.clipping = optimizer, per_layer, clipping
        self.groups = {p: group for group in optimizer.param_groups for p in group["params"]}
        self.projected = getattr(optimizer, "projected", {})
        self.buffers: dict[Tensor, Tensor] = getattr(optimizer, "low_rank_grads", {})
        self.magnitudes: dict[Tensor, Tensor] = getattr(optimizer, "magnitude_grads", {})
        self.last = True
        self.measuring = False
        # of what has been stepped within backward; a sum would be of tensors from several streams
        self.squares: list[Tensor] = []
        self.zeros: set[Tensor] = set()
        self._pending: dict[Tensor, int] = {}
        self._patched: list[nn.Module] = []
        self._patch_linears(model)
        self._hooks = [p.register_post_accumulate_grad_hook(self._arrived) for p in self.groups] if per_layer else []

    def close(self) -> None:
        """Leave the model as it was found: no hooks, no patched forward."""
        for hook in self._hooks:
            hook.remove()
        for module in self._patched:
            del module.forward
        self._hooks, self._patched = [], []

    def begin(self, *, measuring: bool) -> None:
        """Forget the last update; `measuring` keeps what a per-layer step would free: the norm, and `zeros`, the
        parameters whose gradient is there and zero throughout."""
        self.optimizer.zero_grad(set_to_none=True)
        self.measuring = measuring
        self.squares.clear()
        self.zeros.clear()
        self._pending.clear()

    def reduce(self) -> None:
        """All micro-batches have had their backward. With several processes their sums are made here."""

    def norm(self) -> Tensor:
        """The global norm of the update's gradients, clipped to the limit."""
        left = [(p, p.grad) for p in self.groups if p.grad is not None]
        left += [*self.buffers.items(), *self.magnitudes.items()]
        if self.measuring:
            self.zeros |= {p for p in self.groups if p.grad is not None and not bool(p.grad.any())}
            self.zeros |= {p for p, buffer in self.buffers.items() if p.grad is None and not bool(buffer.any())}
        norm = self._total_norm(left)
        if self.clipping and left:
            factor = (self.clipping / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_([part for _, part in left], factor)
        return norm

    def _total_norm(self, left: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Of parts of gradients, with their parameters, and of what per-layer steps have seen already."""
        norm = nn.utils.get_total_norm([part for _, part in left])
        return (norm.to(wide(norm.dtype)).square() + sum(self.squares)).sqrt()

    def _square(self, p: Tensor, part: Tensor) -> Tensor:
        """What a part of a tensor's gradient adds to the square of the norm."""
        return part.to(wide(part.dtype)).square().sum()

    def step(self) -> None:
        """Update what has not been updated yet, and free its gradients."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _arrived(self, p: Tensor) -> None:
        """The hook of per-layer mode: backward has just finished the gradient of a tensor."""
        if p.grad is None:
            # a projected linear gave its gradient to the sink
            return
        if p in self.projected and not self.optimizer.is_due(p):
            self.optimizer.collect(p)
            p.grad = None
        self._complete(p)

    def _receive(self, p: Tensor, *low_rank_grad: Tensor) -> None:
        """The sink of a projected linear."""
        self.optimizer.accumulate(p, *low_rank_grad)
        self._pending[p] = self._pending.get(p, 0) - 1
        if self.per_layer and not self._pending[p]:
            self._complete(p)

    def _complete(self, p: Tensor) -> None:
        """Step within backward, if this was the last micro-batch and nobody waits for the norm."""
        if self.last and not self.clipping:
            self._take(p)

    def _take(self, p: Tensor) -> None:
        """The step of one tensor within backward, after which its gradient is gone."""
        if self.measuring:
            grad = self.buffers.get(p, p.grad)
            if not bool(grad.any()):
                self.zeros.add(p)
            for part in (grad, self.magnitudes.get(p)):
                if part is not None:
                    self.squares.append(self._square(p, part))
        self.optimizer.step_one(p, self.groups[p])
        p.grad = None

    def _patch_linears(self, model: nn.Module) -> None:
        owners: dict[Tensor, list[nn.Module]] = {}
        for module in model.modules():
            weight = self._held(getattr(module, "weight", None))
            layer = getattr(module, "factored_gradient", None)
            if layer is not None and "num_groups" in self.groups.get(weight, {}):
                # a method has wrapped this linear: its gradient comes as the factor of a vector that the layer knows
                layer.sink = partial(self._receive, weight)
                self.optimizer.vectors[weight] = layer.current_vector
            if isinstance(weight, Tensor) and weight in self.projected and self._in_backward(weight):
                owners.setdefault(weight, []).append(module)
        for weight, modules in owners.items():
            # a weight that two modules share has its gradient only when both have added to it
            if len(modules) == 1 and type(modules[0]) is nn.Linear:
                modules[0].forward = partial(self._forward, modules[0], weight)
                self._patched.append(modules[0])

    def _held(self, weight: object) -> object:
        """What the optimizer has of a module's weight: the weight itself, or this process's rows of it."""
        return weight

    def _in_backward(self, weight: Tensor) -> bool:
        """What the group says; if it leaves it open, whether 2 N r (m + n) operations are fewer than 2 N m n, and
        nobody wants the norm of the full gradients to clip them."""
        group = self.projected[weight]
        wanted, shape = group.get("in_backward", False), layout(weight).shape
        if wanted is None:
            wanted = not self.clipping and group["rank"] * sum(shape) < shape.numel()
        return wanted and weight.dim() == 2

    def _forward(self, module: nn.Linear, weight: Tensor, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled() or self.optimizer.is_due(weight):
            return nn.functional.linear(x, module.weight, module.bias)
        # a module that runs several times in a forward pass has its gradient when each run has had its backward; a
        # recomputation inside backward is not another run
        if torch._C._current_graph_task_id() == -1:
            self._pending[weight] = self._pending.get(weight, 0) + 1
        return projected_linear(
            x,
            module.weight,
            module.bias,
            self.optimizer.gradient_bases(weight),
            partial(self._receive, weight),
            row_dots=weight in self.optimizer.normalised,
        )
