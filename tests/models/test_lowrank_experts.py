"""Low-rank experts: the architecture's own forward multiplies by their factors, and models with them save and load."""

import json

import pytest
import tiny_models
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from lowrank_cli.models.lowrank_experts import LowRankStack, replace_stack
from lowrank_cli.models.lowrank_linear import low_rank_linears
from lowrank_cli.models.lowrank_quantizer import densify, mark
from lowrank_cli.models.targets import table

FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "llama4_text", "granitemoe", "phimoe", "qwen2_moe")
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
RANK = 3


def compressed(model_type: str, layers: str = ""):
    """A model in float64 whose experts are random factors, or those of layers whose names have a part."""
    torch.manual_seed(0)
    model = tiny_models.tiny(model_type).eval()
    for row in table(model):
        if row.weight.dim() == 3 and not row.why and layers in row.name:
            stack = replace_stack(model, row.name, RANK)
            stack.assign(*(torch.randn_like(p) / 3 for p in stack.parameters()))
    mark(model)
    return model


def run(model, length: int = 24):
    ids = torch.arange(2 * length).reshape(2, length) % tiny_models.V
    return model(input_ids=ids, labels=ids)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return run(model).logits


def dense(model):
    """The same with the product of the factors in their place."""
    found = {name: stack for name, stack in low_rank_linears(model).items() if isinstance(stack, LowRankStack)}
    for name, stack in found.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, torch.nn.Parameter((stack.A @ stack.B).detach()))
    assert found
    return model


class Products(TorchDispatchMode):
    """Collects the operations that make the product of an expert's factors, or its transpose."""

    def __init__(self, model):
        super().__init__()
        stacks = [m for m in low_rank_linears(model).values() if isinstance(m, LowRankStack)]
        matrices = [one for m in stacks for one in (m.A @ m.B).detach()]
        self.products, self.made = matrices + [one.mT for one in matrices], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for made in tree_leaves(out):
            if isinstance(made, torch.Tensor) and made.dim() > 1 and made.is_floating_point():
                likely = [p for p in self.products if p.shape == made.shape[-2:]]
                parts = made.detach().reshape(-1, *made.shape[-2:]) if likely else ()
                self.made += [str(func) for one in parts for p in likely if torch.allclose(one.to(p.dtype), p)]
        return out


@pytest.mark.numerical
@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_familys_own_forward_multiplies_by_the_factors_and_never_makes_the_product(model_type):
    model = compressed(model_type)
    with Products(model) as seen:
        out = run(model)
        out.loss.backward()
    assert not seen.made
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert all(float(grads[f"{name}.{part}"].norm()) > 0 for name in low_rank_linears(model) for part in "AB")
    expected = logits(dense(model))
    # float64, two products for one
    torch.testing.assert_close(out.logits, expected, rtol=1e-9, atol=1e-9)


def test_the_check_for_products_sees_one():
    model = compressed("mixtral")
    stack = model.model.layers[1].mlp.experts.down_proj
    with Products(model) as seen:
        stack[2].mT.contiguous()
    assert seen.made


@pytest.mark.numerical
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_every_implementation_gives_the_same(model_type):
    model = compressed(model_type)
    expected = logits(model)
    for implementation in IMPLEMENTATIONS:
        model.set_experts_implementation(implementation)
        with Products(model) as seen:
            found = logits(model)
        assert not seen.made
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.numerical
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_grouped_products_take_any_rank(model_type, dtype):
    """Their kernels want rows of multiples of 16 bytes; a rank of 3 has none. The routing is given."""
    model = compressed(model_type)
    experts = model.model.layers[1].mlp.experts
    x, weights = torch.randn(12, 16, dtype=torch.float64), torch.rand(12, 2, dtype=torch.float64)
    chosen = torch.tensor([[0, 3], [3, 1], [1, 0]] * 4)  # expert 2 gets no token

    def outcome():
        model.zero_grad()
        kind = experts.down_proj.A.dtype
        y = experts(x.to(kind), chosen, weights.to(kind))
        y.square().sum().backward()
        return [y.detach(), *(p.grad for p in experts.parameters())]

    exact = outcome()
    model.to(dtype).set_experts_implementation("grouped_mm")
    # sums of a few dozen products in the dtype, five after one another
    near = 20 * torch.finfo(dtype).eps
    for found, expected in zip(outcome(), exact, strict=True):
        assert float((found.double() - expected).norm() / expected.norm()) < near


