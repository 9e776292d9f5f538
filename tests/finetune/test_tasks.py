"""Classification through `lowrank finetune --task`: heads, metrics by epoch, the best kept, 4-bit bases, errors."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score, f1_score
from transformers import AutoModelForSequenceClassification

from lowrank_cli.config import resolve
from lowrank_cli.data import supervised
from lowrank_cli.data.tokenizer import named_tokenizer
from lowrank_cli.models import load
from lowrank_cli.settings.training import ModelConfig


@pytest.fixture
def glue(tmp_path, test_data) -> Path:
    """A data folder with the first 48 records of each part of MRPC and STS-B."""
    for name in ("MRPC/train.tsv", "MRPC/dev.tsv", "STS-B/train.tsv", "STS-B/dev.tsv"):
        lines = (test_data / "glue" / name).read_text(encoding="utf-8").splitlines(keepends=True)
        path = tmp_path / "glue" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines[:49]), encoding="utf-8")
    return tmp_path / "glue"


@pytest.fixture
def flags(base, glue) -> list[str]:
    return [
        *("--model", str(base), "--task", "mrpc", "--data-dir", str(glue), "--max-length", "64"),
        *("--batch-size", "16", "--log-every", "1", "--no-plots", "--lr", "0.003"),
    ]


@pytest.mark.parametrize("method", ["full", "galore", "lora", "vblora"])
def test_metric_by_epoch_and_a_classifier_that_loads(method, lowrank, flags, base):
    code, out, err = lowrank(f"finetune --method {method} --epochs 2 --out run --json", *flags)
    assert code == 0, err
    result = json.loads(out)
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if "eval_accuracy" in line]
    assert [line["step"] for line in evaluations] == [0, 3, 6]
    assert result["validation_f1"] == max(line["eval_f1"] for line in evaluations)
    if result["is_adapter"]:
        plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2, pad_token_id=2)
        model = PeftModel.from_pretrained(plain, "run/model")
        saved = load_file("run/model/adapter_model.safetensors")["base_model.model.score.weight"]
        assert any(p.equal(saved) for name, p in model.named_parameters() if "score" in name)
    else:
        model = AutoModelForSequenceClassification.from_pretrained("run/model")
    assert sorted(model.config.id2label) == [0, 1]
    (line,) = (line.strip() for line in err.splitlines() if line.strip().startswith("lowrank eval"))
    assert line.startswith("lowrank eval mrpc --model run/model --data-dir ")
    code, out, err = lowrank(line.removeprefix("lowrank "), "--max-length", "64", "--json")
    assert code == 0, err
    (scored,) = json.loads(out)["results"]
    assert {row["metric"]: row["value"] for row in scored["rows"]}["f1"] == result["validation_f1"]
    assert scored["loss"] == pytest.approx(result["validation_loss"], rel=1e-5)


def test_a_classifier_is_asked_its_own_task_only(lowrank, flags, glue, base):
    code, _, err = lowrank("finetune --method full --max-steps 2 --out run", *flags)
    assert code == 0, err
    for task in ("mmlu", "mrpc,cola", "stsb", "ppl"):
        code, out, err = lowrank(f"eval {task} --model run --data-dir {glue}")
        assert (code, out) == (2, ""), err
        assert f"run/model is a classifier with 2 labels, and cannot be asked {task}" in err
        assert "name the task that it was trained on: cola, sst2, mrpc" in err
    for line in ("compress --model run --welore-rank 8", "finetune --model run --method welore"):
        code, out, err = lowrank(line)
        assert code == 2
        assert "run/model is a classifier: its head gives labels" in err
    code, out, err = lowrank(f"eval mrpc --model run --data-dir {glue} --limit 7 --dry-run --json")
    assert code == 0, err
    assert json.loads(out) == {"model": "run/model", "mrpc": 7}


def answers(folder):
    """Return the outputs of a run's saved model for each validation example, and the right answers."""
    config = resolve("finetune", {}, {}, config_file=f"{folder}/config.yaml")
    tokenizer = named_tokenizer(f"{folder}/model")
    # one at a time, so that no padding is in it
    data = supervised.build(
        config.data, config.task, batch_size=1, total_batch_size=1, eval_tokens=9, seed=0, tokenizer=tokenizer
    )
    model = AutoModelForSequenceClassification.from_pretrained(f"{folder}/model").eval()
    with torch.no_grad():
        found = [
            (model(input_ids=b["input_ids"], attention_mask=b.get("attention_mask")).logits[0].numpy(), b["labels"])
            for b in data.validation()
        ]
    return np.array([logits for logits, _ in found]), np.array([float(label) for _, label in found])


