"""Spaces: in which coordinates a tensor is trained, and how an update gets from there into its weight.

A space is one tensor's. Methods have spaces of their own; the one here is the gradient as it is. Shapes: a weight and
its gradient are (m, n), or of any shape in the space here.
"""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowrank_cli.ops.precision import wide
from lowrank_cli.optim.rules import Rule, count_
from lowrank_cli.optim.write import add_
from lowrank_cli.parallel.shards import Whole, layout

if TYPE_CHECKING:
    from lowrank_cli.optim.optimizer import LowRankOptimizer


@dataclass(frozen=True)
class Part:
    """A small gradient that the rule works on with a state of its own.

    Attributes:
        grad: float32 or wider; a 16-bit weight's own gradient as it is.
        target: the tensor that it is the gradient of, whose size some rules look at.
        height: rows of the whole of it, where processes hold a share each.
        prefix: of its keys in the tensor's state.
        rate: times the learning rate.
    """

    grad: Tensor
    target: Tensor
    height: int
    prefix: str = ""
    rate: float = 1.0


@dataclass(frozen=True)
class Move:
    """A Move is a rule's result for a part: its tensor becomes `alpha * update + beta * tensor`, the update expanded.

    Attributes:
        update: of the part's shape, float32 or wider.
        alpha: 1, or what weight decay leaves where it comes after the update.
        beta: what weight decay leaves.
    """

    update: Tensor
    alpha: float
    beta: float


