"""Which files are read, and what is refused by name before any work: codes, broken weights, files elsewhere."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lowrank_cli.errors import UsageError
from lowrank_cli.models import quantized

READING = ["compress --welore-rank 50 --eval-tokens 0 --out run", "svd-dump --no-plots --out run"]
LOADING = ["compress --welore-rank 50 --welore-weighting none --eval-tokens 100 --out run --dataset stories.txt"]


@pytest.fixture
def copy(stories, tmp_path, monkeypatch) -> Path:
    """A copy of the model, in the folder of the test."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(stories, "copy")
    return Path("copy")


def change(model: Path, **changes) -> None:
    """Write other tensors into a model's file, by name with _ for the dot."""
    tensors = load_file(model / "model.safetensors")
    for name, value in changes.items():
        tensors[name.replace("__", ".")] = value
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("line", [*READING, *LOADING])
@pytest.mark.parametrize("name", ["model__embed_tokens__weight", "model__layers__1__self_attn__o_proj__weight"])
def test_a_broken_model_is_named_with_its_tensor(line, name, lowrank, copy, text):
    tensor = load_file(copy / "model.safetensors")[name.replace("__", ".")]
    tensor[0, 0] = math.nan
    change(copy, **{name: tensor})
    code, out, err = lowrank(f"{line} --model copy")
    assert (code, out) == (2, "")
    assert f"error: copy is broken: {name.replace('__', '.')} holds a value that is not finite" in err
    assert "hint:  load a sound copy of it" in err
    assert not Path("run").exists()


@pytest.mark.parametrize("line", ["eval ppl --window 64", "compress --eval-tokens 200 --welore-weighting none"])
def test_perplexity_that_is_no_number_is_an_error(line, lowrank, copy, text):
    # the weights are finite, what they give is not
    change(copy, model__norm__weight=torch.full((64,), 3e38))
    code, out, err = lowrank(f"{line} --dataset stories.txt --json --out run --model copy")
    assert (code, out) == (1, "")
    assert "the model's log-probabilities are not numbers" in err
    assert not list(Path().glob("run/eval/*.json"))
    assert not Path("run/result.json").exists()


def test_a_stale_index_beside_the_weights_is_not_read(lowrank, copy):
    """Transformers takes model.safetensors; so do we."""
    model = AutoModelForCausalLM.from_pretrained(copy)
    expected = {
        n: float(torch.linalg.svdvals(p.detach().double())[0]) for n, p in model.named_parameters() if p.dim() == 2
    }
    for p in model.parameters():
        p.data *= 3
    model.save_pretrained("stale", max_shard_size="400KB")
    for file in Path("stale").glob("model*"):
        shutil.copy(file, copy)
    code, _, err = lowrank("svd-dump --no-plots --model copy --out dump")
    assert code == 0, err
    for name, values in load_file("dump/singular_values.safetensors").items():
        assert float(values[0]) == pytest.approx(expected[f"{name}.weight"], rel=1e-4)
    code, _, err = lowrank(
        "compress --welore-rank 50 --eval-tokens 0 --welore-weighting none --no-plots --model copy --out small"
    )
    assert code == 0, err
    written = {k: v for f in Path("small/model").glob("*.safetensors") for k, v in load_file(f).items()}
    assert torch.equal(written["model.norm.weight"], load_file(copy / "model.safetensors")["model.norm.weight"])


@pytest.mark.parametrize("line", READING)
@pytest.mark.parametrize("where", ["../elsewhere.safetensors", "/elsewhere.safetensors"])
def test_an_index_that_leaves_the_folder_is_refused(line, where, lowrank, copy):
    names = load_file(copy / "model.safetensors")
    shutil.move(copy / "model.safetensors", "elsewhere.safetensors")
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, where)}))
    code, _, err = lowrank(f"{line} --model copy")
    assert code == 2, err
    assert "which is not in its folder" in err
    assert not Path("run").exists()


@pytest.mark.parametrize("line", [*READING, *LOADING])
@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors", "fbgemm_fp8", ""])
def test_a_quantized_model_is_refused_by_name(line, method, lowrank, copy, text):
    config = json.loads((copy / "config.json").read_text())
    settings = {"quant_method": method, "bits": 4} if method else {"load_in_8bit": True}
    (copy / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    code, out, err = lowrank(f"{line} --model copy")
    assert (code, out) == (2, ""), err
    assert f"copy is quantized ({method or 'bitsandbytes, 8 bits'}): its weights are codes" in err
    assert not Path("run").exists()


@pytest.mark.parametrize("line", READING)
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_codes_without_a_word_in_the_configuration_are_refused(line, dtype, lowrank, copy):
    name = "model.layers.2.mlp.up_proj.weight"
    weight = load_file(copy / "model.safetensors")[name]
    change(copy, model__layers__2__mlp__up_proj__weight=(weight * 100).to(dtype))
    code, out, err = lowrank(f"{line} --model copy")
    assert (code, out) == (2, ""), err
    assert f"{name} holds codes" in err
    assert not Path("run").exists()


def fp8(folder: str) -> dict[str, torch.Tensor]:
    """Write a model whose linears are stored in blocks of 8-bit floats; returns what they stand for."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "vocab_size": 64}
    LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1)).save_pretrained(folder)
    values, stored = {}, {}
    for name, weight in load_file(f"{folder}/model.safetensors").items():
        stored[name] = weight
        if "proj" in name:
            blocks = weight.unflatten(0, (-1, 128)).unflatten(2, (-1, 128))
            scale = blocks.abs().amax((1, 3)) / 448
            codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
            stored |= {name: codes.flatten(2, 3).flatten(0, 1), f"{name}_scale_inv": scale}
            values[name] = (codes.float() * scale[:, None, :, None]).flatten(2, 3).flatten(0, 1)
    save_file(stored, f"{folder}/model.safetensors", {"format": "pt"})
    config = json.loads(Path(folder, "config.json").read_text())
    quantized = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    Path(folder, "config.json").write_text(json.dumps({**config, "quantization_config": quantized}))
    return values


def test_fp8_is_dequantized(lowrank):
    values = fp8("model")
    code, _, err = lowrank("svd-dump --no-plots --dtype float32 --model model --out dump")
    assert code == 0, err
    found = load_file("dump/singular_values.safetensors")
    assert {f"{name}.weight" for name in found} == set(values)
    for name, spectrum in found.items():
        expected = torch.linalg.svdvals(values[f"{name}.weight"].double())
        torch.testing.assert_close(spectrum.double(), expected, rtol=1e-2, atol=1e-2 * float(expected[0]))
    code, _, err = lowrank(
        "compress --welore-rank 20 --eval-tokens 0 --welore-weighting none --no-plots --model model --out small"
    )
    assert code == 0, err
    assert AutoModelForCausalLM.from_pretrained("small/model").dtype == torch.float32


def test_what_from_pretrained_needs_to_dequantize():
    (found,) = quantized.dequantizing({"quantization_config": {"quant_method": "fp8"}}).values()
    assert found.dequantize
    assert (
        quantized.dequantizing({}) == quantized.dequantizing({"quantization_config": {"quant_method": "gptq"}}) == {}
    )
    quantized.refuse_codes({"quantization_config": {"quant_method": "lowrank"}}, "some/where")
    with pytest.raises(UsageError, match=r"quantized \(hqq\)"):
        quantized.refuse_codes({"quantization_config": {"quant_method": "hqq"}}, "some/where")
