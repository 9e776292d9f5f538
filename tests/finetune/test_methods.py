"""What `lowrank finetune` promises of every method: it learns, its output loads elsewhere, it resumes bit for bit."""

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lowrank_cli import methods

ADAPTERS = ["lora", "dora", "vblora", "gradnormlorp", "lora+velora", "lora+galore"]
WHOLE = ["full", "galore"]
FEW = ["--max-steps", 6, "--save-every", 3, "--eval-every", 3]


def finetune(lowrank, method: str, flags: list[str], *more: object) -> dict:
    code, out, err = lowrank("finetune", "--method", method, *flags, *more, "--json")
    assert code == 0, err
    return json.loads(out)


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(5, 45).reshape(2, 20)).logits


def test_every_method_of_the_command_is_tested_here():
    available = {n for n in methods.names() if "finetune" in methods.get(n).commands}
    tested = {part for name in ADAPTERS + WHOLE for part in name.split("+")}
    assert available - {"welore"} == tested  # which needs a compressed model: tests/compress


@pytest.mark.parametrize("method", ADAPTERS + WHOLE)
def test_learns_what_the_records_teach(method, lowrank, flags):
    # its bank starts small and learns at rates of its own
    more = ["--vblora-lr-vector-bank", 0.05, "--vblora-lr-logits", 0.1] if method == "vblora" else []
    result = finetune(lowrank, method, flags, *more, "--max-steps", 30, "--eval-every", 10, "--out", "run")
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert min(losses) < losses[0] - 0.2
    assert result["validation_loss"] == min(losses)


@pytest.mark.parametrize("method", ADAPTERS)
def test_peft_loads_the_adapter_and_it_is_what_the_merged_model_is(method, lowrank, flags, base):
    result = finetune(lowrank, method, flags, *FEW, "--out", "adapter")
    finetune(lowrank, method, flags, *FEW, "--merge", "--out", "merged")
    plain = AutoModelForCausalLM.from_pretrained(base)
    before = logits_of(plain)
    adapted = logits_of(PeftModel.from_pretrained(plain, "adapter/model"))
    merged = logits_of(AutoModelForCausalLM.from_pretrained("merged/model"))
    assert (adapted - before).abs().max() > 1e-3
    assert torch.allclose(adapted, merged, atol=1e-5 * float(merged.abs().max()))
    assert result["stored_bytes"] < 0.5 * (base / "model.safetensors").stat().st_size


@pytest.mark.parametrize("method", ADAPTERS + WHOLE)
def test_resumed_is_bit_identical(method, lowrank, flags):
    more = ["--lora-dropout", 0.1] if method.startswith("lora") else []
    finetune(lowrank, method, flags, *more, *FEW, "--total-batch-size", 16, "--out", "whole")
    shutil.copytree("whole", "again")
    shutil.rmtree("again/model")
    shutil.rmtree("again/checkpoints/step-000006")
    code, _, err = lowrank("finetune", "--resume", "again", "--json")
    assert code == 0, err
    for file in Path("whole/model").glob("*.safetensors"):
        first, second = load_file(file), load_file(Path("again/model") / file.name)
        assert first.keys() == second.keys()
        assert all(first[key].equal(second[key]) for key in first)


@pytest.mark.parametrize("method", ["lora", "vblora"])
def test_killed_run_leaves_whole_files_and_goes_on(method, lowrank, process, flags):
    steps = ["--max-steps", 40, "--save-every", 2, "--eval-every", 40]
    whole = finetune(lowrank, method, flags, *steps, "--out", "whole")
    child = process("finetune", "--method", method, *flags, *steps, "--out", "killed")
    end = time.monotonic() + 120
    while not list(Path("killed/checkpoints").glob("step-*")) and time.monotonic() < end:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    for checkpoint in Path("killed/checkpoints").glob("step-*"):
        assert load_file(checkpoint / "trainable.safetensors")
    code, out, err = lowrank("finetune", "--resume", "killed", "--json")
    assert code == 0, err
    assert json.loads(out)["validation_loss"] == whole["validation_loss"]
    name = "adapter_model.safetensors"
    first, second = load_file(f"whole/model/{name}"), load_file(f"killed/model/{name}")
    assert all(first[key].equal(second[key]) for key in first)


