"""VB-LoRA's files: those of PEFT, the numbers that the paper counts, and adapters that do not fit."""

import copy

import peft
import pytest
import torch
from double import BOUND
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from lowrank_cli import methods
from lowrank_cli.errors import LowrankError, MissingError, UsageError
from lowrank_cli.methods.vblora.files import entries

pytestmark = pytest.mark.numerical

VBLoRA = methods.get("vblora")


def llama(hidden: int = 32) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=hidden, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
                         num_hidden_layers=2, vocab_size=64)  # fmt: skip
    return LlamaForCausalLM(config)


def ours(**settings) -> methods.Method:
    return VBLoRA(VBLoRA.Config(**{"rank": 3, "num_vectors": 10, "vector_length": "8"} | settings))


def tokens() -> torch.Tensor:
    return torch.randint(64, (4, 12), generator=torch.Generator().manual_seed(0))


def assert_same_logits(model, wanted) -> None:
    # of a slim file's last weight, which is not stored, float32 keeps 2^-24
    assert float((model(tokens()).logits - wanted).detach().norm()) < BOUND * float(wanted.detach().norm())


def test_slim_files_are_the_same_numbers_whoever_wrote_them(tmp_path):
    shape = {"r": 3, "num_vectors": 10, "vector_length": 8, "init_vector_bank_bound": 0.3}
    config = peft.VBLoRAConfig(
        **shape, task_type="CAUSAL_LM", target_modules="all-linear", save_only_topk_weights=True
    )
    peer = peft.get_peft_model(llama(), config)
    peer.save_pretrained(tmp_path / "peft")
    model, method = llama(), ours(save_only_topk_weights=True)
    method.load_adapter(model, tmp_path / "peft")
    bank = model.vblora["default"]
    assert bank.logits is None
    assert_same_logits(model.eval(), peer.eval()(tokens()).logits)
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
        return BertForSequenceClassification(config).double().eval()

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
    assert_same_logits(peft.PeftModel.from_pretrained(base, tmp_path).eval(), expected)
    again = bert()
    again.bert.load_state_dict(model.bert.state_dict())
    method.load_adapter(again, tmp_path)
    assert_same_logits(again, expected)
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


def test_adapters_that_do_not_fit_are_refused_and_change_nothing(tmp_path):
    model, method = llama(), ours()
    method.wrap(model)
    method.save_adapter(model, tmp_path / "good", "the/base")
    wider = llama(64)
    with pytest.raises(UsageError, match=r"down_proj of 32 x 48; this model's is 64 x 48") as caught:
        method.load_adapter(wider, tmp_path / "good")
    assert "the/base" in caught.value.hint
    assert not hasattr(wider, "vblora")
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64))
    with pytest.raises(UsageError, match="that this model has not"):
        method.load_adapter(gpt2, tmp_path / "good")
    with pytest.raises(MissingError, match=r"adapter_config\.json is not there"):
        method.load_adapter(llama(), tmp_path / "none")
    other = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    other.save_pretrained(tmp_path / "lora")
    with pytest.raises(UsageError, match="of kind LORA, not VBLORA"):
        method.load_adapter(llama(), tmp_path / "lora")
    (tmp_path / "good" / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(LowrankError, match="is damaged"):
        method.load_adapter(llama(), tmp_path / "good")
