"""Low-rank linears: both forms compute what their product does, and models with them load in plain Transformers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lowrank_cli.errors import UsageError
from lowrank_cli.models import lowrank_linear as lr
from lowrank_cli.models.lowrank_quantizer import densify, mark
from lowrank_cli.models.targets import select

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = {
    "llama": {"hidden_size": 32, "intermediate_size": 88, "num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen2": {"hidden_size": 32, "intermediate_size": 88, "num_attention_heads": 4, "num_key_value_heads": 2},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2},
    "openai-gpt": {"n_embd": 32, "n_head": 4, "n_layer": 2},
}


def tiny(model_type: str, **more) -> nn.Module:
    settings = {"vocab_size": 96, "num_hidden_layers": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **settings, **ARCHITECTURES[model_type], **more)
    ).eval()


def compressed(model: nn.Module, form: str, rank: int = 5) -> nn.Module:
    """Every second linear at a small rank, by torch's own decomposition."""
    for name in list(select(model, None))[::2]:
        old = model.get_submodule(name)
        weight = lr.weight_of(old).detach().clone()
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        bias = None if old.bias is None else old.bias.detach() + 0.1
        lr.replace_linear(model, name, rank, form).assign(u[:, :rank] * s[:rank], vh[:rank], bias)
    mark(model)
    return model


def assert_same(one: nn.Module, other: nn.Module) -> None:
    """Fail unless both have the same parameters, bit for bit."""
    one, other = dict(one.named_parameters()), dict(other.named_parameters())
    assert set(one) == set(other)
    assert all(torch.equal(p, other[name]) for name, p in one.items())


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 35).reshape(2, 16)).logits


@pytest.mark.numerical
@settings(deadline=None, max_examples=40)
@given(m=st.integers(2, 70), n=st.integers(1, 70), data=st.data())
def test_both_forms_compute_their_product_and_save_what_they_say(m, n, data):
    rank = data.draw(st.integers(1, min(m - 1, n) if m > 1 else 1))
    generator = torch.Generator().manual_seed(m * 100 + n)
    shapes = ((m, rank), (rank, n), (m,), (3, n))
    first, second, bias, x = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in shapes)
    sizes = {"factored": rank * (m + n), "pifa": rank * (m + n - rank)}
    for form, cls in lr.FORMS.items():
        layer = cls(n, m, rank, bias=True, dtype=torch.float64)
        layer.assign(first, second, bias)
        torch.testing.assert_close(layer(x), x @ (first @ second).T + bias, rtol=1e-9, atol=1e-9)
        # multiplied in float32: up to 70 products of up to about 10, each off by 6e-8 of itself
        torch.testing.assert_close(layer.weight, first @ second, rtol=0, atol=1e-4)
        assert sum(p.numel() for p in layer.parameters()) == sizes[form] + m


@pytest.mark.numerical
def test_pivots_have_small_coordinates_also_in_graded_factors():
    # columns down to 1e-6 of the first: plain elimination would lose the small ones
    torch.manual_seed(0)
    first = torch.randn(200, 60) * torch.logspace(0, -6, 60)
    chosen, coordinates = lr.pivot_rows(first)
    assert chosen.unique().numel() == 60
    assert float(coordinates.abs().max()) < 4
    error = coordinates @ first.double()[chosen] - first.double()
    assert float((error.norm(dim=0) / first.double().norm(dim=0)).max()) < 1e-8


@pytest.mark.numerical
@pytest.mark.parametrize("form", ["factored", "pifa"])
@pytest.mark.parametrize("model_type", list(ARCHITECTURES))
def test_saved_model_loads_as_the_same(model_type, form, tmp_path):
    model = compressed(tiny(model_type), form)
    model.save_pretrained(tmp_path)
    ranks = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["ranks"]
    assert set(ranks) == set(lr.low_rank_linears(model))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path / "again")
    for other in (loaded, AutoModelForCausalLM.from_pretrained(tmp_path / "again")):
        assert_same(other, model)
        # float32: where a file's tensors lie in memory, sums may go another way
        torch.testing.assert_close(logits(other), logits(model))


def test_keeps_bfloat16(tmp_path):
    model = compressed(tiny("llama"), "factored").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert_same(loaded, model)


def test_keeps_tied_embeddings_tied(tmp_path):
    model = compressed(tiny("llama", tie_word_embeddings=True), "factored")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert_same(loaded, model)


@pytest.mark.numerical
@pytest.mark.parametrize("model_type", list(ARCHITECTURES))
def test_dense_form_is_the_architectures_own_model(model_type, tmp_path):
    model = compressed(tiny(model_type), "pifa")
    before = logits(model)
    densify(model)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not lr.low_rank_linears(loaded)
    torch.testing.assert_close(logits(loaded), before, rtol=1e-4, atol=1e-5)


def test_trains_every_factor(tmp_path):
    model = compressed(tiny("llama"), "pifa").train()
    ids = torch.arange(3, 35).reshape(2, 16)
    model(input_ids=ids, labels=ids).loss.backward()
    for name, module in lr.low_rank_linears(model).items():
        for p in module.parameters():
            assert p.grad is not None, name
            assert float(p.grad.norm()) > 0, name


@pytest.mark.parametrize(
    "order",
    [
        "import transformers, lowrank_cli",
        pytest.param("import lowrank_cli, transformers", marks=pytest.mark.slow),
    ],
)
def test_importing_the_package_is_enough_whatever_the_order(order, tmp_path):
    """From the root of the checkout too, whose folder `kernels` is not the package that Transformers looks for."""
    compressed(tiny("llama"), "factored").save_pretrained(tmp_path)
    script = (
        f"{order}; import sys; m = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]); "
        "print(type(m.model.layers[0].self_attn.q_proj).__name__)"
    )
    argv = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "LowRankLinear", done.stderr


def test_importing_the_package_imports_neither_torch_nor_transformers():
    script = "import sys, lowrank_cli; print(bool({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_rank_of_a_linear_that_the_model_does_not_have_is_named(tmp_path):
    compressed(tiny("llama"), "factored").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    content["quantization_config"]["ranks"]["model.layers.7.self_attn.q_proj"] = 4
    path.write_text(json.dumps(content))
    with pytest.raises(UsageError, match="model.layers.7.self_attn.q_proj"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
