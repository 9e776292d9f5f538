"""VB-LoRA against PEFT's: the same numbers; what is refused and merged, and several adapters at once."""

import copy
import json

import peft
import pytest
import torch
from double import BOUND, distance, exact_norm
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lowrank_cli import methods
from lowrank_cli.errors import UsageError
from lowrank_cli.methods.vblora import layer as vblora_layer
from lowrank_cli.methods.vblora.files import entries
from lowrank_cli.methods.vblora.layer import activate

pytestmark = pytest.mark.numerical

VBLoRA = methods.get("vblora")
PEFT_LINEARS = {"llama": "all-linear", "gpt2": ["c_attn", "c_fc", "c_proj"]}


def llama(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Grouped-query attention: k_proj and v_proj are narrower than q_proj."""
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
                         num_hidden_layers=2, vocab_size=64)  # fmt: skip
    return LlamaForCausalLM(config).to(dtype)


def gpt2(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Linears are Conv1D, with biases."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32, resid_pdrop=0, embd_pdrop=0,
                        attn_pdrop=0)  # fmt: skip
    return GPT2LMHeadModel(config).to(dtype)


MODELS = {"llama": llama, "gpt2": gpt2}


def ours(**settings) -> methods.Method:
    return VBLoRA(VBLoRA.Config(**{"rank": 3, "num_vectors": 10, "vector_length": "8"} | settings))


def theirs(kind: str, **settings) -> nn.Module:
    """PEFT's model, with a bank large enough for the adapter to matter."""
    common = {"task_type": "CAUSAL_LM", "r": 3, "num_vectors": 10, "vector_length": 8, "init_vector_bank_bound": 0.3}
    config = peft.VBLoRAConfig(**common, target_modules=PEFT_LINEARS[kind], fan_in_fan_out=kind == "gpt2", **settings)
    model = MODELS[kind]()
    torch.manual_seed(1)
    return peft.get_peft_model(model, config).double()


def tokens(seed: int = 0, rows: int = 4) -> torch.Tensor:
    return torch.randint(64, (rows, 12), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["llama", "gpt2"])
def pair(request, tmp_path) -> tuple[nn.Module, nn.Module, methods.Method]:
    """PEFT's model and ours with the same initial tensors."""
    peer = theirs(request.param)
    peer.save_pretrained(tmp_path / "peft")
    model, method = MODELS[request.param]().requires_grad_(False), ours(save_only_topk_weights=False)
    method.load_adapter(model, tmp_path / "peft", trainable=True)
    return peer, model, method


def train(peer, model, method, *, steps: int, passes: int, seeded: bool = False) -> None:
    """Both sides for some updates of several micro-batches."""
    bank = model.vblora["default"]
    named = [(n, p) for n, p in peer.named_parameters() if p.requires_grad]
    kinds = [[p for n, p in named if kind in n] for kind in ("vblora_vector_bank", "vblora_logits")]
    optimizers = [
        torch.optim.AdamW([{"params": a, "lr": 1e-3}, {"params": b, "lr": 1e-2}], weight_decay=0.0)
        for a, b in (kinds, ([bank.vector_bank], [bank.logits]))
    ]
    for step in range(1, steps + 1):
        for i in range(passes):
            batch = tokens(100 * step + i)
            for side in (peer, model):
                if seeded:
                    torch.manual_seed(step)
                side(input_ids=batch, labels=batch).loss.backward()
        method.before_step(model)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        method.after_step(model, step)


def tensors_of(model) -> dict[str, torch.Tensor]:
    """Return copies of the bank and of each factor's logits, by PEFT's names."""
    bank = model.vblora["default"]
    tensors = {"vblora_vector_bank": bank.vector_bank, **entries(bank, slim=False)}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_same_weights(peer, model, start) -> None:
    """Check that both sides have gone the same way; a loss in float32 has its rounding in either."""
    peers = {"vblora_vector_bank": peer.vblora_vector_bank["default"].detach()}
    peers |= {name: peer.state_dict()[f"{name}.default"] for name in start if name not in peers}
    assert distance(tensors_of(model), peers, start) < BOUND


def assert_same_logits(model, wanted, bound: float = BOUND) -> None:
    assert_close(model(tokens()).logits, wanted, bound)


def assert_close(tensor, wanted, bound: float) -> None:
    assert float((tensor - wanted).detach().norm()) < bound * float(wanted.detach().norm())


@pytest.fixture(autouse=True)
def exact_norms(monkeypatch):
    monkeypatch.setattr(LlamaRMSNorm, "forward", exact_norm)


def test_same_tensors_same_logits_as_peft(pair):
    peer, model, _ = pair
    assert_same_logits(model, peer(tokens()).logits)
    with torch.no_grad(), peer.disable_adapter():
        base = peer(tokens()).logits
    activate(model)
    assert_same_logits(model, base)


@pytest.mark.parametrize("passes", [1, 3])
def test_same_weights_as_peft_after_20_steps(pair, passes):
    peer, model, method = pair
    before, start = model.vblora["default"].logits.detach().clone(), tensors_of(model)
    train(peer, model, method, steps=20, passes=passes)
    assert_same_weights(peer, model, start)
    # only logits that were selected at some time
    moved = (model.vblora["default"].logits != before).float().mean()
    assert 0.2 < moved < 1


def test_same_weights_as_peft_with_dropout_and_recomputed_activations(tmp_path):
    peer = theirs("llama", vblora_dropout=0.2)
    peer.save_pretrained(tmp_path)
    model, method = llama().requires_grad_(False), ours()
    method.load_adapter(model, tmp_path, trainable=True)
    assert model.vblora["default"].dropout == 0.2
    peer.train()
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    start = tensors_of(model)
    train(peer, model, method, steps=5, passes=2, seeded=True)
    assert_same_weights(peer, model, start)


@pytest.mark.parametrize("slim", [False, True])
def test_peft_loads_ours(pair, slim, tmp_path):
    peer, model, method = pair
    train(peer, model, method, steps=3, passes=1)
    VBLoRA(VBLoRA.Config(save_only_topk_weights=slim)).save_adapter(model, tmp_path / "ours", "somewhere/base")
    base = MODELS["gpt2" if hasattr(model, "transformer") else "llama"]()
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    # a slim file has its weights in float32
    assert_same_logits(loaded, model.eval()(tokens()).logits)
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "somewhere/base"
    assert config["task_type"] == "CAUSAL_LM"


@pytest.mark.parametrize("kind", MODELS)
def test_merged_model_is_plain_and_says_the_same(kind):
    model, method = MODELS[kind]().eval(), ours(init_vector_bank_bound=0.3)
    plain = model(tokens()).logits
    names = set(model.state_dict())
    method.wrap(model)
    assert {n for n in model.state_dict() if not n.startswith("vblora.")} == names
    adapted = model(tokens()).logits
    assert not torch.allclose(adapted, plain, atol=1e-3)
    method.merge(model)
    assert_same_logits(model, adapted)
    assert set(model.state_dict()) == names
    assert not any("forward" in vars(module) for module in model.modules())


def quantized(model: nn.Module) -> nn.Module:
    """The model with its layers' linears in NF4, on the CPU."""
    import bitsandbytes as bnb

    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            small = bnb.nn.Linear4bit(module.in_features, module.out_features, bias=False, quant_type="nf4",
                                      compress_statistics=True)  # fmt: skip
            small.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4",
                                             compress_statistics=True)  # fmt: skip
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, small.to("cpu"))
    return model


