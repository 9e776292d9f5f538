"""The training loss against each architecture's own: values, gradients, padding, ties, checkpointing."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from lowrank_cli.models.forward import PLAIN_HEAD, causal_lm_loss, takes_chunked_path
from lowrank_cli.ops.loss import num_targets

pytestmark = pytest.mark.numerical

# the models' own loss, their norms and their positions are in float32: a few dozen roundings on a gradient's way
SINGLE = 32 * 2**-24
V = 61
SMALL = {"vocab_size": V, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
GATED = SMALL | {"intermediate_size": 24, "num_key_value_heads": 2}
CONFIGS = dict.fromkeys(PLAIN_HEAD, GATED) | {
    "bloom": SMALL | {"n_layer": 2, "n_head": 2},
    "codegen": {"vocab_size": V, "n_embd": 16, "n_head": 4, "n_layer": 2, "rotary_dim": 4, "n_inner": 24},
    "falcon": SMALL,
    "gpt2": {"vocab_size": V, "n_embd": 16, "n_head": 2, "n_layer": 2},
    "gpt_neo": {"vocab_size": V, "hidden_size": 16, "num_heads": 2, "num_layers": 2}
    | {"attention_types": [[["global", "local"], 1]], "intermediate_size": 24},
    "gptj": {"vocab_size": V, "n_embd": 16, "n_head": 2, "n_layer": 2, "rotary_dim": 4, "n_inner": 24},
    "gemma": GATED | {"head_dim": 8, "num_key_value_heads": 1},
    "mpt": {"vocab_size": V, "d_model": 16, "n_heads": 2, "n_layers": 2, "expansion_ratio": 2},
    "opt": SMALL | {"ffn_dim": 24, "word_embed_proj_dim": 8},
    "qwen3": GATED | {"head_dim": 8},
    "ministral": GATED | {"head_dim": 8},
    "smollm3": GATED | {"pad_token_id": 0},
    "phi3": GATED | {"pad_token_id": 0},
}


@pytest.fixture(autouse=True)
def seed_zero():
    torch.manual_seed(0)


def tiny(model_type, **changes):
    """Return a model in float64."""
    config = AutoConfig.for_model(model_type, **(CONFIGS.get(model_type, GATED) | changes))
    config.get_text_config().vocab_size = V
    for name in ("dropout", "attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "embedding_dropout"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).train()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def padded_batch():
    """Three documents of 9, 6 and 3 tokens, padded on the right, without targets on the padding."""
    ids = torch.randint(3, V, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(9) < torch.tensor([9, 6, 3]).unsqueeze(1)).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def assert_equals_own_loss(model, batch):
    own = model(**batch, use_cache=False).loss
    own.backward()
    wanted = gradients_of(model)
    loss = causal_lm_loss(model, batch)
    loss.backward()
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(own.item(), rel=SINGLE)
    assert_close(gradients_of(model), wanted)


def gradients_of(model) -> dict[str, torch.Tensor]:
    """Return the gradients and forget them."""
    grads = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return grads


def assert_close(grads, wanted):
    # that of a key's bias is zero but for rounding
    least = 1e-6 * max(float(grad.norm()) for grad in wanted.values())
    for name, grad in wanted.items():
        assert float((grads[name] - grad).norm()) < SINGLE * max(least, float(grad.norm())), name


class HoldsLogits(TorchDispatchMode):
    """Whether a tensor with one entry for each token and vocabulary entry came up."""

    def __init__(self, num_tokens):
        super().__init__()
        self.numel, self.found = num_tokens * V, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.found |= any(isinstance(t, torch.Tensor) and t.numel() == self.numel for t in tree_leaves(result))
        return result


@pytest.mark.parametrize("model_type", sorted(PLAIN_HEAD))
def test_equals_the_models_own_loss_and_gradients(model_type):
    model = tiny(model_type)
    assert takes_chunked_path(model)
    assert_equals_own_loss(model, padded_batch())


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen2", "gemma"])
@pytest.mark.parametrize("tied", [False, True])
def test_tied_and_untied_embeddings(model_type, tied):
    model = tiny(model_type, tie_word_embeddings=tied)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert_equals_own_loss(model, padded_batch())


@pytest.mark.parametrize("model_type", ["phi", "gptj", "codegen"])
def test_head_with_a_bias(model_type):
    model = tiny(model_type)
    assert model.get_output_embeddings().bias is not None
    assert_equals_own_loss(model, padded_batch())


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox"])
def test_activation_checkpointing(model_type):
    model = tiny(model_type)
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    assert_equals_own_loss(model, padded_batch())


def test_batch_without_mask_and_with_positions():
    batch = padded_batch()
    batch = {k: batch[k] for k in ("input_ids", "labels")} | {"position_ids": torch.arange(9).expand(3, 9)}
    assert_equals_own_loss(tiny("llama"), batch)


def test_holds_no_logits():
    model, batch = tiny("llama"), padded_batch()
    with HoldsLogits(27) as plain:
        model(**batch)
    with HoldsLogits(27) as chunked:
        causal_lm_loss(model, batch).backward()
    assert plain.found
    assert not chunked.found


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("granite", {"logits_scaling": 3.0}),
        ("cohere", {"logit_scale": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}),
        ("gemma2", {"head_dim": 8, "num_key_value_heads": 1, "final_logit_softcapping": 2.0}),
    ],
)
def test_scaled_and_capped_heads_use_their_own_logits(model_type, changes):
    model = tiny(model_type, **changes)
    assert not takes_chunked_path(model)
    assert_equals_own_loss(model, padded_batch())


def test_a_replaced_subclassed_or_hooked_head_uses_the_models_logits():
    class Louder(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    replaced, hooked, subclassed = tiny("llama"), tiny("llama"), tiny("llama")
    replaced.lm_head = Louder(16, V, bias=False, dtype=torch.float64)
    hooked.lm_head.register_forward_hook(lambda module, args, output: 2 * output)
    subclassed.__class__ = type("Mine", (type(subclassed),), {})
    for model in (replaced, hooked, subclassed):
        assert not takes_chunked_path(model)
        assert_equals_own_loss(model, padded_batch())


def test_a_wrapped_model_is_called_as_a_whole():
    class Wrapper(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, **inputs):
            return self.inner(**inputs)

    model, batch = tiny("llama"), padded_batch()
    torch.testing.assert_close(causal_lm_loss(Wrapper(model), batch), causal_lm_loss(model, batch))


@pytest.mark.parametrize("model_type", ["llama", "granite"])
def test_micro_batches_add_up_on_both_paths(model_type):
    model, batch = tiny(model_type), padded_batch()
    total = num_targets(batch["labels"])
    whole = causal_lm_loss(model, batch)
    whole.backward()
    wanted = gradients_of(model)
    parts = [{k: v[rows] for k, v in batch.items()} for rows in (slice(0, 1), slice(1, 3))]
    losses = [causal_lm_loss(model, part, total) for part in parts]
    sum(losses).backward()
    assert float(sum(losses)) == pytest.approx(float(whole), rel=SINGLE)
    assert_close(gradients_of(model), wanted)


@pytest.mark.parametrize("model_type", ["llama", "granite"])
def test_a_batch_without_targets_is_zero(model_type):
    batch = padded_batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss = causal_lm_loss(tiny(model_type), batch)
    loss.backward()
    assert loss.item() == 0


def test_bfloat16_is_close_to_float64():
    model, batch = tiny("llama"), padded_batch()
    half = copy.deepcopy(model).bfloat16()
    loss = causal_lm_loss(half, batch)
    loss.backward()
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(causal_lm_loss(model, batch)), rel=1e-2)


def test_a_real_model_scores_a_real_text_as_published(published_data):
    folder = published_data / "models/stories260K"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    text = (folder / "tinystories_sample.txt").read_text(encoding="utf-8")
    stories = [story.strip() for story in text.split("<|endoftext|>") if story.strip()]
    assert len(stories) == 5
    total = count = 0
    with torch.no_grad():
        for story in stories:
            ids = tokenizer.encode(story, add_special_tokens=False)
            ids = torch.tensor([[tokenizer.bos_token_id, *ids][:512]])
            total += causal_lm_loss(model, {"input_ids": ids, "labels": ids}, num_targets=1).item()
            count += int(num_targets(ids))
    assert total / count == pytest.approx(1.2664, abs=1e-4)
