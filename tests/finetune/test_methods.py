"""Adapters of `lowrank finetune`: what a kill leaves, what a checkpoint holds, what the other commands make of one.

What every method promises is in tests/contract.
"""

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

FEW = "--max-steps 6 --save-every 3 --eval-every 3"


def finetune(lowrank, line: str, *more: object) -> dict:
    code, out, err = lowrank(f"finetune {line} --json", *more)
    assert code == 0, err
    return json.loads(out)


def test_vblora_learns_what_the_records_teach(lowrank, flags):
    # its bank starts small and learns at rates of its own
    line = "--method vblora --vblora-lr-vector-bank 0.05 --vblora-lr-logits 0.1 --max-steps 30 --eval-every 10"
    result = finetune(lowrank, f"{line} --out run", *flags)
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert min(losses) < losses[0] - 0.2
    assert result["validation_loss"] == min(losses)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "vblora"])
def test_killed_run_leaves_whole_files_and_goes_on(method, lowrank, process, flags):
    line = f"--method {method} --max-steps 40 --save-every 2 --eval-every 40"
    whole = finetune(lowrank, f"{line} --out whole", *flags)
    child = process(f"finetune {line} --out killed", *flags)
    end = time.monotonic() + 120
    while not list(Path("killed/checkpoints").glob("step-*")) and time.monotonic() < end:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    for checkpoint in Path("killed/checkpoints").glob("step-*"):
        assert load_file(checkpoint / "trainable.safetensors")
    code, out, err = lowrank("finetune --resume killed --json")
    assert code == 0, err
    assert json.loads(out)["validation_loss"] == whole["validation_loss"]
    name = "adapter_model.safetensors"
    first, second = load_file(f"whole/model/{name}"), load_file(f"killed/model/{name}")
    assert all(first[key].equal(second[key]) for key in first)


def test_checkpoints_of_an_adapter_hold_the_adapter_only(lowrank, flags, base):
    finetune(lowrank, f"--method lora {FEW} --out run", *flags)
    folder = Path("run/checkpoints/step-000006")
    assert not (folder / "model.safetensors").exists()
    assert sum(p.stat().st_size for p in folder.iterdir()) < (base / "model.safetensors").stat().st_size


def test_a_resumed_adapter_wants_the_same_base(lowrank, flags, base, tmp_path):
    shutil.copytree(base, tmp_path / "other")
    flags = ["--model", str(tmp_path / "other"), *flags[2:]]
    finetune(lowrank, f"--method lora {FEW} --out run", *flags)
    shutil.rmtree("run/model")
    shutil.rmtree("run/checkpoints/step-000006")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    torch.nn.init.normal_(model.model.layers[0].mlp.up_proj.weight)
    model.save_pretrained(tmp_path / "other")
    code, _, err = lowrank("finetune --resume run")
    assert code == 2
    assert "the base model's weights are not those that the run began with" in err


def test_an_adapters_run_that_has_not_ended_is_no_model_yet(lowrank, flags):
    finetune(lowrank, f"--method lora {FEW} --out run", *flags)
    shutil.rmtree("run/model")
    code, _, err = lowrank("finetune --method lora --model run", *flags[2:])
    assert code == 2, err
    assert "has not ended" in err
    assert "--resume run" in err


def test_galore_on_a_lora_projects_its_factors(lowrank, flags):
    finetune(lowrank, f"--method lora+galore {FEW} --out run", *flags)
    rows = json.loads(Path("run/targets.json").read_text())
    projected = [row for row in rows if row["role"] == "galore"]
    assert projected
    assert all("lora_" in row["name"] and row["rank"] == 2 for row in projected)


def test_the_adapter_is_a_model_for_the_other_commands(lowrank, flags):
    finetune(lowrank, f"--method lora {FEW} --out run", *flags)
    result = finetune(lowrank, "--method full --model run --max-steps 1 --out next", *flags[2:])
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    best = min(line["eval_loss"] for line in lines if "eval_loss" in line)
    first = json.loads(Path("next/metrics.jsonl").read_text().splitlines()[0])
    assert first["eval_loss"] == pytest.approx(best, rel=1e-5)
    assert result["steps"] == 1


def test_an_adapter_on_an_adapter_is_refused_and_the_default_is_a_plain_model(lowrank, flags, base):
    shutil.copytree(base.parent, "runs/1-pretrain")
    finetune(lowrank, f"--method lora --model runs/1-pretrain {FEW} --out runs/2-adapter", *flags[2:])
    code, _, err = lowrank("finetune --model runs/2-adapter --max-steps 1", *flags[2:])
    assert code == 2
    assert "is an adapter" in err
    assert "--merge" in err
    code, out, err = lowrank("finetune --print-config", *flags[2:])
    assert code == 0, err
    assert "model: runs/1-pretrain" in out


def test_best_weights_of_another_step_are_not_taken(lowrank, flags):
    finetune(lowrank, f"--method lora {FEW} --out run", *flags)
    shutil.rmtree("run/model")
    shutil.rmtree("run/checkpoints/step-000006")
    step = Path("run/best/step.json")
    assert json.loads(step.read_text())["step"] in (3, 6)
    # what a kill between the best weights and the next checkpoint leaves behind: weights of a later step
    progress = Path("run/checkpoints/step-000003/progress.json")
    assert json.loads(progress.read_text())["evaluated"] == 3
    Path("run/best").rename("run/.old-best")
    code, _, err = lowrank("finetune --resume run --json")
    assert code == 0, err
    assert not Path("run/.old-best").exists()


def test_an_adapter_on_a_bfloat16_base_trains_in_float32(lowrank, flags):
    finetune(lowrank, f"--method lora --dtype bfloat16 {FEW} --out run", *flags)
    saved = load_file("run/model/adapter_model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.float32}
