"""The adapter of magnitude and direction: its maths in float64, PEFT's DoRA beside it, and the way in and out."""

import copy
import json

import pytest
import torch
from double import BOUND, distance, exact_norm
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from lowrank_cli.methods.gradnormlorp import linear as weight_norm_linear
from lowrank_cli.methods.gradnormlorp.linear import WeightNormLinear
from lowrank_cli.models.targets import select

pytestmark = pytest.mark.numerical

SHAPE = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}  # fmt: skip


def small_llama(**more) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, attention_bias=True, **more)).double()


def layer_of(m=7, n=11, rank=3, *, bias=True, dtype=torch.float64, **more) -> WeightNormLinear:
    """A layer whose factors and magnitude are all away from where they begin."""
    torch.manual_seed(0)
    layer = WeightNormLinear(nn.Linear(n, m, bias=bias, dtype=dtype), rank, alpha=2.0 * rank, **more)
    with torch.no_grad():
        layer.lora_B.normal_()
        layer.lora_magnitude_vector.mul_(torch.rand(m, dtype=dtype) + 0.5)
    return layer


def reference(layer: WeightNormLinear) -> torch.Tensor:
    """The weight that the layer stands for, in full."""
    v = layer.base_layer.weight + layer.scaling * layer.lora_B @ layer.lora_A
    return layer.lora_magnitude_vector.unsqueeze(1) * v / v.norm(dim=1, keepdim=True)


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 300),
    rank=st.integers(1, 12),
    seed=st.integers(0, 9),
    scale=st.floats(0.01, 9),
)
def test_factored_norm_is_the_norm_of_the_rows(m, n, rank, seed, scale):
    torch.manual_seed(seed)
    layer = WeightNormLinear(nn.Linear(n, m, dtype=torch.float64), rank, alpha=scale)
    nn.init.normal_(layer.lora_B)
    v = layer.base_layer.weight + layer.scaling * layer.lora_B @ layer.lora_A
    assert torch.allclose(layer.norm(), v.norm(dim=1), rtol=1e-9)


def test_begins_as_the_linear_that_it_wraps():
    torch.manual_seed(0)
    base = nn.Linear(100, 63, dtype=torch.float64)
    x = torch.randn(5, 100, dtype=torch.float64)
    layer = WeightNormLinear(copy.deepcopy(base), 8, alpha=16.0)
    assert torch.allclose(layer(x), base(x), rtol=0, atol=1e-12)
    assert layer.lora_A.abs().max() <= 1 / 10
    assert not layer.lora_B.any()


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_those_of_finite_differences(bias):
    layer = layer_of(bias=bias)
    x = torch.randn(2, 5, 11, dtype=torch.float64, requires_grad=True)
    parameters = (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)
    names = ("lora_A", "lora_B", "lora_magnitude_vector")

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), x)

    assert torch.autograd.gradcheck(run, (x, *parameters))


def test_detached_norm_is_doras_gradient():
    layer = layer_of(detached=True)
    x, dy = torch.randn(9, 11, dtype=torch.float64), torch.randn(9, 7, dtype=torch.float64)
    layer(x).backward(dy)
    v = (layer.base_layer.weight + layer.scaling * layer.lora_B @ layer.lora_A).detach()
    grad, c, g = dy.mT @ x, v.norm(dim=1, keepdim=True), layer.lora_magnitude_vector.detach().unsqueeze(1)
    dv = g / c * grad
    assert torch.allclose(layer.lora_magnitude_vector.grad, (grad * v / c).sum(1))
    assert torch.allclose(layer.lora_B.grad, layer.scaling * dv @ layer.lora_A.mT)
    assert torch.allclose(layer.lora_A.grad, layer.scaling * layer.lora_B.mT @ dv)


def test_exact_gradient_of_the_direction_has_no_part_along_it():
    layer = layer_of()
    x, dy = torch.randn(9, 11, dtype=torch.float64), torch.randn(9, 7, dtype=torch.float64)
    layer(x).backward(dy)
    v = (layer.base_layer.weight + layer.scaling * layer.lora_B @ layer.lora_A).detach()
    grad, c, g = dy.mT @ x, v.norm(dim=1, keepdim=True), layer.lora_magnitude_vector.detach().unsqueeze(1)
    dv = g / c * (grad - (grad * v / c).sum(1, keepdim=True) * v / c)
    assert float((dv * v).sum(1).abs().max()) < 1e-12
    assert torch.allclose(layer.lora_B.grad, layer.scaling * dv @ layer.lora_A.mT)
    assert torch.allclose(layer.lora_A.grad, layer.scaling * layer.lora_B.mT @ dv)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_merged_is_the_same_function_and_unmerged_the_same_weight(dtype):
    torch.manual_seed(0)
    layer = WeightNormLinear(nn.Linear(63, 300, dtype=dtype), 4, alpha=8.0)
    with torch.no_grad():
        layer.lora_B.normal_(std=0.1)
        layer.lora_magnitude_vector.mul_(1.5).neg_()
    before, x = layer.base_layer.weight.clone(), torch.randn(5, 63, dtype=dtype)
    adapted = layer(x)
    layer.merge_()
    layer.merge_()
    limit = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    assert torch.allclose(layer(x), adapted, rtol=limit, atol=limit)
    assert not torch.equal(before, layer.base_layer.weight)
    layer.unmerge_()
    layer.unmerge_()
    assert torch.allclose(layer.base_layer.weight, before, rtol=limit, atol=limit)
    assert torch.allclose(layer(x), adapted, rtol=limit, atol=limit)