def test_four_bit_base_trains_as_its_plain_values_do_and_merges_to_them():
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2,
                         num_hidden_layers=2, vocab_size=64)  # fmt: skip
    model, method = quantized(LlamaForCausalLM(config)), ours(init_vector_bank_bound=0.3)
    kinds = {type(m).__name__ for m in model.modules()}
    assert "Linear4bit" in kinds
    plain = copy.deepcopy(model)
    for m in (model, plain):
        torch.manual_seed(2)
        method.wrap(m)
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    # the base merged without an adapter: the values that the 4-bit weights stand for
    bank = plain.vblora["default"]
    activate(plain)
    method.merge(plain)
    assert {type(m) for n, m in plain.named_modules() if n.endswith("_proj")} == {nn.Linear}
    vblora_layer.attach(plain, "default", bank)
    for m in (model, plain):
        m(input_ids=tokens(), labels=tokens()).loss.backward()
        method.before_step(m)
    # in float32, which bitsandbytes computes in: sums of up to 128 products, 2^-24 each, there and back
    single = 256 * 2**-24
    assert_same_logits(model, plain(tokens()).logits, single)
    for p, q in zip(model.vblora.parameters(), plain.vblora.parameters(), strict=True):
        assert_close(p.grad, q.grad, single)
    adapted = model(tokens()).logits
    method.merge(model)
    assert_same_logits(model, adapted, single)
    assert "Linear4bit" not in {type(m).__name__ for m in model.modules()}


