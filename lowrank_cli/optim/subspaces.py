"""The bases that gradients are projected with: when they are refreshed, from what, and what follows."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable

from torch import Tensor

from lowrank_cli import console
from lowrank_cli.ops.precision import wide
from lowrank_cli.optim.projection import unfold
from lowrank_cli.optim.refresh import find_basis, overlap

# Q-GaLore, arXiv:2407.08296: a basis that stayed this similar twice in a row is refreshed half as often
CALM_OVERLAP, CALM_REFRESHES = 0.4, 2
TELL_EVERY_S = 5.0


class Subspaces:
    """Mixed into a ProjectedOptimizer: the part of its state that is bases and their clock."""

    def is_due(self, p: Tensor) -> bool:
        """Whether the next update of a projected parameter refreshes its basis, which takes the full gradient."""
        return (self.state.get(p) or {}).get("until_refresh", 0) == 0

    def bases(self, p: Tensor) -> dict[str, Tensor]:
        """The bases of a projected parameter; it has some after its first update."""
        state, layout = self.state[p], self.layouts[p]
        return {side: layout.basis(state[f"basis_{side}"], side) for side in self.sides[p]}

    def gradient_bases(self, p: Tensor) -> dict[str, Tensor]:
        """The bases that the gradient of the weight itself is projected with, for `accumulate`."""
        bases, layout = self.bases(p), self.layouts[p]
        if p in self.normalised:
            bases = self._direction(p).row_scaled(bases)
        return bases if "left" not in bases else {**bases, "left": layout.whole_basis(bases["left"], "left")}

    def _refresh(self, p: Tensor, state: dict, group: dict) -> None:
        """New bases from the full gradient, and when the next ones are due."""
        self.adopt(p, *self.find_bases(p, console.warn))

    def dense_grad(self, p: Tensor) -> Tensor:
        """The gradient that a refresh decomposes, this process's rows of it: `.grad`, or that of the direction."""
        return self._direction(p).dense(p.grad) if p in self.normalised else p.grad

    def whole_bases(self, p: Tensor) -> dict[str, Tensor]:
        """The bases so far, put together; none before the first refresh."""
        state, layout = self.state[p], self.layouts[p]
        keys = {side: f"basis_{side}" for side in self.sides[p] if f"basis_{side}" in state}
        return {side: layout.whole_basis(state[key], side) for side, key in keys.items()}

    def find_bases(
        self, p: Tensor, warn: Callable[[str], None], grad: Tensor | None = None,
        old_bases: dict[str, Tensor] | None = None, engine: str | None = None,
    ) -> tuple[dict[str, Tensor], bool, bool]:  # fmt: skip
        """What a refresh of a projected parameter finds in its full gradient; `adopt` takes it.

        Args:
            p: its `.grad` is there.
            warn: told if an old basis has to stay.
            grad: what to decompose instead of `dense_grad`, where that is not the whole gradient.
            old_bases: the whole bases so far, likewise.
            engine: instead of the group's.
        Returns:
            The new bases, whether the gradient has any direction, and whether the bases have hardly moved.
        Raises:
            FloatingPointError: the gradient is not finite.
        """
        state, group = self.state[p], self.projected[p]
        place, name = self.places[p], self.names[p]
        self._tell(group["refresh"])
        if grad is None and p.grad is None:
            raise ValueError(f"the basis of {name} is due for a refresh, which needs its full gradient")
        grad = self.dense_grad(p) if grad is None else grad
        old_bases = self.whole_bases(p) if old_bases is None else old_bases
        bases, calm = {}, True
        for side in self.sides[p]:
            old = old_bases.get(side)
            matrix, stands = unfold(grad, side)
            seed = zlib.crc32(f"{place} {side} {state.get('refreshes', 0) + 1}".encode())
            bases[side] = find_basis(
                matrix,
                group["rank"],
                stands,
                engine or group["refresh"],
                old,
                seed=seed,
                name=name,
                keep_signs=group["moments"] == "align",
                warn=warn,
                dtype=p.dtype,
            )
            if old is not None:
                calm = calm and overlap(bases[side], old) >= CALM_OVERLAP
        self._refreshed = time.monotonic()
        return bases, bool(grad.any()), calm

    def adopt(self, p: Tensor, bases: dict[str, Tensor], alive: bool, calm: bool) -> None:
        """Takes the result of `find_bases`: bases, moments and the clock of the next refresh."""
        state, group = self.state[p], self.projected[p]
        if p in self.normalised:
            # whoever found the bases has asked for it already; another process has not
            self._direction(p)
        gap, place = state.get("gap", group["update_proj_gap"]), self.places[p]
        state["refreshes"] = state.get("refreshes", 0) + 1
        if group["lazy_refresh"]:
            # from the first step on: what appears later is lost by those who save by the keys of a fresh state
            state.setdefault("calm", 0)
            state.setdefault("gap", gap)
        again, change = any(f"basis_{side}" in state for side in bases), {}
        if again and group["moments"] == "rotate":
            # old^T new, (r, r)
            wider = wide(p.dtype)
            change = {side: old.to(wider).mT @ bases[side].to(wider) for side, old in self.whole_bases(p).items()}
        state.update({f"basis_{side}": self.layouts[p].own_basis(new) for side, new in bases.items()})
        if again and group["moments"] == "reset":
            del state["step"]
        elif change:
            self._rotate(state, change, group)
        if not alive:
            # a gradient of zeros has no directions: the next one is asked again
            state["until_refresh"] = 1
            return
        if group["lazy_refresh"] and again:
            state["calm"] = state["calm"] + 1 if calm else 0
            if state["calm"] >= CALM_REFRESHES:
                gap, state["calm"] = 2 * gap, 0
            state["gap"] = gap
        # staggered: the first refresh is everyone's, the second spreads them over the gap
        spread = 1 + place * gap // len(self.places) if group["stagger"] and not again else gap
        state["until_refresh"] = spread

    def _tell(self, engine: str) -> None:
        """A line every few seconds while a long series of refreshes runs: an exact SVD of a 7B model takes minutes."""
        now = time.monotonic()
        if now - self._refreshed > 1:
            self._told = now
        elif now - self._told > TELL_EVERY_S:
            left = sum(self.is_due(p) for p in self.projected)
            console.note(f"refreshing bases ({engine}): {left} of {len(self.projected)} to go")
            self._told = now
