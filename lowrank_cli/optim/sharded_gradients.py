"""Gradients of a model whose weights are cut over processes: what FSDP2 does not sum and cut itself.

FSDP2 (`torch.distributed.fsdp.fully_shard`) gives each rank its own rows of a tensor's summed gradient, after every
micro-batch. They are projected as they are (ops/shards.py), per layer as soon as they arrive. What never becomes a
full gradient, from a projected or a compressed linear, is summed and cut here in the same way: r / n of the exchange.

A basis that is due is found by one rank, which gathers that gradient alone; or from the Gram matrix, to which each
rank adds that of its rows (the engine `gram`, on the right). Tensors that every rank holds whole, such as adapters, go
the way of `ReplicatedGradients`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_cli.ops.replicas import balanced
from lowrank_cli.ops.shards import layout
from lowrank_cli.optim.replicated_gradients import ReplicatedGradients


class ShardedGradients(ReplicatedGradients):
    """`Gradients` of a process that holds its rows of the weights.

    Args:
        model: after `models.sharding.shard`.
        optimizer: of this rank's parts of the parameters.
        how: per_layer (the step is then within FSDP2's reduction), clipping and replicas, as for ReplicatedGradients.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, **how: Any):
        parts = [p for group in optimizer.param_groups for p in group["params"] if layout(p).is_cut]
        self._part_of = {layout(p).source: p for p in parts}
        super().__init__(model, optimizer, **how)
        self._hooks += [source.register_post_accumulate_grad_hook(self._cut) for source in self._part_of]

    def reduce(self) -> None:
        if not self.per_layer or self.clipping:
            due = [p for p in self._part_of.values() if p in self.projected and p.grad is not None]
            for some in _chunks([p for p in due if self.optimizer.is_due(p)], self.replicas.world_size):
                self._refresh_together(some)
        super().reduce()

    def _cut(self, source: Tensor) -> None:
        """The hook of every tensor: FSDP2 has summed a micro-batch's gradient and cut it."""
        p, grad = self._part_of[source], source.grad.to_local()
        source.grad = None
        p.grad = grad if p.grad is None else p.grad.add_(grad)
        if self.per_layer:
            self._arrived(p)

    def _complete(self, p: Tensor) -> None:
        if not layout(p).is_cut:
            super()._complete(p)
        elif self.last and not self.clipping:
            # the order is FSDP2's, and the same on every rank
            if p in self.projected and self.optimizer.is_due(p):
                self._window.append(p)
                if len(self._window) == self.replicas.world_size:
                    self._close_window()
            else:
                self._take(p)

    def _refresh_together(self, due: list[Tensor]) -> None:
        cut = [p for p in due if layout(p).is_cut]
        if len(cut) < len(due):
            super()._refresh_together([p for p in due if not layout(p).is_cut])
        replicas, optimizer = self.replicas, self.optimizer
        # as many as there are ranks at most: none holds more than one full gradient
        owners = balanced([layout(p).shape.numel() * min(layout(p).shape) for p in cut], replicas.world_size)
        mine = {}
        for p, owner in zip(cut, owners, strict=True):
            old, grad = optimizer.whole_bases(p), optimizer.dense_grad(p)
            if self._by_gram(p):
                whole, engine = grad.double().mT @ grad.double(), "of_gram"
                replicas.sum_to_(whole, owner)
            else:
                whole, engine = replicas.gathered_at(grad, layout(p).shape[0], owner), None
            if owner == replicas.rank:
                mine[p] = (whole, old, engine)
        # all has been exchanged: the ranks decompose side by side
        self._adopt(cut, owners, {p: self._find(p, *given) for p, given in mine.items()})

    def _by_gram(self, p: Tensor) -> bool:
        """Whether the Gram matrix is what the engine decomposes, and no larger than the gradient."""
        m, n = layout(p).shape
        return self.projected[p]["refresh"] == "gram" and self.optimizer.sides[p] == ("right",) and m >= n

    def _held(self, weight: object) -> object:
        return self._part_of.get(weight, weight) if isinstance(weight, Tensor) else weight

    def _total_norm(self, left: list[tuple[Tensor, Tensor]]) -> Tensor:
        square = sum((self._square(p, part) for p, part in left), torch.zeros(())) + sum(self.squares)
        return torch.tensor(self.replicas.numbers(float(square))[0]).sqrt()

    def _square(self, p: Tensor, part: Tensor) -> Tensor:
        # every rank has the whole of what is not cut, and counts its share of it
        return super()._square(p, part) / (1 if layout(p).is_cut else self.replicas.world_size)


def _chunks(items: list[Tensor], size: int) -> Iterator[list[Tensor]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
