"""Preset sizes against counts worked out by hand, and the errors of a wrong name."""

import subprocess
import sys

import pytest

from lowrank_cli.errors import UsageError
from lowrank_cli.models import presets
from lowrank_cli.models.architecture import build_config
from lowrank_cli.models.load import meta
from lowrank_cli.settings.training import ModelConfig

# 2 V h (embedding and head) + layers (4 h^2 + 3 h f + 2 h) + h, with V = 32,000, by hand
PARAMETERS = {
    "llama-9m": 8_995_968,
    "llama-20m": 19_548_416,
    "llama-35m": 35_197_824,
    "llama-40m": 42_392_480,
    "llama-60m": 58_073_600,
    "llama-71m": 70_578_688,
    "llama-100m": 99_989_120,
    "llama-130m": 134_105_856,
    "llama-250m": 247_370_496,
    "llama-350m": 367_969_280,
    "llama-1b": 1_339_082_752,
    "llama-3b": 2_685_831_680,
    "llama-7b": 6_738_415_616,
}


def config_of_preset(name):
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return build_config(ModelConfig(name=name), vocab_size=32000, max_length=256, **tokens)


def test_every_preset_has_a_count_here():
    assert set(presets.names()) == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name):
    model = meta(config_of_preset(name))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert all(p.is_meta for p in model.parameters())


def test_presets_share_the_rest():
    for name in presets.names():
        config = config_of_preset(name)
        assert config.model_type == "llama"
        assert (config.rms_norm_eps, config.initializer_range, config.hidden_act) == (1e-6, 0.02, "silu")
        assert config.max_position_embeddings == 1024
        assert not config.tie_word_embeddings
        assert not config.attention_bias
        assert config.num_key_value_heads == config.num_attention_heads


def test_get_returns_a_fresh_dict():
    presets.get("llama-9m")["hidden_size"] = 0
    assert presets.get("llama-9m")["hidden_size"] == 128


def test_unknown_name_says_the_nearest_and_all():
    with pytest.raises(UsageError) as error:
        presets.get("lama-60m")
    assert error.value.message == "unknown preset 'lama-60m' in --model"
    assert error.value.hint.startswith("did you mean 'llama-60m'? presets: llama-100m, llama-130m")
    assert error.value.exit_code == 2


def test_reading_the_names_imports_no_torch():
    code = "import sys; from lowrank_cli.models import presets; presets.names(); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
