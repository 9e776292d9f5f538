"""Every causal language model that Transformers has: how much of its layers' matrices methods act on."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

from lowrank_cli import methods
from lowrank_cli.errors import UsageError
from lowrank_cli.models.targets import table

# what less than this share is targeted of, and why
LESS = {
    "phi4_multimodal": "convolutions of the speech encoder in the decoder's layers",
    "xlnet": "attention's weights are tensors of (hidden, heads, head size)",
}
SHARE = 0.95
LAYERS = 4
DECODER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
           "num_key_value_heads": 2, "vocab_size": 32}  # fmt: skip
EXPERTS = {
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 8, "num_experts_per_tok": 2, "head_dim": 8},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8},
    "mixtral": {"num_local_experts": 4},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8},
    "deepseek_v3": {"n_routed_experts": 4, "moe_intermediate_size": 8, "first_k_dense_replace": 1, "n_group": 1,
                    "topk_group": 1, "num_experts_per_tok": 2, "q_lora_rank": 8, "kv_lora_rank": 8,
                    "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip
# model types whose configuration the installed Transformers cannot fill by itself, or whose model needs more packages
NEEDS_MORE = (
    TypeError,
    ValueError,
    AttributeError,
    KeyError,
    ImportError,
    AssertionError,
    RuntimeError,
    StrictDataclassError,
)


def share_of(model) -> tuple[float, dict[str, int]]:
    """Return the share of the layers' matrices that methods act on, and the elements of the rest by reason."""
    rows, rest = table(model), {}
    for row in rows:
        if row.why:
            rest[row.why] = rest.get(row.why, 0) + row.weight.numel()
    total = sum(row.weight.numel() for row in rows)
    return 1 - sum(rest.values()) / max(total, 1), rest


def on_meta(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("model_type", EXPERTS)
def test_experts_are_targets_and_routers_are_not(model_type):
    model = on_meta(AutoConfig.for_model(model_type, **DECODER | EXPERTS[model_type]))
    rows = {row.name: row.why for row in table(model)}
    experts = {n for n, p in model.named_parameters() if p.dim() == 3}
    assert experts
    assert all(rows[name] == "" for name in experts)
    routers = {name for name, why in rows.items() if why == "a router"}
    assert len(routers) == sum("router" in type(m).__name__.lower() for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_a_linear_of_a_model_is_one_if_it_multiplies_like_one():
    class Same(torch.nn.Linear):
        def forward(self, x):
            y = x @ self.weight.T
            return y if self.bias is None else y + self.bias

    class Pair(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    class Half(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) / 2

    state = torch.random.get_rng_state()
    model = torch.nn.ModuleList([torch.nn.ModuleDict({k.__name__: k(8, 8) for k in (Same, Pair, Half)})])
    torch.random.set_rng_state(state)
    assert {row.name: row.why for row in table(model)} == {
        "0.Same.weight": "", "0.Pair.weight": "no plain product of a matrix",
        "0.Half.weight": "no plain product of a matrix",
    }  # fmt: skip
    # looking at a model draws no random number of a run
    assert torch.random.get_rng_state().equal(state)


@pytest.mark.slow
def test_nearly_all_of_every_model_is_targeted():
    shares, unbuilt = {}, []
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING:
        try:
            config = kind()
            text = config.get_text_config()
            if not getattr(text, "layer_types", None) and getattr(text, "num_hidden_layers", 0) > LAYERS:
                text.num_hidden_layers = LAYERS
            model = on_meta(config)
        except NEEDS_MORE as error:
            unbuilt.append(f"{kind.model_type}: {error}")
            continue
        if table(model):
            shares[kind.model_type] = share_of(model)
    assert len(shares) > 150, unbuilt
    few = {name: found for name, found in shares.items() if found[0] < SHARE and name not in LESS}
    assert not few
    # what is better by now is no exception any longer
    assert all(shares[name][0] < SHARE for name in LESS if name in shares)


def groups_of(method, model) -> dict[str, str]:
    """Return the role of every parameter that a method tags."""
    groups = [{"params": list(model.named_parameters()), "role": "full"}]
    return {name: group["role"] for group in method.param_groups(model, groups) for name, _ in group["params"]}


# every method that projects the matrices of whole models and lets its user choose them
@pytest.mark.parametrize("name", [n for n in methods.names() if issubclass(methods.get(n), methods.get("galore"))])
def test_the_matrices_to_project_can_be_chosen_by_name(name):
    model = on_meta(AutoConfig.for_model("mixtral", **DECODER | EXPERTS["mixtral"]))
    kind = methods.get(name)
    roles = groups_of(kind(kind.Config(target_modules="q_proj,*.0.mlp.experts.down_proj")), model)
    chosen = {name for name, role in roles.items() if role != "full"}
    assert chosen == {
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.0.mlp.experts.down_proj",
    }
    with pytest.raises(UsageError, match="matches no linear"):
        groups_of(kind(kind.Config(target_modules="q_porj")), model)


def wrapped(model_type: str, layers: str | None = None, sizes=DECODER) -> set[str]:
    """Return the ends of the names of what VeLoRA wraps."""
    kind = methods.get("velora")
    model = on_meta(AutoConfig.for_model(model_type, **sizes | {"pad_token_id": 0}))
    method = kind(kind.Config() if layers is None else kind.Config(layers=layers))
    return {name.rpartition(".")[2] for name in method.targets(model)}


def test_velora_finds_fused_linears_and_says_where_it_finds_none():
    assert wrapped("llama") == {"v_proj", "down_proj"}
    # one linear for q, k and v, and one for gate and up
    assert wrapped("phi3") == {"qkv_proj", "down_proj"}
    assert wrapped("phi3", "qkvu") == {"qkv_proj", "gate_up_proj"}
    assert wrapped("gpt_neox") == {"query_key_value", "dense_4h_to_h"}
    # experts are no linears: the paper's choice is what there is of it, and a choice of one's own is an error
    mixtral = DECODER | EXPERTS["mixtral"]
    assert wrapped("mixtral", sizes=mixtral) == {"v_proj"}
    for model_type, layers, sizes in (("mixtral", "d", mixtral), ("gpt2", "c_proj", DECODER), ("gpt2", None, DECODER)):
        with pytest.raises(UsageError, match="no trained linear"):
            wrapped(model_type, layers, sizes)
