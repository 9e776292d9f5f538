"""GradNormLoRP as a method: what it tags, what it refuses, and the promises that GaLore keeps too."""

import json
from pathlib import Path

import pytest
import torch
from double import BOUND, distance, exact_norm, use_double
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from watched import watch

from lowrank_cli import methods, optim
from lowrank_cli.errors import UsageError
from lowrank_cli.methods.gradnormlorp.linear import layers
from lowrank_cli.settings.training import OptimConfig
from lowrank_cli.train.finish import optimizer_bytes

pytestmark = pytest.mark.numerical

NAME = "gradnormlorp"
LINE = f"pretrain --method {NAME} --gradnormlorp-rank 8"


def small_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 48, "intermediate_size": 100, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=97, num_hidden_layers=2, max_position_embeddings=64, **shape))


def method_of(command="pretrain", **settings) -> methods.Method:
    method = methods.get(NAME)(methods.get(NAME).Config(**settings))
    method.command = command
    return method


def built(model, command="finetune", optimizer="adamw", **settings):
    """The method with its groups and optimizer, as a run builds them."""
    method, config = method_of(command, **settings), OptimConfig(optimizer=optimizer, lr=0.01)
    method.wrap(model)
    groups = method.param_groups(model, optim.base_groups(model, config))
    # the optimizer rewrites the groups that it gets
    return method, groups, optim.build(config, [dict(group) for group in groups])


# ---- full mode


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "optimizer", ["adamw", pytest.param("adamw8bit", marks=slow), pytest.param("adafactor", marks=slow)]
)
def test_per_layer_in_backward_gives_the_plain_update(optimizer, lowrank, tiny_flags, monkeypatch):
    use_double(monkeypatch.setattr)
    line = f"{LINE} --gradnormlorp-update-proj-gap 4 --max-steps 6 --optimizer {optimizer} --total-batch-size 16"
    seen = [{}, {}]
    for i, more in enumerate(["--batch-size 16", "--batch-size 4 --per-layer --gradnormlorp-in-backward"]):
        with monkeypatch.context() as patch:
            watch(patch.setattr, seen[i])
            code, _, err = lowrank(line, *tiny_flags, *more.split(), "--out", f"run{i}")
        assert code == 0, err
    plain, other = seen
    assert distance(other["end"], plain["end"], plain["start"]) < BOUND


@pytest.mark.parametrize(
    "more",
    [
        "--per-layer --optimizer adamw8bit --gradnormlorp-stagger --gradnormlorp-lazy-refresh",
        pytest.param(
            "--gradnormlorp-in-backward --gradnormlorp-refresh subspace --gradnormlorp-moments rotate", marks=slow
        ),
        pytest.param("--gradnormlorp-proj-type full --gradnormlorp-moments reset --optimizer adafactor", marks=slow),
        pytest.param("--dtype bfloat16 --stochastic-rounding --per-layer --gradnormlorp-detached-norm", marks=slow),
    ],
    ids=["8bit", "subspace", "adafactor", "bfloat16"],
)
def test_resumed_in_the_middle_of_a_gap_is_bit_identical(more, lowrank, tiny_flags):
    line = f"{LINE} --gradnormlorp-update-proj-gap 3 --max-steps 8 --total-batch-size 8 --out whole"
    code, _, err = lowrank(f"{line} {more}", *tiny_flags, "--save-every", 4)
    assert code == 0, err
    whole = load_file("whole/model/model.safetensors")
    code, _, err = lowrank("pretrain --resume whole/checkpoints/step-000004")
    assert code == 0, err
    again = load_file("whole/model/model.safetensors")
    assert all(whole[key].equal(again[key]) for key in whole)