def test_checkpoints_of_an_adapter_hold_the_adapter_only(lowrank, flags, base):
    finetune(lowrank, "lora", flags, *FEW, "--out", "run")
    folder = Path("run/checkpoints/step-000006")
    assert not (folder / "model.safetensors").exists()
    assert sum(p.stat().st_size for p in folder.iterdir()) < (base / "model.safetensors").stat().st_size


def test_a_resumed_adapter_wants_the_same_base(lowrank, flags, base, tmp_path):
    shutil.copytree(base, tmp_path / "other")
    flags = ["--model", str(tmp_path / "other"), *flags[2:]]
    finetune(lowrank, "lora", flags, *FEW, "--out", "run")
    shutil.rmtree("run/model")
    shutil.rmtree("run/checkpoints/step-000006")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    torch.nn.init.normal_(model.model.layers[0].mlp.up_proj.weight)
    model.save_pretrained(tmp_path / "other")
    code, _, err = lowrank("finetune", "--resume", "run")
    assert code == 2
    assert "the base model's weights are not those that the run began with" in err


def test_an_adapters_run_that_has_not_ended_is_no_model_yet(lowrank, flags):
    finetune(lowrank, "lora", flags, *FEW, "--out", "run")
    shutil.rmtree("run/model")
    code, _, err = lowrank("finetune", "--method", "lora", "--model", "run", *flags[2:])
    assert code == 2, err
    assert "has not ended" in err
    assert "--resume run" in err


def test_galore_on_a_lora_projects_its_factors(lowrank, flags):
    finetune(lowrank, "lora+galore", flags, *FEW, "--out", "run")
    rows = json.loads(Path("run/targets.json").read_text())
    projected = [row for row in rows if row["role"] == "galore"]
    assert projected
    assert all("lora_" in row["name"] and row["rank"] == 2 for row in projected)


def test_the_adapter_is_a_model_for_the_other_commands(lowrank, flags):
    finetune(lowrank, "lora", flags, *FEW, "--out", "run")
    result = finetune(lowrank, "full", ["--model", "run", *flags[2:]], "--max-steps", 1, "--out", "next")
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    best = min(line["eval_loss"] for line in lines if "eval_loss" in line)
    first = json.loads(Path("next/metrics.jsonl").read_text().splitlines()[0])
    assert first["eval_loss"] == pytest.approx(best, rel=1e-5)
    assert result["steps"] == 1


def test_an_adapter_on_an_adapter_is_refused_and_the_default_is_a_plain_model(lowrank, flags, base):
    shutil.copytree(base.parent, "runs/1-pretrain")
    finetune(lowrank, "lora", ["--model", "runs/1-pretrain", *flags[2:]], *FEW, "--out", "runs/2-adapter")
    code, _, err = lowrank("finetune", "--model", "runs/2-adapter", *flags[2:], "--max-steps", 1)
    assert code == 2
    assert "is an adapter" in err
    assert "--merge" in err
    code, out, err = lowrank("finetune", *flags[2:], "--print-config")
    assert code == 0, err
    assert "model: runs/1-pretrain" in out


def test_best_weights_of_another_step_are_not_taken(lowrank, flags):
    finetune(lowrank, "lora", flags, *FEW, "--out", "run")
    shutil.rmtree("run/model")
    shutil.rmtree("run/checkpoints/step-000006")
    step = Path("run/best/step.json")
    assert json.loads(step.read_text())["step"] in (3, 6)
    # what a kill between the best weights and the next checkpoint leaves behind: weights of a later step
    progress = Path("run/checkpoints/step-000003/progress.json")
    assert json.loads(progress.read_text())["evaluated"] == 3
    Path("run/best").rename("run/.old-best")
    code, _, err = lowrank("finetune", "--resume", "run", "--json")
    assert code == 0, err
    assert not Path("run/.old-best").exists()


def test_an_adapter_on_a_bfloat16_base_trains_in_float32(lowrank, flags):
    finetune(lowrank, "lora", flags, *FEW, "--dtype", "bfloat16", "--out", "run")
    saved = load_file("run/model/adapter_model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.float32}
