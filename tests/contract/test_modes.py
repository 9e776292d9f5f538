"""Every method in every mode: the same update however it is computed, or the refusal that its class names.

Methods, and what they refuse, come from the registry; a toy method that needs the full gradient stands for the next
one that somebody writes. Runs are in float64 unless a mode is about another dtype.
"""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from double import BOUND, distance
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from watched import SEEN, written

STEPS = "--max-steps 8"
ONE_PASS = f"{STEPS} --batch-size 4 --total-batch-size 4"
FOUR_PASSES = f"{STEPS} --batch-size 1 --total-batch-size 4"
RESUMABLE = f"{FOUR_PASSES} --save-every 5 --keep 9"
# the largest relative error of a number in 8 + 8 bits
U16 = 2**-8


@pytest.fixture
def same(subject, train, lowrank, command_line):
    """Check that a line trains what another one does, or is refused if the method's class says so."""

    def call(line: str, other: str) -> None:
        why = subject.refusal(line)
        if why is not None:
            code, _, err = lowrank("", *command_line(subject), *line.split())
            assert code == 2, err
            assert why in " ".join(err.split())
            assert not list(Path().glob("runs/*"))
            return
        a, b = train(subject, line), train(subject, other)
        assert distance(a.end, b.end, b.start) < BOUND
        assert a.values("loss") == pytest.approx(b.values("loss"), rel=BOUND)
        assert a.values("tokens") == b.values("tokens")

    return call


def padded(subject) -> str:
    """Return the flag for batches of unlike lengths; records have them anyway."""
    return "--packing padded" if subject.command == "pretrain" else ""


def test_learns(subject, train):
    losses = train(subject, ONE_PASS).values("eval_loss")
    assert losses[-1] < losses[0]


def test_accumulation_of_ragged_rows(subject, same):
    same(f"{FOUR_PASSES} {padded(subject)}", f"{ONE_PASS} {padded(subject)}")


def test_per_layer(subject, same):
    same(f"{STEPS} --batch-size 2 --total-batch-size 4 --per-layer", ONE_PASS)


def test_in_backward(subject, same):
    # every setting that leaves it to the method, and the other two
    flags = [f"--{part.name}-in-backward" for part in subject.parts if subject.has("in_backward")]
    for flag in flags:
        same(f"{STEPS} --batch-size 2 --total-batch-size 4 {flag}", f"{ONE_PASS} {flag.replace('--', '--no-', 1)}")


@pytest.mark.parametrize("rule", ["adamw8bit", "adafactor"])
def test_other_rules(rule, subject, same):
    same(f"{FOUR_PASSES} --optimizer {rule}", f"{ONE_PASS} --optimizer {rule}")


def test_8_bit_moments_follow_32(subject, train):
    coarse, fine = train(subject, f"{ONE_PASS} --optimizer adamw8bit"), train(subject, ONE_PASS)
    # a code of 8 bits is off by up to 2^-5 of a moment, and the first updates have all of their size
    assert distance(*map(joined, (coarse.end, fine.end, fine.start))) < 0.2
    assert coarse.values("loss")[-1] == pytest.approx(fine.values("loss")[-1], rel=0.05)


