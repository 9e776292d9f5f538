"""Weights cut over processes with FSDP2: the same weights as one process, checkpoints for any number of processes."""

import json
import signal
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from lowrank_cli.errors import UsageError
from lowrank_cli.models.source import place
from lowrank_cli.ops.replicas import rows_of

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
    "galore-clipped": [*PLAIN, "--grad-clipping", 0.5],
    "galore-per-layer-clipped": [*GALORE, "--per-layer", "--galore-in-backward", "--grad-clipping", 0.5],
    # all on the right, all on the left, on both sides
    "galore-right": [*PLAIN, "--galore-proj-type", "right", "--galore-stagger"],
    "galore-left": [*PLAIN, "--galore-proj-type", "left", "--galore-refresh", "subspace", "--galore-lazy-refresh"],
    "galore-two-sided": [*PLAIN, "--galore-proj-type", "full", "--galore-moments", "reset"],
    # from the sum of the ranks' Gram matrices; an eigenvector's sign is any
    "galore-gram": [*PLAIN, "--galore-refresh", "gram", "--galore-moments", "align"],
    "galore-recomputed": [*GALORE, "--galore-in-backward", "--activation-checkpointing"],
    "velora": ["--method", "velora", *EPS],
    "velora-moving": ["--method", "velora", "--velora-init", "ema_0.9", *EPS],
    "galore+velora": ["--method", "galore+velora", *GALORE[2:]],
    "gradnormlorp": NORMED,
    "gradnormlorp-per-layer": [*NORMED, "--per-layer"],
    "gradnormlorp-in-backward": [*NORMED, "--gradnormlorp-in-backward"],
    "gradnormlorp-left": [*NORMED, "--gradnormlorp-in-backward", "--gradnormlorp-proj-type", "left"],
}
FSDP = ["--parallel", "fsdp"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next((folder / "model").glob("*.safetensors")))


def largest_difference(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max(float((a[k].double() - b[k].double()).norm() / b[k].double().norm().clamp(min=1e-9)) for k in b)


def lines(folder: Path, key: str) -> list[float]:
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line[key] for line in found if key in line]


