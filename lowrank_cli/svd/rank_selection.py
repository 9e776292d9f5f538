"""Select how many directions of each weight to keep: pure functions from singular values to ranks.

Shapes: a weight is (m, n), k = min(m, n) its singular values, r <= k the rank that it is factored at. A rank of None
leaves a weight dense, at full rank. The weights of E experts, (E, m, n), are one weight, whose matrices are all
factored at the same rank: its values are the roots of the sums of the matrices' squares, so that squares are errors
as they are of one matrix.

Two counts say how much is compressed, and they are not the same (WeLore's "50 %" may be larger than the model was):

    rank reduction    the share of all singular values that the factored weights have lost; WeLore's "effective rank
                      reduction". `counting="all"` also counts what falls below the threshold in weights left dense.
    parameter share   parameters of the compressed linears as a share of those of the dense ones
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

Shape = tuple[int, ...]
Ranks = dict[str, int | None]

# the thresholds of WeLore's linear search
PAPER_STEP = 0.005
BISECTIONS = 64


@dataclass(frozen=True)
class Spectra:
    """Singular values and shapes of a model's weights, and the form that they would be factored in.

    Attributes:
        values: by name, (k,) each, descending; of experts (E, k) are given, and what `together` makes of them is kept.
        shapes: by name, (m, n) or (E, m, n).
        pifa: factored matrices take r (m + n - r) parameters instead of r (m + n); experts never do.
        allow_growth: factor a weight also where its factors are no smaller than it was, as the paper's code does.
    """

    values: Mapping[str, Tensor]
    shapes: Mapping[str, Shape]
    pifa: bool = False
    allow_growth: bool = False
    normalised: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self):
        kept = {}
        for name, values in self.values.items():
            *experts, m, n = self.shapes[name]
            if values.shape != (*experts, min(m, n)):
                raise ValueError(f"singular values of {tuple(values.shape)} for {name}, which is {m} x {n}")
            kept[name] = together(values)
            self.normalised[name] = normalise(kept[name].double())
        object.__setattr__(self, "values", kept)

    def count(self, name: str) -> int:
        """Matrices of a weight: 1, or the number of experts."""
        return math.prod(self.shapes[name][:-2])

    def parameters(self, name: str, rank: int | None) -> int:
        """Parameters of a weight at a rank."""
        m, n = self.shapes[name][-2:]
        pifa = self.pifa and len(self.shapes[name]) == 2
        return self.count(name) * (m * n if rank is None else rank * (m + n - (rank if pifa else 0)))

    def total(self) -> int:
        """Singular values of all matrices."""
        return sum(self.count(name) * v.numel() for name, v in self.values.items())

    def fits(self, name: str, rank: int) -> bool:
        """Return whether factoring at this rank is allowed: it makes the weight smaller, or growth is allowed."""
        return self.allow_growth or self.parameters(name, rank) < self.parameters(name, None)

    def parameter_share(self, ranks: Ranks) -> float:
        """Parameters at these ranks as a share of the dense ones."""
        dense = sum(map(math.prod, self.shapes.values()))
        return sum(self.parameters(name, rank) for name, rank in ranks.items()) / dense

    def least_share(self) -> float:
        """The parameter share of every weight at rank 1, where that makes it smaller."""
        return self.parameter_share({name: 1 if self.fits(name, 1) else None for name in self.shapes})

    def largest_rank(self, name: str) -> int:
        """The largest rank that a weight may be factored at; 0 if none."""
        return max((r for r in range(1, min(self.shapes[name][-2:]) + 1) if self.fits(name, r)), default=0)

    def rank_reduction(self, ranks: Ranks) -> float:
        """Share of all singular values that the factored weights have lost."""
        return num_cut(self, ranks) / self.total()


def together(values: Tensor) -> Tensor:
    """The values of one weight: its own, (k,), or of experts' (E, k) the roots of the sums of squares."""
    return values if values.dim() == 1 else values.double().square().sum(0).sqrt()


def normalise(values: Tensor) -> Tensor:
    """(s - min) / (max - min) of one weight's singular values; ones where all are equal. WeLore, sec. 3."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else torch.ones_like(values)


def below_threshold(spectra: Spectra, threshold: float, min_ratio: float) -> Ranks:
    """WeLore's rule: a weight keeps the normalised singular values of at least the threshold.

    It is a low-rank component, factored at that rank, if more than `min_ratio` of its values fall below; else it
    stays dense. A rank is at least 1.
    """
    ranks: Ranks = {}
    for name, normalised in spectra.normalised.items():
        total = normalised.numel()
        kept = max(1, int((normalised >= threshold).sum()))
        is_low_rank = total - kept > min_ratio * total
        ranks[name] = kept if is_low_rank and spectra.fits(name, kept) else None
    return ranks


def pooled_reduction(spectra: Spectra, threshold: float) -> float:
    """The share of all normalised singular values below a threshold, those of weights left dense included."""
    below = sum(spectra.count(name) * int((n < threshold).sum()) for name, n in spectra.normalised.items())
    return below / spectra.total()


def pooled_threshold(spectra: Spectra, target: float, *, paper: bool = False) -> float:
    """The least threshold, on the paper's grid if asked, that the target share of all normalised values is below."""

    def reduction(threshold: float) -> float:
        return pooled_reduction(spectra, threshold)

    return on_grid(reduction, target) if paper else bisect(reduction, target)[1]


