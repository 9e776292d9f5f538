"""`lowrank svd-dump`: the values of torch's own decomposition, in files that others read."""

import csv
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowrank_cli.models.targets import select


def test_values_are_torchs_in_every_file(lowrank, stories):
    code, out, err = lowrank("svd-dump --published --out dump --json --model", stories)
    assert code == 0, err
    assert json.loads(out)["linears"] == 35
    found = load_file("dump/singular_values.safetensors")
    published = torch.load("dump/singular_values.pt", weights_only=True)
    rows = {row["name"]: row for row in csv.DictReader(Path("dump/singular_values.csv").read_text().splitlines())}
    linears = select(AutoModelForCausalLM.from_pretrained(stories), None)
    assert set(found) == set(rows) == set(linears)
    for name, module in linears.items():
        expected = torch.linalg.svdvals(module.weight.detach().double())
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-5, atol=1e-6 * float(expected[0]))
        layer, kind = name.removeprefix("model.layers.").split(".", 1)
        assert torch.equal(published[int(layer)][kind], found[name])
        assert float(rows[name]["largest"]) == pytest.approx(float(expected[0]), rel=1e-5)
        energy = expected.square().cumsum(0) / expected.square().sum()
        assert int(rows[name]["rank_of_90_percent"]) == int((energy < 0.9).sum()) + 1
    for picture in ("singular_values", "effective_rank"):
        assert Path(f"dump/plots/{picture}.png").stat().st_size > 5000


def test_gradients_are_those_of_the_mean_loss(lowrank, stories, text):
    line = "svd-dump --gradients 3 --dataset stories.txt --max-length 64 --out dump --no-plots --json"
    code, out, err = lowrank(f"{line} --model", stories)
    assert code == 0, err
    assert json.loads(out)["gradient_windows"] == 3
    found = load_file("dump/gradient_singular_values.safetensors")
    model = AutoModelForCausalLM.from_pretrained(stories).eval()
    ids = AutoTokenizer.from_pretrained(stories)(text.read_text()).input_ids
    ids = torch.tensor(ids[: 3 * 64]).reshape(3, 64)
    model(input_ids=ids, labels=ids).loss.backward()
    for name, module in select(model, None).items():
        expected = torch.linalg.svdvals(module.weight.grad.double())
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-3, atol=1e-4 * float(expected[0]))


def test_a_weight_that_was_decomposed_before_is_not_decomposed_again(lowrank, stories, monkeypatch):
    assert lowrank("svd-dump --out one --no-plots --model", stories)[0] == 0
    from lowrank_cli.compress import svd_dump

    def never(weight):
        raise AssertionError("decomposed again")

    monkeypatch.setattr(svd_dump, "singular_values", never)
    code, _, err = lowrank("svd-dump --out two --no-plots --model", stories)
    assert code == 0, err
    one, two = (load_file(f"{folder}/singular_values.safetensors") for folder in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_reads_one_weight_at_a_time(lowrank, stories, monkeypatch):
    """The model itself is never loaded: a model larger than memory can be dumped."""
    from lowrank_cli.models import load

    def never(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(load, "load", never)
    code, _, err = lowrank("svd-dump --out dump --no-plots --model", stories)
    assert code == 0, err


def test_names_the_weight_that_is_not_finite(lowrank, stories):
    shutil.copytree(stories, "broken")
    tensors = load_file(stories / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"][0, 0] = math.inf
    save_file(tensors, "broken/model.safetensors", metadata={"format": "pt"})
    code, _, err = lowrank("svd-dump --model broken --out dump")
    assert code == 2
    assert "model.layers.1.self_attn.o_proj.weight" in err


def test_conv1d_of_gpt2_is_read_as_out_by_in(lowrank):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=24, n_head=2, n_layer=2, vocab_size=50, n_positions=32))
    model.save_pretrained("gpt2")
    code, _, err = lowrank("svd-dump --model gpt2 --out dump --no-plots")
    assert code == 0, err
    rows = {row["name"]: row for row in csv.DictReader(Path("dump/singular_values.csv").read_text().splitlines())}
    row = rows["transformer.h.0.attn.c_attn"]
    assert (int(row["out"]), int(row["in"]), int(row["rank"])) == (72, 24, 24)


def test_reads_an_encoder_without_a_head(lowrank):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    BertModel(
        BertConfig(hidden_size=24, num_attention_heads=2, num_hidden_layers=2, intermediate_size=40, vocab_size=50)
    ).save_pretrained("bert")
    code, _, err = lowrank("svd-dump --model bert --out dump --no-plots")
    assert code == 0, err
    found = load_file("dump/singular_values.safetensors")
    assert len(found) == 12
    assert found["encoder.layer.1.attention.self.query"].shape == (24,)
