"""Weights cut over processes with FSDP2: the same weights as one process, checkpoints for any number of processes."""

import json
import re
import signal
from pathlib import Path

import psutil
import pytest
import torch
from double import BOUND, distance
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from watched import written

from lowrank_cli.errors import UsageError
from lowrank_cli.models.source import place
from lowrank_cli.parallel.replicas import rows_of

GALORE = "--method galore --galore-rank 8 --galore-update-proj-gap 7"
PLAIN = f"{GALORE} --no-galore-in-backward"
METHODS = {
    "full": "--method full",
    "galore": PLAIN,
    "galore-left": f"{PLAIN} --galore-proj-type left",
    "galore-in-backward": f"{GALORE} --galore-in-backward",
    "gradnormlorp": "--method gradnormlorp --gradnormlorp-rank 8 --gradnormlorp-update-proj-gap 7",
}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next((folder / "model").glob("*.safetensors")))


@pytest.fixture
def train(ranks, tiny_flags, tmp_path):
    """Pretrain on n processes, which cut the weights if they are several: the run folder, and what was sent."""

    def call(n: int, line: str, *more: object, steps: int = 20, **how):
        out = tmp_path / f"on{n}"
        sizes = f"--batch-size {8 // n} --total-batch-size 8 --max-steps {steps} --out {out}"
        cut = "--parallel fsdp" if n > 1 else ""
        results = ranks(n, "pretrain", *tiny_flags, *f"{line} {cut} {sizes}".split(), *more, **how)
        return out, [r.sent for r in results]

    return call


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