def on_grid(reduction: Callable[[float], float], target: float) -> float:
    """The first threshold of the paper's linear search that reaches a reduction; 1 if none does."""
    grid = (i * PAPER_STEP for i in range(round(1 / PAPER_STEP) + 1))
    return next((k for k in grid if reduction(k) >= target), 1.0)


def welore(
    spectra: Spectra, target: float, *, min_ratio: float = 0.5, counting: str = "factored", paper: bool = False
) -> Ranks:
    """WeLore's ranks for a rank reduction. Jaiswal et al., arXiv:2407.11239, sec. 3.

    One threshold on all normalised singular values, found by bisection. Reduction is a step function of it: a weight
    that becomes a low-rank component loses half of its rank at once. What is missing to the target, or too much, is
    then cut from the factored weights or given back to them, in the order of the normalised values. `paper` takes the
    first threshold of the paper's grid that reaches the target instead, and no more.

    Args:
        spectra: of the weights.
        target: share of singular values to cut, in [0, 1).
        min_ratio: share of its values that a weight must lose to be factored; the paper's text has 0.5, its code 0.
        counting: "factored" counts values of factored weights only, "all" those of weights left dense as well.
        paper: the paper's grid of thresholds.
    """
    if target <= 0:
        return dict.fromkeys(spectra.values)

    if counting == "all":
        return below_threshold(spectra, pooled_threshold(spectra, target, paper=paper), min_ratio)

    def reduction(threshold: float) -> float:
        return spectra.rank_reduction(below_threshold(spectra, threshold, min_ratio))

    if paper:
        return below_threshold(spectra, on_grid(reduction, target), min_ratio)
    under, over = bisect(reduction, target)
    cut = round(target * spectra.total())
    fewer, more = (below_threshold(spectra, threshold, min_ratio) for threshold in (under, over))
    reached = [cut_more(spectra, fewer, cut), give_back(spectra, more, cut, min_ratio)]
    return min(reached, key=lambda ranks: abs(num_cut(spectra, ranks) - cut))


def num_cut(spectra: Spectra, ranks: Ranks) -> int:
    """Singular values that the factored weights have lost."""
    return sum(
        spectra.count(name) * (v.numel() - ranks[name])
        for name, v in spectra.values.items()
        if ranks[name] is not None
    )


def cut_more(spectra: Spectra, ranks: Ranks, count: int) -> Ranks:
    """The ranks with directions cut from factored weights until `count` are, least normalised singular value first."""
    ranks = dict(ranks)
    heap = [(float(spectra.normalised[n][r - 1]), n) for n, r in ranks.items() if r is not None and r > 1]
    heapq.heapify(heap)
    missing = count - num_cut(spectra, ranks)
    while heap and missing > 0:
        _, name = heapq.heappop(heap)
        if spectra.count(name) > missing:
            continue
        ranks[name] -= 1
        missing -= spectra.count(name)
        if ranks[name] > 1:
            heapq.heappush(heap, (float(spectra.normalised[name][ranks[name] - 1]), name))
    return ranks


def give_back(spectra: Spectra, ranks: Ranks, count: int, min_ratio: float) -> Ranks:
    """The ranks with directions given back until `count` are cut, greatest normalised singular value first.

    A low-rank component stays one: it keeps losing more than `min_ratio` of its values. One that has all back is
    dense.
    """
    ranks = dict(ranks)

    def candidate(name: str) -> tuple[float, str] | None:
        rank, total = ranks[name], spectra.values[name].numel()
        if rank is None:
            return None
        lost = total - rank - 1
        stays = lost > min_ratio * total and spectra.fits(name, rank + 1)
        return (-float(spectra.normalised[name][rank]), name) if stays or lost == 0 else None

    heap = [c for c in map(candidate, ranks) if c is not None]
    heapq.heapify(heap)
    spare = num_cut(spectra, ranks) - count
    while heap and spare > 0:
        _, name = heapq.heappop(heap)
        if spectra.count(name) > spare:
            continue
        spare -= spectra.count(name)
        full = ranks[name] + 1 == spectra.values[name].numel()
        ranks[name] = None if full else ranks[name] + 1
        following = candidate(name)
        if following is not None:
            heapq.heappush(heap, following)
    return ranks


def welore_for_parameters(spectra: Spectra, share: float, *, min_ratio: float = 0.5) -> Ranks:
    """WeLore's rule at the least threshold whose parameter share is within the given one."""
    if share >= 1:
        return dict.fromkeys(spectra.values)
    _, over = bisect(lambda k: 1 - spectra.parameter_share(below_threshold(spectra, k, min_ratio)), 1 - share)
    return below_threshold(spectra, over, min_ratio)


