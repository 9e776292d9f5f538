"""A run that is killed and resumed ends with the same weights, bit for bit, as one that was never stopped."""

import json
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

STEPS = 60


def wait_for_step(run: Path, step: int, child, timeout: float = 120) -> None:
    """Return as soon as metrics.jsonl reports the step."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if child.poll() is not None:
            pytest.fail(f"the run ended before step {step}: {child.stderr.read()}")
        metrics = run / "metrics.jsonl"
        if metrics.is_file() and any(json.loads(line)["step"] >= step for line in whole_lines(metrics)):
            return
        time.sleep(0.005)
    pytest.fail(f"step {step} was not reached within {timeout} s")


def whole_lines(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def assert_same_model(a: Path, b: Path) -> None:
    first, second = load_file(a / "model" / "model.safetensors"), load_file(b / "model" / "model.safetensors")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.equal(second[name]), f"{name} differs"


KILLS = [
    ("--method galore --galore-rank 8 --galore-update-proj-gap 10 --streaming --total-batch-size 16", ""),
    ("--method full --total-batch-size 4", "slow"),
    ("--method full --streaming --total-batch-size 4", "slow"),
    ("--method galore --galore-rank 8 --galore-update-proj-gap 10 --total-batch-size 16", "slow"),
    ("--method galore --galore-rank 8 --galore-update-proj-gap 10 --packing padded --total-batch-size 4", "slow"),
]


@pytest.mark.parametrize("line", [pytest.param(text, marks=pytest.mark.slow if mark else ()) for text, mark in KILLS])
def test_killed_and_resumed_equals_uninterrupted(line, lowrank, process, tiny_flags, tmp_path):
    flags = [*tiny_flags, *f"--max-steps {STEPS} --save-every 7 --eval-every 20 {line}".split()]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code, _, err = lowrank("pretrain", *flags, "--out", whole)
    assert code == 0, err

    step = random.SystemRandom().randrange(8, STEPS - 5)
    child = process("pretrain", *flags, "--out", killed)
    wait_for_step(killed, step, child)
    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=60)
    assert json.loads((killed / "run.json").read_text())["status"] == "running"
    code, _, err = lowrank("pretrain --resume", killed)
    assert code == 0, err

    assert_same_model(whole, killed)
    # a resumed run's metrics are those of one run: every step once, with the same losses
    losses = [
        {line["step"]: line["loss"] for line in map(json.loads, whole_lines(run / "metrics.jsonl")) if "loss" in line}
        for run in (whole, killed)
    ]
    assert losses[0] == losses[1]
    assert list(losses[1]) == list(range(1, STEPS + 1))
    assert json.loads((killed / "run.json").read_text())["status"] == "done"


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_interrupt_saves_exits_130_and_resumes_exactly(number, lowrank, process, tiny_flags, tmp_path):
    line = f"pretrain --method galore --packing padded --max-steps {STEPS}"
    assert lowrank(f"{line} --out whole", *tiny_flags)[0] == 0
    child = process(f"{line} --out stopped", *tiny_flags)
    wait_for_step(tmp_path / "stopped", 10, child)
    child.send_signal(number)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130, err
    assert "go on with: lowrank pretrain --resume" in err
    assert json.loads((tmp_path / "stopped" / "run.json").read_text())["status"] == "interrupted"
    assert lowrank("pretrain --resume stopped")[0] == 0
    assert_same_model(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.slow
def test_second_interrupt_stops_at_once_and_leaves_the_checkpoint_whole(process, tiny_flags, tmp_path):
    # one update of many micro-batches, so that the first interrupt is still being honoured when the second comes
    child = process("pretrain --max-steps 4000 --out run", *tiny_flags, "--save-every", 5)
    wait_for_step(tmp_path / "run", 12, child)
    child.send_signal(signal.SIGINT)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130, err
    assert "Traceback" not in err
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "interrupted"
    resumed = process("pretrain --resume run")
    wait_for_step(tmp_path / "run", 20, resumed)


def test_resumed_run_continues_the_newest_without_a_path(lowrank, tiny_flags):
    code, before, err = lowrank("pretrain --method galore --max-steps 6", *tiny_flags)
    assert code == 0, err
    code, after, err = lowrank("pretrain --resume auto")
    assert code == 0, err
    # nothing is left to train, and what it came to is still known
    assert after.split(":")[0] == before.split(":")[0]
    record = json.loads(Path("runs/latest/run.json").read_text())
    assert record["result"]["validation_perplexity"] > 1
    assert "nothing is left to do" in err


def test_changed_settings_are_listed(lowrank, tiny_flags):
    assert lowrank("pretrain --max-steps 4 --out run", *tiny_flags)[0] == 0
    code, _, err = lowrank("pretrain --resume run --lr 0.5 --max-steps 9")
    assert code == 2
    assert "lr: 0.001 -> 0.5; max_steps: 4 -> 9" in err
    code, _, err = lowrank("pretrain --resume run --keep 5")
    assert code == 0, err


def test_truncated_checkpoint_is_named(lowrank, tiny_flags):
    assert lowrank("pretrain --max-steps 4 --out run", *tiny_flags, "--save-every", 2)[0] == 0
    shutil.rmtree("run/model")  # one that has ended has nothing to resume
    file = Path("run/checkpoints/step-000004/optimizer.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    before = sorted(p.name for p in Path("run").rglob("*"))
    code, _, err = lowrank("pretrain --resume run")
    assert code == 2
    assert "optimizer.safetensors has" in err
    assert "--resume run/checkpoints/step-000002" in err
    assert sorted(p.name for p in Path("run").rglob("*")) == before
    code, _, err = lowrank("pretrain --resume run/checkpoints/step-000002")
    assert code == 0, err


def test_optimizer_state_holds_tensors_and_numbers_only(lowrank, tiny_flags):
    assert lowrank("pretrain --method galore --max-steps 2 --out run", *tiny_flags)[0] == 0
    tensors = load_file("run/checkpoints/step-000002/optimizer.safetensors")
    assert {key.rpartition("|")[2] for key in tensors} == {"exp_avg", "exp_avg_sq", "basis_left", "basis_right"}
    progress = json.loads(Path("run/checkpoints/step-000002/progress.json").read_text())
    assert all(entries["step"] == 2 for entries in progress["optimizer_numbers"].values())
    assert all(type(v) in (int, float) for entries in progress["optimizer_numbers"].values() for v in entries.values())


def test_keep_prunes_old_checkpoints(lowrank, tiny_flags):
    assert lowrank("pretrain --max-steps 10 --keep 3 --out run", *tiny_flags, "--save-every", 2)[0] == 0
    names = sorted(p.name for p in Path("run/checkpoints").iterdir())
    assert names == ["step-000006", "step-000008", "step-000010"]
