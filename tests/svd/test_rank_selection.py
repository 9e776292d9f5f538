"""Ranks against the paper's rule written out, and against an exhaustive search."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_cli.svd import rank_selection as rs

pytestmark = pytest.mark.numerical

# the singular values 10, 9, ... of four weights, and what the paper's rule makes of them at three thresholds, by hand:
# normalised (s - min) / (max - min); kept are those >= threshold
HAND = {
    "a": ((4, 4), [4.0, 3.0, 2.0, 1.0]),  # normalised 1, 2/3, 1/3, 0
    "b": ((4, 9), [10.0, 1.0, 1.0, 0.0]),  # 1, .1, .1, 0
    "c": ((6, 5), [9.0, 3.0, 2.0, 1.0, 0.0]),  # 1, .333, .222, .111, 0
    "d": ((4, 4), [5.0, 5.0, 5.0, 1.0]),  # 1, 1, 1, 0
}
# threshold -> kept values
EXPECTED = {0.05: {"a": 3, "b": 3, "c": 4, "d": 3}, 0.2: {"a": 3, "b": 1, "c": 3, "d": 3},
            0.5: {"a": 2, "b": 1, "c": 1, "d": 3}}  # fmt: skip


def hand(**form) -> rs.Spectra:
    return rs.Spectra({k: torch.tensor(v) for k, (_, v) in HAND.items()}, {k: s for k, (s, _) in HAND.items()}, **form)


def random_spectra(seed: int, count: int = 6, **form) -> rs.Spectra:
    generator = np.random.default_rng(seed)
    values, shapes = {}, {}
    for i in range(count):
        m, n = (int(x) for x in generator.integers(3, 40, 2))
        decay = generator.uniform(0.2, 3)
        values[f"w{i}"] = torch.tensor(np.sort(generator.random(min(m, n)) ** decay)[::-1].copy() + 1e-6)
        shapes[f"w{i}"] = (m, n)
    return rs.Spectra(values, shapes, **form)


@pytest.mark.parametrize("threshold", list(EXPECTED))
@pytest.mark.parametrize("min_ratio", [0.0, 0.4999, 0.5])
def test_threshold_rule_is_the_papers(threshold, min_ratio):
    ranks = rs.below_threshold(hand(allow_growth=True), threshold, min_ratio)
    for name, kept in EXPECTED[threshold].items():
        total = len(HAND[name][1])
        assert ranks[name] == (kept if (total - kept) / total > min_ratio else None), name


def paper_search(spectra: rs.Spectra, target: float, min_ratio: float) -> tuple[float, dict]:
    """The paper's linear search in plain numpy: thresholds 0, 0.005, ..., the reduction of what is factored."""
    for i in range(201):
        k = i * 0.005
        cut, total, ranks = 0, 0, {}
        for name, values in spectra.values.items():
            s = values.numpy()
            keep = int((((s - s.min()) / (s.max() - s.min())) >= k).sum())
            total += len(s)
            if (len(s) - keep) / len(s) > min_ratio:
                ranks[name], cut = max(1, keep), cut + len(s) - max(1, keep)
            else:
                ranks[name] = None
        if cut / total >= target:
            return k, ranks
    return 1.0, ranks


