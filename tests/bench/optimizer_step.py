"""`GaLoreAdamW.step` against galore-torch, torch's fused AdamW, and the two matrix products that it cannot do without.

One process, one thread, float32, fixed random gradients, every step in turn with the others'. No basis is refreshed in
a timed step. The floor is `grad @ Q` and `W.addmm_(N, Q^T)` (or their left-sided forms) on every matrix, no more.

Shapes: a weight and its gradient are (m, n) = (out, in); the rank is r; k = min(m, n).
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from comparison import Bar, Comparison, Settings, answer, console, in_alternation
from galore_torch import GaLoreAdamW as PeerGaLoreAdamW
from galore_torch.galore_projector import GaLoreProjector
from torch import Tensor

from lowrank_cli import GaLoreAdamW
from lowrank_cli.methods.gradnormlorp.space import Normalised

NO_REFRESH = 10**9
SCALE = 0.25
LR = 1e-3


@dataclass(frozen=True)
class Case:
    """A model's projected matrices at a rank.

    Attributes:
        name: what the table calls it.
        shapes: of the matrices.
        rank: columns of each basis.
        steps: timed steps a pair.
        decompose: the first step computes real bases; otherwise random ones are put into the state, since a
            decomposition of such a matrix takes longer than the rest of the bench.
        galore_bar: what the speed against galore-torch has to reach.
    """

    name: str
    shapes: list[tuple[int, int]]
    rank: int
    steps: int
    decompose: bool
    galore_bar: Bar | None = None


LLAMA_60M = 8 * [*4 * [(512, 512)], *2 * [(1376, 512)], (512, 1376)]
LLAMA_7B_LAYER = [*4 * [(4096, 4096)], *2 * [(11008, 4096)], (4096, 11008)]
TINY_LAYER = [(64, 64), (176, 64), (64, 176)]
CASES = [
    Case("LLaMA-60M, rank 128", LLAMA_60M, 128, 20, True, Bar(1.3)),
    Case("LLaMA-60M, rank 256", LLAMA_60M, 256, 20, True),
    Case("LLaMA-7B layer, rank 128", LLAMA_7B_LAYER, 128, 3, False),
    Case("LLaMA-7B layer, rank 1024", LLAMA_7B_LAYER, 1024, 1, False),
]
SMOKE_CASES = [
    Case("tiny, rank 16", TINY_LAYER, 16, 3, True, Bar(1.3)),
    Case("tiny, rank 16, given bases", TINY_LAYER, 16, 3, False),
]


def compare(settings: Settings) -> list[Comparison]:
    """The comparisons of every case."""
    torch.set_num_threads(1)
    rows = []
    for case in SMOKE_CASES if settings.smoke else CASES:
        steps = settings.steps or case.steps
        console.print(f"optimizer_step: {case.name}, {settings.repeats} x {steps} steps")
        rows += compare_case(case, settings.repeats, steps)
    return rows


def compare_case(case: Case, repeats: int, steps: int) -> list[Comparison]:
    """One case: a value of each side is the median of its steps of a pair, in milliseconds."""
    torch.manual_seed(0)
    grads = [torch.randn(shape) * 1e-3 for shape in case.shapes]  # (m, n) each
    bases = None if case.decompose else [random_basis(min(shape), case.rank) for shape in case.shapes]
    sides = {
        "ours": our_step(grads, bases, case),
        "weight norm": our_step(grads, bases, case, space=Normalised),
        "galore-torch": peer_step(grads, bases, case),
        "AdamW fused": torch.optim.AdamW(weights_of(grads), lr=LR, fused=True).step,
        "two products": products(grads, case.rank),
    }
    for step in sides.values():
        # the first step makes state, the second meets it in memory
        step()
        step()
    calls = {name: lambda step=step: milliseconds(step) for name, step in sides.items()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, values in in_alternation(calls, steps).items():
            times[name].append(statistics.median(values))

    def speed(peer: str, bar: Bar | None) -> Comparison:
        ours, theirs = ([1000 / t for t in times[name]] for name in ("ours", peer))
        return Comparison("optimizer_step", f"speed, {peer}: {case.name}", "steps/s", ours, theirs, bar)

    return [
        speed("galore-torch", case.galore_bar),
        speed("AdamW fused", None),
        Comparison(
            "optimizer_step",
            f"time, two products alone: {case.name}",
            "ms",
            times["ours"],
            times["two products"],
            Bar(1.15, at_most=True),
        ),
        Comparison(
            "optimizer_step",
            f"time with weight_norm, without: {case.name}",
            "ms",
            times["weight norm"],
            times["ours"],
        ),
    ]


def milliseconds(step: Callable[[], object]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    step()
    return 1000 * (time.perf_counter() - start)


def weights_of(grads: list[Tensor]) -> list[torch.nn.Parameter]:
    """Fresh weights with these gradients, which all sides share."""
    weights = [torch.nn.Parameter(torch.randn_like(grad) * 0.02) for grad in grads]
    for weight, grad in zip(weights, grads, strict=True):
        weight.grad = grad
    return weights


def group_of(weights: list[torch.nn.Parameter], rank: int) -> list[dict]:
    """The parameter group that both GaLore optimizers take."""
    return [{"params": weights, "rank": rank, "update_proj_gap": NO_REFRESH, "scale": SCALE, "proj_type": "std"}]


def random_basis(size: int, rank: int) -> Tensor:
    """Orthonormal columns, (size, rank)."""
    return torch.linalg.qr(torch.randn(size, rank)).Q


def our_step(grads: list[Tensor], bases: list[Tensor] | None, case: Case, **tags: str) -> Callable[[], object]:
    """The step of lowrank's optimizer; given bases go into its state as it keeps them itself."""
    (group,) = group_of(weights_of(grads), case.rank)
    optimizer = GaLoreAdamW([group | tags], lr=LR)
    for weight, basis in zip(optimizer.param_groups[0]["params"], bases or [], strict=bases is not None):
        m, n = weight.shape
        low_rank = (m, case.rank) if m >= n else (case.rank, n)
        optimizer.state[weight] = {
            "step": 1,
            "until_refresh": NO_REFRESH,
            "basis_right" if m >= n else "basis_left": basis.clone(memory_format=torch.contiguous_format),
            "exp_avg": torch.zeros(low_rank),
            "exp_avg_sq": torch.zeros(low_rank),
        }
    return optimizer.step