@pytest.fixture
def train(ranks, tiny_flags, tmp_path):
    """Pretrain on n processes, which cut the weights if they are several: the run folder, and what was sent."""

    def call(n: int, flags: list, *, out: str = "", total: int = 8, steps: int = 20, **more):
        out = tmp_path / (out or f"on{n}")
        sizes = ["--batch-size", 8 // n, "--total-batch-size", total, "--max-steps", steps]
        results = ranks(n, "pretrain", *tiny_flags, *sizes, *(FSDP if n > 1 else []), *flags, "--out", out, **more)
        return out, [r.sent for r in results]

    return call


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_train_what_one_does(name, train):
    one, _ = train(1, METHODS[name])
    two, _ = train(2, METHODS[name])
    assert largest_difference(weights(two), weights(one)) < 1e-5
    assert lines(two, "loss") == pytest.approx(lines(one, "loss"), rel=1e-5)
    assert lines(two, "eval_perplexity") == pytest.approx(lines(one, "eval_perplexity"), rel=1e-5)
    if name in ("full", "galore-clipped", "gradnormlorp"):
        # where one process has whole gradients, so have the processes together: the norm is the same
        assert lines(two, "grad_norm") == pytest.approx(lines(one, "grad_norm"), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_four_processes_train_what_one_does(name, train):
    one, _ = train(1, METHODS[name])
    four, _ = train(4, METHODS[name])
    if name == "galore-8bit":
        # a sum in another order rounds a moment to the neighbouring code now and then: the rest is the same
        one, four = weights(one), weights(four)
        other = sum(int(((four[key] - one[key]).abs() > 1e-5).sum()) for key in one)
        assert other < 0.005 * sum(t.numel() for t in one.values())
        assert largest_difference(four, one) < 1e-3
        return
    assert largest_difference(weights(four), weights(one)) < 1e-5


@pytest.mark.parametrize("name", ["galore", "galore-per-layer", "galore-in-backward", "gradnormlorp-left"])
def test_accumulation(name, train):
    one, _ = train(1, METHODS[name], total=32, steps=8)
    two, _ = train(2, METHODS[name], total=32, steps=8)
    assert largest_difference(weights(two), weights(one)) < 1e-5


def test_rows_that_do_not_divide(train, tmp_path):
    """Three heads of ten, 90 features, a vocabulary of 509: on four processes the last has fewer rows, or none."""
    config = tmp_path / "odd.json"
    shape = {"hidden_size": 30, "intermediate_size": 90, "num_hidden_layers": 2, "num_attention_heads": 3}
    config.write_text(json.dumps({"model_type": "llama", **shape, "max_position_embeddings": 64}))
    flags = ["--model-config", config, "--vocab-size", 509, "--galore-rank", 5]
    one, _ = train(1, [*PLAIN, *flags], steps=10)
    four, _ = train(4, [*PLAIN, *flags], steps=10)
    assert largest_difference(weights(four), weights(one)) < 1e-5
    one, _ = train(1, [*PLAIN, *flags, "--optimizer", "adamw8bit", "--save-every", 5], out="q1", steps=10)
    four, _ = train(4, [*PLAIN, *flags, "--optimizer", "adamw8bit", "--save-every", 5], out="q4", steps=10)
    # blocks of 8 bits begin elsewhere: the same up to their rounding
    assert largest_difference(weights(four), weights(one)) < 1e-2


@given(st.integers(0, 50), st.integers(1, 9))
def test_rows_are_those_of_torch_chunk(size, world_size):
    chunks = list(torch.arange(size).chunk(world_size)) if size else []
    for rank in range(world_size):
        start, stop = rows_of(size, rank, world_size)
        expected = chunks[rank].tolist() if rank < len(chunks) else []
        assert list(range(start, stop)) == expected


HELD = """
from lowrank_cli.train import loop
import json
original = loop.Session.mark
def mark(self):
    original(self)
    if self.progress.step == 10:
        kept = {}
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                tensors = {"weight": p.detach(), **self.optimizer.state[p]}
                for key, t in tensors.items():
                    if hasattr(t, "numel") and t.dim():
                        kind = "weights" if key == "weight" else "bases" if "basis" in key else "moments"
                        kept[kind] = kept.get(kind, 0) + t.numel()
        json.dump(kept, open(f"held{rank}.json", "w"))
loop.Session.mark = mark
undo.callback(setattr, loop.Session, "mark", original)
"""


@pytest.mark.parametrize("name", ["galore", "galore-left", "gradnormlorp", "full"])
def test_a_process_holds_its_share_of_weights_moments_and_bases(name, train, tmp_path):
    train(1, METHODS[name], steps=10, before=HELD)
    alone = json.loads((tmp_path / "held0.json").read_text())
    train(2, METHODS[name], steps=10, before=HELD)
    for rank in range(2):
        assert json.loads((tmp_path / f"held{rank}.json").read_text()) == {k: v // 2 for k, v in alone.items()}


# 4-byte numbers of the tiny model: 512 x 32 twice, five norms, 2 layers of 4 x (32 x 32), 2 x (88 x 32), (32 x 88)
OTHERS = 2 * 512 * 32 + 5 * 32
MATRICES = 2 * (4 * 32 * 32 + 3 * 88 * 32)
PROJECTED = 2 * (4 * 32 * 8 + 3 * 88 * 8)
LEFT = 2 * 88 * 8  # of down_proj, the only one that is wider than high


@pytest.mark.parametrize(
    ("name", "first", "each"),
    [
        ("full", OTHERS + MATRICES, OTHERS + MATRICES),
        ("galore", OTHERS + MATRICES + LEFT, OTHERS + MATRICES + LEFT),
        ("galore-in-backward", OTHERS + MATRICES + LEFT, OTHERS + PROJECTED),
    ],
)
def test_numbers_scattered_are_those_of_the_projected_gradients(name, first, each, train):
    """FSDP2's own and ours, seen from outside; the first update refreshes and has full gradients."""
    _, sent = train(2, METHODS[name], steps=6)
    for rank in sent:
        scattered = sum(size for op, size, _ in rank if op.startswith("reduce_scatter"))
        assert 2 * scattered == 4 * (first + 5 * each)


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_saved_on_some_processes_and_resumed_on_others(kind, ranks, train, tmp_path):
    flags = [*PLAIN, "--optimizer", kind, "--save-every", 9, "--keep", 3]
    whole, _ = train(1, flags)
    run, _ = train(2, flags)
    cut = weights(run)
    checkpoint = "on2/checkpoints/step-000009"
    resume = ["pretrain", "--resume", checkpoint]
    ranks(2, *resume, *FSDP)
    assert all(weights(run)[key].equal(cut[key]) for key in cut)
    with pytest.raises(UsageError, match="is a checkpoint of weights that were cut over processes"):
        place(str(tmp_path / checkpoint), offline=True)
    for n, how in ((1, []), (2, ["--parallel", "ddp"]), (4, FSDP)):
        results = ranks(n, *resume, "--nproc", 1, *how)
        assert "at step 9 of 20" in results[0].err
        assert largest_difference(weights(run), weights(whole)) < 1e-5
    ranks(2, "pretrain", "--resume", "on1/checkpoints/step-000009", *FSDP)
    assert largest_difference(weights(whole), cut) < 1e-5


def test_8_bit_blocks_that_lie_on_two_processes_stay_with_their_number(ranks, train, tmp_path):
    config = tmp_path / "odd.json"
    shape = {"hidden_size": 40, "intermediate_size": 88, "num_hidden_layers": 2, "num_attention_heads": 4}
    config.write_text(json.dumps({"model_type": "llama", **shape, "max_position_embeddings": 64}))
    # 250 x 40 numbers on a process are no whole number of blocks
    flags = [*PLAIN, "--model-config", config, "--vocab-size", 500, "--optimizer", "adamw8bit", "--save-every", 5]
    run, _ = train(2, flags, steps=10)
    cut = weights(run)
    ranks(2, "pretrain", "--resume", "on2/checkpoints/step-000005")
    assert all(weights(run)[key].equal(cut[key]) for key in cut)
    results = ranks(1, "pretrain", "--resume", "on2/checkpoints/step-000005", "--nproc", 1, code=2)
    assert "were saved by 2 processes, and their blocks cannot be divided otherwise" in results[0].err
    assert "go on with 2 processes" in results[0].err


def test_a_killed_rank_takes_the_run_down_and_it_goes_on(process, ranks, tiny_flags, tmp_path, wait_for_step):
    flags = ["pretrain", *tiny_flags, *PLAIN, *FSDP, "--batch-size", 4, "--max-steps", 60, "--save-every", 5]
    ranks(2, *flags, "--nproc", 2, "--out", "whole")
    child = process(*flags, "--nproc", 2, "--out", "killed")
    wait_for_step(tmp_path / "killed", 12, child)
    members = psutil.Process(child.pid).children(recursive=True)
    next(p for p in members if p.environ().get("RANK") == "1").send_signal(signal.SIGKILL)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 1, err
    assert err.count("error:") == 1, err
    assert "rank 1 does not answer at step" in err
    assert "rank 1 does not answer" in json.loads((tmp_path / "killed" / "run.json").read_text())["error"]
    ranks(2, "pretrain", "--resume", "auto", "--out", "killed")
    assert all(weights(tmp_path / "killed")[key].equal(t) for key, t in weights(tmp_path / "whole").items())


@pytest.mark.parametrize(
    "method",
    [
        ["vblora", "--vblora-lr-vector-bank", 0.05],
        ["lora", "--lora-dropout", 0, "--merge"],
        ["dora", "--dora-dropout", 0],
        ["lora+velora", "--lora-dropout", 0],
        ["gradnormlorp", "--gradnormlorp-adapter-dropout", 0, "--gradnormlorp-update-proj-gap", 7],
    ],
)
def test_adapters_stay_whole_on_a_base_that_is_cut(method, ranks, base, records, tmp_path):
    flags = ["finetune", "--method", *method, "--model", base, "--dataset", records, "--max-length", 96, *EPS,
             "--template", "plain", "--no-plots", "--eval-tokens", 200, "--max-steps", 12, "--lr", 0.01,
             "--total-batch-size", 8, "--save-every", 5, "--keep", 3]  # fmt: skip
    ranks(1, *flags, "--batch-size", 8, "--out", "one")
    ranks(2, *flags, "--batch-size", 4, "--out", "two", *FSDP)
    two = weights(tmp_path / "two")
    floats = {k: t for k, t in weights(tmp_path / "one").items() if t.is_floating_point()}
    assert largest_difference({k: two[k] for k in floats}, floats) < 1e-5
    ranks(2, "finetune", "--resume", "two/checkpoints/step-000005")
    assert all(weights(tmp_path / "two")[key].equal(t) for key, t in two.items())


@pytest.mark.slow
@pytest.mark.parametrize("how", [[], FSDP], ids=["ddp", "fsdp"])
def test_vblora_on_four_processes(how, ranks, base, records, tmp_path):
    flags = ["finetune", "--method", "vblora", "--vblora-lr-vector-bank", 0.05, "--model", base, "--dataset", records,
             "--max-length", 96, *EPS, "--template", "plain", "--no-plots", "--eval-tokens", 200, "--max-steps", 20,
             "--lr", 0.01, "--total-batch-size", 8]  # fmt: skip
    ranks(1, *flags, "--batch-size", 8, "--out", "one")
    ranks(4, *flags, "--batch-size", 2, "--out", "four", *how)
    four = weights(tmp_path / "four")
    floats = {k: t for k, t in weights(tmp_path / "one").items() if t.is_floating_point()}
    assert largest_difference({k: four[k] for k in floats}, floats) < 1e-5


def test_a_task_is_judged_and_its_best_weights_are_kept(ranks, base, test_data, tmp_path):
    flags = ["finetune", "--task", "mrpc", "--method", "full", "--model", base, "--data-dir", test_data / "glue", *EPS,
             "--max-length", 32, "--no-plots", "--max-steps", 6, "--eval-every", 2, "--total-batch-size", 8,
             "--lr", 0.001]  # fmt: skip
    ranks(1, *flags, "--batch-size", 8, "--out", "one")
    ranks(2, *flags, "--batch-size", 4, "--out", "two", *FSDP)
    one, two = (json.loads((tmp_path / out / "run.json").read_text())["result"] for out in ("one", "two"))
    assert two["validation_accuracy"] == one["validation_accuracy"]
    assert largest_difference(weights(tmp_path / "two"), weights(tmp_path / "one")) < 1e-5


def test_16_bits(train):
    one, _ = train(1, [*METHODS["galore"], "--dtype", "bfloat16"], steps=8)
    two, _ = train(2, [*METHODS["galore"], "--dtype", "bfloat16"], steps=8)
    assert {t.dtype for t in weights(two).values()} == {torch.bfloat16}
    assert lines(two, "loss") == pytest.approx(lines(one, "loss"), rel=1e-2)


def test_a_broken_row_is_named_wherever_it_is(ranks, tiny_flags, tmp_path):
    breaks = """
from lowrank_cli.train import loop
original = loop.Session.mark
def mark(self):
    original(self)
    if rank == 1 and self.progress.step == 3:
        names = {n: p for g in self.optimizer.param_groups for n, p in zip(g["param_names"], g["params"])}
        names["model.layers.1.mlp.up_proj.weight"].data[2] = float("nan")
loop.Session.mark = mark
undo.callback(setattr, loop.Session, "mark", original)
"""
    flags = ["pretrain", *tiny_flags, *PLAIN, *FSDP, "--max-steps", 6, "--out", "run"]
    results = ranks(2, *flags, code=1, before=breaks)
    said = "".join(r.err for r in results)
    assert said.count("error:") == 1
    assert (
        "at step 4; the first tensor with a non-finite value is the weight model.layers.1.mlp.up_proj.weight" in said
    )
    # a checkpoint that is cut is no model to continue from
    assert "start again; a lower --lr" in said
    assert "--continue-from" not in said


def test_one_process_is_told_that_it_shares_nothing(lowrank, tiny_flags):
    code, _, err = lowrank("pretrain", *tiny_flags, *FSDP, "--max-steps", 2, "--out", "run")
    assert code == 0, err
    assert "--parallel fsdp: one process holds the whole model" in err


class TestBadInput:
    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            ([*PLAIN, "--optimizer", "adafactor"], "Adafactor's moments are means over rows and columns"),
            ([*PLAIN, "--galore-moments", "rotate"], "--parallel fsdp does not rotate moments"),
            ([*PLAIN, "--parallel", "zero"], "--parallel takes one of: ddp, fsdp"),
        ],
    )
    def test_what_cannot_be_cut(self, flags, message, ranks, tiny_flags):
        results = ranks(2, "pretrain", *tiny_flags, *FSDP, *flags, code=2)
        assert message in "".join(r.err for r in results)

    def test_a_base_of_4_bits(self, ranks, base, records):
        flags = ["--method", "lora", "--model", base, "--dataset", records, "--quantize", "nf4", "--max-steps", 2]
        results = ranks(2, "finetune", *flags, *FSDP, "--no-plots", code=2)
        assert "does not cut a base of 4 bits" in "".join(r.err for r in results)
