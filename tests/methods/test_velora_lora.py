"""`--method velora+lora` against PEFT's own `LoraConfig(velora_config=...)`: the same weights after twenty updates."""

import pytest
import torch
from double import BOUND, distance, exact_norm
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import VeloraConfig
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lowrank_cli import optim
from lowrank_cli.config import resolve
from lowrank_cli.optim.gradients import Gradients
from lowrank_cli.train.setup import apply_methods

pytestmark = pytest.mark.numerical

GROUPS = 8
INIT = "batch_average_once"


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().train()


def batches(number: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 128, (4, 24), generator=generator) for _ in range(number)]


def ours(layers: str, steps: int, eps: float) -> tuple[dict, dict]:
    settings = {
        "lora": {"target_modules": "v_proj,down_proj", "rank": 4, "alpha": 8},
        "velora": {"layers": layers, "num_groups": GROUPS, "init": INIT},
    }
    config = resolve(
        "finetune", {"method": "velora+lora", "lr": 0.01, "eps": eps, "weight_decay": 0.1, "model": "x"}, settings
    )
    model = base()
    torch.manual_seed(5)
    _, groups = apply_methods(config, model)
    optimizer = optim.build(config.optim, groups)
    gradients = Gradients(model, optimizer, per_layer=False, clipping=0.0)
    before = adapter(model)
    for batch in batches(steps):
        gradients.begin(measuring=False)
        model(batch, labels=batch).loss.backward()
        gradients.step()
    return before, adapter(model)


def adapter(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("base_model.model."): p.detach().clone()
        for name, p in model.named_parameters()
        if "lora_A" in name or "lora_B" in name
    }


def test_velora_on_lora_is_pefts(monkeypatch):
    monkeypatch.setattr(LlamaRMSNorm, "forward", exact_norm)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["v_proj", "down_proj"],
        velora_config=VeloraConfig(num_groups=GROUPS, scale=1.0, init_type=INIT),
    )  # fmt: skip
    before, after = ours("vd", 20, 1e-6)
    theirs = get_peft_model(base(), config).double()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if (key := name.removeprefix("base_model.model.")) in before:
                p.copy_(before[key])
    trained = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01, eps=1e-6, weight_decay=0.1)
    for batch in batches(20):
        optimizer.zero_grad()
        theirs(batch, labels=batch).loss.backward()
        optimizer.step()
    # the model's loss is in float32, whose rounding Adam divides by no less than eps
    assert distance(after, adapter(theirs), before) < BOUND


def test_it_is_not_the_plain_gradient():
    _, compressed = ours("vd", 3, 1e-6)
    _, other = ours("v", 3, 1e-6)
    name = next(n for n in compressed if "down_proj.lora_A" in n)
    assert not torch.allclose(compressed[name], other[name])


@pytest.mark.parametrize("layers", ["q", "gate_proj"])
def test_layers_that_the_adapter_does_not_have_are_an_error(layers):
    from lowrank_cli.errors import UsageError

    with pytest.raises(UsageError, match="no trained linear") as error:
        ours(layers, 1, 1e-8)
    assert "names: down_proj, v_proj" in error.value.hint
