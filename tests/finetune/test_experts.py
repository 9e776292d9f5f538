"""Adapters on mixtures of experts: what they adapt, what they leave and say, what PEFT loads and a merge writes."""

import json
from pathlib import Path

import pytest
import torch
from made_text import articles
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS, tiny
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from watched import SEEN, watch

from lowrank_cli import methods
from lowrank_cli.config import resolve
from lowrank_cli.errors import UsageError
from lowrank_cli.models import adapters
from lowrank_cli.models.load import load_weights
from lowrank_cli.models.source import place
from lowrank_cli.train.setup import apply_methods

METHODS = {"lora": {}, "dora": {}, "vblora": {"init_vector_bank_bound": 0.5}, "gradnormlorp": {"mode": "adapter"}}
SIZES = {"hidden_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 128}
# ends of what no method acts on: routers, a gate of one output, a convolution, and the biases of experts
NO_TARGETS = ("mlp.gate.weight", "router.weight", "expert_gate.weight", "conv1d.weight", "_bias")
# names of linears that PEFT takes for those of experts, and where
TAKEN = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
HAS_TAKEN = ("deepseek_v3", "qwen3_next")
FAMILIES = [
    "deepseek_v3",
    *(pytest.param(name, marks=pytest.mark.slow)
      for name in ("mixtral", "qwen3_moe", "gpt_oss", "qwen3_next", "llama4_text")),
]  # fmt: skip


def expected(model_type: str, method: str, shapes: dict[str, tuple[int, ...]]) -> set[str]:
    """Return the names of the weights that a method adapts, by names and shapes alone."""
    matrices = {n for n, s in shapes.items() if ".layers." in n and len(s) > 1 and not n.endswith(NO_TARGETS)}
    experts = {n for n in matrices if len(shapes[n]) == 3}
    assert experts
    if method == "lora":
        return matrices
    taken = {n for n in matrices if n.endswith(TAKEN)} if model_type in HAS_TAKEN and method != "vblora" else set()
    assert bool(taken) == (model_type in HAS_TAKEN and method != "vblora")
    return matrices - experts - taken


@pytest.fixture(scope="module")
def base(request, tmp_path_factory, stories) -> Path:
    """Return the folder of a tiny mixture of a family, with a tokenizer."""
    folder, kind = tmp_path_factory.mktemp("base") / request.param, request.param
    tokenizer = AutoTokenizer.from_pretrained(stories)
    layers = {"num_hidden_layers": 4} if kind == "qwen3_next" else {}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **CONFIGS[kind] | SIZES | {"vocab_size": len(tokenizer)} | layers)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "t.jsonl"
    path.write_text("".join(json.dumps(a) + "\n" for a in articles(30, "news")), encoding="utf-8")
    return path


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(SEEN, use_cache=False).logits.double()


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Say whether logits differ by roundings of 24 bits only: 1e-7 each, of some dozens of products in a row."""
    return bool((a - b).abs().max() < 1e-5 * b.abs().max())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("base", FAMILIES, indirect=True)
def test_an_adapter_is_on_what_was_chosen_and_loads_and_merges(base, method, lowrank, text, monkeypatch):
    line = f"finetune --task text --method {method} --max-steps 3 --max-length 64 --batch-size 4 --lr 0.05 --no-plots"
    # most of these models are experts, which not every method has a form for
    line += " --total-batch-size 4 --eval-tokens 200 --no-keep-best --seed 1 --allow-partial"
    if method == "gradnormlorp":
        line += " --gradnormlorp-adapter-dropout 0"
    seen: dict = {}
    with monkeypatch.context() as patch:
        watch(patch.setattr, seen)
        code, _, err = lowrank(line, "--model", base, "--dataset", text, "--out", "adapter")
    assert code == 0, err
    trained, start = seen["logits"].double(), AutoModelForCausalLM.from_pretrained(base)
    assert not same(logits(start), trained)
    before = {name: p.clone() for name, p in start.named_parameters()}
    # plain PEFT on the plain model, and this package's own reader
    assert same(logits(PeftModel.from_pretrained(start, "adapter/model")), trained)
    assert same(logits(load_weights(place("adapter", offline=True), torch.float32)), trained)
    code, _, err = lowrank(f"{line} --merge", "--model", base, "--dataset", text, "--out", "merged")
    assert code == 0, err
    merged = AutoModelForCausalLM.from_pretrained("merged/model")
    assert same(logits(merged), trained)
    after = dict(merged.named_parameters())
    assert before.keys() == after.keys()
    shapes = {name: tuple(p.shape) for name, p in before.items()}
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed == expected(base.name, method, shapes)


def made(method: str, **settings) -> methods.Method:
    """Return a method of `lowrank finetune`."""
    kind = methods.get(method)
    found = kind(kind.Config(**METHODS[method] | settings))
    found.command = "finetune"
    return found


@pytest.mark.parametrize("method", ["dora", "vblora", "gradnormlorp"])
def test_what_is_left_is_said_with_its_share_and_alone_refused(method, capsys):
    model = tiny("mixtral")
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    left = expected("mixtral", "lora", shapes) - expected("mixtral", method, shapes)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    share = 100 * sum(sizes[n] for n in left) / sum(size for n, size in sizes.items() if ".layers." in n)
    made(method).wrap(model)
    said = [line for line in capsys.readouterr().err.splitlines() if " leaves " in line]
    assert len(said) == 1
    assert f"leaves 4 tensors of experts ({share:.3g} % of the layers' parameters) as they are: PEFT has no" in said[0]
    for patterns in ("experts", "q_proj,gate_up_proj"):
        with pytest.raises(UsageError, match="adapts nothing that '(experts|gate_up_proj)' names: PEFT has no") as why:
            made(method, target_modules=patterns).wrap(tiny("mixtral"))
        assert why.value.hint == "name others: k_proj, o_proj, q_proj, v_proj"


def test_dropout_leaves_the_experts_and_says_so(capsys):
    model = tiny("mixtral")
    made("lora", dropout=0.1).wrap(model)
    assert "PEFT has no dropout for tensors of experts: without it they are adapted" in capsys.readouterr().err
    assert {p.dim() for name, p in model.named_parameters() if p.requires_grad} == {2}
    assert not any("experts" in name for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("patterns", "ends"),
    [
        ("down_proj", ("experts.down_proj", "mlp.down_proj.weight", "shared_experts.down_proj.weight")),
        ("gate_proj", ("gate_proj.weight",)),
        ("*.experts.gate_up_proj", ("experts.gate_up_proj",)),
        ("o_proj,layers.1.mlp.experts", ("o_proj.weight", "1.mlp.experts.gate_up_proj", "1.mlp.experts.down_proj")),
    ],
)
def test_patterns_choose_among_linears_and_experts(patterns, ends):
    model = tiny("deepseek_v3")
    names = {name for name, _ in model.named_parameters() if name.endswith(ends)}
    start = {name: p.clone() for name, p in model.named_parameters()}
    lora = made("lora", target_modules=patterns)
    lora.wrap(model)
    shaken(model)
    lora.merge(model)
    assert {name for name, p in model.named_parameters() if not p.equal(start[name])} == names


def shaken(model) -> None:
    """Give everything that trains another value."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn(p.shape, generator=draw, dtype=p.dtype)


