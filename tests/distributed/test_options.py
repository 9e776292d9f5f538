"""Options of methods on several processes: the weights that one process trains, in float64.

Every method in its own way is in tests/contract; here are the settings that change what is summed, sent or cut.
"""

import json
from pathlib import Path

import pytest
from double import BOUND, distance
from watched import written

GALORE = "--method galore --galore-rank 8 --galore-update-proj-gap 7"
NORMED = "--method gradnormlorp --gradnormlorp-rank 8 --gradnormlorp-update-proj-gap 7"
IN_BACKWARD = f"{GALORE} --galore-in-backward"
PLAIN = f"{GALORE} --no-galore-in-backward"
# name -> flags, and the ways to share a model that take them
OPTIONS = {
    "clipped": (f"{PLAIN} --grad-clipping 0.5", "ddp fsdp"),
    "per-layer-clipped": (f"{IN_BACKWARD} --per-layer --grad-clipping 0.5", "ddp fsdp"),
    "8-bit": (f"{PLAIN} --optimizer adamw8bit", "ddp"),
    "adafactor": (f"{PLAIN} --optimizer adafactor", "ddp"),
    "staggered": (f"{PLAIN} --galore-stagger --galore-lazy-refresh --galore-refresh subspace", "ddp"),
    "rotated": (f"{PLAIN} --galore-moments rotate --galore-proj-type full", "ddp"),
    # bases on the left, on both sides, and from the sum of the processes' Gram matrices
    "left": (f"{PLAIN} --galore-proj-type left --galore-refresh subspace --galore-lazy-refresh", "fsdp"),
    "two-sided": (f"{PLAIN} --galore-proj-type full --galore-moments reset", "fsdp"),
    "gram": (f"{PLAIN} --galore-refresh gram --galore-moments align --galore-stagger", "fsdp"),
    "recomputed": (f"{IN_BACKWARD} --activation-checkpointing", "fsdp"),
    "svd-vector": ("--method velora --velora-init svd", "ddp"),
    "moving-vector": ("--method velora --velora-init ema_0.9", "ddp fsdp"),
    "two-methods": ("--method galore+velora --galore-update-proj-gap 7", "ddp fsdp"),
    "normed-left": (f"{NORMED} --gradnormlorp-in-backward --gradnormlorp-proj-type left", "fsdp"),
    "normed-per-layer": (f"{NORMED} --gradnormlorp-in-backward --per-layer", "ddp fsdp"),
}
CASES = [(name, how) for name, (_, hows) in OPTIONS.items() for how in hows.split()]
# one for every way in which what is summed, sent or cut differs
QUICK = {
    ("per-layer-clipped", "fsdp"), ("gram", "fsdp"), ("moving-vector", "ddp"), ("normed-left", "fsdp"),
}  # fmt: skip
ON_TWO = [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES]


@pytest.fixture
def train(ranks, tiny_flags, tmp_path):
    """Pretrain on n processes in float64: returns the run folder."""

    def call(n: int, line: str, *more: object, total: int = 8, steps: int = 10) -> Path:
        out = tmp_path / f"on{n}"
        sizes = f"--batch-size {8 // n} --total-batch-size {total} --max-steps {steps} --out {out}"
        before = f"import watched; watched.in_worker(undo, rank, {f'{out}.safetensors'!r})"
        ranks(n, f"pretrain {line} {sizes}", *more, *without_sizes(tiny_flags), before=before)
        return out

    return call


def without_sizes(flags: list[str]) -> list[str]:
    """Return the flags without the batch size, which a test gives."""
    i = flags.index("--batch-size")
    return flags[:i] + flags[i + 2 :]


def assert_same_training(several: Path, one: Path) -> None:
    """Check weights, losses, and, where the norm is that of whole gradients, its clipping."""
    files = [out.with_name(f"{out.name}.safetensors") for out in (several, one)]
    assert distance(written(files[0]), written(files[1]), written(files[1], "start")) < BOUND
    a, b = (list(map(json.loads, (out / "metrics.jsonl").read_text().splitlines())) for out in (several, one))
    for key in ("loss", "tokens", "eval_perplexity"):
        assert [m[key] for m in a if key in m] == pytest.approx([m[key] for m in b if key in m], rel=BOUND)


@pytest.mark.parametrize(("name", "how"), ON_TWO)
def test_two_processes_train_what_one_does(name, how, train):
    one = train(1, OPTIONS[name][0])
    assert_same_training(train(2, f"{OPTIONS[name][0]} --parallel {how}"), one)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "how"), CASES)
def test_four_processes_train_what_one_does(name, how, train):
    one = train(1, OPTIONS[name][0])
    assert_same_training(train(4, f"{OPTIONS[name][0]} --parallel {how}"), one)


@pytest.mark.parametrize("how", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
@pytest.mark.parametrize("line", [f"{IN_BACKWARD} --per-layer", pytest.param(NORMED, marks=pytest.mark.slow)])
def test_accumulation_of_padded_rows(line, how, train):
    # documents of other lengths on every process: a mean of the processes' means would be another loss
    one = train(1, f"{line} --packing padded", total=32)
    assert_same_training(train(2, f"{line} --packing padded --parallel {how}", total=32), one)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_rows_that_do_not_divide(optimizer, train, tmp_path):
    """Three heads of ten, 90 features, a vocabulary of 509: on four processes the last has fewer rows, or none."""
    config = tmp_path / "odd.json"
    shape = {"hidden_size": 30, "intermediate_size": 90, "num_hidden_layers": 2, "num_attention_heads": 3}
    config.write_text(json.dumps({"model_type": "llama", **shape, "max_position_embeddings": 64}))
    line, more = f"{PLAIN} --galore-rank 5 --optimizer {optimizer}", ["--model-config", config, "--vocab-size", 509]
    one, four = train(1, line, *more), train(4, f"{line} --parallel fsdp", *more)
    if optimizer == "adamw":
        assert_same_training(four, one)
        return
    # blocks of 8 bits begin elsewhere: a code, 2^-5 of a moment, apart
    files = [tmp_path / f"on{n}.safetensors" for n in (4, 1)]
    assert distance(written(files[0]), written(files[1]), written(files[1], "start")) < 0.1
