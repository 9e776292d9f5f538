"""Compression from file to file: the model that memory gives, of files that are never loaded as a whole."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from lowrank_cli.models.lowrank_linear import low_rank_linears


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 67).reshape(1, 64)).logits


def model_of(run: str):
    return AutoModelForCausalLM.from_pretrained(f"{run}/model", dtype="auto")


@pytest.mark.parametrize("form", ["", "--welore-pifa"])
def test_gives_the_model_that_memory_gives(form, compress, monkeypatch):
    from lowrank_cli.compress import streaming
    from lowrank_cli.models import load

    line = f"--welore-param-budget 0.7 --welore-allocation uniform --welore-weighting none --no-plots {form}"
    compress(f"{line} --eval-tokens 300 --out memory")
    monkeypatch.setattr(load, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    monkeypatch.setattr(streaming, "FILE_BYTES", 100_000)
    result = compress(f"{line} --eval-tokens 0 --out files --json")
    assert len(list(Path("files/model").glob("model-*.safetensors"))) > 5
    memory, files = model_of("memory"), model_of("files")
    assert type(low_rank_linears(memory).popitem()[1]) is type(low_rank_linears(files).popitem()[1])
    # float32: where a file's tensors lie in memory, sums may go another way
    torch.testing.assert_close(logits(memory), logits(files), rtol=1e-5, atol=1e-5 * float(logits(memory).abs().max()))
    assert len(AutoTokenizer.from_pretrained("files/model")) == 512
    assert result["parameters_after"] == sum(p.numel() for p in memory.parameters())


def random_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_head=2, n_layer=2, vocab_size=70, n_positions=64))


def test_keeps_biases_dtype_and_conv1d(compress):
    model = random_gpt2()
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p)
    model.to(torch.bfloat16).save_pretrained("gpt2")
    compress("--welore-rank 5 --welore-allocation uniform --welore-paper --out run", code=2, model="gpt2")
    # all directions kept but the last ones: nearly the same function
    compress(
        "--welore-rank 5 --welore-allocation uniform --welore-pifa --eval-tokens 0 --welore-weighting none --out run",
        model="gpt2",
    )
    loaded = model_of("run")
    assert len(low_rank_linears(loaded)) == 8
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    before, after = logits(model.float()), logits(loaded.float())
    assert float((before - after).norm() / before.norm()) < 0.2


@pytest.mark.parametrize("prefixed", [True, False])
def test_finds_weights_saved_with_and_without_the_head(prefixed, compress):
    """GPT-2's own files name `h.0.attn`, those of the language model `transformer.h.0.attn`."""
    model = random_gpt2()
    (model if prefixed else model.transformer).save_pretrained("gpt2")
    compress(
        "--welore-param-budget 0.8 --welore-allocation uniform --eval-tokens 0 --welore-weighting none --out run",
        model="gpt2",
    )
    loaded = model_of("run")
    assert len(low_rank_linears(loaded)) == 8
    whole, cut = logits(model), logits(loaded)
    assert 0 < float((whole - cut).norm() / whole.norm()) < 0.7


@pytest.mark.slow
def test_needs_less_than_two_layers_of_memory(tmp_path):
    """Peak resident memory of the whole command over that of the same command on a model of one small layer."""

    def made(name: str, **sizes: int) -> Path:
        config = LlamaConfig(vocab_size=64, num_attention_heads=4, num_key_value_heads=4, **sizes)
        LlamaForCausalLM(config).save_pretrained(tmp_path / name, max_shard_size="60MB")
        return tmp_path / name

    small = made("small", hidden_size=32, intermediate_size=64, num_hidden_layers=1)
    large = made("large", hidden_size=2048, intermediate_size=8192, num_hidden_layers=3)
    script = (
        "import sys; from lowrank_cli.main import main; from lowrank_cli.run import peak_resident_bytes; "
        "code = main(sys.argv[1:]); print(peak_resident_bytes()); sys.exit(code)"
    )
    line = (
        "compress --welore-rank 50 --welore-allocation uniform "
        "--eval-tokens 0 --welore-weighting none --no-plots --json"
    )
    peaks = {}
    for model in (small, large):
        argv = [*line.split(), "--model", model, "--out", tmp_path / f"{model.name}-out"]
        done = subprocess.run([sys.executable, "-c", script, *argv], capture_output=True, text=True, check=True)
        peaks[model.name] = int(done.stdout.strip().splitlines()[-1])
    layer = 4 * (4 * 2048 * 2048 + 3 * 2048 * 8192)
    assert peaks["large"] - peaks["small"] < 2 * layer, (peaks, layer)