def peer_step(grads: list[Tensor], bases: list[Tensor] | None, case: Case) -> Callable[[], object]:
    """The step of galore-torch's optimizer; given bases have the strides of those that it computes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        optimizer = PeerGaLoreAdamW(group_of(weights_of(grads), case.rank), lr=LR)
    for weight, basis in zip(optimizer.param_groups[0]["params"], bases or [], strict=bases is not None):
        m, n = weight.shape
        projector = GaLoreProjector(case.rank, update_proj_gap=NO_REFRESH, scale=SCALE, proj_type="std")
        # a slice of the whole factor, which torch.linalg.svd returns column by column
        factor = torch.zeros(min(m, n), min(m, n)).mT  # (k, k)
        kept = factor[: case.rank] if m >= n else factor[:, : case.rank]
        projector.ortho_matrix = kept.copy_(basis.mT if m >= n else basis)
        optimizer.state[weight] = {"step": 1, "projector": projector}
    return optimizer.step


@torch.no_grad()
def products(grads: list[Tensor], rank: int) -> Callable[[], object]:
    """The gradient into the basis, and an update out of it into the weight: on every matrix, and nothing else."""
    work = []
    for weight in weights_of(grads):
        m, n = weight.shape
        update = torch.randn((m, rank) if m >= n else (rank, n))
        work.append((weight.detach(), weight.grad, random_basis(min(m, n), rank), update))

    def step() -> None:
        for weight, grad, basis, update in work:
            if weight.shape[0] >= weight.shape[1]:
                torch.mm(grad, basis)
                weight.addmm_(update, basis.mT, alpha=-LR * SCALE)
            else:
                torch.mm(basis.mT, grad)
                weight.addmm_(basis, update, alpha=-LR * SCALE)

    return step


if __name__ == "__main__":
    answer(compare)