@pytest.mark.parametrize(
    "name",
    ["gradnormlorp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("galore", "galore-left", "full"))],
)
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


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_saved_on_some_processes_and_resumed_on_others(kind, ranks, train, tmp_path):
    # in float64: processes that sum in another order give the same weights up to its rounding
    double = {"before": "import watched; watched.in_worker(undo, rank)"}
    line = f"{PLAIN} --optimizer {kind} --save-every 9 --keep 3"
    train(1, line, **double)
    start, end = (written(tmp_path / "end.safetensors", when) for when in ("start", "end"))
    run, _ = train(2, line, **double)
    cut = weights(run)
    resume = "pretrain --resume on2/checkpoints/step-000009"
    ranks(2, f"{resume} --parallel fsdp", **double)
    assert all(weights(run)[key].equal(cut[key]) for key in cut)
    with pytest.raises(UsageError, match="is a checkpoint of weights that were cut over processes"):
        place(str(tmp_path / "on2/checkpoints/step-000009"), offline=True)
    for n, how in ((1, ""), (2, "--parallel ddp"), (4, "--parallel fsdp")):
        results = ranks(n, f"{resume} --nproc 1 {how}", **double)
        assert "at step 9 of 20" in results[0].err
        assert distance(written(tmp_path / "end.safetensors"), end, start) < BOUND
    ranks(2, "pretrain --resume on1/checkpoints/step-000009 --parallel fsdp", **double)
    assert distance(written(tmp_path / "end.safetensors"), end, start) < BOUND


@pytest.mark.slow
def test_8_bit_blocks_that_lie_on_two_processes_stay_with_their_number(ranks, train, tmp_path):
    config = tmp_path / "odd.json"
    shape = {"hidden_size": 40, "intermediate_size": 88, "num_hidden_layers": 2, "num_attention_heads": 4}
    config.write_text(json.dumps({"model_type": "llama", **shape, "max_position_embeddings": 64}))
    # 250 x 40 numbers on a process are no whole number of blocks
    flags = ["--model-config", config, "--vocab-size", 500]
    run, _ = train(2, f"{PLAIN} --optimizer adamw8bit --save-every 5", *flags, steps=10)
    cut = weights(run)
    ranks(2, "pretrain --resume on2/checkpoints/step-000005")
    assert all(weights(run)[key].equal(cut[key]) for key in cut)
    results = ranks(1, "pretrain --resume on2/checkpoints/step-000005 --nproc 1", code=2)
    assert "were saved by 2 processes, and their blocks cannot be divided otherwise" in results[0].err
    assert "go on with 2 processes" in results[0].err


@pytest.mark.slow
def test_a_killed_rank_takes_the_run_down_and_it_goes_on(process, ranks, tiny_flags, tmp_path, wait_for_step):
    line = f"pretrain {PLAIN} --parallel fsdp --max-steps 60 --save-every 5 --nproc 2"
    ranks(2, f"{line} --out whole", *tiny_flags)
    child = process(f"{line} --out killed", *tiny_flags)
    wait_for_step(tmp_path / "killed", 12, child)
    members = psutil.Process(child.pid).children(recursive=True)
    next(p for p in members if p.environ().get("RANK") == "1").send_signal(signal.SIGKILL)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 1, err
    assert err.count("error:") == 1, err
    assert "rank 1 does not answer at step" in err
    assert "rank 1 does not answer" in json.loads((tmp_path / "killed" / "run.json").read_text())["error"]
    ranks(2, "pretrain --resume auto --out killed")
    assert all(weights(tmp_path / "killed")[key].equal(t) for key, t in weights(tmp_path / "whole").items())


FINETUNE = "finetune --max-length 96 --template plain --no-plots --eval-tokens 200 --total-batch-size 8 --lr 0.01"


@pytest.mark.parametrize(
    "method",
    [
        pytest.param("lora --lora-dropout 0.1 --merge", marks=pytest.mark.slow),
        "vblora",
        pytest.param("gradnormlorp --gradnormlorp-update-proj-gap 7", marks=pytest.mark.slow),
    ],
)
def test_an_adapter_on_a_base_that_is_cut_resumes_bit_for_bit(method, ranks, base, records, tmp_path):
    line = f"{FINETUNE} --method {method} --max-steps 12 --batch-size 4 --save-every 5 --keep 3 --parallel fsdp"
    ranks(2, f"{line} --out two", "--model", base, "--dataset", records)
    two = weights(tmp_path / "two")
    ranks(2, "finetune --resume two/checkpoints/step-000005")
    assert all(weights(tmp_path / "two")[key].equal(t) for key, t in two.items())


@pytest.mark.slow
def test_a_task_is_judged_and_its_best_weights_are_kept(ranks, base, test_data, tmp_path):
    line = "finetune --task mrpc --method full --max-length 32 --no-plots --max-steps 6 --eval-every 2 --lr 0.001"
    more = ["--total-batch-size", 8, "--model", base, "--data-dir", test_data / "glue"]
    for n, out in ((1, "one"), (2, "two")):
        before = f"import watched; watched.in_worker(undo, rank, '{out}.safetensors')"
        cut = "--parallel fsdp" if n > 1 else ""
        ranks(n, f"{line} {cut} --batch-size {8 // n} --out {out}", *more, before=before)
    one, two = (json.loads((tmp_path / out / "run.json").read_text())["result"] for out in ("one", "two"))
    assert two["validation_accuracy"] == one["validation_accuracy"]
    a, b = (written(tmp_path / f"{out}.safetensors") for out in ("two", "one"))
    assert distance(a, b, written(tmp_path / "one.safetensors", "start")) < BOUND


@pytest.mark.slow
def test_16_bits(train):
    one, _ = train(1, f"{PLAIN} --dtype bfloat16", steps=8)
    two, _ = train(2, f"{PLAIN} --dtype bfloat16", steps=8)
    assert {t.dtype for t in weights(two).values()} == {torch.bfloat16}
    losses = [
        [m["loss"] for m in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if "loss" in m]
        for out in (two, one)
    ]
    # numbers of 8 + 8 bits are summed in another order
    assert losses[0] == pytest.approx(losses[1], rel=4 * 2**-8)


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
    line = f"pretrain {PLAIN} --parallel fsdp --max-steps 6 --out run"
    results = ranks(2, line, *tiny_flags, code=1, before=breaks)
    said = "".join(r.err for r in results)
    assert said.count("error:") == 1
    # by the evaluation after the update, or by the loss of the next one
    assert re.search(
        r"is nan at step [34]; the first tensor with a non-finite value is the weight [\w.]*up_proj", said
    )
    # a checkpoint that is cut is no model to continue from
    assert "start again; a lower --lr" in said
    assert "--continue-from" not in said


def test_one_process_is_told_that_it_shares_nothing(lowrank, tiny_flags):
    code, _, err = lowrank("pretrain --parallel fsdp --max-steps 2 --out run", *tiny_flags)
    assert code == 0, err
    assert "--parallel fsdp: one process holds the whole model" in err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"{PLAIN} --optimizer adafactor", "Adafactor's moments are means over rows and columns"),
        (f"{PLAIN} --galore-moments rotate", "--parallel fsdp does not rotate moments"),
        (f"{PLAIN} --parallel zero", "--parallel takes one of: ddp, fsdp"),
    ],
)
def test_what_cannot_be_cut(line, message, ranks, tiny_flags):
    results = ranks(2, f"pretrain --parallel fsdp {line}", *tiny_flags, code=2)
    assert message in "".join(r.err for r in results)


def test_a_base_of_4_bits_cannot_be_cut(ranks, base, records):
    line = "finetune --method lora --quantize nf4 --max-steps 2 --no-plots --parallel fsdp"
    results = ranks(2, line, "--model", base, "--dataset", records, code=2)
    assert "does not cut a base of 4 bits" in "".join(r.err for r in results)
