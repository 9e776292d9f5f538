"""Multimodal checkpoints: text is trained, compressed and measured; towers and projectors stay as they are."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from lowrank_cli.models.layers import decoder_of, layers_of, outside_text
from lowrank_cli.models.targets import linears, select

TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT |= {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64}
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
TOWER |= {"image_size": 28, "patch_size": 14}
LINEAR_ATTENTION = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8}
LINEAR_ATTENTION |= {"linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}
CONFIGS = {
    "gemma3": {"text_config": TEXT, "vision_config": TOWER, "mm_tokens_per_image": 4},
    "llama4": {
        "text_config": TEXT | {"num_local_experts": 2, "intermediate_size_mlp": 48, "pad_token_id": 0},
        "vision_config": TOWER | {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
    },
    "qwen3_5": {
        "text_config": TEXT | LINEAR_ATTENTION,
        "vision_config": {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 14}
        | {"out_hidden_size": 32},
    },
}
SPECIAL = ("image_token_id", "image_token_index", "boi_token_id", "boi_token_index", "eoi_token_id")
SPECIAL += ("eoi_token_index", "video_token_id", "vision_start_token_id", "vision_end_token_id")
TOWERS = ("vision_tower.", "multi_modal_projector.", "vision_model.", "visual.")
every_type = pytest.mark.parametrize("model_type", sorted(CONFIGS))
# through whole commands, one of them every time
typed = pytest.mark.parametrize(
    "model_type", ["gemma3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama4", "qwen3_5"))]
)
RUNS = {
    "pretrain": "pretrain --dataset t.jsonl --max-length 32 --batch-size 4 --max-steps 2 --eval-tokens 200 --no-plots "
    "--continue-from model --out run --method",
    "finetune": "finetune --task text --dataset t.jsonl --max-length 32 --batch-size 4 --max-steps 2 --no-plots "
    "--eval-tokens 200 --model model --out run --method",
}


def made(model_type, entries=61):
    config = CONFIGS[model_type]
    config = config | {"text_config": config["text_config"] | {"vocab_size": entries + 4}}
    known = AutoConfig.for_model(model_type, **config)
    for name in SPECIAL:
        if hasattr(known, name):
            setattr(known, name, entries + 1)
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(known)


@pytest.fixture
def folder(model_type, stories, tmp_path) -> Path:
    """A multimodal checkpoint with the tokenizer of stories, and a text."""
    entries = json.loads((stories / "config.json").read_text())["vocab_size"]
    made(model_type, entries).save_pretrained(tmp_path / "model")
    for path in stories.glob("*token*"):
        shutil.copy(path, tmp_path / "model")
    line = json.dumps({"text": "Once upon a time there was a cat. " * 9}) + "\n"
    (tmp_path / "t.jsonl").write_text(line * 60)
    return tmp_path / "model"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def is_outside(name: str) -> bool:
    return any(part in name for part in TOWERS)


def assert_towers_are_the_same(before: Path, after: Path) -> None:
    old, new = tensors(before), tensors(after)
    outside = {name for name in old if is_outside(name)}
    assert len(outside) > 10
    assert outside == {name for name in new if is_outside(name)}
    assert all(torch.equal(old[name], new[name]) for name in outside)
    own, theirs = (json.loads((f / "config.json").read_text()) for f in (before, after))
    assert (own["model_type"], own["architectures"]) == (theirs["model_type"], theirs["architectures"])
    assert own["vision_config"] == {k: v for k, v in theirs["vision_config"].items() if k != "dtype"}


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 40)[None], use_cache=False).logits


@typed
@pytest.mark.parametrize(("command", "method"), [("pretrain", "galore"), ("finetune", "full")])
def test_training_on_text_leaves_the_towers(command, method, model_type, folder, lowrank):
    code, _, err = lowrank(f"{RUNS[command]} {method}")
    assert code == 0, err
    assert_towers_are_the_same(folder, Path("run/model"))
    assert not torch.equal(logits(Path("run/model")), logits(folder))
    # and it is a model to go on from, and to measure
    code, _, err = lowrank("eval ppl --dataset t.jsonl --window 32 --max-tokens 100 --json --model run")
    assert code == 0, err


@typed
def test_an_adapter_merged_into_it_leaves_the_towers(model_type, folder, lowrank):
    code, _, err = lowrank(f"{RUNS['finetune']} lora --merge --lora-target-modules q_proj,up_proj")
    assert code == 0, err
    adapter = load_file("run/adapter/adapter_model.safetensors") if Path("run/adapter").is_dir() else {}
    assert not any(is_outside(name) for name in adapter)
    assert_towers_are_the_same(folder, Path("run/model"))


@typed
@pytest.mark.parametrize(
    "text",
    [
        "--eval-tokens 0 --welore-weighting none",
        "--welore-calibrate t.jsonl --welore-samples 20 --dataset t.jsonl --max-length 32 --eval-tokens 100",
    ],
)
def test_compression_leaves_the_towers(text, model_type, folder, lowrank):
    flags = f"--model model --out low --method welore --welore-param-budget 0.7 {text}"
    code, _, err = lowrank(f"compress {flags}")
    assert code == 0, err
    assert_towers_are_the_same(folder, Path("low/model"))
    compressed = json.loads(Path("low/model/config.json").read_text())["quantization_config"]["ranks"]
    assert compressed
    assert not any(is_outside(name) for name in compressed)
    # multiplied out, it is the same model in its own class
    code, _, err = lowrank("compress --model low --format dense --out dense")
    assert code == 0, err
    assert_towers_are_the_same(folder, Path("dense/model"))
    torch.testing.assert_close(logits(Path("dense/model")), logits(Path("low/model")), rtol=1e-4, atol=1e-5)


@typed
def test_spectra_and_plans_are_of_the_text_alone(model_type, folder, lowrank):
    line = "svd-dump --model model --out dump --json --dataset t.jsonl --max-length 32 --gradients 1"
    code, out, err = lowrank(line)
    assert code == 0, err
    assert not any(part in out for part in TOWERS)
    for line in ("compress --model model --dry-run --json", f"{RUNS['pretrain']} galore --dry-run --json"):
        code, out, err = lowrank(line)
        assert code == 0, err
        assert not any(part in out for part in TOWERS)


@every_type
def test_the_text_is_what_the_decoder_and_the_head_are(model_type):
    model = made(model_type)
    decoder = model.get_decoder()
    assert decoder_of(model) is decoder
    assert layers_of(model) == list(getattr(decoder, "model", decoder).layers)
    outside = outside_text(model)
    assert not outside & {*decoder.modules(), model.get_output_embeddings(), model}
    names = {name for name, module in model.named_modules() if module in outside}
    assert all(is_outside(f"{name}.") for name in names)
    assert {p for module in outside for p in module.parameters()} == {
        p for name, p in model.named_parameters() if is_outside(name)
    }
    # by a pattern that fits both
    chosen = select(model, ["*.q_proj"])
    assert chosen
    assert not any(is_outside(name) for name in (*chosen, *linears(model), *select(model, None)))


def test_tensors_that_a_model_has_no_place_for_are_an_error(stories, tmp_path, lowrank):
    shutil.copytree(stories, tmp_path / "model")
    found = tensors(tmp_path / "model")
    save_file(found | {"vision_tower.weight": torch.ones(3)}, tmp_path / "model/model.safetensors", {"format": "pt"})
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": "Once upon a time. " * 40}) + "\n")
    code, _, err = lowrank("eval ppl --dataset t.jsonl --model model")
    assert code == 2
    assert "model has 1 tensors that a LlamaForCausalLM has no place for, such as vision_tower.weight" in err


def test_layers_beyond_the_configuration_are_an_error(stories, tmp_path, lowrank):
    shutil.copytree(stories, tmp_path / "model")
    path = tmp_path / "model/config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"num_hidden_layers": config["num_hidden_layers"] - 1}))
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": "Once upon a time. " * 40}) + "\n")
    code, _, err = lowrank("eval ppl --dataset t.jsonl --model model")
    assert code == 2
    assert "9 tensors that a LlamaForCausalLM has no place for, such as model.layers." in err
