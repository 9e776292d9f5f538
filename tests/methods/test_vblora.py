"""VB-LoRA against PEFT's: same numbers, same files; what is stored, refused, merged, and several adapters at once."""

import copy
import json
from types import SimpleNamespace

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from lowrank_cli import methods
from lowrank_cli.errors import MissingError, UsageError
from lowrank_cli.models import vblora_layer
from lowrank_cli.models.vblora_files import entries
from lowrank_cli.models.vblora_layer import activate

VBLoRA = methods.get("vblora")
PEFT_LINEARS = {"llama": "all-linear", "gpt2": ["c_attn", "c_fc", "c_proj"]}


def llama() -> nn.Module:
    """Grouped-query attention: k_proj and v_proj are narrower than q_proj."""
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
                         num_hidden_layers=2, vocab_size=64)  # fmt: skip
    return LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    """Linears are Conv1D, with biases."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32, resid_pdrop=0, embd_pdrop=0,
                        attn_pdrop=0)  # fmt: skip
    return GPT2LMHeadModel(config)


MODELS = {"llama": llama, "gpt2": gpt2}


def ours(**settings) -> methods.Method:
    return VBLoRA(VBLoRA.Config(**{"rank": 3, "num_vectors": 10, "vector_length": "8"} | settings))


def theirs(kind: str, **settings) -> nn.Module:
    """PEFT's model, with a bank large enough for the adapter to matter."""
    common = {"task_type": "CAUSAL_LM", "r": 3, "num_vectors": 10, "vector_length": 8, "init_vector_bank_bound": 0.3}
    config = peft.VBLoRAConfig(**common, target_modules=PEFT_LINEARS[kind], fan_in_fan_out=kind == "gpt2", **settings)
    model = MODELS[kind]()
    torch.manual_seed(1)
    return peft.get_peft_model(model, config)


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


def assert_same_weights(peer, model, atol: float) -> None:
    bank = model.vblora["default"]
    assert torch.allclose(peer.vblora_vector_bank["default"], bank.vector_bank, rtol=0, atol=atol)
    state = peer.state_dict()
    for name, ours in entries(bank, slim=False).items():
        assert torch.allclose(state[f"{name}.default"], ours, rtol=0, atol=atol), name


def test_same_tensors_same_logits_as_peft(pair):
    peer, model, _ = pair
    assert torch.allclose(peer(tokens()).logits, model(tokens()).logits, rtol=0, atol=1e-6)
    with torch.no_grad(), peer.disable_adapter():
        base = peer(tokens()).logits
    activate(model)
    assert torch.allclose(base, model(tokens()).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("passes", [1, 3])
def test_same_weights_as_peft_after_20_steps(pair, passes):
    peer, model, method = pair
    before = model.vblora["default"].logits.detach().clone()
    train(peer, model, method, steps=20, passes=passes)
    assert_same_weights(peer, model, 1e-5)
    # they went somewhere: only logits that were selected at some time
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
    train(peer, model, method, steps=5, passes=2, seeded=True)
    assert_same_weights(peer, model, 1e-5)


@pytest.mark.parametrize("slim", [False, True])
def test_peft_loads_ours(pair, slim, tmp_path):
    peer, model, method = pair
    train(peer, model, method, steps=3, passes=1)
    VBLoRA(VBLoRA.Config(save_only_topk_weights=slim)).save_adapter(model, tmp_path / "ours", "somewhere/base")
    base = MODELS["gpt2" if hasattr(model, "transformer") else "llama"]()
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    assert torch.allclose(loaded(tokens()).logits, model.eval()(tokens()).logits, rtol=0, atol=1e-6)
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "somewhere/base"
    assert config["task_type"] == "CAUSAL_LM"


def test_slim_files_are_the_same_numbers_whoever_wrote_them(tmp_path):
    peer = theirs("llama", save_only_topk_weights=True)
    peer.save_pretrained(tmp_path / "peft")
    model, method = llama(), ours(save_only_topk_weights=True)
    method.load_adapter(model, tmp_path / "peft")
    bank = model.vblora["default"]
    assert bank.logits is None
    assert torch.allclose(peer.eval()(tokens()).logits, model.eval()(tokens()).logits, rtol=0, atol=1e-6)
    method.save_adapter(model, tmp_path / "ours", "base")
    a, b = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("peft", "ours"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)
    with pytest.raises(UsageError, match="cannot be trained on"):
        method.load_adapter(llama(), tmp_path / "ours", trainable=True)


def test_a_trained_head_travels_with_the_adapter(tmp_path):
    def bert():
        config = BertConfig(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=1,
                            vocab_size=64, num_labels=3)  # fmt: skip
        return BertForSequenceClassification(config).eval()

    torch.manual_seed(0)
    model, method = bert(), ours(save_only_topk_weights=True)
    base = copy.deepcopy(model)
    method.wrap(model)
    for p in model.classifier.parameters():
        p.requires_grad_(True)
    nn.init.normal_(model.classifier.weight)
    # "dense" is also the pooler's name, which is not adapted: PEFT has to be given full names
    assert "bert.pooler.dense" not in model.vblora["default"].slots
    method.save_adapter(model, tmp_path, "base")
    expected = model(tokens()).logits
    assert torch.allclose(peft.PeftModel.from_pretrained(base, tmp_path).eval()(tokens()).logits, expected, atol=1e-6)
    again = bert()
    again.bert.load_state_dict(model.bert.state_dict())
    method.load_adapter(again, tmp_path)
    assert torch.allclose(again(tokens()).logits, expected, atol=1e-6)
    method.save_adapter(again, tmp_path / "again", "base")
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "again"))
    assert a.keys() == b.keys()
    assert "base_model.model.classifier.weight" in a


