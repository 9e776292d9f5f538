"""A target is a target: what trains beside a head is what is measured, saved and merged, tied or not."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowrank_cli import methods
from lowrank_cli.models.load import load_weights
from lowrank_cli.models.source import place

# every method that can train an adapter, with the flags that make it do so beside the head alone
ADAPTERS = [
    f"{name} --{name}-target-modules lm_head" + (f" --{name}-mode adapter" if hasattr(method.Config, "mode") else "")
    for name in methods.names()
    if "finetune" in (method := methods.get(name)).commands and (method.adapter or hasattr(method.Config, "mode"))
]


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request, stories, tmp_path) -> Path:
    """A trained model whose head and embedding share their weight, or not."""
    net = AutoModelForCausalLM.from_pretrained(stories)
    if not request.param:
        net.lm_head.weight = torch.nn.Parameter(net.lm_head.weight.detach().clone())
    else:
        net.lm_head.weight = net.model.embed_tokens.weight
    net.config.tie_word_embeddings = request.param
    net.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(stories).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def logits(net) -> torch.Tensor:
    ids = torch.arange(3, 60).view(1, -1)
    with torch.no_grad():
        return net.eval()(input_ids=ids).logits.double()


def same(a: torch.Tensor, b: torch.Tensor, start: torch.Tensor) -> bool:
    """Whether two results are the same up to float32, in which each is 2^-20 off; training has moved them further."""
    rounding = 2**-20 * float(a.norm())
    assert float((a - start).norm()) > 1000 * rounding
    return float((a - b).norm()) < rounding


@pytest.mark.parametrize("line", ADAPTERS)
def test_an_update_beside_the_head_is_the_heads_alone(line, model, lowrank):
    from peft import PeftModel

    records = [{"prompt": f"Say {i}.", "response": f"It is {i} and a cat."} for i in range(40)]
    Path("r.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    common = (
        "--dataset r.jsonl --template plain --max-steps 6 --batch-size 8 --lr 0.02 --no-keep-best --no-plots --json"
    )
    results = {}
    for name, more in (("adapter", ""), ("merged", "--merge")):
        code, out, err = lowrank(f"finetune --method {line} {common} {more} --out {name}", "--model", model)
        assert code == 0, err
        results[name] = json.loads(out)
    before = AutoModelForCausalLM.from_pretrained(model)
    start, embedding = logits(before), before.model.embed_tokens.weight.detach().clone()
    peft = logits(PeftModel.from_pretrained(before, "adapter/model"))
    merged = AutoModelForCausalLM.from_pretrained("merged/model")
    ours = load_weights(place("adapter/model", offline=True), torch.float32)
    assert same(peft, logits(merged), start)
    assert same(peft, logits(ours), start)
    for net in (merged, ours):
        assert torch.equal(net.model.embed_tokens.weight, embedding)
        assert not net.config.tie_word_embeddings
    assert set(load_file("merged/model/model.safetensors")) >= {"lm_head.weight", "model.embed_tokens.weight"}
    # measured in training, and by the command for it
    code, out, err = lowrank(
        "eval ppl --dataset r.jsonl --text-field response --max-tokens 300 --json --model merged/model"
    )
    one = json.loads(out)
    code, out, err = lowrank(
        "eval ppl --dataset r.jsonl --text-field response --max-tokens 300 --json --model adapter/model"
    )
    other = json.loads(out)
    assert code == 0, err
    assert one["results"][0]["perplexity"] == pytest.approx(other["results"][0]["perplexity"], rel=1e-5)
    assert results["adapter"]["validation_loss"] == pytest.approx(results["merged"]["validation_loss"], rel=1e-6)


def test_a_foreign_adapter_of_the_embedding_is_the_embeddings_alone(model, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(0)
    net = AutoModelForCausalLM.from_pretrained(model)
    start = logits(net)
    net = get_peft_model(net, LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj", "embed_tokens"]))
    for name, p in net.named_parameters():
        if "lora_B" in name or "lora_embedding" in name:
            p.data += 0.05 * torch.randn_like(p)
    net.save_pretrained(tmp_path / "adapter")
    theirs = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), tmp_path / "adapter"))
    ours = load_weights(place(str(tmp_path / "adapter"), offline=True), torch.float32)
    assert same(theirs, logits(ours), start)


def test_a_foreign_adapter_of_the_layers_leaves_the_tie(stories, tmp_path):
    from peft import LoraConfig, get_peft_model

    net = AutoModelForCausalLM.from_pretrained(stories)
    net.lm_head.weight, net.config.tie_word_embeddings = net.model.embed_tokens.weight, True
    net.save_pretrained(tmp_path / "model")
    get_peft_model(net, LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj"])).save_pretrained(
        tmp_path / "adapter"
    )
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "model")
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    ours = load_weights(place(str(tmp_path / "adapter"), offline=True), torch.float32)
    assert ours.config.tie_word_embeddings
    assert ours.lm_head.weight is ours.model.embed_tokens.weight


def test_an_adapter_with_tokens_of_its_own_brings_their_rows(stories, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    tokenizer = AutoTokenizer.from_pretrained(stories)
    tokenizer.add_tokens(["<one>", "<two>"])
    base = AutoModelForCausalLM.from_pretrained(stories)
    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    settings = LoraConfig(
        r=4, task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]
    )
    net = get_peft_model(base, settings)
    net.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(stories)
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    fresh = AutoModelForCausalLM.from_pretrained(stories)
    fresh.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    theirs = logits(PeftModel.from_pretrained(fresh, tmp_path / "adapter"))
    ours = load_weights(place(str(tmp_path / "adapter"), offline=True), torch.float32)
    assert torch.allclose(theirs, logits(ours), rtol=0, atol=1e-5)


@pytest.mark.parametrize("base", ["itself", "another", 7, None, "", ["a"]])
def test_an_adapter_that_names_no_base_is_refused_in_one_sentence(base, lowrank, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    named = {"itself": str(folder), "another": str(tmp_path / "other")}
    content = {
        "peft_type": "LORA",
        "base_model_name_or_path": named.get(base, base) if isinstance(base, str) else base,
    }
    (folder / "adapter_config.json").write_text(json.dumps(content))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/adapter_config.json").write_text(json.dumps(content | {"base_model_name_or_path": str(folder)}))
    code, _, err = lowrank("eval ppl --dataset stdlib --model adapter")
    assert code == 2, err
    assert "adapter_config.json" in err
    assert "this is a bug" not in err
