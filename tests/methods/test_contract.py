"""What every method promises, whatever it does: checked on each one by its name."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lowrank_cli import methods
from lowrank_cli.config import resolve

PRETRAINING = [name for name in methods.names() if "pretrain" in methods.get(name).commands]


def train(lowrank, name: str, flags: list[str], *more: object) -> dict:
    code, out, err = lowrank("pretrain", "--method", name, *flags, *more, "--json")
    assert code == 0, err
    return json.loads(out)


@pytest.mark.parametrize("name", methods.names())
def test_describes_itself(name):
    method = methods.get(name)
    assert method.title
    assert method.summary
    assert method.paper.startswith("https://")
    assert method.commands <= {"pretrain", "finetune", "compress"}
    assert method.acts_on <= {"weights", "activations", "gradients"}


@pytest.mark.parametrize("name", PRETRAINING)
def test_learns_real_text(name, lowrank, tiny_flags):
    train(lowrank, name, tiny_flags, "--max-steps", 30, "--lr", "0.01", "--out", "run")
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("name", PRETRAINING)
def test_same_seed_same_weights(name, lowrank, tiny_flags):
    for out in ("a", "b"):
        train(lowrank, name, tiny_flags, "--max-steps", 5, "--out", out)
    a, b = (load_file(f"{out}/model/model.safetensors") for out in ("a", "b"))
    assert all(a[key].equal(b[key]) for key in a)


@pytest.mark.parametrize("name", PRETRAINING)
def test_saved_model_is_a_plain_transformers_model(name, lowrank, tiny_flags):
    result = train(lowrank, name, tiny_flags, "--max-steps", 3, "--out", "run")
    model = AutoModelForCausalLM.from_pretrained("run/model")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    assert result["validation_perplexity"] > 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "adafactor"])
@pytest.mark.parametrize("name", PRETRAINING)
def test_estimate_is_what_the_optimizer_holds(name, optimizer, dtype, lowrank, tiny_flags):
    flags = [*tiny_flags, "--dtype", dtype, "--optimizer", optimizer]
    estimate = train(lowrank, name, flags, "--dry-run")
    result = train(lowrank, name, flags, "--max-steps", 1, "--lr", "0.1", "--out", "run")
    assert estimate["optimizer_states_bytes"] == pytest.approx(result["optimizer_state_bytes"], rel=0.05)


@pytest.mark.parametrize("name", PRETRAINING)
def test_checkpoint_holds_tensors_and_numbers_only(name, lowrank, tiny_flags):
    train(lowrank, name, tiny_flags, "--max-steps", 1, "--out", "run")
    folder = Path("run/checkpoints/step-000001")
    assert not [p for p in folder.iterdir() if p.suffix not in (".safetensors", ".json")]
    numbers = json.loads((folder / "progress.json").read_text())["optimizer_numbers"]
    assert all(isinstance(v, (int, float)) for entries in numbers.values() for v in entries.values())


@pytest.mark.parametrize("name", PRETRAINING)
def test_every_trainable_tensor_has_a_role(name, lowrank, tiny_flags):
    train(lowrank, name, tiny_flags, "--max-steps", 1, "--out", "run")
    rows = json.loads(Path("run/targets.json").read_text())
    names = set(load_file("run/model/model.safetensors"))
    assert {row["name"] for row in rows} == names
    assert all(row["role"] in (name, "full", "frozen") for row in rows)
    assert any(row["role"] == name for row in rows)


def test_galore_targets_are_the_papers():
    method = methods.get("galore")(resolve("pretrain", {"method": "galore"}, {}).methods["galore"])
    assert method.rank_for((128, 352)) == 32
    assert method.rank_for((20, 352)) == 20
    # Table 1 of the paper, 60M: 56 matrices at rank 128; bases and two moments, in float32
    shapes = 32 * [(512, 512)] + 16 * [(1376, 512)] + 8 * [(512, 1376)]
    method = methods.get("galore")(methods.get("galore").Config(rank=128))
    assert sum(method.memory(s).states for s in shapes) == 4 * 128 * sum(min(s) + 2 * max(s) for s in shapes)
