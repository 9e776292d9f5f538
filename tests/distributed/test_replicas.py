"""Replicas of a model: no more sent than has to be, and the same bits on each."""

import json

import pytest
import torch
from safetensors.torch import load_file

GALORE = "--method galore --galore-rank 8 --galore-update-proj-gap 7"
PLAIN = f"{GALORE} --no-galore-in-backward"
METHODS = {
    "full": "--method full --eps 1e-3",
    "galore": PLAIN,
    "galore-per-layer": f"{PLAIN} --per-layer",
    "galore-in-backward": f"{GALORE} --galore-in-backward",
    "gradnormlorp": "--method gradnormlorp --gradnormlorp-rank 8 --gradnormlorp-update-proj-gap 7",
    "velora": "--method velora",
}
# each rank writes what it holds after 20 updates: moments and bases too
SPY = """
from lowrank_cli.train import loop
from lowrank_cli.train.checkpoint import optimizer_state
from safetensors.torch import save_file
original = loop.Session.mark
def mark(self):
    original(self)
    if self.progress.step == 20:
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


@pytest.fixture
def train(ranks, tiny_flags, tmp_path):
    """Pretrain on two processes; returns the run folder and what each rank has sent."""

    def call(line: str, steps: int, **more):
        sizes = f"--batch-size 4 --total-batch-size 8 --max-steps {steps} --out run"
        results = ranks(2, f"pretrain {line}", *tiny_flags, *sizes.split(), **more)
        return tmp_path / "run", [[(op, size) for op, size, is_number in r.sent if not is_number] for r in results]

    return call


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
    out, sent = train(METHODS[name], steps)
    assert [sum(size for _, size in rank) - start for rank in sent] == [4 * (steps * each + first)] * 2
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    said = [line["sent_bytes"] for line in lines if "sent_bytes" in line]
    assert said == [4 * (each + first)] + [4 * each] * (steps - 1)


@pytest.mark.parametrize("name", ["galore", "galore-per-layer", "gradnormlorp", "velora"])
def test_replicas_stay_the_same_bit_for_bit(name, train, tmp_path):
    train(METHODS[name].replace("gap 7", "gap 17"), 20, before=SPY)
    first, second = (load_file(tmp_path / f"rank{rank}.safetensors") for rank in range(2))
    assert first.keys() == second.keys()
    assert all(first[key].equal(second[key]) for key in first)
    assert name == "velora" or any("basis" in key for key in first)


def test_stochastic_rounding_draws_the_same_everywhere(train, tmp_path):
    train(f"{METHODS['galore-per-layer']} --dtype bfloat16 --stochastic-rounding", 20, before=SPY)
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
    from lowrank_cli.parallel.replicas import Replicas
    from lowrank_cli.optim.exchange import Replicated
    from lowrank_cli.optim.gradients import Gradients
    dist.init_process_group("gloo")
    for per_layer in (False, True):
        torch.manual_seed(0)
        model = torch.nn.ModuleList(torch.nn.Linear(6, 10) for _ in range(3)).double()
        groups = [{"params": [m.weight for m in model], "rank": 2, "update_proj_gap": 2},
                  {"params": [m.bias for m in model]}]
        optimizer = GaLoreAdamW(groups, lr=0.1)
        gradients = Gradients(model, optimizer, per_layer=per_layer, clipping=0.0, exchange=Replicated(Replicas()))
        for step in range(5):
            gradients.begin(measuring=False)
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step)).double()
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
        assert all(torch.allclose(a, b, rtol=1e-9) for a, b in zip(kept[0], other, strict=True))
    assert all(a.equal(b) for a, b in zip(kept[0], kept[2], strict=True))
    assert all(a.equal(b) for a, b in zip(kept[1], kept[3], strict=True))
