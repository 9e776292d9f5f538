"""Microseconds of the projected step on a GPU: the kernel, its peers and the floor.

    python tests/bench/kernel_gpu.py [--dtype bfloat16] [--repeats 50] [--json FILE]

Not part of `make bench`, which needs no GPU. Medians of device events, the sides in turn. `kernel` is the hand-written
products, `library` cuBLAS around the fused Adam; where the second is faster for a rank, `fused_step.CUDA_LARGE_RANK`
should be below it. The floor is the larger of two times: the bytes that have to move over the measured rate of a copy,
and the operations over the measured rate of a large product.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from optimizer_step import LLAMA_7B_LAYER, LLAMA_60M, LR, SCALE, Case, our_step, peer_step, random_basis
from torch import Tensor

from lowrank_cli.ops import build, fused_step

LLAMA_1B_LAYER = [*4 * [(2048, 2048)], *2 * [(5461, 2048)], (2048, 5461)]
CASES = [
    Case("LLaMA-60M", LLAMA_60M, 128, 1, False),
    Case("LLaMA-1B layer", LLAMA_1B_LAYER, 512, 1, False),
    Case("LLaMA-7B layer", LLAMA_7B_LAYER, 1024, 1, False),
    Case("LLaMA-7B layer, rank 128", LLAMA_7B_LAYER, 128, 1, False),
]


def main() -> None:
    """Print the table, write the file."""
    parser = argparse.ArgumentParser(description="Microseconds of the projected step on a GPU.")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device")
    warnings.simplefilter("ignore", FutureWarning)
    dtype = getattr(torch, given.dtype)
    build.load("cuda")
    torch.set_default_device("cuda")
    rates = copy_rate(), product_rate(dtype)
    print(f"{torch.cuda.get_device_name()}, {given.dtype}: copy {rates[0] / 1e12:.2f} TB/s, "
          f"product {rates[1] / 1e12:.0f} TFLOP/s")  # fmt: skip
    record = {}
    for case in CASES:
        sides = sides_of(case, dtype)
        times = microseconds(sides, given.repeats) | {"floor": floor(case, dtype, *rates)}
        record[f"{case.name}, rank {case.rank}"] = times
        per_layer = {name: value / len(case.shapes) for name, value in times.items()}
        print(f"{case.name}, rank {case.rank}: whole step / a matrix, us")
        for name, value in times.items():
            print(f"  {name:14} {value:10.1f} {per_layer[name]:10.2f}   {times['kernel'] / value:6.3f} of it is ours")
    if given.json:
        given.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def sides_of(case: Case, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """The steps to time, on the same gradients and bases."""
    torch.manual_seed(0)
    grads = [torch.randn(shape, dtype=dtype) * 1e-3 for shape in case.shapes]
    bases = [random_basis(min(shape), case.rank).to(dtype) for shape in case.shapes]
    return {
        "kernel": by_op(grads, bases, case, whole=False),
        "library": by_op(grads, bases, case, whole=True),
        "galore-torch": peer_step(grads, bases, case),
        "plain path": our_step(grads, bases, case),
        "compiled": torch.compile(by_op(grads, bases, case, whole=False, op=fused_step.galore_step_), dynamic=False),
    }


def by_op(
    grads: list[Tensor], bases: list[Tensor], case: Case, *, whole: bool, op: Callable = torch.ops.lowrank.galore_step_
) -> Callable[[], object]:
    """The step of all layers by an op, or by the reference for `torch.compile`."""
    sides: dict[bool, list[tuple[Tensor, ...]]] = {}
    for grad, basis in zip(grads, bases, strict=True):
        m, n = grad.shape
        low = (m, case.rank) if m >= n else (case.rank, n)
        moments = torch.zeros(low), torch.zeros(low)
        sides.setdefault(m < n, []).append((torch.randn_like(grad), grad, basis.contiguous(), *moments))

    def step() -> None:
        for left, layers in sides.items():
            op(
                *map(list, zip(*layers, strict=True)),
                [],
                [],
                [],
                left,
                False,
                whole,
                0.9,
                0.999,
                1e-6,
                LR * SCALE,
                1.0,
            )

    return step


def microseconds(sides: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The median of each side's device time."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for step in sides.values():
        for _ in range(3):
            step()
    for _ in range(repeats):
        for name, step in sides.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            end.record()
            end.synchronize()
            times[name].append(1000 * start.elapsed_time(end))
    return {name: statistics.median(values) for name, values in times.items()}


def copy_rate() -> float:
    """Bytes a second of a large copy, read and written."""
    source = torch.empty(2**30, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * 2**30 / (microseconds({"copy": lambda: target.copy_(source)}, 20)["copy"] * 1e-6)


def product_rate(dtype: torch.dtype) -> float:
    """Operations a second of a large square product."""
    a, b = torch.randn(8192, 8192, dtype=dtype), torch.randn(8192, 8192, dtype=dtype)
    return 2 * 8192**3 / (microseconds({"product": lambda: a @ b}, 20)["product"] * 1e-6)


def floor(case: Case, dtype: torch.dtype, bytes_a_second: float, operations_a_second: float) -> float:
    """Microseconds that the step cannot go below: gradient read, weight read and written, moments likewise."""
    total = 0.0
    for m, n in case.shapes:
        moved = 3 * m * n * dtype.itemsize + 2 * 2 * 4 * max(m, n) * case.rank
        total += max(moved / bytes_a_second, 4 * m * n * case.rank / operations_a_second)
    return total * 1e6


if __name__ == "__main__":
    main()