def test_another_set_than_the_chosen_one_stops_the_run(monkeypatch):
    # as if a PEFT of another day took other names for those of experts
    monkeypatch.setattr(adapters, "_taken_for_experts", lambda model: set())
    with pytest.raises(UsageError, match="PEFT adapts other weights of this model than the chosen ones: 6 fewer") as e:
        made("lora").wrap(tiny("deepseek_v3"))
    assert "mlp.down_proj.weight" in e.value.message
    assert "chosen and adapted are: down_proj, gate_up_proj, kv_a_proj_with_mqa" in e.value.hint


@pytest.mark.parametrize("method", METHODS)
def test_a_linear_whose_weight_the_model_takes_out_is_left(method, capsys):
    model = tiny("jamba")
    start = {name: p.clone() for name, p in model.named_parameters()}
    one = made(method)
    one.wrap(model)
    assert "the model multiplies by their weights without calling them" in capsys.readouterr().err
    shaken(model)
    one.after_step(model, 1)
    trained = logits(model)
    one.merge(model)
    # the norms of these models go through 24 bits
    assert same(logits(model), trained)
    moved = {name.rpartition("layers.")[2] for name, p in model.named_parameters() if not p.equal(start[name])}
    assert not any("dt_proj" in name for name in moved)
    assert any("mamba.x_proj" in name for name in moved)


def applied(method: str, settings: dict | None = None, **own) -> list[dict]:
    """Return the groups of methods on a mixture of experts."""
    return apply_methods(
        resolve("finetune", {"method": method, "model": "m"} | (settings or {}), own), tiny("mixtral")
    )[1]


@pytest.mark.parametrize("projecting", ["galore", "fira", "apollo"])
def test_projections_act_on_the_factors_of_experts(projecting):
    roles = {name: group["role"] for group in applied(f"lora+{projecting}") for name, _ in group["params"]}
    # two nested wrappers in each of two layers, with two factors each
    assert len([name for name in roles if "experts" in name]) == 8
    assert set(roles.values()) == {projecting}


def test_velora_has_no_input_to_keep_of_the_factors_of_experts():
    with pytest.raises(UsageError, match="--velora-layers experts: this model has no trained linear experts"):
        applied("lora+velora", velora={"layers": "experts"})


def test_factors_of_experts_are_of_the_layers():
    with pytest.raises(UsageError, match="--lr-other is for what trains outside the layers' linears"):
        applied("lora", {"lr_other": 1e-3})


def test_a_file_without_some_of_the_adapters_tensors_is_no_adapter(tmp_path):
    model = tiny("mixtral").float()
    model.save_pretrained(tmp_path / "base")
    lora = made("lora")
    lora.wrap(model)
    (tmp_path / "adapter").mkdir()
    lora.save_adapter(model, tmp_path / "adapter", str(tmp_path / "base"))
    file = tmp_path / "adapter" / adapters.WEIGHTS
    kept = {name: t for name, t in load_file(file).items() if "experts.base_layer" not in name}
    save_file(kept, file)
    with pytest.raises(UsageError, match="Found missing adapter keys"):
        load_weights(place(str(tmp_path / "adapter"), offline=True), torch.float32)
