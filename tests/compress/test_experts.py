"""`lowrank compress` and `svd-dump` on mixtures of experts: the experts are the matrices that count."""

import csv
import json
import math
import shutil
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lowrank_cli.compress.decomposition import Store, decompose_all, find_targets
from lowrank_cli.models.lowrank_experts import LowRankStack
from lowrank_cli.models.lowrank_linear import low_rank_linears
from lowrank_cli.svd import calibration

FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3")
SIZES = {"hidden_size": 32, "intermediate_size": 40, "moe_intermediate_size": 24, "vocab_size": 512}


@pytest.fixture
def family(stories):
    """Write a model of a family, of random weights, beside a tokenizer: family(name) -> folder."""

    def write(model_type: str) -> str:
        torch.manual_seed(0)
        config = tiny_models.tiny_config(model_type, **SIZES)
        config.get_text_config().vocab_size = 512
        model = AutoModelForCausalLM.from_config(config)
        for p in model.parameters():
            if p.dim() > 1:
                torch.nn.init.normal_(p, std=0.2)
        model.save_pretrained("dense")
        for file in stories.glob("tokenizer*"):
            shutil.copyfile(file, Path("dense") / file.name)
        return "dense"

    return write


def tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(Path(folder).glob("*.safetensors")) for name, t in load_file(file).items()}


def matrices(folder: str | Path) -> int:
    """Parameters of the layers' matrices in a folder's files: all but the norms, biases, routers."""
    left = ("norm", "bias", "mlp.gate.", "moe.gate.", "router", "e_score")
    return sum(t.numel() for n, t in tensors(folder).items() if ".layers." in n and not any(p in n for p in left))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 67).reshape(1, 64)).logits


