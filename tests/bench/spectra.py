"""Singular values of one LLaMA-7B layer against `torch.svd` per matrix, as the reference calls it.

Seven matrices: q, k, v, o (4096 x 4096), gate, up (11008 x 4096), down (4096 x 11008), with the singular values of a
trained layer's shape: random bases are not drawn, since neither side's time depends on them. Errors are against
float64 singular values of the same matrix, over all values above a thousandth of the largest.
"""

from __future__ import annotations

import time

import torch
from comparison import Bar, Comparison, Settings, answer, console, in_alternation
from torch import Tensor

from lowrank_cli.svd.spectrum import singular_values

FASTER, ACCURATE = Bar(5.0), Bar(1.0, at_most=True)
HIDDEN, FEED_FORWARD = 4096, 11008
SMALL_HIDDEN, SMALL_FEED_FORWARD = 64, 172
# the largest relative error that a value above a thousandth of the largest may have
TOLERATED = 1e-3


def layer(smoke: bool) -> list[tuple[str, Tensor]]:
    """The matrices of a layer whose singular values fall off smoothly, over three decades."""
    hidden, feed_forward = (SMALL_HIDDEN, SMALL_FEED_FORWARD) if smoke else (HIDDEN, FEED_FORWARD)
    generator = torch.Generator().manual_seed(0)
    shapes = [(hidden, hidden)] * 4 + [(feed_forward, hidden)] * 2 + [(hidden, feed_forward)]
    names = ("q", "k", "v", "o", "gate", "up", "down")
    scale = torch.logspace(0, -3, hidden)
    return [
        (
            name,
            torch.randn(m, n, generator=generator)
            * (scale[None, :] if n == hidden else torch.cat([scale, scale.new_ones(n - hidden) * 1e-3])[None, :]),
        )
        for name, (m, n) in zip(names, shapes, strict=True)
    ]


def compare(settings: Settings) -> list[Comparison]:
    """Seconds a layer of both, and the worst error of ours."""
    torch.set_num_threads(settings.threads)
    matrices = layer(settings.smoke)
    worst = 0.0
    sums: dict[str, list[float]] = {"ours": [0.0] * settings.repeats, "peer": [0.0] * settings.repeats}
    for name, weight in matrices:
        times = in_alternation(
            {"ours": lambda w=weight: seconds(singular_values, w), "peer": lambda w=weight: seconds(peer, w)},
            settings.repeats,
        )
        for side, values in times.items():
            sums[side] = [a + b for a, b in zip(sums[side], values, strict=True)]
        worst = max(worst, error(weight))
        console.print(f"spectra: {name} done")
    rates = [[1 / t for t in sums[side]] for side in ("ours", "peer")]
    error_row = [[worst] * settings.repeats, [TOLERATED] * settings.repeats]
    return [
        Comparison("spectra", "speed of a layer, torch.svd of each matrix", "/s", *rates, FASTER),
        Comparison(
            "spectra", "largest relative error of a value above 1e-3 of the top, 1e-3", "", *error_row, ACCURATE
        ),
    ]


def peer(weight: Tensor) -> Tensor:
    """What the reference does for the singular values of a weight."""
    return torch.svd(weight.float())[1]


def error(weight: Tensor) -> float:
    """The largest relative error of our values above a thousandth of the largest."""
    exact = torch.linalg.svdvals(weight.double())
    kept = exact > 1e-3 * exact[0]
    return float(((singular_values(weight) - exact).abs() / exact)[kept].max())


def seconds(call, weight: Tensor) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    call(weight)
    return time.perf_counter() - start


if __name__ == "__main__":
    answer(compare)
