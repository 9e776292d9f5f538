"""--memory-budget: of the settings that make a run smaller, those that make it fit and cost the user least."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

from lowrank_cli import console
from lowrank_cli.config import RunConfig
from lowrank_cli.errors import LowrankError, PreflightError
from lowrank_cli.memory.knobs import KNOBS, OTHER, SAME, configured

FARTHEST = 1 << 30


@dataclass(frozen=True)
class Plan:
    """A run with knobs turned.

    Attributes:
        turned: steps of each of KNOBS; 0 leaves it as the user has it.
        flags: what to type, by the index of the knob.
        config: what the run and the flags resolve to.
    """

    turned: tuple[int, ...]
    flags: dict[int, str]
    config: RunConfig

    @property
    def typed(self) -> str:
        """All flags; of two with the same name, the later one."""
        return " ".join({flag.partition(" ")[0]: flag for flag in self.flags.values()}.values())


def check(
    total: int,
    budget: int,
    config: RunConfig,
    reestimate: Callable[[RunConfig], int],
    bound: Callable[[RunConfig], tuple[int, int]] | None = None,
    kept: int = 0,
) -> None:
    """Compare an estimate with the budget.

    Args:
        total: the estimate, in bytes.
        budget: bytes that the run may take.
        config: of the run.
        reestimate: the estimate of another configuration.
        bound: the same where it is within the budget, elsewhere a number over the budget, which is quicker to have;
            and bytes that the configuration keeps however it comes to the same updates.
        kept: these of the run itself.
    Raises:
        PreflightError: it is over the budget; with the settings that would make it fit.
    """
    if total <= budget:
        return
    search = Search(config, budget, bound or (lambda other: (reestimate(other), 0)), kept)
    plan = search.cheapest()
    over = f"the estimate of {console.human_bytes(total)} is over the budget of {console.human_bytes(budget)}"
    if plan is not None:
        show(plan)
        size = console.human_bytes(search.sizes[plan.turned])
        raise PreflightError(over, f"it is {size} with: {plan.typed}")
    plan = search.smallest()
    if plan is None:
        raise PreflightError(over, "take a smaller --model")
    show(plan)
    size = console.human_bytes(reestimate(plan.config))
    raise PreflightError(over, f"take a smaller --model; it is {size} even with: {plan.typed}")


def show(plan: Plan) -> None:
    """Print what the knobs of a plan cost."""
    rows = [[flag, KNOBS[index].cost] for index, flag in plan.flags.items()]
    console.table("What makes it smaller", ["flag", "what it costs"], rows)


class Search:
    """The plans of a run, and the cheapest one that fits.

    Of all plans that fit, the cheapest is the one whose costliest knob costs least; of those alike in that, the one
    that turns this knob least; and so on with the next costly.

    A set of plans with a limit for each knob has one that fits if and only if one of its corners does: every knob is
    turned as far as the limit, or, if it tries both ends, not at all. A misfit rules out all plans that turn the knobs
    less far and those with two ends alike, and where it keeps too much between updates, all that differ in SAME alone.
    So a plan is found whenever there is one, with few estimates.

    Args:
        config: the run.
        budget: bytes that it may take.
        estimate: of a configuration, in bytes; any number over the budget will do for one that is over it. And bytes
            that no knob of SAME takes away.
        kept: these of the run.
    """

    def __init__(
        self, config: RunConfig, budget: int, estimate: Callable[[RunConfig], tuple[int, int]], kept: int = 0
    ):
        self.config, self.budget, self.estimate = config, budget, estimate
        # what is kept, by the turns of OTHER
        self.kept: dict[tuple[int, ...], int] = {(0,) * len(OTHER): kept}
        # by the turns of plans; None where the command refuses one after all
        self.sizes: dict[tuple[int, ...], int | None] = {}
        self._plans: dict[tuple[int, ...], Plan] = {}

    def cheapest(self) -> Plan | None:
        """The plan that fits and costs least, or None if none fits."""
        low, high = 0, len(SAME)
        found = self._first(self._limits(high))
        if found is None:
            low, high = len(SAME), len(KNOBS)
            found = self._first(self._limits(high))
        if found is None:
            return None
        # how many of the knobs it takes, from the cheapest on
        while high - low > 1:
            middle = (low + high) // 2
            fewer = self._first(self._limits(middle))
            found, low, high = (found, middle, high) if fewer is None else (fewer, low, middle)
        limits = self._limits(high)
        for index in reversed(range(high)):
            found = self._relaxed(limits, index, found)
            limits[index] = found.turned[index]
        return found

    def smallest(self) -> Plan | None:
        """The smallest plan that was looked at, as far as is known; None if there is none."""
        known = {turned: size for turned, size in self.sizes.items() if size is not None and any(turned)}
        return self._plans[min(known, key=known.__getitem__)] if known else None

    def plan(self, wanted: tuple[int, ...]) -> Plan:
        """The run with each knob turned as far as is wanted and possible; what the command refuses stays as it is."""
        if wanted not in self._plans:
            try:
                made = self._turn(wanted, together=True)
            except LowrankError:
                made = self._turn(wanted, together=False)
            self._plans[wanted] = self._plans.setdefault(made.turned, made)
        return self._plans[wanted]

    def _turn(self, wanted: tuple[int, ...], *, together: bool) -> Plan:
        """The plan, checked once with all knobs turned, or knob by knob without those that are refused."""
        config, settings, turned, flags = self.config, self.config.flat(), [0] * len(KNOBS), {}
        for index in sorted(range(len(KNOBS)), key=lambda i: not KNOBS[i].first):
            steps = KNOBS[index].steps(config, settings) if wanted[index] else []
            number = min(wanted[index], len(steps))
            if not number:
                continue
            flag, new = steps[number - 1]
            if KNOBS[index].first or not together:
                try:
                    config = configured(config.command, new)
                except LowrankError:
                    continue
            settings, turned[index], flags[index] = new, number, flag
        config = configured(config.command, settings) if together else config
        return Plan(tuple(turned), {index: flags[index] for index in sorted(flags)}, config)

    def _limits(self, count: int) -> list[int]:
        """Return limits that let the `count` cheapest knobs turn as far as they go, and the others not at all."""
        return [FARTHEST] * count + [0] * (len(KNOBS) - count)

    def _relaxed(self, limits: list[int], index: int, found: Plan) -> Plan:
        """A plan that fits and turns one knob as little as is possible within the limits of the others."""
        low, high = -1, found.turned[index]
        while high - low > 1:
            # a knob is often not needed at all
            middle = 0 if low < 0 else (low + high) // 2
            fewer = self._first([*limits[:index], middle, *limits[index + 1 :]])
            if fewer is None:
                low = middle
            else:
                found, high = fewer, fewer.turned[index]
        return found

    def _first(self, limits: list[int]) -> Plan | None:
        """A plan that fits within these limits; None if there is none."""
        return next((plan for plan in self._corners(limits) if self._fits(plan)), None)

    def _corners(self, limits: list[int]) -> Iterator[Plan]:
        ends = [
            tuple(limit if far else 0 for far in knob.tries) if limit else (0,)
            for knob, limit in zip(KNOBS, limits, strict=True)
        ]
        # the last factor of a product runs fastest: the cheapest knob
        return (self.plan(tuple(reversed(wanted))) for wanted in product(*reversed(ends)))

    def _fits(self, plan: Plan) -> bool:
        if plan.turned not in self.sizes:
            if self._is_ruled_out(plan.turned):
                return False
            try:
                self.sizes[plan.turned], self.kept[plan.turned[len(SAME) :]] = self.estimate(plan.config)
            except (LowrankError, ImportError):
                # such as for want of a package
                self.sizes[plan.turned] = None
        size = self.sizes[plan.turned]
        return size is not None and size <= self.budget

    def _is_ruled_out(self, turned: tuple[int, ...]) -> bool:
        """Return whether known sizes rule out a plan: what it keeps between updates is over the budget, or a misfit
        turns all knobs at least as far, and those with two ends alike."""
        if self.kept.get(turned[len(SAME) :], 0) > self.budget:
            return True
        return any(
            size is not None
            and size > self.budget
            and all(
                less <= more and (len(knob.tries) == 1 or bool(less) == bool(more))
                for knob, less, more in zip(KNOBS, turned, misfit, strict=True)
            )
            for misfit, size in self.sizes.items()
        )