def test_a_weight_behind_a_magnitude_of_zero_is_not_given_back():
    layer = layer_of()
    layer.lora_magnitude_vector.data[2] = 0
    layer.merge_()
    assert not layer.base_layer.weight[2].any()
    with pytest.raises(ValueError, match="1 rows have a magnitude of zero"):
        layer.unmerge_()


def test_a_row_of_zeros_stays_finite():
    base = nn.Linear(8, 3, bias=False)
    base.weight.data[1] = 0
    layer = WeightNormLinear(base, 2, alpha=2.0)
    y = layer(torch.randn(4, 8))
    y.square().sum().backward()
    assert torch.isfinite(y).all()
    assert all(bool(torch.isfinite(p.grad).all()) for p in layer.parameters() if p.requires_grad)


def test_outside_training_the_scale_is_computed_once_for_each_step(monkeypatch):
    layer, calls = layer_of(), []
    original = WeightNormLinear.norm
    monkeypatch.setattr(WeightNormLinear, "norm", lambda self: (calls.append(1), original(self))[1])
    x = torch.randn(4, 11, dtype=torch.float64)
    with torch.no_grad():
        first = layer(x)
        layer(x)
        assert len(calls) == 1
        layer.lora_A.mul_(2)
        second = layer(x)
    assert len(calls) == 2
    assert not torch.equal(first, second)
    assert torch.allclose(second, x @ reference(layer).mT + layer.base_layer.bias)


def test_dropout_is_of_the_adapters_input_in_training_only():
    layer = layer_of(dropout=0.5)
    x = torch.randn(4, 11, dtype=torch.float64)
    exact = x @ reference(layer).mT + layer.base_layer.bias
    assert not torch.allclose(layer(x), exact)
    assert torch.allclose(layer.eval()(x), exact)


def test_keeps_three_tensors_for_backward():
    layer = layer_of(m=40, n=60, rank=4, dtype=torch.float32)
    x = torch.randn(500, 60)
    kept = {}

    def pack(tensor):
        if not any(tensor.data_ptr() == p.data_ptr() for p in layer.parameters()):
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    # x, x A^T and the product before it is scaled; the rest is of the weight's sides and the rank
    tokens = 4 * 500 * (60 + 4 + 40)
    assert tokens <= sum(kept.values()) <= tokens + 4 * 12 * (40 + 60) * 4


def dora(model, **more):
    names = sorted(select(model, None))
    config = {"r": 4, "lora_alpha": 8.0, "lora_dropout": 0.0, "use_dora": True, "target_modules": names}
    return get_peft_model(model, LoraConfig(**config | more))


def pair_with_peft(detached=True):
    """PEFT's DoRA and ours on the same weights, with the same factors."""
    theirs, ours = dora(small_llama()), small_llama()
    weight_norm_linear.wrap(ours, select(ours, None), rank=4, alpha=8.0, dropout=0.0, detached=detached)
    for name, layer in weight_norm_linear.layers(ours).items():
        peft = theirs.base_model.model.get_submodule(name)
        layer.lora_A.data.copy_(peft.lora_A["default"].weight)
        layer.lora_B.data.copy_(peft.lora_B["default"].weight)
        assert torch.allclose(layer.lora_magnitude_vector, peft.lora_magnitude_vector["default"].weight, rtol=1e-6)
    return theirs, ours


def batch(step: int) -> torch.Tensor:
    return torch.randint(0, 61, (2, 16), generator=torch.Generator().manual_seed(step))


def assert_same_logits(model, wanted) -> None:
    # norms are in float32
    assert float((model(batch(0)).logits - wanted).detach().norm()) < BOUND * float(wanted.detach().norm())


