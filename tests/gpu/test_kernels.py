"""The CUDA kernel on a CUDA device: the op's own tests, CUDA graphs, no waiting, the optimizer's numbers."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lowrank_cli.ops import build, fused_step
from lowrank_cli.optim.adamw import GaLoreAdamW

pytestmark = pytest.mark.gpu
OPS = torch.ops.lowrank
TESTS = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module", autouse=True)
def kernel():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    build.load("cuda")


def test_every_test_of_the_op_passes():
    command = [sys.executable, "-m", "pytest", "-q", str(TESTS / "ops" / "test_fused_step.py")]
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    done = subprocess.run(
        command, env={**env, "LOWRANK_TEST_KERNEL": "cuda"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 25


def layer(m, n, rank, dtype=torch.bfloat16):
    torch.manual_seed(0)
    weight, grad = torch.randn(m, n), torch.randn(m, n)
    basis = torch.linalg.qr(torch.randn(n, rank)).Q
    return [t.to(dtype).cuda() for t in (weight, grad, basis)] + [torch.zeros(m, rank, device="cuda") for _ in "MV"]


def step(weight, grad, basis, mean, square, scalars=None, whole=False, step_size=1e-3):
    OPS.galore_step_([weight], [grad], [basis], [mean], [square], [], [], [], False, False, whole, 0.9, 0.999, 1e-8,
                     step_size, 1.0, scalars)  # fmt: skip


def test_a_captured_step_replays_with_other_numbers():
    captured, eager = layer(256, 192, 32), layer(256, 192, 32)
    scalars = torch.tensor([1e-8, 1e-3, 1.0], device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(*layer(256, 192, 32), scalars)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(*captured, scalars)
    for size in (1e-3, 5e-4, 2e-3):
        scalars[1] = size
        graph.replay()
        step(*eager, step_size=size)
    assert torch.equal(captured[0], eager[0])


@pytest.mark.parametrize("whole", [False, True])
def test_a_step_never_waits_for_the_device(whole):
    parts = layer(256, 192, 32)
    step(*parts, whole=whole)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*parts, whole=whole)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_librarys_products_and_our_own_agree(dtype):
    ours, library = layer(512, 384, 64, dtype), layer(512, 384, 64, dtype)
    start = ours[0].clone()
    step(*ours)
    step(*library, whole=True)
    moved = (library[0] - start).float().norm()
    assert float((ours[0] - library[0]).float().norm() / moved) < (1e-3 if dtype == torch.float32 else 2e-2)


def test_the_optimizer_gives_the_numbers_of_plain_pytorch():
    weights = {}
    for kernel in ("cuda", "torch"):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape, device="cuda") * 0.02) for shape in [(64, 64), (63, 100)] * 20]
        tags = {"rank": 16, "update_proj_gap": 5, "weight_decay": 0.1, "moments": "align"}
        optimizer = GaLoreAdamW([{"params": params, **tags}], lr=1e-2, kernel=kernel)
        for _ in range(12):
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
        weights[kernel] = params
    for p, q in zip(weights["cuda"], weights["torch"], strict=True):
        assert float((p - q).detach().norm() / q.detach().norm()) < 1e-4


def test_auto_takes_the_kernel():
    assert fused_step.choose("auto", "cuda").name == "cuda"