@pytest.mark.parametrize("min_ratio", [0.0, 0.4999])
@pytest.mark.parametrize("target", [0.1, 0.3, 0.5, 0.7])
def test_paper_mode_is_the_papers_search(target, min_ratio):
    spectra = random_spectra(3, count=30, allow_growth=True)
    assert rs.welore(spectra, target, min_ratio=min_ratio, paper=True) == paper_search(spectra, target, min_ratio)[1]


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), target=st.floats(0.05, 0.8))
def test_reaches_the_reduction_within_one_rank(seed, target):
    spectra = random_spectra(seed, count=12, allow_growth=True)
    total = sum(v.numel() for v in spectra.values.values())
    ranks = rs.welore(spectra, target, min_ratio=0.0)
    # a rank is at least 1: some targets cannot be reached
    if target < 1 - len(ranks) / total:
        assert abs(spectra.rank_reduction(ranks) - target) * total <= 1


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), target=st.floats(0.05, 0.95), pifa=st.booleans())
def test_no_rule_makes_a_weight_larger(seed, target, pifa):
    spectra = random_spectra(seed, pifa=pifa)
    found = [
        rs.welore(spectra, target, min_ratio=0.0),
        rs.welore(spectra, target),
        rs.uniform(spectra, target),
        rs.energy(spectra, target, spectra.rank_reduction),
        rs.cheapest(spectra, 1 - target),
        rs.cheapest(spectra, 1 - target, unit="rank"),
        rs.welore_for_parameters(spectra, 1 - target),
    ]
    for ranks in found:
        assert set(ranks) == set(spectra.values)
        for name, rank in ranks.items():
            assert rank is None or 1 <= rank <= spectra.values[name].numel()
            assert spectra.parameters(name, rank) <= spectra.parameters(name, None)


@pytest.mark.parametrize("rule", ["welore", "uniform", "cheapest", "energy"])
def test_target_zero_leaves_every_weight_dense(rule):
    spectra = hand()
    found = {
        "welore": lambda: rs.welore(spectra, 0.0),
        "uniform": lambda: rs.uniform(spectra, 0.0),
        "cheapest": lambda: rs.cheapest(spectra, 1.0),
        "energy": lambda: rs.energy(spectra, 0.0, spectra.rank_reduction),
    }[rule]()
    assert found == dict.fromkeys(HAND)


def error_of(spectra: rs.Spectra, ranks: rs.Ranks) -> float:
    return sum(float(v.double()[ranks[n] :].square().sum()) for n, v in spectra.values.items() if ranks[n] is not None)


@pytest.mark.parametrize("pifa", [False, True])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.85, 0.6, 0.35])
def test_budgeted_ranks_are_near_the_best_of_all(seed, share, pifa):
    generator = np.random.default_rng(seed)
    shapes = {"a": (6, 9), "b": (8, 8), "c": (12, 5)}
    values = {n: torch.tensor(np.sort(generator.random(min(s)) ** 2)[::-1].copy()) for n, s in shapes.items()}
    spectra = rs.Spectra(values, shapes, pifa=pifa)
    ranks = rs.cheapest(spectra, share)
    assert spectra.parameter_share(ranks) <= share
    choices = [[None, *range(1, v.numel() + 1)] for v in values.values()]
    every = (dict(zip(values, c, strict=True)) for c in itertools.product(*choices))
    best = min(error_of(spectra, r) for r in every if spectra.parameter_share(r) <= share)
    # a price finds the best on the convex hull; between its corners it may miss by a step of one small weight
    assert error_of(spectra, ranks) <= best * 1.6 + 0.02


def test_budget_of_many_weights_is_used_up():
    spectra = random_spectra(1, count=60)
    for share in (0.9, 0.6, 0.3):
        assert share - 0.01 < spectra.parameter_share(rs.cheapest(spectra, share)) <= share


def test_the_budget_goes_to_the_weight_whose_errors_cost_most():
    values = torch.linspace(1, 0.1, 32)
    spectra = rs.Spectra({"cheap": values, "dear": 10 * values}, {"cheap": (32, 32), "dear": (32, 32)})
    ranks = rs.cheapest(spectra, 0.6)
    assert ranks["dear"] is None or ranks["dear"] > ranks["cheap"]


def test_uniform_for_parameters_takes_the_largest_rank_that_fits():
    spectra = rs.Spectra({"a": torch.ones(576)}, {"a": (576, 576)})
    assert rs.uniform_for_parameters(spectra, 0.6) == {"a": 172}  # 172 x 1152 = 198,144 <= 199,065
    spectra = rs.Spectra({"a": torch.ones(576)}, {"a": (576, 576)}, pifa=True)
    assert rs.uniform_for_parameters(spectra, 0.6) == {"a": 211}  # 211 x 941 = 198,551 <= 199,065