def load(folder: str | Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")


def assert_same(one: torch.Tensor, other: torch.Tensor) -> None:
    # products of float32 in files, computed in float64; factors are multiplied out in float32
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


@pytest.mark.numerical
@pytest.mark.parametrize("how", ["--welore-calibrate stories.txt --welore-samples 8", "--welore-weighting none"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_keeps_a_share_of_all_matrices_and_loads_as_it_was_made(model_type, how, family, compress, monkeypatch):
    from lowrank_cli.compress import pipeline

    made, save = {}, pipeline.save

    def watched(folder, model, tokenizer):
        model.set_experts_implementation("eager")
        made["logits"] = logits(model.double())
        save(folder, model.float(), tokenizer)

    monkeypatch.setattr(pipeline, "save", watched)
    monkeypatch.setattr(pipeline, "measure", lambda *_: {"parameters": 0})
    dense = family(model_type)
    compress(f"--welore-param-budget 0.8 {how} --no-plots --out run", model=dense)
    before, after = matrices(dense), matrices("run/model")
    assert 0.78 * before < after <= 0.8 * before
    loaded = load("run/model")
    found = low_rank_linears(loaded)
    assert any(isinstance(module, LowRankStack) for module in found.values())
    assert_same(logits(loaded), made["logits"])
    merged = compress("--format dense --no-plots --out merged --json", model="run")
    plain = load("merged/model")
    assert not low_rank_linears(plain)
    assert_same(logits(plain), made["logits"])
    # the plain architecture, under its publishers' names
    shapes = {name: t.shape for name, t in tensors(dense).items()}
    assert {name: t.shape for name, t in tensors("merged/model").items()} == shapes
    assert merged["model"].endswith("model")


@pytest.mark.numerical
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_without_text_it_is_the_model_of_the_whole_way(model_type, family, compress, monkeypatch):
    """GPT-OSS's files have its code's names and go from file to file; a Mixtral's have a tensor for each expert."""
    from lowrank_cli.models import load as models

    dense, original = family(model_type), models.load
    line = "--welore-param-budget 0.7 --welore-allocation uniform --welore-weighting none --no-plots"
    compress(f"{line} --eval-tokens 300 --out memory", model=dense)
    loads = []
    monkeypatch.setattr(models, "load", lambda *a, **k: loads.append(1) or original(*a, **k))
    compress(f"{line} --eval-tokens 0 --out files", model=dense)
    assert bool(loads) == (model_type == "mixtral")
    assert matrices("files/model") <= 0.7 * matrices(dense)
    assert set(tensors("files/model")) == set(tensors("memory/model"))
    assert_same(logits(load("files/model")), logits(load("memory/model")))


@pytest.mark.numerical
def test_weighting_by_routed_tokens_keeps_more_of_a_model_that_has_learned(mixture, compress):
    line = "--welore-param-budget 0.4 --no-plots --json"
    calibrated = f"{line} --welore-calibrate calibrating.txt --welore-samples 40"
    import made_text

    Path("calibrating.txt").write_text("\n\n".join(made_text.stories(80, "calibrating")), encoding="utf-8")
    runs = {
        "plain": compress(f"{line} --welore-weighting none --out plain", model=mixture),
        "input": compress(f"{calibrated} --welore-weighting input --out input", model=mixture),
        "two-sided": compress(f"{calibrated} --out weighted", model=mixture),
    }
    lost = {name: math.log(run["perplexity_after"] / run["perplexity_before"]) for name, run in runs.items()}
    assert lost["two-sided"] < 0.5 * lost["plain"], lost
    assert lost["two-sided"] < lost["input"], lost
    assert all(0.38 < matrices(f"{run['run']}/model") / matrices(mixture) <= 0.4 for run in runs.values())


@pytest.mark.numerical
def test_layer_by_layer_and_expert_by_expert_give_the_model_of_a_whole_pass(mixture, compress, monkeypatch):
    from lowrank_cli.compress import decomposition

    line = "--welore-param-budget 0.6 --welore-calibrate stories.txt --welore-samples 8 --no-plots --json"
    whole = compress(f"{line} --out whole", model=mixture)
    monkeypatch.setattr(decomposition, "HELD", 200_000)
    parts = compress(f"{line} --out layers", model=mixture)
    assert parts["perplexity_after"] == pytest.approx(whole["perplexity_after"], rel=1e-4)


@pytest.mark.numerical
@pytest.mark.parametrize("weighting", ["two-sided", "input"])
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_squared_values_of_an_expert_are_its_part_of_the_loss(model_type, weighting, tmp_path):
    """Those of L^T W K by torch, for moments that tests/svd/test_routed.py looks at; N_e of N tokens count N_e / N."""
    torch.manual_seed(0)
    model = tiny_models.tiny(model_type).float().eval()
    linears = {name: m for name, m in find_targets(model).linears.items() if "experts" in name}
    windows, damping = [torch.randint(0, tiny_models.V, (2, 20))], 0.05
    two_sided = weighting == "two-sided"
    moments = calibration.collect(model, linears, windows, two_sided=two_sided)
    store = Store(tmp_path)
    decompose_all(model, linears, store, windows=windows, two_sided=two_sided, damping=damping, largest=lambda name: 4)
    for name, row in linears.items():
        for e, weight in enumerate(row.weight.detach().double()):
            own = moments[f"{name}.{e}"]
            # (out, in): GPT-OSS stores (in, out)
            weight = weight.mT if model_type == "gpt_oss" else weight
            for moment, side in ((own.input, "in"), (own.output, "out")):
                if moment is not None:
                    damped = moment + damping * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)
                    root = torch.linalg.cholesky(damped)
                    weight = weight @ root if side == "in" else root.mT @ weight
            expected = torch.linalg.svdvals(weight) * math.sqrt(own.share)
            found = store.values_of(name, row)[e]
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * float(expected[0]))


def test_pifa_is_of_linears_and_the_budget_is_exact(mixture, compress):
    result = compress(
        "--welore-param-budget 0.5 --welore-pifa --eval-tokens 0 --no-plots --json --out run", model=mixture
    )
    names = tensors("run/model")
    assert any(name.endswith("pivots.weight") for name in names)
    assert any(name.endswith("gate_up_proj.A") for name in names)
    orders = sum(t.numel() for name, t in names.items() if name.endswith(".order"))
    assert (matrices("run/model") - orders) / matrices(mixture) == pytest.approx(result["linear_parameter_share"])
    assert 0.48 < result["linear_parameter_share"] <= 0.5


def test_reports_have_stacks(mixture, compress):
    planned = compress("--dry-run --welore-param-budget 0.6", model=mixture)
    assert "4 x 96 x 32" in planned
    assert "4 x 32 x 48" in planned
    printed = compress("--welore-rank 50 --eval-tokens 0 --out run", model=mixture)
    assert "4 x 96 x 32" in printed
    rows = {row["name"]: row for row in json.loads(Path("run/ranks.json").read_text())}
    for layer in range(2):
        row = rows[f"model.layers.{layer}.mlp.experts.gate_up_proj"]
        assert (row["experts"], row["out"], row["in"], row["full_rank"]) == (4, 96, 32, 32)
        assert row["parameters_before"] == 4 * 96 * 32
        dense = row["role"] == "N-LRC"
        assert row["parameters_after"] == (4 * 96 * 32 if dense else 4 * row["rank"] * (96 + 32))
    assert rows["model.layers.0.mlp.gate"]["why"] == "is a router"
    assert not any("experts" in row["why"] for row in rows.values())
    # half of the values of all matrices, an expert's as much as a linear's
    counts = {n: (4 if r["experts"] else 1) for n, r in rows.items() if "rank" in r}
    cut = sum(counts[n] * (rows[n]["full_rank"] - rows[n]["rank"]) for n in counts)
    assert cut / sum(counts[n] * rows[n]["full_rank"] for n in counts) == pytest.approx(0.5, abs=0.005)
    assert Path("run/plots/rank_map.png").stat().st_size > 5000


@pytest.mark.numerical
def test_a_dump_has_a_spectrum_for_each_expert_and_their_mean(mixture, lowrank, compress):
    code, _, err = lowrank("svd-dump --published --out dump --model", mixture)
    assert code == 0, err
    found = load_file("dump/singular_values.safetensors")
    published = torch.load("dump/singular_values.pt", weights_only=True)
    lines = Path("dump/singular_values.csv").read_text().splitlines()
    table = {(row["name"], row["expert"]): row for row in csv.DictReader(lines)}
    model = AutoModelForCausalLM.from_pretrained(mixture)
    for leaf in ("gate_up_proj", "down_proj"):
        name = f"model.layers.1.mlp.experts.{leaf}"
        expected = torch.linalg.svdvals(model.get_parameter(name).detach().double())
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-4, atol=1e-6 * float(expected.max()))
        assert torch.equal(published[1][f"mlp.experts.{leaf}"], found[name])
        for expert, values in (*enumerate(expected), ("mean", expected.mean(0))):
            row = table[name, str(expert)]
            assert float(row["largest"]) == pytest.approx(float(values[0]), rel=1e-5)
            share = values / values.sum()
            assert float(row["effective_rank"]) == pytest.approx(float((-share * share.log()).sum().exp()), rel=1e-3)
    assert Path("dump/plots/singular_values.png").stat().st_size > 5000
    # a compression reads it, in both layouts, and refuses another model's
    for i, spectra in enumerate(("dump", "dump/singular_values.pt")):
        compress(f"--spectra {spectra} --welore-rank 40 --eval-tokens 0 --no-plots --out run{i}", model=mixture)
    assert all(torch.equal(t, tensors("run1/model")[name]) for name, t in tensors("run0/model").items())