def uniform(spectra: Spectra, target: float) -> Ranks:
    """The same share of rank cut from every weight; a weight stays dense where its factors would not be smaller."""
    if target <= 0:
        return dict.fromkeys(spectra.values)
    ranks = {name: max(1, round((1 - target) * v.numel())) for name, v in spectra.values.items()}
    return {name: rank if spectra.fits(name, rank) else None for name, rank in ranks.items()}


def uniform_for_parameters(spectra: Spectra, share: float) -> Ranks:
    """Every weight at the largest rank whose factors have at most the given share of its parameters."""
    if share >= 1:
        return dict.fromkeys(spectra.values)

    def largest(name: str) -> int:
        allowed = share * spectra.parameters(name, None)
        candidates = range(1, spectra.values[name].numel() + 1)
        return max([r for r in candidates if spectra.parameters(name, r) <= allowed], default=1)

    return {name: largest(name) for name in spectra.values}


def energy(spectra: Spectra, target: float, measure: Callable[[Ranks], float]) -> Ranks:
    """Every weight keeps the same share of its squared singular values; the share is the least compression that
    brings `measure`, which grows as more is cut, to the target."""
    if target <= 0:
        return dict.fromkeys(spectra.values)
    lost = {name: tail_energy(v) / max(float(v.double().square().sum()), 1e-300) for name, v in spectra.values.items()}

    def ranks_at(share: float) -> Ranks:
        ranks = {name: max(1, int((tail > share).sum())) for name, tail in lost.items()}
        return {name: r if r < lost[name].numel() and spectra.fits(name, r) else None for name, r in ranks.items()}

    _, over = bisect(lambda share: measure(ranks_at(share)), target)
    return ranks_at(over)


def cheapest(spectra: Spectra, share: float, *, unit: str = "parameters") -> Ranks:
    """The ranks of least squared error, summed over all weights, within a share of the parameters or of the ranks.

    With singular values weighted on both sides the squares are changes of the loss, the same unit in every weight.
    For a price on parameters each weight takes the rank, or stays dense, where error + price x parameters is least;
    the price is found by bisection. What the last step leaves of the budget goes to the directions of the largest
    error per parameter.

    Args:
        spectra: of the weights.
        share: what is allowed, as a share of what the dense weights have.
        unit: "parameters" or "rank".
    """
    if share >= 1:
        return dict.fromkeys(spectra.values)

    def price_of(name: str, rank: int | None) -> int:
        if unit == "rank":
            return spectra.count(name) * (spectra.values[name].numel() if rank is None else rank)
        return spectra.parameters(name, rank)

    allowed = share * sum(price_of(name, None) for name in spectra.values)
    table = {}
    for name, values in spectra.values.items():
        candidates = [r for r in range(1, values.numel() + 1) if spectra.fits(name, r)]
        costs = torch.tensor([*(price_of(name, r) for r in candidates), price_of(name, None)])
        errors = torch.cat([tail_energy(values)[candidates] if candidates else values.new_empty(0), torch.zeros(1)])
        table[name] = (candidates, costs.double(), errors.double())

    def ranks_at(price: float) -> Ranks:
        chosen = {name: int((errors + price * costs).argmin()) for name, (_, costs, errors) in table.items()}
        return {name: (table[name][0][i] if i < len(table[name][0]) else None) for name, i in chosen.items()}

    top = max(float(v.double().square().sum()) for v in spectra.values.values()) or 1.0
    low, high = -60.0, 10.0  # powers of two of the price, relative to the largest error
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        used = sum(price_of(n, r) for n, r in ranks_at(top * 2**middle).items())
        low, high = (low, middle) if used <= allowed else (middle, high)
    return fill(spectra, ranks_at(top * 2**high), allowed, price_of)


def fill(spectra: Spectra, ranks: Ranks, allowed: float, price_of: Callable[[str, int | None], int]) -> Ranks:
    """The ranks with directions added to factored weights, most squared error per price first, while they fit."""
    ranks = dict(ranks)
    left = allowed - sum(price_of(name, rank) for name, rank in ranks.items())

    def step(name: str) -> tuple[float, int, str] | None:
        rank = ranks[name]
        if rank is None or rank >= spectra.values[name].numel() or not spectra.fits(name, rank + 1):
            return None
        cost = price_of(name, rank + 1) - price_of(name, rank)
        return (-(float(spectra.values[name][rank]) ** 2) / max(cost, 1), cost, name)

    heap = [s for s in map(step, ranks) if s is not None]
    heapq.heapify(heap)
    while heap:
        _, cost, name = heapq.heappop(heap)
        if cost > left:
            continue
        left -= cost
        ranks[name] += 1
        following = step(name)
        if following is not None:
            heapq.heappush(heap, following)
    return ranks


def tail_energy(values: Tensor) -> Tensor:
    """The squared error of each rank: entry r is the sum of squares after the first r values, (k + 1,) float64."""
    squares = values.double().square()
    return torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])


def bisect(measure: Callable[[float], float], target: float) -> tuple[float, float]:
    """The two sides of the place in [0, 1] where a growing step function reaches a target: (not over, reached)."""
    low, high = 0.0, 1.0 + 1e-9
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if measure(middle) >= target else (middle, high)
    return low, high