def test_reported_metrics_are_those_of_the_saved_model(lowrank, flags):
    code, out, err = lowrank("finetune --method full --max-steps 3 --out run --json", *flags)
    assert code == 0, err
    result, (logits, labels) = json.loads(out), answers("run")
    predictions = logits.argmax(axis=1)
    assert result["validation_accuracy"] == pytest.approx(accuracy_score(labels, predictions))
    assert result["validation_f1"] == pytest.approx(f1_score(labels, predictions, zero_division=0))


def test_a_regression_has_one_output_and_its_correlations(lowrank, flags):
    line, found = "finetune --max-steps 4 --json", {}
    for method in ("full", "lora"):
        code, out, err = lowrank(f"{line} --method {method} --out {method}", *flags, "--task", "stsb")
        assert code == 0, err
        found[method] = json.loads(out)["validation_pearson"]
    logits, labels = answers("full")
    assert found["full"] == pytest.approx(pearsonr(logits[:, 0], labels).statistic, abs=1e-5)
    assert -1 <= found["lora"] <= 1
    model = AutoModelForSequenceClassification.from_pretrained("full/model")
    assert (model.config.num_labels, model.config.problem_type) == (1, "regression")


def test_patience_ends_the_run(lowrank, flags):
    line = "finetune --method lora --max-steps 30 --eval-every 1 --patience 2 --out run --json"
    code, out, err = lowrank(line, *flags, "--lr", "1e-12")
    assert code == 0, err
    # the first evaluation after an update is the best so far
    assert json.loads(out)["steps"] == 3
    assert "no better evaluation for 2 times" in err


def test_a_four_bit_base_trains_an_adapter_and_merges(lowrank, base, records):
    line = "finetune --quantize nf4 --max-length 96 --max-steps 3 --no-plots --json"
    for more in ("--out adapter", "--out merged --merge"):
        code, text, err = lowrank(f"{line} {more}", "--model", base, "--dataset", records)
        assert code == 0, err
        assert np.isfinite(json.loads(text)["validation_loss"])
    assert "is_adapter" in json.loads(text)
    merged = load_file("merged/model/model.safetensors")
    original = load_file(base / "model.safetensors")
    assert merged.keys() == original.keys()
    name = "model.layers.0.mlp.up_proj.weight"
    assert merged[name].dtype == torch.float32
    # the update is small, and the base under it is the original one, not the one in 4 bits
    assert float((merged[name] - original[name]).norm() / original[name].norm()) < 0.02


def test_gradients_pass_through_a_four_bit_base_after_an_evaluation(base):
    import bitsandbytes as bnb

    source = ModelConfig(name=str(base))
    common = {"config": None, "dtype": torch.float32, "device": "cpu", "seed": 0, "offline": True}
    small = load.load(source, **common, quantize="nf4")
    plain = load.load(source, **common)
    for name, module in small.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            full = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.get_submodule(name).weight.data.copy_(full)
    ids = torch.arange(3, 35).reshape(2, 16)
    gradients = []
    for model in (small, plain):
        model.eval()
        with torch.no_grad():
            model(ids)
        model.train()
        x = model.get_input_embeddings()(ids).detach().requires_grad_(True)
        model(inputs_embeds=x, labels=ids).loss.backward()
        gradients.append(x.grad)
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-7)
    assert gradients[0].abs().max() > 1e-4


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        ("--task mrcp", 2, "did you mean"),
        ("--task mrpc --dataset x.json", 2, "both say what to train on"),
        ("--method full --quantize nf4", 2, "take a method that trains an adapter"),
        ("--method lora --lora-target-modules q_prj", 2, "did you mean 'q_proj'"),
        ("--model nowhere/at/all", 4, "no folder nowhere/at/all"),
        ("--method vblora --vblora-vector-length 7", 2, "divide"),
        ("--patience 0", 2, "at least 1"),
        ("--model-config x.json", 2, "no option --model-config"),
    ],
)
def test_bad_input_is_one_clear_error(more, code, message, lowrank, base, records):
    known = ["--model", base] if "--model " not in more else []
    known += ["--dataset", records] if "--task" not in more else []
    found, _, err = lowrank(f"finetune --max-steps 1 --out run {more}", *known)
    assert found == code, err
    assert message in err
    assert not Path("run").exists()
