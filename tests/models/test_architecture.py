"""Configurations from presets and from JSON files as they are found in the wild, and every way they can be wrong."""

import json

import pytest

from lowrank_cli.errors import UsageError
from lowrank_cli.models.load import build_config, load, meta
from lowrank_cli.settings.training import ModelConfig

TOKENS = {"vocab_size": 300, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GALORE = {
    "architectures": ["LLaMAForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 172,
    "initializer_range": 0.02,
    "max_sequence_length": 1024,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "pad_token_id": -1,
    "rms_norm_eps": 1e-06,
    "transformers_version": "4.28.1",
    "use_cache": True,
    "vocab_size": 32000,
}


@pytest.fixture
def config_of_file(tmp_path):
    def build(content, max_length=256, **tokens):
        path = tmp_path / "model.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return build_config(ModelConfig(model_config=str(path)), **(TOKENS | tokens), max_length=max_length)

    return build


def without(content, *keys, **changes):
    return {key: value for key, value in content.items() if key not in keys} | changes


def test_preset_takes_the_tokenizers_vocabulary_and_ids():
    config = build_config(ModelConfig(name="llama-9m"), **TOKENS, max_length=256)
    assert (config.vocab_size, config.bos_token_id, config.eos_token_id, config.pad_token_id) == (300, 1, 2, 0)
    assert (config.hidden_size, config.max_position_embeddings) == (128, 1024)


def test_positions_grow_with_the_sequence():
    config = build_config(ModelConfig(name="llama-9m"), **TOKENS, max_length=4096)
    assert config.max_position_embeddings == 4096


def test_galore_file(config_of_file):
    config = config_of_file(GALORE)
    assert (config.vocab_size, config.bos_token_id, config.eos_token_id, config.pad_token_id) == (300, 1, 2, 0)
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (64, 172, 2)
    assert config.max_position_embeddings == 1024
    assert not hasattr(config, "max_sequence_length")
    assert config.rms_norm_eps == 1e-6
    model = meta(config)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.get_input_embeddings().weight.shape == (300, 64)


@pytest.mark.parametrize(
    ("content", "positions"),
    [
        (without(GALORE, "max_sequence_length"), 2048),  # the architecture's own default
        (without(GALORE, max_position_embeddings=512), 512),  # both: Transformers' name counts
        (without(GALORE, "architectures", "transformers_version", torch_dtype="float16"), 1024),
    ],
)
def test_galore_variants(config_of_file, content, positions):
    config = config_of_file(content)
    assert config.max_position_embeddings == positions
    assert str(config.dtype) not in ("float16", "torch.float16")


@pytest.mark.parametrize(
    ("content", "positions"),
    [
        ({"model_type": "gpt2", "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64}, 128),
        (without(GALORE, model_type="qwen2", num_key_value_heads=2), 1024),
        (without(GALORE, model_type="mistral", num_key_value_heads=2, sliding_window=32), 1024),
        ({"model_type": "gpt_neox", "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}, 2048),
    ],
)
def test_other_architectures(config_of_file, content, positions):
    config = config_of_file(content, max_length=128)
    assert config.model_type == content["model_type"]
    assert config.vocab_size == 300
    assert config.max_position_embeddings == positions
    assert meta(config).get_input_embeddings().num_embeddings == 300


def test_architecture_without_a_bound_on_positions(config_of_file):
    config = config_of_file({"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 4}, max_length=8192)
    assert config.vocab_size == 300


@pytest.mark.parametrize("same_as", ["bos_token_id", "eos_token_id"])
def test_padding_that_is_another_token_is_left_out_so_that_its_row_learns(config_of_file, same_as):
    config = config_of_file(GALORE, pad_token_id=TOKENS[same_as])
    assert config.pad_token_id is None
    assert meta(config).get_input_embeddings().padding_idx is None


def test_tokenizer_without_special_tokens(config_of_file):
    config = config_of_file(GALORE, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, None, None)


def test_head_dim_of_its_own_needs_no_division(config_of_file):
    config = config_of_file(
        without(GALORE, model_type="qwen3", head_dim=8, num_attention_heads=6, num_key_value_heads=2)
    )
    assert config.head_dim == 8


@pytest.mark.parametrize(
    ("content", "message", "hint"),
    [
        ('{"model_type": "llama",\n "hidden_size": 64,\n}', ", line 3: not JSON (", "it is an object"),
        ("[1]", "holds no object but a list", "it is an object"),
        (without(GALORE, "model_type"), "has no model_type", 'add "model_type": "llama"'),
        (without(GALORE, "model_type", architectures=["MistralForCausalLM"]), "no model_type", '"mistral"'),
        (without(GALORE, model_type="lama"), "unknown model_type 'lama' in ", "did you mean 'llama'?"),
        (without(GALORE, model_type="t5"), "t5 has no causal language model", "take a decoder"),
        (
            without(GALORE, num_attention_heads=7),
            "7 attention heads do not divide the hidden size of 64",
            "take 4 heads",
        ),
        (
            {"model_type": "gpt2", "n_embd": 64, "n_head": 7},
            "7 attention heads do not divide the hidden size of 64",
            "take 4 heads, or a hidden size of 63",
        ),
        (without(GALORE, num_key_value_heads=3), "3 key-value heads do not divide 4 attention heads", "to a divisor"),
        (without(GALORE, hidden_size="64"), "'hidden_size' expected int, got str", "mend that value"),
        (without(GALORE, hidden_size=0), "hidden size 0 with 4 attention heads", "at least 1"),
        (without(GALORE, hidden_act="silly"), "unknown activation 'silly' in ", "did you mean 'silu'?"),
    ],
)
def test_errors_of_a_file(config_of_file, content, message, hint):
    with pytest.raises(UsageError) as error:
        config_of_file(content)
    assert message in error.value.message
    assert "model.json" in error.value.message
    assert hint in error.value.hint
    assert "\n" not in error.value.message


def test_json_error_names_the_line(config_of_file):
    with pytest.raises(UsageError, match=r"model.json, line [23]: not JSON \(.*, column \d+\)"):
        config_of_file('{"model_type": "llama",\n "hidden_size": 64,\n}')


def test_missing_folder_and_binary_files(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"\xff\xfe\x00")
    cases = {"none.json": "none.json: no such file", ".": "Is a directory", "weights.bin": "is not UTF-8 text"}
    for name, message in cases.items():
        with pytest.raises(UsageError, match=message):
            build_config(ModelConfig(model_config=str(tmp_path / name)), **TOKENS, max_length=256)


@pytest.mark.parametrize(
    ("model", "message", "hint"),
    [
        (ModelConfig(), "no architecture to pretrain", "--model llama-9m"),
        (ModelConfig(name="llama-9m", model_config="x.json"), "both name an architecture", "leave one"),
        (ModelConfig(name="lama-60m"), "unknown preset 'lama-60m' in --model", "did you mean 'llama-60m'?"),
        (ModelConfig(name="meta-llama/Llama-2-7b"), "is not a preset", "--continue-from meta-llama/Llama-2-7b"),
    ],
)
def test_errors_of_the_flags(model, message, hint):
    with pytest.raises(UsageError) as error:
        build_config(model, **TOKENS, max_length=256)
    assert message in error.value.message
    assert hint in error.value.hint


def test_what_only_building_finds_out_is_an_error_of_ours(config_of_file):
    import torch

    config = config_of_file(without(GALORE, rope_parameters={"rope_type": "spiral", "rope_theta": 1e4}))
    with pytest.raises(UsageError, match="cannot build this llama"):
        load(ModelConfig(), config=config, dtype=torch.float32, device="cpu", seed=0, offline=True)