def test_factors_are_composed_once_an_update(monkeypatch):
    calls = []
    monkeypatch.setattr(vblora_layer, "compose", lambda *a, real=vblora_layer.compose: calls.append(1) or real(*a))
    model, method = llama(), ours()
    method.wrap(model)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for _ in range(4):
        model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert len(calls) == 1
    method.before_step(model)
    with torch.no_grad():
        for p in model.vblora.parameters():
            p.add_(p.grad)
    method.after_step(model, 1)
    model(tokens())
    assert len(calls) == 2


def test_changed_parameters_are_noticed_without_a_hook():
    model, method = llama().eval(), ours(init_vector_bank_bound=0.3)
    method.wrap(model)
    before = model(tokens()).logits
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        model.vblora["default"].vector_bank.mul_(2)
    assert not torch.allclose(model(tokens()).logits, before, atol=1e-3)
    model.load_state_dict(state)
    assert torch.equal(model(tokens()).logits, before)


def test_several_adapters_at_once(tmp_path):
    model, method = llama().eval(), ours(init_vector_bank_bound=0.3, save_only_topk_weights=False)
    base = model(tokens()).logits
    other = llama().eval()
    torch.manual_seed(7)
    ours(init_vector_bank_bound=0.3, num_vectors=6, target_modules="q_proj,down_proj").wrap(other)
    method.save_adapter(other, tmp_path, "base")
    method.wrap(model)
    alone = model(tokens()).logits
    method.load_adapter(model, tmp_path, name="other")
    assert_same_logits(model, other(tokens()).logits)
    activate(model, "default")
    assert torch.equal(model(tokens()).logits, alone)
    activate(model, "default", "other")
    both = model(tokens()).logits
    # only the first is trained, and both take part in the loss
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    method.before_step(model)
    assert all(p.grad is not None for p in model.vblora["default"].parameters())
    assert all(p.grad is None for p in model.vblora["other"].parameters())
    # what a checkpoint needs beyond the trained parameters
    state = {key: tensor.clone() for key, tensor in method.state(model).items()}
    assert set(state) == {"other.vector_bank", "other.logits"}
    with torch.no_grad():
        for p in model.vblora["other"].parameters():
            p.zero_()
    method.load_state(model, state)
    assert torch.equal(model(tokens()).logits, both)
    copied = copy.deepcopy(model)
    method.merge(copied)
    assert_same_logits(copied, both)
    activate(model)
    assert torch.equal(model(tokens()).logits, base)
    with pytest.raises(ValueError, match="no adapter third; there are: default, other"):
        activate(model, "third")


