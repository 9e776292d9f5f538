"""One process against several: the same weights, whatever the method, with no more sent than has to be."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

STEPS = 20
# Adam normalises entries that hold nothing but rounding; an eps over those keeps the comparison about the sums
EPS = ["--eps", 1e-3]
GALORE = ["--method", "galore", "--galore-rank", 8, "--galore-update-proj-gap", 7, *EPS]
PLAIN = [*GALORE, "--no-galore-in-backward"]
NORMED = ["--method", "gradnormlorp", "--gradnormlorp-rank", 8, "--gradnormlorp-update-proj-gap", 7, *EPS]
METHODS = {
    "full": ["--method", "full", *EPS],
    "full-per-layer": ["--method", "full", *EPS, "--per-layer"],
    "galore": PLAIN,
    "galore-per-layer": [*PLAIN, "--per-layer"],
    "galore-in-backward": [*GALORE, "--galore-in-backward"],
    "galore-per-layer-in-backward": [*GALORE, "--per-layer", "--galore-in-backward"],
    "galore-8bit": [*PLAIN, "--optimizer", "adamw8bit"],
    "galore-adafactor": [*PLAIN, "--optimizer", "adafactor"],
    "galore-clipped": [*PLAIN, "--grad-clipping", 0.5],
    "galore-per-layer-clipped": [*GALORE, "--per-layer", "--galore-in-backward", "--grad-clipping", 0.5],
    "galore-staggered": [*PLAIN, "--galore-stagger", "--galore-lazy-refresh", "--galore-refresh", "subspace"],
    "galore-rotated": [*PLAIN, "--galore-moments", "rotate", "--galore-proj-type", "full"],
    "velora": ["--method", "velora", *EPS],
    "velora-svd": ["--method", "velora", "--velora-init", "svd", *EPS],
    "velora-moving": ["--method", "velora", "--velora-init", "ema_0.9", *EPS],
    "velora-per-layer": ["--method", "velora", "--per-layer", *EPS],
    "galore+velora": ["--method", "galore+velora", *GALORE[2:]],
    "gradnormlorp": NORMED,
    "gradnormlorp-per-layer": [*NORMED, "--per-layer"],
    "gradnormlorp-in-backward": [*NORMED, "--gradnormlorp-in-backward"],
}
# each rank writes what it holds after 50 updates: moments and bases too
SPY = """
from lowrank_cli.train import loop
from lowrank_cli.train.checkpoint import optimizer_state
from safetensors.torch import save_file
original = loop.Session.mark
def mark(self):
    original(self)
    if self.progress.step == 50:
        held, _ = optimizer_state(self.optimizer)
        held |= {name: p.detach().clone() for name, p in self.model.named_parameters()}
        save_file(held, f"rank{rank}.safetensors")