def test_rows_of_the_saved_model_have_the_trained_magnitudes(lowrank, tiny_flags):
    code, _, err = lowrank(f"{LINE} --max-steps 3 --out run", *tiny_flags)
    assert code == 0, err
    weights = load_file("run/model/model.safetensors")
    state = load_file("run/checkpoints/step-000003/optimizer.safetensors")
    magnitudes = {key.rpartition("|")[0]: value for key, value in state.items() if key.endswith("|magnitude")}
    assert len(magnitudes) == 14
    for name, magnitude in magnitudes.items():
        # norms of up to 88 squares in float32, 2^-24 each
        assert torch.allclose(weights[name].norm(dim=1), magnitude.abs(), rtol=1e-5)


def test_velora_keeps_the_linears_that_it_wraps(lowrank, tiny_flags):
    code, _, err = lowrank("pretrain --method velora+gradnormlorp --max-steps 1 --out run", *tiny_flags)
    assert code == 0, err
    roles = {row["name"].split(".")[-2]: row["role"] for row in json.loads(Path("run/targets.json").read_text())}
    assert roles["down_proj"] == "velora"
    assert roles["q_proj"] == NAME


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--gradnormlorp-mode adapter", "those of a pretraining are random"),
        ("--gradnormlorp-mode both", "auto, full, adapter"),
        ("--gradnormlorp-moments rotate --optimizer adafactor", "--gradnormlorp-moments rotate"),
        ("--gradnormlorp-magnitude-scale 0", "larger than 0"),
    ],
)
def test_bad_settings_are_named(flags, message, lowrank, tiny_flags):
    code, _, err = lowrank(f"{LINE} {flags}", *tiny_flags)
    assert code == 2
    assert message in " ".join(err.split())


def test_a_rank_over_a_matrix_is_clamped_with_a_warning(lowrank, tiny_flags):
    code, _, err = lowrank(f"{LINE} --gradnormlorp-rank 64 --max-steps 1", *tiny_flags)
    assert code == 0, err
    assert "rank 64 is larger than some matrices" in err


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("model", ["llama-60m", "llama-7b"])
def test_state_of_a_paper_sized_model_is_galores_and_the_magnitudes(model, optimizer):
    hidden, feed, layer_count = {"llama-60m": (512, 1376, 8), "llama-7b": (4096, 11008, 32)}[model]
    shapes = layer_count * [*4 * [(hidden, hidden)], *2 * [(feed, hidden)], (hidden, feed)]
    ours, galore = method_of(rank=128), methods.get("galore")(methods.get("galore").Config(rank=128))
    extra = sum(
        ours.memory(s, optimizer=optimizer).states - galore.memory(s, optimizer=optimizer).states for s in shapes
    )
    one = 8 + (2 + 8 / 256 if optimizer == "adamw8bit" and hidden >= 4096 else 8)
    rows = sum(m for m, _ in shapes)
    assert extra <= 16 * rows
    if model == "llama-7b" or optimizer == "adamw":
        assert extra == pytest.approx(one * rows)


# ---- adapter mode


def batch(step: int) -> torch.Tensor:
    return torch.randint(0, 97, (2, 16), generator=torch.Generator().manual_seed(step))