def test_copies_are_their_own():
    model, method = llama().eval(), ours(init_vector_bank_bound=0.3)
    method.wrap(model)
    before = model(tokens()).logits
    copied = copy.deepcopy(model)
    copied(input_ids=tokens(), labels=tokens()).loss.backward()
    with torch.no_grad():
        copied.vblora["default"].vector_bank.mul_(2)
    assert not torch.allclose(copied(tokens()).logits, before, atol=1e-3)
    assert torch.equal(model(tokens()).logits, before)
    assert not bool(model.vblora["default"].accumulated.any())
    assert bool(copied.vblora["default"].accumulated.any())


def test_sixteen_bit_models_keep_bank_and_logits_in_float32():
    wide, narrow, method = llama().eval(), llama().eval().bfloat16(), ours(init_vector_bank_bound=0.3)
    for model in (wide, narrow):
        torch.manual_seed(2)
        method.wrap(model)
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        method.before_step(model)
    bank = narrow.vblora["default"]
    assert bank.composed.dtype == torch.bfloat16
    assert {p.dtype for p in bank.parameters()} == {torch.float32}
    assert narrow(tokens()).logits.dtype == torch.bfloat16
    for p, q in zip(bank.parameters(), wide.vblora.parameters(), strict=True):
        assert float(nn.functional.cosine_similarity(p.grad.flatten(), q.grad.flatten(), dim=0)) > 0.98


def test_groups_have_their_own_rates_and_no_decay():
    model, method = llama(torch.float32), ours(lr_vector_bank=0.5, lr_logits=0.25)
    method.wrap(model)
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    head = nn.Parameter(torch.zeros(3, 3))
    given = [{"params": [*trained, ("head", head)], "weight_decay": 0.1, "role": "full"}]
    groups = {name: group for group in method.param_groups(model, given) for name, _ in group["params"]}
    assert {n: (g["role"], g.get("lr"), g["weight_decay"]) for n, g in groups.items()} == {
        "vblora.default.vector_bank": ("vblora", 0.5, 0.0),
        "vblora.default.logits": ("vblora", 0.25, 0.0),
        "head": ("full", None, 0.1),
    }
    # the estimate of a dry run is what is there: parameters, composed factors and their sums
    memory = [method.memory(tuple(p.shape), 4, "adamw", groups[n]) for n, p in trained]
    bank = model.vblora["default"]
    own = sum(p.numel() for p in bank.parameters()) * 4
    assert sum(m.weights for m in memory) == own + bank.composed.nbytes
    assert sum(m.gradients for m in memory) == own + bank.accumulated.nbytes
    assert sum(m.states for m in memory) == 2 * own


def test_a_length_that_does_not_divide_names_those_that_do():
    with pytest.raises(UsageError) as caught:
        ours(vector_length="24").wrap(llama())
    assert "--vblora-vector-length 24 does not divide the 32 features of model.layers.0" in caught.value.message
    assert "1, 2, 4, 8, 16;" in caught.value.hint


def test_automatic_length_is_said(capsys):
    model = llama()
    ours(vector_length="auto").wrap(model)
    assert model.vblora["default"].shape.vector_length == 16
    assert "vector length 16" in capsys.readouterr().err


def test_targets_are_chosen_and_unknown_ones_answered_with_the_models_own():
    model = llama()
    ours(target_modules="q_proj, *.layers.1.mlp.*").wrap(model)
    slots = model.vblora["default"].slots
    assert sum(name.endswith("q_proj") for name in slots) == 2
    assert sum(".mlp." in name for name in slots) == 3
    assert len(slots) == 5
    with pytest.raises(UsageError, match="query") as caught:
        ours(target_modules="query").wrap(llama())
    assert "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj" in caught.value.hint


@pytest.mark.parametrize(
    ("settings", "words"), [({"topk": 11}, "more than the 10"), ({"vector_length": "x"}, "is 'x'")]
)
def test_settings_that_do_not_go_together(settings, words):
    with pytest.raises(UsageError, match=words):
        ours(**settings).check(None)
    ours().check(None)