@pytest.mark.numerical
def test_gradients_of_experts_are_those_of_the_mean_loss(mixture, lowrank, text):
    line = "svd-dump --gradients 2 --dataset stories.txt --max-length 64 --out dump --no-plots --model"
    code, _, err = lowrank(line, mixture)
    assert code == 0, err
    found = load_file("dump/gradient_singular_values.safetensors")
    from transformers import AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(mixture)
    ids = torch.tensor(AutoTokenizer.from_pretrained(mixture)(text.read_text()).input_ids[: 2 * 64]).reshape(2, 64)
    model(input_ids=ids, labels=ids).loss.backward()
    name = "model.layers.0.mlp.experts.gate_up_proj"
    expected = torch.linalg.svdvals(model.get_parameter(name).grad.double())
    torch.testing.assert_close(found[name].double(), expected, rtol=1e-3, atol=1e-4 * float(expected.max()))


@pytest.mark.parametrize("line", ["--method welore", "--method welore+galore --galore-rank 2"])
def test_low_rank_experts_train_and_nothing_else_does(line, mixture, compress, lowrank, news):
    compress("--welore-param-budget 0.5 --eval-tokens 0 --no-plots --out small", model=mixture)
    always = f"finetune --task text --max-length 64 --batch-size 4 --eval-tokens 500 --model small --dataset {news}"
    code, out, err = lowrank(f"{always} {line} --dry-run --json")
    assert code == 0, err
    parameters = sum(t.numel() for t in tensors("small/model").values())
    # and a few rotary frequencies
    assert json.loads(out)["weights_bytes"] == pytest.approx(4 * parameters, rel=1e-3)
    code, _, err = lowrank(f"{always} {line} --lr 0.01 --no-plots --max-steps 3 --out run")
    assert code == 0, err
    before, after = tensors("small/model"), tensors("run/model")
    assert set(before) == set(after)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    factors = {f"{n}.{p}" for n, m in low_rank_linears(load("small/model")).items() for p, _ in m.named_parameters()}
    assert moved == factors
    assert any(".experts." in name for name in moved)
