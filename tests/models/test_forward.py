"""The training loss against each architecture's own: values, gradients, padding, ties, checkpointing."""

import copy

import pytest
import torch
from tiny_models import CONFIGS, GATED, V, tiny, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from lowrank_cli.memory.stand_ins import RealKernels
from lowrank_cli.memory.tracker import Tracker
from lowrank_cli.models.forward import causal_lm_loss, takes_chunked_path
from lowrank_cli.models.head import tail_of
from lowrank_cli.ops.loss import num_targets

pytestmark = pytest.mark.numerical

# the models' own loss, their norms and their positions are in float32: a few dozen roundings on a gradient's way
SINGLE = 32 * 2**-24


@pytest.fixture(autouse=True)
def seed_zero():
    torch.manual_seed(0)


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
    least = 1e-6 * max(float(grad.norm()) for grad in wanted.values() if grad is not None)
    for name, grad in wanted.items():
        # an expert that no token came to has none
        assert (grads[name] is None) == (grad is None), name
        assert grad is None or float((grads[name] - grad).norm()) < SINGLE * max(least, float(grad.norm())), name


class HoldsLogits(TorchDispatchMode):
    """Whether a tensor with one entry for each token and vocabulary entry came up."""

    def __init__(self, num_tokens):
        super().__init__()
        self.numel, self.found = num_tokens * V, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.found |= any(isinstance(t, torch.Tensor) and t.numel() == self.numel for t in tree_leaves(result))
        return result


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_equals_the_models_own_loss_and_gradients(model_type):
    model = tiny(model_type)
    assert takes_chunked_path(model)
    with HoldsLogits(27) as chunked:
        causal_lm_loss(model, padded_batch()).backward()
    assert not chunked.found
    model.zero_grad()
    assert_equals_own_loss(model, padded_batch())


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_is_decided_on_the_meta_device_as_with_weights(model_type):
    with torch.device("meta"):
        without = AutoModelForCausalLM.from_config(tiny_config(model_type), dtype=torch.bfloat16)
    tail = tail_of(tiny(model_type).eval())
    assert tail is not None
    # as the estimate of a run's memory asks, in the middle of a forward pass
    with Tracker(on_cuda=True), RealKernels("cuda"):
        assert tail_of(without) == tail


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
    ("model_type", "changes", "scale", "cap"),
    [
        ("granite", {"logits_scaling": 3.0}, 1 / 3, None),
        ("cohere", {"logit_scale": 0.3}, 0.3, None),
        ("falcon_h1", {"lm_head_multiplier": 0.4}, 0.4, None),
        ("gemma2", {"final_logit_softcapping": 2.0}, 1.0, 2.0),
        ("gemma2", {"final_logit_softcapping": None}, 1.0, None),
        ("nanochat", {"final_logit_softcapping": 0.125}, 1.0, 0.125),
    ],
)
def test_finds_the_scale_and_the_cap_of_a_configuration(model_type, changes, scale, cap):
    model = tiny(model_type, **changes)
    tail = tail_of(model)
    assert tail.scale == pytest.approx(scale, rel=1e-14)
    assert tail.cap == cap
    assert_equals_own_loss(model, padded_batch())


def test_finding_out_leaves_the_model_and_the_random_state_as_they_were():
    model, seen = tiny("gemma2").eval(), []
    for module in model.modules():
        module.register_forward_hook(lambda *_: seen.append(1))
    before, modules = torch.get_rng_state(), dict(model.named_modules())
    assert tail_of(model) is not None
    assert len(seen) == 0
    assert torch.equal(torch.get_rng_state(), before)
    assert dict(model.named_modules()) == modules
    assert not any(module.training for module in modules.values())


LLAMA = type(AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **GATED)))


class Subclass(LLAMA):
    """A model that does something to the logits."""

    def forward(self, **inputs):
        outputs = super().forward(**inputs)
        outputs.logits = self.change(outputs.logits)
        return outputs


def noisy(self, logits):
    return torch.nn.functional.dropout(logits, 0.5, self.training)


def without_a_row(self, logits):
    return torch.cat([logits[..., :5].new_full((*logits.shape[:-1], 5), -50.0), logits[..., 5:]], -1)


CHANGES = {
    "shift": lambda self, logits: logits + 1,
    "one scale a token": lambda self, logits: logits / logits.norm(dim=-1, keepdim=True),
    "normalised": lambda self, logits: logits.log_softmax(-1),
    "a part of the vocabulary": without_a_row,
    "one scale an entry": lambda self, logits: logits * torch.linspace(1, 1.001, logits.shape[-1]),
    "another bend": lambda self, logits: 2 * torch.atan(logits / 2),
    "a hard cap": lambda self, logits: logits.clamp(-2, 2),
    "nothing": lambda self, logits: 0 * logits,
    "the last position": lambda self, logits: logits[:, -1:],
    "another order": lambda self, logits: logits.flip(1),
    "noise": noisy,
}


@pytest.mark.parametrize("change", sorted(CHANGES))
def test_any_other_function_of_the_logits_is_left_to_the_model(change):
    model = tiny("llama").eval()
    model.__class__ = type("Changed", (Subclass,), {"change": CHANGES[change]})
    assert not takes_chunked_path(model)


def test_a_subclass_is_judged_by_what_it_computes():
    model = tiny("llama")
    model.__class__ = type("Louder", (Subclass,), {"change": lambda self, logits: 2 * logits})
    assert tail_of(model).scale == 2.0
    batch = padded_batch()
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert causal_lm_loss(model, batch).item() == pytest.approx(loss.item(), rel=SINGLE)


def test_a_replaced_or_hooked_head_uses_the_models_logits():
    class Louder(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    replaced, hooked = tiny("llama"), tiny("llama")
    replaced.lm_head = Louder(16, V, bias=False, dtype=torch.float64)
    hooked.lm_head.register_forward_hook(lambda module, args, output: 2 * output)
    for model in (replaced, hooked):
        assert not takes_chunked_path(model)
        assert_equals_own_loss(model, padded_batch())


def test_a_head_that_is_replaced_later_uses_the_models_logits():
    model = tiny("llama")
    assert takes_chunked_path(model)
    model.lm_head = torch.nn.Sequential(model.lm_head)
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


@pytest.mark.parametrize("chunked", [False, True])
def test_micro_batches_add_up_on_both_paths(chunked):
    model, batch = tiny("granite"), padded_batch()
    if not chunked:
        model.lm_head.register_forward_hook(lambda module, args, output: 2 * output)
    assert takes_chunked_path(model) == chunked
    total = num_targets(batch["labels"])
    whole = causal_lm_loss(model, batch)
    whole.backward()
    wanted = gradients_of(model)
    parts = [{k: v[rows] for k, v in batch.items()} for rows in (slice(0, 1), slice(1, 3))]
    losses = [causal_lm_loss(model, part, total) for part in parts]
    sum(losses).backward()
    assert float(sum(losses)) == pytest.approx(float(whole), rel=SINGLE)
    assert_close(gradients_of(model), wanted)


@pytest.mark.parametrize("model_type", ["llama", "granite", "gemma2"])
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