def joined(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return all tensors as one, so that a large one counts for more than one that hardly moves."""
    return {"all": torch.cat([tensors[name].flatten() for name in sorted(tensors)])}


def test_16_bits_follow_64(subject, train):
    narrow, wide = train(subject, f"{ONE_PASS} --dtype bfloat16", exact=False), train(subject, ONE_PASS)
    # what an adapter trains is float32 on a base of 16 bits
    dtype = torch.float32 if narrow.result["is_adapter"] else torch.bfloat16
    assert {t.dtype for t in narrow.end.values()} == {dtype}
    # losses are means of a hundred tokens' with a rounding each; eight updates add theirs
    assert narrow.values("loss") == pytest.approx(wide.values("loss"), rel=4 * U16)


def test_stochastic_rounding_follows_64_bits_in_the_mean(subject, train):
    # updates of a quarter of a weight's spacing: rounding to the nearest would lose most of them
    line = f"{ONE_PASS} --scheduler constant --warmup-steps 0 --lr 3e-5"
    narrow = train(subject, f"{line} --dtype bfloat16 --stochastic-rounding", exact=False)
    wide = train(subject, line)
    ways: dict[str, list[float]] = {}
    for row in json.loads((wide.folder / "targets.json").read_text()):
        name = row["name"]
        if row["role"] != "frozen" and narrow.end[name].dtype == torch.bfloat16:
            way, gone = ((run.end[name].double() - run.start[name].double()).flatten() for run in (wide, narrow))
            total = ways.setdefault(row["role"], [0.0, 0.0, 0])
            ways[row["role"]] = [total[0] + float(gone @ way), total[1] + float(way @ way), total[2] + way.numel()]
    assert narrow.result["is_adapter"] or ways
    # a weight's rounding is about its own way, and thousands of them are taken together
    shares = {role: gone / way for role, (gone, way, size) in ways.items() if size > 4000}
    assert all(0.8 < share < 1.2 for share in shares.values()), shares


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes(how, subject, train, ranks, command_line, tmp_path):
    one = train(subject, ONE_PASS)
    line = f"{STEPS} --batch-size 2 --total-batch-size 4 --parallel {how} --out two"
    before = "import watched; watched.in_worker(undo, rank)"
    why = subject.refusal(line)
    results = ranks(2, "", *command_line(subject), *line.split(), before=before, code=2 if why else 0)
    if why:
        assert why in " ".join("".join(r.err for r in results).split())
        return
    assert distance(written(tmp_path / "end.safetensors"), one.end, one.start) < BOUND
    metrics = [json.loads(line) for line in (tmp_path / "two/metrics.jsonl").read_text().splitlines()]
    assert [m["loss"] for m in metrics if "loss" in m] == pytest.approx(one.values("loss"), rel=BOUND)


def test_resumed_in_the_middle_of_a_gap(subject, train, lowrank, tmp_path):
    # in the precision that people train in, where bit for bit says something
    whole = train(subject, RESUMABLE, exact=False)
    again = tmp_path / "again"
    shutil.copytree(whole.folder, again)
    shutil.rmtree(again / "model")
    shutil.rmtree(again / "checkpoints/step-000008")
    code, _, err = lowrank(f"{subject.command} --resume", again)
    assert code == 0, err
    files = sorted(p.name for p in whole.folder.glob("model/*.safetensors"))
    assert files
    for name in files:
        first, second = load_file(whole.folder / "model" / name), load_file(again / "model" / name)
        assert first.keys() == second.keys()
        assert all(first[key].equal(second[key]) for key in first)
    old, new = ((run / "metrics.jsonl").read_text() for run in (whole.folder, again))
    losses = [[m["loss"] for m in map(json.loads, text.splitlines()) if "loss" in m] for text in (old, new)]
    assert losses[0] == losses[1]


def test_what_is_written_computes_what_was_trained(subject, train):
    run = train(subject, ONE_PASS)
    # the grouped product of experts is for 32 bits at most
    options = {"experts_implementation": "eager"} if subject.experts else {}
    if run.result["is_adapter"]:
        # in float32, since some of PEFT's layers compute in nothing else
        base = AutoModelForCausalLM.from_pretrained(run.result["base"], **options)
        plain = logits_of(base)
        assert same_logits(logits_of(peft.PeftModel.from_pretrained(base, run.folder / "model")), run.logits)
        assert not same_logits(plain, run.logits)
        run = train(subject, f"{ONE_PASS} --merge")
    model = AutoModelForCausalLM.from_pretrained(run.folder / "model", dtype=torch.float64, **options)
    assert type(model).__name__ == ("MixtralForCausalLM" if subject.experts else "LlamaForCausalLM")
    assert same_logits(logits_of(model), run.logits)


def logits_of(model) -> torch.Tensor:
    """Return the logits of a loaded model, with the norms that the run had."""
    with torch.no_grad():
        return model.eval()(SEEN).logits


def same_logits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Say whether logits are the same but for norms and adapters that loaders compute in float32."""
    return bool((a - b).abs().max() < 1e-5 * b.abs().max())


@pytest.mark.parametrize(
    "line",
    [
        RESUMABLE,
        f"{ONE_PASS} --dtype bfloat16",
        pytest.param("--max-steps 1 --lr 0.1 --optimizer adamw8bit", marks=pytest.mark.slow),
        pytest.param("--max-steps 1 --lr 0.1 --optimizer adafactor", marks=pytest.mark.slow),
    ],
    ids=["adamw", "bfloat16", "adamw8bit", "adafactor"],
)
def test_estimate_is_what_the_optimizer_holds(line, subject, train, lowrank, command_line):
    code, out, err = lowrank("", *command_line(subject), *line.split(), "--dry-run", "--json")
    assert code == 0, err
    held = train(subject, line, exact=False).result["optimizer_state_bytes"]
    assert json.loads(out)["optimizer_states_bytes"] == pytest.approx(held, rel=0.05)


def test_a_run_says_what_it_trained_and_keeps_tensors_and_numbers(subject, train):
    run = train(subject, ONE_PASS)
    rows = json.loads((run.folder / "targets.json").read_text())
    roles = {row["role"] for row in rows}
    assert roles <= {*subject.method.split("+"), "full", "frozen"}
    assert {part.name for part in subject.parts} & roles
    assert {row["name"] for row in rows if row["role"] != "frozen"} == set(run.start)
    folder = run.folder / "checkpoints/step-000008"
    # and its settings, which are text
    assert not [p for p in folder.iterdir() if p.suffix not in (".safetensors", ".json", ".yaml")]
    numbers = json.loads((folder / "progress.json").read_text())["optimizer_numbers"]
    assert all(isinstance(v, (int, float)) for entries in numbers.values() for v in entries.values())


def test_describes_itself(subject):
    for method in subject.parts:
        assert method.title
        assert method.summary
        assert method.paper.startswith("https://")
        assert method.commands <= {"pretrain", "finetune", "compress"}
        assert method.acts_on <= {"weights", "activations", "gradients"}