def train(model, optimizer, steps) -> list[float]:
    losses = []
    for step in steps:
        loss = model(input_ids=batch(step % 2), labels=batch(step % 2)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize(
    ("optimizer", "proj_type"),
    [
        ("adamw", "full"),
        ("adamw8bit", "std"),
        ("adafactor", "full"),
        *(pytest.param(*case, marks=slow) for case in [("adamw", "std"), ("adamw8bit", "full"), ("adafactor", "std")]),
    ],
)
def test_adapter_learns_and_only_it_changes(optimizer, proj_type):
    model = small_llama()
    before = {name: p.clone() for name, p in model.named_parameters()}
    more = {"adapter_dropout": 0.0, "update_proj_gap": 10, "scale": 1.0}
    _, groups, opt = built(model, optimizer=optimizer, proj_type=proj_type, **more)
    losses = train(model, opt, range(60))
    whole = small_llama()
    unprojected = train(whole, built(whole, optimizer=optimizer, rank=8, **more)[2], range(60))
    # a random model can only learn so much beside its frozen weights; half the rank is worth more than half of it
    assert losses[0] - losses[-1] > 0.5 * (unprojected[0] - unprojected[-1]) > 0.2
    now = {name.replace(".base_layer", ""): p for name, p in model.named_parameters()}
    assert all(torch.equal(now[name], before[name]) for name in before)
    trained = {name for group in groups for name, _ in group["params"]}
    assert trained == {f"{n}.{leaf}" for n in layers(model) for leaf in ("lora_A", "lora_B", "lora_magnitude_vector")}


def test_factors_are_projected_two_sided_with_a_rank_of_their_own():
    model = small_llama()
    _, groups, opt = built(model, adapter_rank=8, rank=3)
    train(model, opt, range(3))
    layer = model.model.layers[0].self_attn.q_proj
    for p in (layer.lora_A, layer.lora_B):
        assert opt.state[p]["exp_avg"].shape == (3, 3)
        assert opt.state[p]["basis_left"].shape == (p.shape[0], 3)
        assert opt.state[p]["basis_right"].shape == (p.shape[1], 3)
    assert opt.state[layer.lora_magnitude_vector]["exp_avg"].shape == (48,)
    assert {g["rank"] for g in groups if "rank" in g} == {3}
    assert next(g["scale"] for g in groups if "rank" in g) == 4.0
    assert next(g["update_proj_gap"] for g in groups if "rank" in g) == 500


def test_a_projection_that_would_only_rotate_is_left_out_with_a_line(capsys):
    model = small_llama()
    _, groups, opt = built(model, adapter_rank=8, rank=8)
    assert "28 factors of the adapter are not projected" in " ".join(capsys.readouterr().err.split())
    assert not [g for g in groups if "rank" in g]
    assert all("why" in g for g in groups)
    train(model, opt, range(2))


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "adafactor"])
def test_estimate_of_an_adapter_is_what_its_optimizer_holds(optimizer):
    model = small_llama()
    method, groups, opt = built(model, optimizer=optimizer)
    train(model, opt, range(2))
    estimate = sum(
        method.memory(tuple(p.shape), 4, optimizer, group).states for group in groups for _, p in group["params"]
    )
    assert estimate == pytest.approx(optimizer_bytes(opt), rel=0.05)


def test_dora_with_the_projection_off_is_the_detached_adapter(monkeypatch):
    """Rank over the factors and a detached norm: plain AdamW on DoRA, which its own test compares with PEFT."""
    monkeypatch.setattr(LlamaRMSNorm, "forward", exact_norm)
    model, plain = small_llama().double(), small_llama().double()
    _, _, opt = built(model, rank=8, detached_norm=True, adapter_dropout=0.0)
    torch.manual_seed(1)
    method_of("finetune", detached_norm=True, adapter_dropout=0.0).wrap(plain)
    for mine, other in zip(layers(model).values(), layers(plain).values(), strict=True):
        other.lora_A.data.copy_(mine.lora_A)
    start = trained(plain)
    reference = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=0.01, weight_decay=0.0)
    train(model, opt, range(5))
    train(plain, reference, range(5))
    assert distance(trained(model), trained(plain), start) < BOUND


def trained(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_merge_leaves_a_plain_model():
    model = small_llama().double()
    method, _, opt = built(model, adapter_dropout=0.0)
    train(model, opt, range(3))
    model.eval()
    adapted = model(batch(0)).logits.detach()
    method.merge(model)
    assert not layers(model)
    assert float((model(batch(0)).logits - adapted).norm()) < BOUND * float(adapted.norm())


def test_adapter_mode_is_for_finetuning_alone():
    assert method_of("finetune").is_adapter
    assert not method_of("pretrain").is_adapter
    assert not method_of("finetune", mode="full").is_adapter


def test_targets_that_the_model_has_not_are_named():
    with pytest.raises(UsageError, match="'c_attn' matches no linear"):
        built(small_llama(), target_modules="c_attn")