def test_without_projection_it_is_pefts_dora(monkeypatch):
    monkeypatch.setattr(LlamaRMSNorm, "forward", exact_norm)
    theirs, ours = pair_with_peft()
    start = tensors_of(ours)
    optimizers = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0, eps=1e-5)
        for m in (theirs, ours)
    ]
    for step in range(20):
        for model, optimizer in zip((theirs, ours), optimizers, strict=True):
            loss = model(input_ids=batch(step), labels=batch(step)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    peft = {}
    for name in weight_norm_linear.layers(ours):
        layer = theirs.base_model.model.get_submodule(name)
        peft[f"{name}.lora_A"], peft[f"{name}.lora_B"] = (x["default"].weight for x in (layer.lora_A, layer.lora_B))
        peft[f"{name}.lora_magnitude_vector"] = layer.lora_magnitude_vector["default"].weight
    with torch.no_grad():
        # the model's loss is in float32, whose rounding Adam divides by no less than eps
        assert distance(tensors_of(ours), peft, start) < BOUND


def tensors_of(model) -> dict[str, torch.Tensor]:
    """Return copies of the factors and magnitudes."""
    names = ("lora_A", "lora_B", "lora_magnitude_vector")
    return {
        f"{name}.{key}": getattr(layer, key).detach().clone()
        for name, layer in weight_norm_linear.layers(model).items()
        for key in names
    }


def disturb(model) -> None:
    """Move every factor and magnitude away from where it began."""
    torch.manual_seed(3)
    for layer in weight_norm_linear.layers(model).values():
        layer.lora_B.data.normal_(std=0.3)
        layer.lora_magnitude_vector.data.mul_(torch.rand(layer.lora_magnitude_vector.shape) + 0.5)


def test_peft_loads_what_is_saved(tmp_path):
    model = small_llama()
    weight_norm_linear.wrap(model, select(model, None), rank=4, alpha=8.0, dropout=0.1, detached=False)
    disturb(model)
    weight_norm_linear.save(model, tmp_path, "some/base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["use_dora"]
    assert config["base_model_name_or_path"] == "some/base"
    assert config["task_type"] == "CAUSAL_LM"
    loaded = PeftModel.from_pretrained(small_llama(), tmp_path).eval()
    model.eval()
    assert_same_logits(loaded.double(), model(batch(0)).logits)


def test_file_has_the_names_that_peft_writes(tmp_path):
    from safetensors.torch import load_file

    theirs, ours = pair_with_peft()
    theirs.save_pretrained(tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    weight_norm_linear.save(ours, tmp_path / "ours", "")
    a, b = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("theirs", "ours"))
    assert {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}


def test_merge_leaves_a_plain_model_with_the_same_logits():
    model = small_llama().eval()
    names = [name for name, _ in model.named_modules()]
    weight_norm_linear.wrap(model, select(model, None), rank=4, alpha=8.0, dropout=0.1, detached=False)
    disturb(model)
    adapted = model(batch(0)).logits
    weight_norm_linear.merge(model)
    assert [name for name, _ in model.named_modules()] == names
    assert_same_logits(model, adapted)


def test_gpt2s_transposed_linears(tmp_path):
    torch.manual_seed(0)
    shape = {"vocab_size": 61, "n_positions": 32, "n_embd": 24, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**shape)).double().eval()
    plain = copy.deepcopy(model)
    weight_norm_linear.wrap(model, select(model, None), rank=4, alpha=8.0, dropout=0.0, detached=False)
    assert any(isinstance(layer.base_layer, Conv1D) for layer in weight_norm_linear.layers(model).values())
    assert_same_logits(model, plain(batch(0)).logits)
    disturb(model)
    adapted = model(batch(0)).logits
    weight_norm_linear.save(model, tmp_path, "")
    assert_same_logits(PeftModel.from_pretrained(plain, tmp_path).eval().double(), adapted)
    weight_norm_linear.merge(model)
    assert_same_logits(model, adapted)


def test_a_base_in_four_bits():
    import bitsandbytes

    torch.manual_seed(0)
    dense = nn.Linear(64, 96)
    base = bitsandbytes.nn.Linear4bit(64, 96, compute_dtype=torch.float32, quant_type="nf4")
    base.load_state_dict(dense.state_dict())
    base = base.to("cpu")
    layer = WeightNormLinear(base, 4, alpha=8.0)
    weight = bitsandbytes.functional.dequantize_4bit(base.weight.data, base.weight.quant_state)  # (96, 64)
    assert torch.allclose(layer.base_square, weight.float().square().sum(1), rtol=1e-5)
    layer.lora_B.data.normal_()
    x = torch.randn(5, 64)
    v = weight + layer.scaling * layer.lora_B @ layer.lora_A
    w = layer.lora_magnitude_vector.unsqueeze(1) * v / v.norm(dim=1, keepdim=True)
    y = layer(x)
    assert torch.allclose(y, x @ w.mT + dense.bias, atol=1e-4)
    y.sum().backward()
    assert layer.lora_A.grad.any()
    with pytest.raises(ValueError, match="quantised"):
        layer.merge_()
    plain = layer.to_plain()
    assert type(plain) is nn.Linear
    assert torch.allclose(plain(x), y, atol=1e-4)


def test_half_precision_weights_get_float32_factors():
    layer = WeightNormLinear(nn.Linear(64, 32, dtype=torch.bfloat16), 4, alpha=8.0)
    assert {p.dtype for p in layer.parameters() if p.requires_grad} == {torch.float32}
    y = layer(torch.randn(3, 64, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.lora_B.grad.dtype == torch.float32
