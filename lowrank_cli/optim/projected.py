"""GaLore's space: the gradient in the coordinates of a basis that is found anew every few updates.

GaLore, arXiv:2403.03507, Alg. 2. Shapes: a weight W and its gradient G are (m, n); the rank is r; a left basis P is
(m, r), a right basis Q is (n, r), with orthonormal columns; R = P^T G (r, n) or G Q (m, r). Experts are a batch of
matrices, (E, m, n), with E bases and nothing in common but the clock of their refresh.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowrank_cli import console
from lowrank_cli.ops.precision import cut, wide
from lowrank_cli.ops.projected_linear import ProjectedLinear
from lowrank_cli.optim.projection import project, sides, unfold
from lowrank_cli.optim.refresh import CHOICES, engine_for, find_basis, overlap
from lowrank_cli.optim.space import Move, Part, Space, is_batch
from lowrank_cli.optim.write import expand_add_
from lowrank_cli.parallel.shards import layout

if TYPE_CHECKING:
    from lowrank_cli.optim.optimizer import LowRankOptimizer

MOMENTS = ("keep", "align", "rotate", "reset")
# Q-GaLore, arXiv:2407.08296: a basis that stayed this similar twice in a row is refreshed half as often
CALM_OVERLAP, CALM_REFRESHES = 0.4, 2
TELL_EVERY_S = 5.0


class Projected(Space):
    """W <- W + scale P N or scale N Q^T, where N is the rule's update of R.

    Keys of its groups, with galore-torch's behaviour as the default: `rank`; `update_proj_gap`, the updates between
    refreshes of the basis; `scale`, the paper's alpha; `proj_type`, the sides; `batched`: tensors of three dimensions
    are matrices, and not projected in every mode; `refresh`, an engine of optim/refresh.py, or auto; `moments`, what
    becomes of them at a refresh: keep, align, rotate or reset; `stagger`: spread the refreshes over the gap;
    `lazy_refresh`: double the gap of a basis that has stopped moving; `in_backward`: let the model's linears form R
    without G, None where that takes fewer operations.

    State: `basis_left`, `basis_right` or `basis_mode0` ..., `until_refresh`, `refreshes`; `gap` and `calm` where lazy.
    """

    DEFAULTS = {
        "update_proj_gap": 200, "scale": 0.25, "proj_type": "std", "refresh": "svd", "moments": "keep",
        "stagger": False, "lazy_refresh": False, "batched": False,
    }  # fmt: skip

    def __init__(self, weight: Tensor, group: dict, optimizer: LowRankOptimizer):
        super().__init__(weight, group, optimizer)
        self.is_open = False  # the layers give R in backward
        self._modules: list[nn.Module] = []
        self._bases: dict[str, Tensor] | None = None  # during an update

    @classmethod
    def check(cls, group: dict) -> None:
        if int(group["rank"]) < 1:
            raise ValueError(f"rank is {group['rank']}; it must be at least 1")
        for key, value in cls.DEFAULTS.items():
            group.setdefault(key, value)
        if int(group["update_proj_gap"]) < 1:
            raise ValueError(f"update_proj_gap is {group['update_proj_gap']}; it must be at least 1")
        for key, known in (("refresh", CHOICES), ("moments", MOMENTS)):
            if group[key] not in known:
                raise ValueError(f"{key} is {group[key]!r}; it is one of {', '.join(known)}")
        for p in group["params"]:
            sides(layout(p).shape, group["proj_type"], batched=is_batch(p.shape, group))

    @property
    def sides(self) -> tuple[str, ...]:
        """The sides of the gradient that are projected."""
        return sides(self.layout.shape, self.group["proj_type"], batched=self.is_batch)

    @property
    def engine(self) -> str:
        """The engine that finds this tensor's bases."""
        return engine_for(self.group["refresh"], self.layout.shape)

    @property
    def is_due(self) -> bool:
        """Return whether the next update refreshes the basis, which takes the full gradient."""
        return (self.optimizer.state.get(self.weight) or {}).get("until_refresh", 0) == 0

    @property
    def wants_full_gradient(self) -> bool:
        return self.always_full or self.is_due

    # ---- the gradient

    def bases(self) -> dict[str, Tensor]:
        """Return the bases to project this process's gradient with; there are some after the first update."""
        if self._bases is not None:
            return self._bases
        state = self.state
        return {side: self.layout.basis(state[f"basis_{side}"], side) for side in self.sides}

    def whole_bases(self) -> dict[str, Tensor]:
        """Return the bases so far, put together; none before the first refresh."""
        state = self.state
        keys = {side: f"basis_{side}" for side in self.sides if f"basis_{side}" in state}
        return {side: self.layout.whole_basis(state[key], side) for side, key in keys.items()}

    def made_small(self, grad: Tensor) -> list[Tensor]:
        bases = self.bases()
        return [self.layout.settled(project(grad, bases), bases)]

    def zeros(self) -> list[Tensor]:
        bases = {side: basis.to("meta", torch.float32) for side, basis in self.bases().items()}
        shape = project(torch.empty(self.weight.shape, device="meta"), bases).shape
        return [torch.zeros(shape, dtype=wide(self.weight.dtype), device=self.weight.device)]

    # ---- one update

    def ready(self) -> None:
        grad = self.weight.grad
        # a refresh would stop at it half-way through the model
        if grad is not None and self.is_due and not bool(grad.isfinite().all()):
            raise FloatingPointError(f"the gradient of {self.name} is not finite at a refresh")

    def gradient(self) -> list[Part]:
        self._bases = None
        if self.is_due:
            self.refresh()
        self._bases = bases = self.bases()
        if self.weight.grad is not None:
            # the whole gradient, or the part of it that did not come through a projected linear
            self.collect(self.weight.grad)
        self.state["until_refresh"] -= 1
        grads, self.small = self.small, []
        return self.parts([cut(grad) for grad in grads], bases)

    def parts(self, grads: list[Tensor], bases: dict[str, Tensor]) -> list[Part]:
        """Return what the rule works on, from the small gradient; never narrower than float32."""
        (grad,) = grads
        return [Part(grad, self.weight, self.layout.height(grad, bases))]

    def clear(self) -> None:
        # of a step that was interrupted
        self._bases = None
        super().clear()

    def taken(self) -> Tensor:
        """Return the small gradient, or its first part, which is not kept any longer."""
        return self.small.pop(0)

    def apply_(self, moves: list[Move]) -> None:
        (move,), bases = moves, self.bases()
        self._bases = None
        update = self.layout.expandable(move.update, bases)
        alpha = self.group["scale"] * move.alpha
        expand_add_(self.weight, update, bases, alpha=alpha, beta=move.beta, noise=self.noise())

    # ---- in backward

    def attach(self, module: nn.Module, *, clipping: float) -> bool:
        wanted, shape = self.group.get("in_backward", False), self.layout.shape
        if wanted is None:
            # 2 N r (m + n) operations instead of 2 N m n; a norm to clip by is that of the full gradients
            wanted = not clipping and self.group["rank"] * sum(shape) < shape.numel()
        if not wanted or self.always_full or len(shape) != 2 or type(module) not in (nn.Linear, ProjectedLinear):
            return False
        if module not in self._modules:
            # the layers of an optimizer that is not used any longer are taken over
            ProjectedLinear.dress(module, self)
            self._modules.append(module)
        self.settle()
        return True

    def detach(self, module: nn.Module) -> None:
        if module in self._modules:
            ProjectedLinear.undress(module)
            self._modules.remove(module)
            self.settle()

    def orphaned(self) -> None:
        self.is_open = False

    def settle(self) -> None:
        self.is_open = bool(self._modules) and not self.is_due
        if self.is_open:
            self.leaves_for(self.leaf_shapes())

    def leaf_shapes(self) -> list[tuple[int, ...]]:
        """Return the shapes of the leaves: of R, of one process's tokens."""
        (m, n), state = self.layout.shape, self.state
        ranks = {side: state[f"basis_{side}"].shape[-1] for side in self.sides}
        return [(ranks.get("left", m), ranks.get("right", n))]

    def bases_in_backward(self) -> dict[str, Tensor]:
        """Return the bases that the gradient of the weight itself is projected with."""
        bases = self.bases()
        return {**bases, "left": self.layout.whole_basis(bases["left"], "left")} if "left" in bases else bases

    # ---- the refresh

    def refresh(self) -> None:
        """Find new bases from the full gradient, and when the next ones are due."""
        self.adopt(*self.find_bases(console.warn))

    def dense_grad(self) -> Tensor:
        """Return the gradient that a refresh decomposes, this process's rows of it."""
        return self.weight.grad

    def find_bases(
        self, warn: Callable[[str], None], grad: Tensor | None = None,
        old_bases: dict[str, Tensor] | None = None, engine: str | None = None,
    ) -> tuple[dict[str, Tensor], bool, bool]:  # fmt: skip
        """Return what a refresh finds in the full gradient, which has to be there; `adopt` takes it.

        Args:
            warn: told if an old basis has to stay.
            grad: what to decompose instead of `dense_grad`, where that is not the whole gradient.
            old_bases: the whole bases so far, likewise.
            engine: instead of the group's.
        Returns:
            The new bases, whether the gradient has any direction, and whether the bases have hardly moved.
        Raises:
            FloatingPointError: the gradient is not finite.
        """
        state, group = self.state, self.group
        self._tell()
        if grad is None and self.weight.grad is None:
            raise ValueError(f"the basis of {self.name} is due for a refresh, which needs its full gradient")
        grad = self.dense_grad() if grad is None else grad
        old_bases = self.whole_bases() if old_bases is None else old_bases
        bases, calm = {}, True
        for side in self.sides:
            old = old_bases.get(side)
            matrix, stands = unfold(grad, side)
            seed = zlib.crc32(f"{self.place} {side} {state.get('refreshes', 0) + 1}".encode())
            bases[side] = find_basis(
                matrix,
                group["rank"],
                stands,
                engine or self.engine,
                old,
                seed=seed,
                name=self.name,
                keep_signs=group["moments"] == "align",
                warn=warn,
                dtype=self.weight.dtype,
            )
            if old is not None:
                # a process may have no expert at all
                calm = calm and (not old.numel() or overlap(bases[side], old) >= CALM_OVERLAP)
        self.optimizer.clock.refreshed = time.monotonic()
        return bases, *self.layout.agreed(alive=bool(grad.any()), calm=calm)

    def empty_bases(self) -> dict[str, Tensor]:
        """Return room for bases that another process has found: of the gradient's dtype, which is the weight's."""
        bases = {}
        for side in self.sides:
            matrix, stands = unfold(torch.empty(self.layout.shape, device="meta"), side)
            *batch, rows, columns = matrix.shape
            size = rows if stands == "left" else columns
            bases[side] = self.weight.new_empty(*batch, size, min(self.group["rank"], rows, columns))
        return bases

    def adopt(self, bases: dict[str, Tensor], alive: bool, calm: bool) -> None:
        """Take the result of `find_bases`: bases, moments and the clock of the next refresh."""
        state, group = self.state, self.group
        gap = state.get("gap", group["update_proj_gap"])
        state["refreshes"] = state.get("refreshes", 0) + 1
        if group["lazy_refresh"]:
            # from the first step on: what appears later is lost by those who save by the keys of a fresh state
            state.setdefault("calm", 0)
            state.setdefault("gap", gap)
        again, change = any(f"basis_{side}" in state for side in bases), {}
        if again and group["moments"] == "rotate":
            # old^T new, (r, r)
            wider = wide(self.weight.dtype)
            change = {side: old.to(wider).mT @ bases[side].to(wider) for side, old in self.whole_bases().items()}
        state.update({f"basis_{side}": self.layout.own_basis(new) for side, new in bases.items()})
        if again and group["moments"] == "reset":
            del state["step"]
        elif change:
            self.optimizer.rule.rotate(state, change, group)
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
        spread = 1 + self.place * gap // len(self.optimizer.projected) if group["stagger"] and not again else gap
        state["until_refresh"] = spread

    def _tell(self) -> None:
        """Say how far a long series of refreshes is, every few seconds: an exact SVD of a 7B model takes minutes."""
        clock, now = self.optimizer.clock, time.monotonic()
        if now - clock.refreshed > 1:
            clock.told = now
        elif now - clock.told > TELL_EVERY_S:
            projected = self.optimizer.projected
            left = sum(space.is_due for space in projected)
            console.note(f"refreshing bases ({self.engine}): {left} of {len(projected)} to go")
            clock.told = now

    # ---- loading

    def keeps(self, key: str) -> bool:
        return key.startswith("basis_") or key in ("until_refresh", "refreshes", "gap", "calm")

    def check_loaded(self, state: dict[str, Any], group: dict) -> torch.Size | None:
        p, bases = self.weight, {}
        for side in sides(p.shape, group["proj_type"], batched=is_batch(p.shape, group)):
            basis = state.get(f"basis_{side}")
            *batch, rows, columns = unfold(p, side)[0].shape
            beginning = (*batch, columns if side == "right" else rows)
            if basis is None or tuple(basis.shape[:-1]) != beginning:
                there = "no basis" if basis is None else f"a basis {tuple(basis.shape)}"
                raise ValueError(f"the state of {self.name} has {there}, and the weight is {tuple(p.shape)}")
            bases[side] = basis.to("meta")
        return project(torch.empty(p.shape, dtype=p.dtype, device="meta"), bases).shape
