"""Which linears are chosen, on decoders and encoders built tiny from their configurations."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

from lowrank_cli.errors import UsageError
from lowrank_cli.models.targets import linears, select

LLAMA = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"} | {
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
}
BERT = {"attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"} | {
    *("intermediate.dense", "output.dense"),
}
SIZES = {"vocab_size": 19, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 12}
GPT2 = {"vocab_size": 19, "n_embd": 8, "n_head": 2, "n_layer": 2}
OPT = SIZES | {"ffn_dim": 12, "word_embed_proj_dim": 4, "max_position_embeddings": 16}
NEOX = {"attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"}


def build(auto, model_type, sizes=SIZES):
    sizes = sizes | ({"num_key_value_heads": 1} if model_type in ("llama", "qwen2", "mistral") else {})
    with torch.device("meta"):
        return auto.from_config(AutoConfig.for_model(model_type, **sizes))


def named(prefix, parts):
    return {f"{prefix}.{i}.{part}" for i in range(2) for part in parts}


@pytest.fixture(scope="module")
def llama():
    return build(AutoModelForCausalLM, "llama")


@pytest.mark.parametrize(
    ("auto", "model_type", "sizes", "prefix", "parts"),
    [
        (AutoModelForCausalLM, "llama", SIZES, "model.layers", LLAMA),
        (AutoModelForCausalLM, "qwen2", SIZES, "model.layers", LLAMA),
        (AutoModelForCausalLM, "mistral", SIZES, "model.layers", LLAMA),
        (
            AutoModelForCausalLM,
            "gpt2",
            GPT2,
            "transformer.h",
            {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"},
        ),
        (AutoModelForCausalLM, "gpt_neox", SIZES, "gpt_neox.layers", NEOX),
        (AutoModelForCausalLM, "opt", OPT, "model.decoder.layers", None),
        (AutoModelForMaskedLM, "bert", SIZES, "bert.encoder.layer", BERT),
        (AutoModelForSequenceClassification, "bert", SIZES, "bert.encoder.layer", BERT),
        (AutoModelForSequenceClassification, "roberta", SIZES, "roberta.encoder.layer", BERT),
        (AutoModelForSequenceClassification, "llama", SIZES, "model.layers", LLAMA),
    ],
)
def test_default_takes_every_linear_of_the_layers_and_no_other(auto, model_type, sizes, prefix, parts):
    model = build(auto, model_type, sizes)
    parts = parts or {*(f"self_attn.{p}_proj" for p in ("q", "k", "v", "out")), "fc1", "fc2"}
    chosen = select(model, None)
    assert set(chosen) == named(prefix, parts)
    assert chosen == {name: model.get_submodule(name) for name in chosen}
    # what is left is outside the layers: head, classifier, pooler, projections around the embedding
    assert not any(name.startswith(f"{prefix}.") for name in set(linears(model)) - set(chosen))


def test_linears_are_all_of_them_and_no_embedding(llama):
    assert set(linears(llama)) == named("model.layers", LLAMA) | {"lm_head"}
    bert = build(AutoModelForSequenceClassification, "bert")
    assert {"bert.pooler.dense", "classifier"} <= set(linears(bert))
    assert not any(isinstance(module, nn.Embedding) for module in linears(bert).values())


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["mlp"], named("model.layers", {p for p in LLAMA if "mlp" in p})),
        (["*.q_proj"], named("model.layers", {"self_attn.q_proj"})),
        (["q_proj", "*.v_proj"], named("model.layers", {"self_attn.q_proj", "self_attn.v_proj"})),
        (["*.1.*.[qk]_proj"], {"model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj"}),
        (["layers.0.mlp.up_proj"], {"model.layers.0.mlp.up_proj"}),
        (["lm_head"], {"lm_head"}),
    ],
)
def test_patterns_are_parts_of_names_or_globs(llama, patterns, expected):
    assert set(select(llama, patterns)) == expected


def test_order_is_the_models_whatever_the_order_of_patterns(llama):
    assert list(select(llama, ["mlp", "attn"])) == list(select(llama, None)) == list(linears(llama))[:-1]


def test_a_pattern_that_matches_nothing_lists_the_names(llama):
    with pytest.raises(UsageError) as error:
        select(llama, ["mlp", "q_porj"])
    assert error.value.message == "target pattern 'q_porj' matches no linear of the model"
    assert error.value.hint == (
        "did you mean 'q_proj'? "
        "linears of this model: down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"
    )


@pytest.mark.parametrize("pattern", ["", "embed_tokens", "q_proj*"])
def test_patterns_that_only_look_as_if_they_matched(llama, pattern):
    with pytest.raises(UsageError, match="matches no linear"):
        select(llama, [pattern])


def test_no_pattern_at_all(llama):
    with pytest.raises(UsageError, match="no target pattern was given"):
        select(llama, [])


def test_a_text_instead_of_a_list_is_a_programmers_mistake(llama):
    with pytest.raises(ValueError, match="must be a list of texts, not the text 'mlp'"):
        select(llama, "mlp")


def test_a_model_that_the_default_does_not_know():
    with pytest.raises(UsageError) as error:
        select(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), None)
    assert error.value.message == "no linear of a repeating layer was recognised in Sequential"
    assert error.value.hint == "name the linears yourself; linears of this model: 0"