loop.Session.mark = mark
undo.callback(setattr, loop.Session, "mark", original)
"""
# 4-byte numbers of the tiny model: 512 x 32 twice, five norms, 2 layers of 4 x (32 x 32), 2 x (88 x 32), (32 x 88)
TABLES, NORMS = 2 * 512 * 32, 5 * 32
MATRICES = 2 * (4 * 32 * 32 + 3 * 88 * 32)
PROJECTED = 2 * (4 * 32 * 8 + 3 * 88 * 8)
BASES = 2 * (4 * 32 * 8 + 3 * 32 * 8)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def largest_difference(a: dict, b: dict) -> float:
    return max(float((a[k].double() - b[k].double()).norm() / b[k].double().norm()) for k in b)


def metrics(folder: Path, key: str) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line[key] for line in lines if key in line]


@pytest.fixture
def train(ranks, tiny_flags, tmp_path):
    """Pretrain on n processes; returns the run folder and what each rank has sent."""

    def call(n: int, flags: list, *, out: str = "", batch: int = 8, total: int = 8, steps: int = STEPS, **more):
        out = tmp_path / (out or f"on{n}")
        sizes = ["--batch-size", batch // n, "--total-batch-size", total, "--max-steps", steps]
        results = ranks(n, "pretrain", *tiny_flags, *sizes, *flags, "--out", out, **more)
        return out, [[(op, size) for op, size, is_number in r.sent if not is_number] for r in results]

    return call


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_train_what_one_does(name, train):
    one, _ = train(1, METHODS[name])
    two, _ = train(2, METHODS[name])
    assert largest_difference(weights(two), weights(one)) < 1e-5
    assert metrics(two, "loss") == pytest.approx(metrics(one, "loss"), rel=1e-5)
    assert metrics(two, "tokens") == metrics(one, "tokens")
    assert metrics(two, "eval_perplexity") == pytest.approx(metrics(one, "eval_perplexity"), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_four_processes_train_what_one_does(name, train):
    one, _ = train(1, METHODS[name])
    four, _ = train(4, METHODS[name])
    assert largest_difference(weights(four), weights(one)) < 1e-5


@pytest.mark.parametrize(
    "name", ["galore", "galore-per-layer", "galore-per-layer-in-backward", "gradnormlorp-per-layer"]
)
def test_accumulation_on_two_processes(name, train):
    one, _ = train(1, METHODS[name], total=32, steps=8)
    two, sent = train(2, METHODS[name], total=32, steps=8)
    assert largest_difference(weights(two), weights(one)) < 1e-5
    # four micro-batches cost no more than one
    _, once = train(2, METHODS[name], out="other", steps=8)
    assert sum(size for _, size in sent[0]) == sum(size for _, size in once[0])


def test_padding_counts_targets_over_all_processes(train):
    # documents of other lengths on every rank: a mean of the ranks' means would be another loss
    flags = [*PLAIN, "--packing", "padded"]
    one, _ = train(1, flags)
    two, _ = train(2, flags)
    assert largest_difference(weights(two), weights(one)) < 1e-5


@pytest.mark.parametrize(
    ("name", "each", "first"),
    [
        ("full", TABLES + NORMS + MATRICES, 0),
        ("galore", TABLES + NORMS + PROJECTED, MATRICES + BASES),
        ("galore-per-layer", TABLES + NORMS + PROJECTED, MATRICES + BASES),
        ("galore-in-backward", TABLES + NORMS + PROJECTED, MATRICES + BASES),
        ("gradnormlorp", TABLES + NORMS + PROJECTED + 2 * (4 * 32 + 2 * 88 + 32), MATRICES + BASES),
        # v_proj 32 x 32 and down_proj 32 x 88 keep a number for each group of 16 or 11 features
        ("velora", TABLES + NORMS + MATRICES - 2 * (32 * 32 + 32 * 88) + 2 * (32 * 2 + 32 * 8), 2 * (16 + 1 + 11 + 1)),
    ],
)
def test_bytes_sent_are_those_of_the_projected_gradients(name, each, first, train):
    """Per update `each` numbers, and `first` more where bases or vectors are found: there the full gradient travels
    once, to one rank, and the basis to all."""
    steps, start = 5, 4 * TABLES + 4 * NORMS + 4 * MATRICES  # the weights, once, at the beginning
    out, sent = train(2, METHODS[name], steps=steps)
    assert [sum(size for _, size in rank) - start for rank in sent] == [4 * (steps * each + first)] * 2
    assert metrics(out, "sent_bytes") == [4 * (each + first)] + [4 * each] * (steps - 1)


@pytest.mark.parametrize("name", ["galore", "galore-per-layer", "gradnormlorp", "velora"])
def test_replicas_stay_the_same_bit_for_bit(name, train, tmp_path):
    flags = [17 if flag == 7 else flag for flag in METHODS[name]]
    train(2, flags, steps=50, before=SPY)
    first, second = (load_file(tmp_path / f"rank{rank}.safetensors") for rank in range(2))
    assert first.keys() == second.keys()
    assert all(first[key].equal(second[key]) for key in first)
    assert name == "velora" or any("basis" in key for key in first)


def test_stochastic_rounding_draws_the_same_everywhere(train, tmp_path):
    flags = [*METHODS["galore-per-layer"], "--dtype", "bfloat16", "--stochastic-rounding"]
    train(2, flags, steps=50, before=SPY)
    first, second = (load_file(tmp_path / f"rank{rank}.safetensors") for rank in range(2))
    assert all(first[key].equal(second[key]) for key in first)


def test_a_tensor_without_a_gradient_on_one_rank(ranks, tmp_path):
    """An expert that got no token there: its gradient is the other rank's, in every mode the same."""
    script = """
import torch
import torch.distributed as dist
from lowrank_cli import main
def run(argv):
    from lowrank_cli import GaLoreAdamW
    from lowrank_cli.ops.replicas import Replicas
    from lowrank_cli.optim.replicated_gradients import ReplicatedGradients
    dist.init_process_group("gloo")
    for per_layer in (False, True):
        torch.manual_seed(0)
        model = torch.nn.ModuleList(torch.nn.Linear(6, 10) for _ in range(3))
        groups = [{"params": [m.weight for m in model], "rank": 2, "update_proj_gap": 2},
                  {"params": [m.bias for m in model]}]
        optimizer = GaLoreAdamW(groups, lr=0.1)
        gradients = ReplicatedGradients(model, optimizer, per_layer=per_layer, clipping=0.0, replicas=Replicas())
        for step in range(5):
            gradients.begin(measuring=False)
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
            used = [m for i, m in enumerate(model) if i != 1 or rank == 0]
            sum(m(x).square().sum() for m in used).backward()
            gradients.reduce()
            gradients.step()
        torch.save([p.detach() for p in model.parameters()], f"{rank}-{per_layer}.pt")
    dist.destroy_process_group()
    return 0
original, main.main = main.main, run
undo.callback(setattr, main, "main", original)
"""
    ranks(2, before=script)
    kept = [torch.load(tmp_path / f"{rank}-{mode}.pt") for rank in range(2) for mode in (False, True)]
    for other in kept[1:]:
        assert all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(kept[0], other, strict=True))
    assert all(a.equal(b) for a, b in zip(kept[0], kept[2], strict=True))
    assert all(a.equal(b) for a, b in zip(kept[1], kept[3], strict=True))