@pytest.mark.numerical
def test_whatever_else_is_done_with_it_is_done_with_the_product():
    stack = LowRankStack((3, 4, 5), 2, dtype=torch.float64)
    stack.assign(torch.randn(3, 4, 2, dtype=torch.float64), torch.randn(3, 2, 5, dtype=torch.float64))
    whole, x = (stack.A @ stack.B).detach(), torch.randn(3, 5, 6, dtype=torch.float64)
    pairs = [
        (torch.einsum("eij,ejk->eik", stack, x), torch.einsum("eij,ejk->eik", whole, x)),
        (stack.view(3, 20), whole.view(3, 20)),
        (torch.cat([stack, stack]), torch.cat([whole, whole])),
        (stack[1, :2], whole[1, :2]),
        (stack[1][:, 3], whole[1][:, 3]),
        (stack[0] * 2.0, whole[0] * 2.0),
        (1.0 - stack, 1.0 - whole),
        (whole + stack, 2 * whole),
        (stack.permute(0, 2, 1), whole.permute(0, 2, 1)),
        (stack @ x, whole @ x),
        (x.mT @ stack.mT, x.mT @ whole.mT),
        (x.mT[0] @ stack[0].T, x.mT[0] @ whole[0].T),
        (torch.stack([part.whole() for part in stack]), whole),
    ]
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert (stack.shape, stack.dim(), stack.size(1), len(stack)) == (whole.shape, 3, 4, 3)
    assert (stack.dtype, stack.device, stack[0].dtype) == (whole.dtype, whole.device, whole.dtype)


@pytest.mark.parametrize("layers", ["", ".1."], ids=["every layer", "one layer"])
@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_saved_model_loads_as_the_same(model_type, layers, tmp_path):
    model = compressed(model_type, layers)
    low = low_rank_linears(model)
    model.save_pretrained(tmp_path / "one")
    ranks = json.loads((tmp_path / "one" / "config.json").read_text())["quantization_config"]["ranks"]
    assert ranks == dict.fromkeys(low, RANK)
    # through the names that the code has, and again from what was loaded
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    loaded.save_pretrained(tmp_path / "two")
    again, plain = (AutoModelForCausalLM.from_pretrained(tmp_path / "two") for _ in range(2))
    expected = dict(model.named_parameters())
    for other in (loaded, again):
        found = dict(other.named_parameters())
        assert set(found) == set(expected)
        assert all(torch.equal(found[name], p) for name, p in expected.items())
    plain.dequantize()
    plain.save_pretrained(tmp_path / "plain")
    # under its publishers' names
    torch.manual_seed(0)
    tiny_models.tiny(model_type).save_pretrained(tmp_path / "first")
    stored = {name: set(load_file(tmp_path / name / "model.safetensors")) for name in ("plain", "first")}
    assert stored["plain"] == stored["first"]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert not low_rank_linears(plain)
    for name, stack in low.items():
        # multiplied in float32
        torch.testing.assert_close(plain.get_parameter(name), stack.A @ stack.B, rtol=1e-5, atol=1e-6)


def test_initialisation_of_an_architecture_is_not_drawn_into_a_product(monkeypatch):
    """Transformers initialises a module of which a tensor is missing in the files: by its parameters' names."""
    model = compressed("mixtral")
    experts = model.model.layers[0].mlp.experts
    before = [p.detach().clone() for p in experts.parameters()]
    monkeypatch.setattr(LowRankStack, "whole", lambda self: pytest.fail("a product was made"))
    with torch.no_grad():
        model._init_weights(experts)
    assert all(map(torch.equal, experts.parameters(), before))


def test_what_stands_beside_factors_keeps_its_reason():
    model = compressed("gpt_oss")
    rows = {row.name.removeprefix("model.layers.0.mlp."): row.why for row in table(model) if ".0.mlp." in row.name}
    leaves = ("gate_up_proj", "down_proj")
    assert rows == {"router.weight": "a router"} | {
        f"experts.{leaf}_bias": "a bias or a scale of experts" for leaf in leaves
    } | {f"experts.{leaf}.{part}": "" for leaf in leaves for part in "AB"}
    densify(model)
    assert {row.name for row in table(model)} == {row.name for row in table(tiny_models.tiny("gpt_oss"))}


def test_files_that_are_turned_around_on_loading_are_not_once_they_are_factors(tmp_path):
    """Qwen3-VL's checkpoints hold experts as (in, out), which the names of factors would match as well."""
    sizes = {"hidden_size": 24, "intermediate_size": 24, "moe_intermediate_size": 12, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 12, "vocab_size": 64, "num_experts": 4}
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 24}
    vision |= {"deepstack_visual_indexes": [0]}
    config = AutoConfig.for_model("qwen3_vl_moe", text_config=sizes, vision_config=vision)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    rank = 12  # a factor as wide as an expert
    for row in [row for row in table(model) if row.weight.dim() == 3 and not row.why]:
        stack = replace_stack(model, row.name, rank)
        stack.assign(*(torch.randn_like(p) for p in stack.parameters()))
    assert low_rank_linears(model)
    mark(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    expected = dict(model.named_parameters())
    found = dict(loaded.named_parameters())
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], p) for name, p in expected.items())
