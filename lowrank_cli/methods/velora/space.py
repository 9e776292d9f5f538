"""Updates from a factored gradient F (x) v, straight into the weight. VeLoRA, arXiv:2405.17991.

Shapes: a weight W is (m, D), D = G * M; F is (m, G), v is (M,) of unit length; (F (x) v)[o, g M + j] = F[o, g] v[j].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor, nn

from lowrank_cli.ops.precision import cut, wide
from lowrank_cli.ops.projected_linear import Handle
from lowrank_cli.optim import kernels
from lowrank_cli.optim.rules import Rule, count_
from lowrank_cli.optim.space import Part, Space
from lowrank_cli.optim.write import ROWS, add_

if TYPE_CHECKING:
    from lowrank_cli.optim.optimizer import LowRankOptimizer


class Factored(Space):
    """VeLoRA's space: the gradient is F (x) v, and the rule works on F alone.

    Its groups say `num_groups`, G. The layer that makes F knows v, and tells it (`vector`).
    """

    def __init__(self, weight: Tensor, group: dict, optimizer: LowRankOptimizer):
        super().__init__(weight, group, optimizer)
        self.vector: Callable[[], Tensor] | None = None
        self._layer: Any = None

    @property
    def wants_full_gradient(self) -> bool:
        return False

    def made_small(self, grad: Tensor) -> list[Tensor]:
        # of a layer in eval mode, say: what v sees of a dense gradient
        vector = self.vector()
        return [grad.unflatten(-1, (-1, len(vector))) @ vector.to(grad.dtype)]

    def zeros(self) -> list[Tensor]:
        shape = self.weight.shape[0], self.group["num_groups"]
        return [torch.zeros(shape, dtype=wide(self.weight.dtype), device=self.weight.device)]

    def ready(self) -> None:
        if self.has_gradient and (self.vector is None or self.vector() is None):
            raise ValueError(f"{self.name} has a gradient before its layer has found a projection vector")

    def gradient(self) -> list[Part]:
        if self.weight.grad is not None:
            self.collect(self.weight.grad)
        factor = cut(self.small.pop(0))
        return [Part(factor, self.weight, self.layout.height(factor, {}))]

    def step_(self, rule: Rule) -> None:
        (part,), state, group = self.gradient(), self.state, self.group
        count_(rule, state, part.grad, group, part.height)
        vector = self.vector()
        if kernels.factored_(self.weight, part.grad, vector, state, rule, group):
            return
        alpha, beta = rule.factors(self.weight, state, group)
        if rule.advances:
            step_size, eps = rule.advance_(part.grad, state, group)
            moments = state["exp_avg"], state["exp_avg_sq"]
            factored_adamw_(self.weight, *moments, vector, step_size=alpha * step_size, eps=eps, beta=beta,
                            noise=self.noise())  # fmt: skip
        else:
            # right for any rule that does not depend on the gradient's scale
            update = torch.zeros_like(part.grad)
            rule([update], [part.grad], [state], group, [self.weight])
            factored_sign_(self.weight, update, vector, alpha=alpha, beta=beta, noise=self.noise())

    def attach(self, module: nn.Module, *, clipping: float) -> bool:
        layer = getattr(module, "factored_gradient", None)
        if layer is None:
            return False
        layer.handle, self.vector = Handle(self), layer.current_vector
        self._layer = layer
        self.settle()
        return True

    def detach(self, module: nn.Module) -> None:
        if self._layer is not None:
            self._layer.handle.space = self._layer = None

    def orphaned(self) -> None:
        if self._layer is not None:
            self._layer.handle.space = None

    def settle(self) -> None:
        if self._layer is not None:
            self.leaves_for([(self.layout.shape[0], self.group["num_groups"])])

    def check_loaded(self, state: dict[str, Any], group: dict) -> None:
        """Accept any: the shape of F is the layer's."""


def factored_adamw_(
    weight: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, vector: Tensor, *, step_size: float, eps: float,
    beta: float = 1.0, noise: Generator | None = None,
) -> None:  # fmt: skip
    """Dense Adam's update of F (x) v from the moments of F: W <- beta W - step_size * (M_F v) / (sqrt(V_F) |v| + eps).

    With v fixed the moments of F (x) v are M_F (x) v and V_F (x) v^2, so this is the dense update up to rounding.

    Args:
        weight: (m, D), changed in place.
        exp_avg: M_F (m, G), float32, after this step's gradient.
        exp_avg_sq: V_F (m, G), likewise.
        vector: v (M,), float32.
        step_size: learning rate with both bias corrections.
        eps: added to the root.
        beta: what weight decay leaves of the weight.
        noise: as for `write.put_`.
    """
    size = vector.abs()
    for start in range(0, weight.shape[0], ROWS):
        rows = slice(start, start + ROWS)
        move = exp_avg[rows].unsqueeze(-1) * vector  # (rows, G, M)
        move.div_((exp_avg_sq[rows].sqrt().unsqueeze(-1) * size).add_(eps))
        add_(weight[rows], move.flatten(1), alpha=-step_size, beta=beta, noise=noise)


def factored_sign_(
    weight: Tensor, update: Tensor, vector: Tensor, *, alpha: float = 1.0, beta: float = 1.0,
    noise: Generator | None = None,
) -> None:  # fmt: skip
    """Add `update (x) sign(v)`: what a scale-free rule makes of F (x) v, where eps does not matter.

    Args:
        weight: (m, D), changed in place.
        update: the rule's own update of F (m, G), float32.
        vector: v (M,).
        alpha: factor of the update.
        beta: what weight decay leaves of the weight.
        noise: as for `write.put_`.
    """
    signs = vector.sign()
    for start in range(0, weight.shape[0], ROWS):
        rows = slice(start, start + ROWS)
        move = (update[rows].unsqueeze(-1) * signs).flatten(1)
        add_(weight[rows], move, alpha=alpha, beta=beta, noise=noise)
