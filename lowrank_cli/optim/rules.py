"""Update rules: what becomes of a gradient and its state. They know no space, no process and no 16-bit weight."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class Rule(Protocol):
    """An update rule; its settings are those of the group.

    Attributes:
        in_place: it may change a weight of 32 bits or more itself.
        advances: it has `advance_(grad, state, group) -> (step_size, eps)`: moments M and V that are float32 or wider,
            so that step_size * M / (sqrt(V) + eps) is its update.
    """

    in_place: bool
    advances: bool

    def __call__(
        self, targets: list[Tensor], grads: list[Tensor], states: list[dict], group: dict, params: list[Tensor]
    ) -> None:
        """Add -lr times the rule's direction to each target; all states are at the same step.

        Args:
            targets: float32 or float64 tensors to change: weights, or zeros of the gradients' shapes.
            grads: one for each target, of its shape and dtype.
            states: with `step`, counted from 1, and what `init` made; updated in place.
            group: the settings.
            params: what the gradients are of, for rules that look at its size.
        """

    def init(self, state: dict[str, Any], grad: Tensor, group: dict, height: int | None = None) -> None:
        """Make the state for a gradient; `height` is the rows of the whole one that it is a part of."""

    def check(self, group: dict) -> None:
        """Raise ValueError for settings that the rule cannot have."""

    def rotate(self, state: dict[str, Any], change: dict[str, Tensor], group: dict) -> None:
        """Take the moments to the coordinates of a new basis; `change` holds old^T new (r, r) for each side."""

    def decays_first(self, group: dict) -> bool:
        """Say whether weight decay acts on the weight before the update, as in torch.optim, or on what it made."""

    def kept(self, p: Tensor, state: dict[str, Any], group: dict) -> float:
        """Return what decoupled weight decay leaves of a weight."""

    def factors(self, p: Tensor, state: dict[str, Any], group: dict) -> tuple[float, float]:
        """Return (alpha, beta) of W <- alpha U + beta W, for the update U of a weight that is written once."""


class Decaying:
    """Decoupled weight decay, for rules: GaLore's `scale` has no part in it."""

    in_place = True
    advances = False

    def check(self, group: dict) -> None:
        """Accept every group."""

    def decays_first(self, group: dict) -> bool:
        """Follow the group's convention."""
        return group.get("convention") == "torch"

    def kept(self, p: Tensor, state: dict[str, Any], group: dict) -> float:
        """Return 1 - lr * weight_decay."""
        return 1 - group["lr"] * group["weight_decay"]

    def factors(self, p: Tensor, state: dict[str, Any], group: dict) -> tuple[float, float]:
        """Return (1, kept), or (kept, kept) where decay comes after the update."""
        kept = self.kept(p, state, group) if group["weight_decay"] else 1.0
        return (1.0, kept) if self.decays_first(group) else (kept, kept)


def count_(rule: Rule, state: dict[str, Any], grad: Tensor, group: dict, height: int | None = None) -> None:
    """Count an update in a state, which is made first if it is not there; `height` as for `Rule.init`."""
    if "step" not in state:
        state["step"] = 0
        rule.init(state, grad, group, height)
    state["step"] += 1
