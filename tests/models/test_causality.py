"""What later tokens do to a model's logits: encoders are refused, and nothing that is causal is."""

import pytest
import torch
from tiny_models import CONFIGS, GATED, tiny, tiny_config
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lowrank_cli.errors import UsageError
from lowrank_cli.models.causality import TEXTS, refuse_lookahead

ENCODERS = ("bert", "roberta", "electra", "xlm-roberta", "camembert", "ernie", "megatron-bert", "rembert", "roformer")


def encoder(model_type, dtype=torch.float32, **changes):
    config = AutoConfig.for_model(model_type, **(GATED | {"max_position_embeddings": 40} | changes))
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_a_causal_model_is_taken(model_type):
    torch.manual_seed(0)
    refuse_lookahead(tiny(model_type).train(), "a model")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["gemma2", "gpt2", "llama", "mamba", "mixtral", "qwen3_moe"])
def test_rounding_is_no_look_ahead(model_type, dtype):
    torch.manual_seed(0)
    config = tiny_config(model_type, num_hidden_layers=8)
    refuse_lookahead(AutoModelForCausalLM.from_config(config, dtype=dtype), "a model")


@pytest.mark.parametrize("model_type", ENCODERS)
def test_an_encoder_is_refused(model_type):
    torch.manual_seed(0)
    with pytest.raises(UsageError, match="my-model is no causal language model") as error:
        refuse_lookahead(encoder(model_type), "my-model")
    assert "lowrank finetune --task TASK" in error.value.hint
    assert "lowrank eval TASK" in error.value.hint


@pytest.mark.parametrize("model_type", ["bert", "electra", "xlm-roberta"])
def test_an_encoder_that_is_made_a_decoder_is_taken(model_type):
    torch.manual_seed(0)
    refuse_lookahead(encoder(model_type, is_decoder=True), "a model")


def test_an_encoder_of_16_bits_is_refused():
    torch.manual_seed(0)
    with pytest.raises(UsageError, match="no causal"):
        refuse_lookahead(encoder("bert", torch.bfloat16, hidden_size=64, initializer_range=0.2), "a model")


def test_one_token_ahead_in_the_last_layer_is_enough():
    class Peeking(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x + 0.01 * x.roll(-1, 1))

    torch.manual_seed(0)
    model = tiny("llama")
    model.model.layers[-1].mlp = Peeking(model.model.layers[-1].mlp)
    with pytest.raises(UsageError, match="no causal"):
        refuse_lookahead(model, "a model")


def test_a_router_that_changes_its_mind_in_one_text_is_no_look_ahead():
    class Flickering(nn.Module):
        calls = 0

        def forward(self, x):
            Flickering.calls += 1
            return x + torch.randn_like(x) if Flickering.calls == 1 else x

    torch.manual_seed(0)
    model = tiny("llama")
    model.lm_head = nn.Sequential(Flickering(), model.lm_head)
    model.get_output_embeddings = lambda: model.lm_head[1]
    refuse_lookahead(model, "a model")
    assert 2 < Flickering.calls <= 2 * TEXTS


def test_dropout_is_off_and_modes_are_put_back():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **CONFIGS["gpt2"], resid_pdrop=0.5)).train()
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    refuse_lookahead(model, "a model")
    assert [module.training for module in model.modules()] == before
    assert torch.equal(torch.get_rng_state(), state)


def test_special_tokens_are_not_among_the_texts(monkeypatch):
    from lowrank_cli.models import causality

    model = tiny("llama", pad_token_id=5, bos_token_id=7, eos_token_id=9)
    monkeypatch.setattr(causality, "TEXTS", 100)
    texts = torch.stack(causality._texts(model))
    assert set(texts.unique().tolist()) == set(range(61)) - {5, 7, 9}
    first, second = texts.unbind(1)
    assert torch.equal(first[:, :4], second[:, :4])
    assert (first[:, 4:] != second[:, 4:]).all()