ROBERTA = {"base": (768, 3072, 12), "large": (1024, 4096, 24)}
QV, ALL = "query,value", "all-linear"


@pytest.mark.parametrize(
    ("size", "targets", "stored"),
    [("base", QV, 23_904), ("base", ALL, 26_928), ("large", QV, 25_344), ("large", ALL, 33_408)],
)
def test_stored_numbers_are_the_papers(size, targets, stored):
    hidden, intermediate, layers = ROBERTA[size]
    config = AutoConfig.for_model("roberta", hidden_size=hidden, intermediate_size=intermediate,
                                  num_hidden_layers=layers, num_attention_heads=hidden // 64)  # fmt: skip
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    ours(rank=4, num_vectors=90, vector_length="256", target_modules=targets).wrap(model)
    assert float32_numbers(model) == stored


def test_stored_numbers_of_llama_7b():
    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    ours(rank=4, num_vectors=2048, vector_length="auto").wrap(model)
    bank = model.vblora["default"]
    assert bank.shape.vector_length == 256
    assert bank.num_subvectors == 39_040
    assert float32_numbers(model) == 602_368
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 524_288 + 39_040 * 2048


def float32_numbers(model) -> float:
    """What the slim file holds, counted as the paper does: in numbers of four bytes."""
    bank = model.vblora["default"]
    tensors = [bank.vector_bank, *entries(bank, slim=True).values()]
    return sum(t.numel() * t.element_size() for t in tensors) / 4


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
    assert torch.allclose(model(tokens()).logits, adapted, rtol=0, atol=1e-5)
    assert set(model.state_dict()) == names
    assert not any("forward" in vars(module) for module in model.modules())


def quantized(model: nn.Module) -> nn.Module:
    """The model with its layers' linears in NF4, on the CPU."""
    bnb = pytest.importorskip("bitsandbytes")
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
    assert torch.allclose(model(tokens()).logits, plain(tokens()).logits, atol=1e-5)
    for p, q in zip(model.vblora.parameters(), plain.vblora.parameters(), strict=True):
        assert float(p.grad.abs().max()) > 0
        assert torch.allclose(p.grad, q.grad, atol=1e-6)
    adapted = model(tokens()).logits
    method.merge(model)
    assert torch.allclose(model(tokens()).logits, adapted, rtol=0, atol=1e-5)
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
    assert torch.allclose(model(tokens()).logits, other(tokens()).logits, atol=1e-6)
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
    assert torch.allclose(copied(tokens()).logits, both, atol=1e-5)
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
    model, method = llama(), ours(lr_vector_bank=0.5, lr_logits=0.25)
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
    ("settings", "per_layer", "words"),
    [({}, True, "same bank"), ({"topk": 11}, False, "more than the 10"), ({"vector_length": "x"}, False, "is 'x'")],
)
def test_settings_that_do_not_go_together(settings, per_layer, words):
    run = SimpleNamespace(optim=SimpleNamespace(per_layer=per_layer))
    with pytest.raises(UsageError, match=words):
        ours(**settings).check(run)
    ours().check(SimpleNamespace(optim=SimpleNamespace(per_layer=False)))


def test_adapters_that_do_not_fit_are_refused_and_change_nothing(tmp_path):
    model, method = llama(), ours()
    method.wrap(model)
    method.save_adapter(model, tmp_path / "good", "the/base")
    config = LlamaConfig(hidden_size=64, intermediate_size=48, num_attention_heads=4, num_hidden_layers=2,
                         vocab_size=64)  # fmt: skip
    wider = LlamaForCausalLM(config)
    with pytest.raises(UsageError, match=r"down_proj of 32 x 48; this model's is 64 x 48") as caught:
        method.load_adapter(wider, tmp_path / "good")
    assert "the/base" in caught.value.hint
    assert not hasattr(wider, "vblora")
    with pytest.raises(UsageError, match="that this model has not"):
        method.load_adapter(gpt2(), tmp_path / "good")
    with pytest.raises(MissingError, match=r"adapter_config\.json is not there"):
        method.load_adapter(llama(), tmp_path / "none")
    other = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    other.save_pretrained(tmp_path / "lora")
    with pytest.raises(UsageError, match="of kind LORA, not VBLORA"):
        method.load_adapter(llama(), tmp_path / "lora")
    (tmp_path / "good" / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(UsageError, match="unreadable"):
        method.load_adapter(llama(), tmp_path / "good")


def test_updates_lower_the_loss_and_the_merged_model_is_saved_plain(tmp_path):
    rates = {"lr_vector_bank": 1e-2, "lr_logits": 1e-1}
    model, method = llama().train(), ours(num_vectors=32, vector_length="auto", init_vector_bank_bound=0.1, **rates)
    method.wrap(model)
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = method.param_groups(model, [{"params": trained, "role": "full"}])
    optimizer = torch.optim.AdamW(
        [{"params": [p for _, p in g["params"]], "lr": g["lr"], "weight_decay": g["weight_decay"]} for g in groups]
    )
    losses = []
    for step in range(1, 61):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        method.before_step(model)
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(model, step)
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.3
    method.merge(model)
    model.save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(saved.eval()(tokens()).logits, model.eval()(tokens()).logits)
