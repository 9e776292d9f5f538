"""Moments layer by layer against one pass through the whole model, over the architectures that are compressed."""

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from lowrank_cli.models.targets import select
from lowrank_cli.svd import calibration, layerwise
from lowrank_cli.svd.shelf import Shelf

pytestmark = pytest.mark.numerical

SIZES = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4}
LLAMAS = dict(SIZES, intermediate_size=40, num_key_value_heads=2)
ARCHITECTURES = {
    "llama": LLAMAS,
    "mistral": dict(LLAMAS, sliding_window=4),
    "qwen2": dict(LLAMAS, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "qwen3": dict(LLAMAS, head_dim=8),
    "gemma2": dict(LLAMAS, head_dim=8, sliding_window=4),
    "gpt2": {"vocab_size": 61, "n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 32},
    "gpt_neox": dict(SIZES, intermediate_size=40),
    "opt": dict(SIZES, ffn_dim=40, word_embed_proj_dim=16, max_position_embeddings=32),
    "falcon": {**SIZES, "bias": True},
    "bloom": {"vocab_size": 61, "hidden_size": 16, "n_layer": 3, "n_head": 4},
    "gptj": {"vocab_size": 61, "n_embd": 16, "n_layer": 3, "n_head": 4, "rotary_dim": 4, "n_positions": 32},
    "gpt_neo": {
        "vocab_size": 61,
        "hidden_size": 16,
        "num_layers": 3,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1], [["global"], 1]],
        "window_size": 4,
        "max_position_embeddings": 32,
    },
    "phi": dict(LLAMAS),
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**ARCHITECTURES[name]))


def text(count: int = 3, batch: int = 2, length: int = 9) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    windows = [torch.randint(0, 61, (batch, length), generator=generator) for _ in range(count)]
    # the last batch is seldom full
    return [*windows, windows[0][:1]]


def moments(model, *, two_sided: bool, folder, budget: int = 1 << 30) -> dict[str, calibration.Moments]:
    chain = layerwise.chain_of(model)
    linears = layerwise.of_layers(chain, select(model, None))
    shelf = Shelf(folder / "scratch", budget)
    passing = layerwise.LayerMoments(chain, linears, text(), two_sided=two_sided, shelf=shelf, seed=5)
    passing.forward()
    found = {}
    for of_layer in passing.moments():
        found |= of_layer
    assert not shelf.held
    assert not shelf.devices
    assert shelf.budget == budget
    return found


@pytest.mark.parametrize("two_sided", [True, False])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_are_those_of_a_pass_through_the_whole_model(name, two_sided, tmp_path):
    model = made(name)
    linears = select(model, None)
    whole = calibration.collect(model, linears, text(), two_sided=two_sided, seed=5)
    found = moments(model, two_sided=two_sided, folder=tmp_path)
    assert set(found) == set(linears)
    for linear in linears:
        torch.testing.assert_close(found[linear].input, whole[linear].input, rtol=1e-5, atol=1e-8)
        if two_sided:
            scale = float(whole[linear].output.abs().max())
            torch.testing.assert_close(found[linear].output, whole[linear].output, rtol=1e-4, atol=1e-5 * scale)


def test_are_the_same_from_files(tmp_path):
    model = made("llama")
    held = moments(model, two_sided=True, folder=tmp_path)
    filed = moments(model, two_sided=True, folder=tmp_path, budget=0)
    for name, found in held.items():
        assert torch.equal(found.input, filed[name].input)
        assert torch.equal(found.output, filed[name].output)
    assert not list((tmp_path / "scratch").iterdir())


def test_leave_the_model_as_it_was(tmp_path):
    model = made("gpt2").train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    moments(model, two_sided=True, folder=tmp_path)
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(m._forward_hooks or "forward" in vars(m) for m in model.modules())


def test_a_model_that_passes_on_more_than_one_tensor_is_no_chain():
    for change in ("doubled", "scaled", "first returned again"):
        model = made("llama")
        layers = model.model.layers
        if change == "doubled":  # shared: called twice
            layers[1] = layers[0]
        elif change == "scaled":  # something happens between two layers
            layers[1].register_forward_pre_hook(
                lambda m, args, kwargs: ((args[0] * 2, *args[1:]), kwargs), with_kwargs=True
            )
        else:
            layers[2].register_forward_pre_hook(
                lambda m, args, kwargs: (args, kwargs | {"first": args[0]}), with_kwargs=True
            )
            layers[2].forward = lambda hidden, first, inner=layers[2].forward, **kwargs: (
                inner(hidden, **kwargs) + first
            )
        assert layerwise.chain_of(model) is None, change


def test_a_linear_outside_the_layers_is_not_missed():
    model = made("llama")
    chain = layerwise.chain_of(model)
    assert layerwise.of_layers(chain, {**select(model, None), "lm_head": model.lm_head}) is None