class Space:
    """The gradient of one tensor as it is, and the base of every smaller space.

    Life of an update: `collect` once a micro-batch where the full gradient does not have to be kept, or what a layer
    of the method's own gives in backward (`leaves`); then `step_`, which is `gradient`, the rule, and `apply_`.

    Everything that has to survive a restart is in `state`, tensors and numbers under names of their own; what is
    beside it belongs to one update.

    Attributes:
        weight: the parameter, or this process's rows of it.
        group: its group's settings in the optimizer, live.
        name: for messages.
        is_batch: the tensor is a batch of matrices, (E, m, n), as the weights of experts are.
        place: among the spaces that are not of this class, for seeds and turns.
        layout: how the tensor lies over processes.
        small: the small gradient that has been collected, by part; empty where `.grad` is the gradient.
        leaves: stand for the weight in the graph of layers that are attached.
        is_attached: such layers give this tensor's gradient.
        on_arrival: called when a backward pass has given this tensor all of its small gradient.
    """

    always_full = False  # it needs the full gradient at every update, and gets it whole

    def __init__(self, weight: Tensor, group: dict, optimizer: LowRankOptimizer):
        self.weight, self.group = weight, group
        # the optimizer holds its spaces: a strong reference back would keep both until the next garbage collection
        mine = weakref.ref(self)
        self._optimizer = weakref.ref(optimizer, lambda _: (space := mine()) and space.orphaned())
        self.is_batch = is_batch(weight.shape, group)
        self.layout: Whole = layout(weight, batched=self.is_batch)
        self.name, self.place = "", 0
        self.small: list[Tensor] = []
        self.leaves: list[Tensor] = []
        self.is_attached = False
        self.on_arrival: Callable[[], None] = _nothing

    @classmethod
    def check(cls, group: dict) -> None:
        """Complete a group's settings; raises ValueError for one that cannot be."""

    # ---- the gradient

    @property
    def optimizer(self) -> LowRankOptimizer:
        """The optimizer whose space this is."""
        return self._optimizer()

    @property
    def state(self) -> dict[str, Any]:
        """This tensor's entries in the optimizer's state."""
        return self.optimizer.state[self.weight]

    @property
    def wants_full_gradient(self) -> bool:
        """Return whether `.grad` has to be kept, and summed whole, until the next step."""
        return True

    @property
    def has_gradient(self) -> bool:
        """Return whether the tensor has a gradient for an update to work on, full or small."""
        return self.weight.grad is not None or bool(self.small)

    def collect(self, grad: Tensor) -> None:
        """Make a micro-batch's full gradient small and add it; the gradient stays as it is."""
        self.accumulate(self.made_small(grad))

    def made_small(self, grad: Tensor) -> list[Tensor]:
        """Return the parts of a full gradient; linear in it. This process's rows of each where the weight is cut."""
        return [grad]

    def accumulate(self, parts: list[Tensor]) -> None:
        """Add a micro-batch's small gradient, in float32 or wider."""
        if self.small:
            for total, part in zip(self.small, parts, strict=True):
                total.add_(part)
        else:
            self.small = [part.to(wide(part.dtype)) for part in parts]

    def zeros(self) -> list[Tensor]:
        """Return the small gradient of a process that has none: that of zeros, since `made_small` is linear."""
        return [part.to(wide(part.dtype)) for part in self.made_small(torch.zeros_like(self.weight))]

    def clear(self) -> None:
        """Forget the gradients that have been collected: an update was made, or will not be."""
        self.small = []
        for leaf in self.leaves:
            leaf.grad = None
        self.settle()

    # ---- one update

    def ready(self) -> None:
        """Look at the gradient before any tensor moves; raises FloatingPointError for one that would break a step."""

    def gradient(self) -> list[Part]:
        """Return what the rule works on; the gradients that were collected are used up, `.grad` stays."""
        return [Part(self.weight.grad, self.weight, self.layout.height(self.weight.grad, {}))]

    def step_(self, rule: Rule) -> None:
        """Make one update."""
        self.apply_([self.moved(part, rule) for part in self.gradient()])

    def moved(self, part: Part, rule: Rule) -> Move:
        """Return what the rule makes of a part, with its state advanced."""
        with self.state_of(part) as state:
            count_(rule, state, part.grad, self.group, part.height)
            settings = self.group if part.rate == 1 else self.group | {"lr": self.group["lr"] * part.rate}
            update = torch.zeros_like(part.grad, dtype=wide(part.grad.dtype))
            rule([update], [part.grad.to(update.dtype)], [state], settings, [part.target])
            alpha, beta = rule.factors(part.target, state, self.group)
        return Move(update, alpha, beta)

    def state_of(self, part: Part) -> PartState:
        """Return the state of a part, to be used in a `with`."""
        return PartState(self.state, part.prefix)

    def apply_(self, moves: list[Move]) -> None:
        """Write the rule's moves into the weight, rounded once; a 16-bit weight may be rounded at random (`noise`)."""
        (move,) = moves
        add_(self.weight, move.update, alpha=move.alpha, beta=move.beta, noise=self.noise())

    def noise(self) -> torch.Generator | None:
        """Return what rounds a bfloat16 weight at random; None where it is rounded to the nearest.

        It follows from the tensor and the step, so that replicas draw alike, a resumed run draws what the unbroken one
        would have drawn, and nobody else's random numbers move.
        """
        if not (self.group["stochastic_rounding"] and self.weight.dtype == torch.bfloat16):
            return None
        rank = self.layout.replicas.rank if self.layout.is_cut else 0
        text = f"{self.name} {rank} {self.state.get('refreshes', 0)} {self.state['step']}"
        return torch.Generator(self.weight.device).manual_seed(zlib.crc32(text.encode()))

    # ---- in backward

    def attach(self, module: nn.Module, *, clipping: float) -> bool:
        """Let a layer of the model give this tensor's gradient small, if it can; says whether it will.

        Args:
            module: holds the weight.
            clipping: largest norm of the gradients, 0 for none: a method may leave them whole for it.
        """
        return False

    def detach(self, module: nn.Module) -> None:
        """Leave a layer as `attach` found it."""

    def settle(self) -> None:
        """Say to the layers whether they can give the gradient small until the next step."""

    def leaves_for(self, shapes: list[tuple[int, ...]]) -> list[Tensor]:
        """Return zero leaves that stand for the weight in a layer's graph, one a part: their gradients are this
        tensor's small gradient, which autograd itself sums over uses and recomputations.

        R = G Q is the gradient of Z in W + Z Q^T at Z = 0. A leaf takes no memory: one zero, expanded.
        """
        dtype, device = wide(self.weight.dtype), self.weight.device
        wanted = [(torch.Size(shape), dtype, device) for shape in shapes]
        if [(leaf.shape, leaf.dtype, leaf.device) for leaf in self.leaves] != wanted:
            zero = torch.zeros((), dtype=dtype, device=device)
            self.leaves = [zero.expand(shape).requires_grad_() for shape in shapes]
            mine = weakref.ref(self)
            for leaf in self.leaves:
                leaf.register_post_accumulate_grad_hook(lambda _: (space := mine()) and space._arrived())
        return self.leaves

    def orphaned(self) -> None:
        """The optimizer is gone: the layers are ordinary ones from now on."""

    @torch.no_grad()
    def _arrived(self) -> None:
        """A backward pass has given a leaf its gradient."""
        parts = [leaf.grad for leaf in self.leaves]
        if any(part is None for part in parts):
            return
        for leaf in self.leaves:
            leaf.grad = None
        self.accumulate(self.from_backward(parts))
        self.on_arrival()

    def from_backward(self, parts: list[Tensor]) -> list[Tensor]:
        """Return the small gradient from what a backward pass has left in the leaves."""
        return [self.layout.summed(part) for part in parts]

    # ---- loading

    def keeps(self, key: str) -> bool:
        """Say whether an entry of the state is this space's own, beside `step` and what the rule keeps."""
        return False

    def check_loaded(self, state: dict[str, Any], group: dict) -> torch.Size | None:
        """Look at a state that is to be loaded, if it is there.

        Returns:
            The shape of the gradient that the rule's own tensors should have; None where nobody can tell.
        Raises:
            ValueError: it does not fit the weight.
        """
        return self.weight.shape


class PartState:
    """The entries of one part among those of its tensor: a view for a moment, written back at the end."""

    def __init__(self, state: dict[str, Any], prefix: str):
        self.state, self.prefix = state, prefix
        self.own = state

    def __enter__(self) -> dict[str, Any]:
        if self.prefix:
            size = len(self.prefix)
            self.own = {key[size:]: value for key, value in self.state.items() if key.startswith(self.prefix)}
        return self.own

    def __exit__(self, *_) -> None:
        if self.prefix:
            self.state.update({f"{self.prefix}{key}": value for key, value in self.own.items()})


def is_batch(shape: tuple[int, ...], group: dict) -> bool:
    """Return whether a tensor of a group is a batch of matrices: the key `batched` says it of three dimensions."""
    return bool(group.get("batched")) and len(shape) == 3


def collected(spaces: dict[Tensor, Space]) -> Iterator[tuple[Space, Tensor]]:
    """Yield every small gradient that has been collected, with its space."""
    for space in spaces.values():
        for part in space.small:
            yield space, part


def _nothing() -> None:
    """Do nothing on arrival: nobody waits for the small gradient."""