def test_refuses_values_of_another_shape():
    with pytest.raises(ValueError, match=r"singular values of \(5,\) for a, which is 4 x 9"):
        rs.Spectra({"a": torch.ones(5)}, {"a": (4, 9)})


RULES = {
    "welore": lambda spectra: rs.welore(spectra, 0.4, min_ratio=0.0),
    "all": lambda spectra: rs.welore(spectra, 0.4, min_ratio=0.0, counting="all"),
    "uniform": lambda spectra: rs.uniform(spectra, 0.4),
    "energy": lambda spectra: rs.energy(spectra, 0.4, spectra.rank_reduction),
    "budget": lambda spectra: rs.cheapest(spectra, 0.7),
    "budget of rank": lambda spectra: rs.cheapest(spectra, 0.6, unit="rank"),
    "welore for a budget": lambda spectra: rs.welore_for_parameters(spectra, 0.7, min_ratio=0.0),
    "uniform for a budget": lambda spectra: rs.uniform_for_parameters(spectra, 0.7),
}


@pytest.mark.parametrize("rule", RULES)
def test_one_expert_is_a_matrix(rule):
    plain = random_spectra(3, count=8)
    one = rs.Spectra({n: v[None] for n, v in plain.values.items()}, {n: (1, *s) for n, s in plain.shapes.items()})
    assert RULES[rule](one) == RULES[rule](plain)
    assert one.rank_reduction(RULES[rule](one)) == plain.rank_reduction(RULES[rule](plain))


def experts(seed: int) -> tuple[rs.Spectra, dict[str, torch.Tensor]]:
    """A matrix and two stacks; their values as they are."""
    generator = np.random.default_rng(seed)
    shapes = {"a": (6, 9), "b": (3, 8, 8), "c": (2, 12, 5)}
    values = {
        n: torch.tensor(np.sort(generator.random((*s[:-2], min(s[-2:]))) ** 2)[..., ::-1].copy())
        for n, s in shapes.items()
    }
    return rs.Spectra(values, shapes), values


@pytest.mark.parametrize("unit", ["parameters", "rank"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [0.85, 0.6, 0.35])
def test_budgeted_ranks_of_experts_are_near_the_best_of_all(seed, share, unit):
    spectra, values = experts(seed)

    def used(ranks: rs.Ranks) -> float:
        """Written out: every expert of a stack has the same rank."""
        if unit == "rank":
            kept = sum(v[..., : ranks[n]].numel() if ranks[n] else v.numel() for n, v in values.items())
            return kept / sum(v.numel() for v in values.values())
        sizes = {"a": (1, 6, 9), "b": (3, 8, 8), "c": (2, 12, 5)}
        kept = sum(e * (r * (m + n) if (r := ranks[name]) else m * n) for name, (e, m, n) in sizes.items())
        return kept / sum(e * m * n for e, m, n in sizes.values())

    def error(ranks: rs.Ranks) -> float:
        return sum(float(v[..., ranks[n] :].square().sum()) for n, v in values.items() if ranks[n])

    ranks = rs.cheapest(spectra, share, unit=unit)
    assert used(ranks) == pytest.approx(
        spectra.parameter_share(ranks) if unit == "parameters" else 1 - spectra.rank_reduction(ranks)
    )
    assert used(ranks) <= share + 1e-12
    choices = [[None, *range(1, v.shape[-1] + 1)] for v in values.values()]
    every = (dict(zip(values, c, strict=True)) for c in itertools.product(*choices))
    allowed = [r for r in every if all(r[n] is None or spectra.fits(n, r[n]) for n in r) and used(r) <= share]
    # between the corners of the convex hull it may miss by a step of a stack
    assert error(ranks) <= min(map(error, allowed)) * 1.6 + 0.1


def test_coordinates_of_other_rows_are_for_matrices_alone():
    spectra = rs.Spectra({}, {"a": (6, 9), "b": (3, 8, 8)}, pifa=True)
    assert spectra.parameters("a", 2) == 2 * (6 + 9 - 2)
    assert spectra.parameters("b", 2) == 3 * 2 * (8 + 8)
    assert spectra.parameters("b", None) == 3 * 64
