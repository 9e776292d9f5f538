"""Models that there is no command for: refused by name from every command, before anything is loaded."""

import json
import shutil

import pytest
import torch
from transformers import AutoConfig, BertConfig, BertLMHeadModel, DistilBertConfig

from lowrank_cli.errors import UsageError
from lowrank_cli.models.kinds import refuse_kind

CONTINUING = {
    "pretrain": "pretrain --dataset t.jsonl --max-length 32 --max-steps 1 --continue-from",
    "finetune": "finetune --task text --dataset t.jsonl --max-length 32 --max-steps 1 --model",
    "compress": "compress --dataset t.jsonl --max-length 32 --eval-tokens 100 --model",
    "svd-dump": "svd-dump --dataset t.jsonl --max-length 32 --gradients 1 --model",
    "eval": "eval ppl --dataset t.jsonl --window 32 --max-tokens 100 --model",
}
every_command = pytest.mark.parametrize("command", CONTINUING)


@pytest.fixture
def text(tmp_path):
    line = json.dumps({"text": "Once upon a time there was a cat. " * 9}) + "\n"
    (tmp_path / "t.jsonl").write_text(line * 60)


@pytest.fixture
def encoder(stories, tmp_path):
    """A BERT whose files are those of a language model, with the tokenizer of another."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    entries = json.loads((stories / "config.json").read_text())["vocab_size"]
    config = BertConfig(vocab_size=entries, **shape, initializer_range=0.2)
    BertLMHeadModel(config).save_pretrained(tmp_path / "encoder")
    for path in stories.glob("*token*"):
        shutil.copy(path, tmp_path / "encoder")
    return "encoder"


@pytest.fixture
def translator(stories, tmp_path):
    """The configuration of a T5, and a file where weights would be that cannot be read."""
    folder = tmp_path / "translator"
    AutoConfig.for_model("t5").save_pretrained(folder)
    for path in stories.glob("*token*"):
        shutil.copy(path, folder)
    (folder / "model.safetensors").write_bytes(b"no weights")
    return "translator"


@every_command
def test_an_encoder_has_no_next_token_loss(command, encoder, text, lowrank):
    code, out, err = lowrank(f"{CONTINUING[command]} {encoder}")
    assert code == 2
    assert "is no causal language model: its logits at a token depend on the tokens after it" in err
    assert "lowrank finetune --task TASK" in err
    assert "perplexity of" in err
    assert out == ""


def test_the_shape_of_an_encoder_is_not_pretrained(encoder, text, lowrank):
    code, _, err = lowrank(
        f"pretrain --dataset t.jsonl --max-length 32 --max-steps 1 --tokenizer {encoder} "
        f"--model-config {encoder}/config.json"
    )
    assert code == 2
    assert "a bert of this configuration is no causal language model" in err


def test_an_encoder_learns_a_task(encoder, text, tmp_path, lowrank):
    records = [{"sentence": f"once upon a {word}", "label": i % 2} for i, word in enumerate(["cat", "dog"] * 20)]
    (tmp_path / "sst2").mkdir()
    for split in ("train", "validation"):
        lines = "\n".join(json.dumps(record) for record in records)
        (tmp_path / "sst2" / f"{split}.jsonl").write_text(lines)
    code, _, err = lowrank(
        f"finetune --task sst2 --data-dir {tmp_path} --model {encoder} --method full --max-steps 1 --max-length 16 "
        "--batch-size 4 --no-plots"
    )
    assert code == 0, err


@every_command
@pytest.mark.parametrize("dry", ["", "--dry-run"])
def test_an_encoder_decoder_is_refused_by_name(command, dry, translator, text, lowrank):
    code, out, err = lowrank(f"{CONTINUING[command]} {translator} {dry}")
    assert code == 2
    assert "translator is an encoder-decoder (t5), which no command of lowrank supports" in err
    assert out == ""


def test_an_encoder_decoder_is_no_classifier_either(translator, lowrank):
    code, _, err = lowrank(f"finetune --task sst2 --model {translator} --max-steps 1")
    assert code == 2
    assert "is an encoder-decoder (t5)" in err


@pytest.mark.parametrize("model_type", ["bart", "mbart", "pegasus", "whisper"])
@pytest.mark.parametrize("dry", ["", "--dry-run"])
def test_the_shape_of_an_encoder_decoder_is_not_pretrained(model_type, dry, tiny_flags, tmp_path, lowrank):
    (tmp_path / "shape.json").write_text(json.dumps({"model_type": model_type}))
    flags = [*tiny_flags[:2], *tiny_flags[4:]]
    code, _, err = lowrank(f"pretrain --model-config shape.json --max-steps 1 {dry}", *flags)
    assert code == 2
    assert f"shape.json is an encoder-decoder ({model_type})" in err


@pytest.mark.parametrize(
    ("model_type", "causal", "message"),
    [
        ("qwen2_vl", False, r"vision-language model of a type that is not supported \(qwen2_vl\)"),
        ("llava", True, r"vision-language model of a type that is not supported \(llava\)"),
        ("vit", False, r"not a language model of a type that is supported \(vit\)"),
        ("wav2vec2", True, r"not a language model of a type that is supported \(wav2vec2\)"),
        ("distilbert", True, "not a causal language model: Transformers has none of type distilbert"),
    ],
)
def test_what_a_model_is_instead(model_type, causal, message):
    with pytest.raises(UsageError, match=message):
        refuse_kind(AutoConfig.for_model(model_type), "it", causal=causal)


def test_decoders_and_encoders_are_supported():
    refuse_kind(AutoConfig.for_model("llama"), "it", causal=True)
    refuse_kind(AutoConfig.for_model("gemma3"), "it", causal=True)
    refuse_kind(DistilBertConfig(), "it")
    # a decoder that was taken out of an encoder-decoder
    refuse_kind(AutoConfig.for_model("bart", is_encoder_decoder=False, is_decoder=True), "it", causal=True)
