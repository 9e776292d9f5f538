"""The optimizers on the compiled CPU kernel: the numbers of plain PyTorch, and checkpoints that go on bit for bit."""

import copy
import io
import os
import shutil

import pytest
import torch

from lowrank_cli.methods.velora.space import Factored
from lowrank_cli.ops import build
from lowrank_cli.optim import kernels
from lowrank_cli.optim.adamw import GaLoreAdamW
from lowrank_cli.optim.adamw8bit import GaLoreAdamW8bit

pytestmark = pytest.mark.numerical

# float32 sums of up to a hundred products, 2^-24 each, over an eps of a hundredth of a gradient
SINGLE = 1e-5
SHAPES = [(64, 64), (100, 63), (63, 100), (33, 77), (64, 64)]


@pytest.fixture(scope="module")
def kernel(request, shared_folder):
    """Return the name "cpu", with the kernel loaded; built in the folder that the kernels' own tests use."""
    cache = getattr(request.config, "cache", None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(cache.mkdir("kernels") if cache else shared_folder / "kernels"))
        try:
            build.load("cpu")
        except build.BuildError as error:
            if shutil.which(os.environ.get("CXX", "c++")) and "inja" not in str(error):
                raise
            pytest.skip(f"the kernel does not build here: {error}")
    return "cpu"


class Run:
    """An optimizer over a few matrices, stepped with gradients that depend on the step alone."""

    def __init__(self, kernel, cls=GaLoreAdamW, dtype=torch.float32, **group):
        torch.manual_seed(0)
        self.weights = [torch.nn.Parameter((torch.randn(shape) * 0.02).to(dtype)) for shape in SHAPES]
        self.start = [p.detach().clone() for p in self.weights]
        tags = {"rank": 16, "update_proj_gap": 5, "weight_decay": 0.1, "eps": 1e-2, **group}
        self.optimizer = cls([{"params": self.weights, **tags}], lr=1e-2, kernel=kernel)
        self.calls = 0

    def run(self, first, last, in_backward=False):
        for step in range(first, last):
            torch.manual_seed(step + 1)
            for p in self.weights:
                p.grad = torch.randn(p.shape).to(p.dtype)
                space = self.optimizer.spaces[p]
                if in_backward and not space.is_due:
                    space.collect(p.grad)
                    p.grad = None
            self.optimizer.step()
        return self


def difference(one, other):
    """Return the largest distance of two weights, over how far training took the second."""
    triples = zip(one.weights, other.weights, other.start, strict=True)
    return max(float((p - q).detach().norm() / (q - start).detach().norm()) for p, q, start in triples)


@pytest.fixture
def counted(monkeypatch):
    """How many layers went through the op."""
    layers = []
    plain = kernels.galore_
    monkeypatch.setattr(kernels, "galore_", lambda spaces, *rest: (layers.extend(spaces), plain(spaces, *rest)))
    return layers


@pytest.mark.parametrize("more", [
    {}, {"proj_type": "left"}, {"proj_type": "reverse_std", "moments": "rotate"},
    {"moments": "reset", "stagger": True},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("in_backward", [False, True])
def test_the_kernel_gives_the_numbers_of_plain_pytorch(kernel, counted, more, in_backward):
    with torch.no_grad():
        ours, plain = (Run(k, **more).run(0, 20, in_backward) for k in (kernel, "torch"))
        assert difference(ours, plain) < SINGLE
    assert len(counted) == 20 * len(SHAPES)


@pytest.mark.parametrize("more", [{"proj_type": "full"}, {"stochastic_rounding": True}], ids=str)
def test_what_the_kernel_does_not_take_goes_the_plain_way(kernel, counted, more):
    dtype = torch.bfloat16 if "stochastic_rounding" in more else torch.float32
    with torch.no_grad():
        ours, plain = (Run(k, dtype=dtype, **more).run(0, 6) for k in (kernel, "torch"))
        assert difference(ours, plain) == 0
    assert not counted


def test_a_gradient_that_came_both_ways_is_added_up(kernel):
    runs = [Run(k).run(0, 2) for k in (kernel, "torch")]
    with torch.no_grad():
        for run in runs:
            for p in run.weights:
                p.grad = torch.ones_like(p)
                run.optimizer.spaces[p].collect(p.grad)
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(5))
            run.optimizer.step()
        assert difference(*runs) < SINGLE


def test_eight_bit_moments_take_the_kernel(kernel, counted):
    with torch.no_grad():
        ours, plain = (Run(k, GaLoreAdamW8bit, min_8bit_size=256).run(0, 10) for k in (kernel, "torch"))
        # moments half way between two codes go either way; one in ten of them, each 2^-5 apart
        assert difference(ours, plain) < 0.1**0.5 * 2**-5
    assert len(counted) == 10 * len(SHAPES)
    assert ours.optimizer.state[ours.weights[0]]["exp_avg"].dtype == torch.uint8


def test_velora_weights_take_the_kernel(kernel):
    results = []
    for name in (kernel, "torch"):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(30, 40) * 0.02)
        start = p.detach().clone()
        vector = torch.nn.functional.normalize(torch.randn(8), dim=0)
        optimizer = GaLoreAdamW(
            [{"params": [p], "space": Factored, "num_groups": 5, "weight_decay": 0.1}], lr=1e-2, eps=1e-2, kernel=name
        )
        optimizer.spaces[p].vector = lambda v=vector: v
        for _ in range(5):
            optimizer.spaces[p].accumulate([torch.randn(30, 5)])
            optimizer.step()
        results.append(p.detach())
    ours, plain = results
    assert float((ours - plain).norm()) < SINGLE * float((plain - start).norm())


def saved(optimizer):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def resumed(run, kernel, is_auto):
    other = Run(kernel)
    with torch.no_grad():
        for p, q in zip(other.weights, run.weights, strict=True):
            p.copy_(q)
    other.optimizer.kernel_is_auto = is_auto
    other.optimizer.load_state_dict(saved(run.optimizer))
    return other


@pytest.mark.parametrize("before", ["cpu", "torch"])
def test_a_resumed_run_goes_on_with_the_kernel_of_its_checkpoint(kernel, capsys, before):
    now = "torch" if before == "cpu" else "cpu"
    whole = Run(before).run(0, 12)
    parts = resumed(Run(before).run(0, 7), now, is_auto=True).run(7, 12)
    assert difference(parts, whole) == 0
    assert "warning" not in capsys.readouterr().err


def test_a_resumed_run_with_another_kernel_says_so(kernel, capsys):
    whole = Run("cpu").run(0, 12)
    parts = resumed(Run("cpu").run(0, 7), "torch", is_auto=False).run(7, 12)
    assert parts.optimizer.param_groups[0]["kernel"] == "torch"
    assert "not bit for bit" in capsys.readouterr().err
    assert 0 < difference(parts, whole) < SINGLE


def test_a_copy_goes_on(kernel):
    run = Run("cpu").run(0, 3)
    other = copy.deepcopy(run)
    assert difference(other.run(3, 6), run.run(3, 6)) == 0
