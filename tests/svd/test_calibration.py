"""Second moments against autograd on the outputs, and what they say of a model's loss."""

import made_text
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lowrank_cli.models.targets import select
from lowrank_cli.svd import calibration
from lowrank_cli.svd.spectrum import decompose

pytestmark = pytest.mark.numerical


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=61, hidden_size=16, intermediate_size=40, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    return LlamaForCausalLM(config)


def windows(count: int = 3, batch: int = 2, length: int = 9) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 61, (batch, length), generator=generator) for _ in range(count)]


def test_moments_are_those_of_the_inputs_and_of_the_output_gradients(model):
    linears, text = select(model, None), windows()
    found = calibration.collect(model, linears, text, two_sided=True, seed=5)
    # by plain autograd: every input and output kept, the same labels drawn
    generator = torch.Generator().manual_seed(5)
    inputs, grads = {n: [] for n in linears}, {n: [] for n in linears}
    model.eval()
    for ids in text:
        kept = {}

        def keep(name, x, y, kept=kept):
            y.retain_grad()
            kept[name] = (x[0].detach(), y)

        handles = [m.register_forward_hook(lambda m, x, y, n=n: keep(n, x, y)) for n, m in linears.items()]
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).squeeze(1)
        F.cross_entropy(logits, labels, reduction="sum").backward()
        for handle in handles:
            handle.remove()
        for name, (x, y) in kept.items():
            inputs[name].append(x.flatten(0, 1).double())
            grads[name].append(y.grad.flatten(0, 1).double())
    for name in linears:
        x, g = torch.cat(inputs[name]), torch.cat(grads[name])
        torch.testing.assert_close(found[name].input, x.T @ x / len(x), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(found[name].output, g.T @ g / len(g), rtol=1e-4, atol=1e-9)
        assert found[name].input.dtype == torch.float64


def test_linears_of_the_same_input_share_its_moment(model):
    found = calibration.collect(model, select(model, None), windows(), two_sided=False)
    layer = "model.layers.0."
    assert found[f"{layer}self_attn.q_proj"].input is found[f"{layer}self_attn.v_proj"].input
    assert found[f"{layer}mlp.gate_proj"].input is found[f"{layer}mlp.up_proj"].input
    assert found[f"{layer}mlp.gate_proj"].input is not found[f"{layer}self_attn.q_proj"].input
    assert found[f"{layer}self_attn.q_proj"].output is None


def test_groups_give_what_one_pass_gives(model):
    linears, text = select(model, None), windows()
    whole = calibration.collect(model, linears, text, two_sided=True, seed=3)
    shapes = {name: (m.out_features, m.in_features) for name, m in linears.items()}
    cut = calibration.groups(shapes, 3 * 8 * (16 * 16 + 40 * 40), two_sided=True)
    assert len(cut) > 2
    assert [name for group in cut for name in group] == list(linears)
    for names in cut:
        part = calibration.collect(model, {n: linears[n] for n in names}, text, two_sided=True, seed=3)
        for name in names:
            assert torch.equal(part[name].input, whole[name].input)
            assert torch.equal(part[name].output, whole[name].output)


def test_leaves_the_model_as_it_was(model):
    model.train()
    next(model.parameters()).requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    calibration.collect(model, select(model, None), windows(), two_sided=True)
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * (len(before) - 1)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_windows_drop_what_is_left_over():
    cut = list(calibration.windows_of(torch.arange(23), 5))
    assert [w.tolist() for w in cut] == [[list(range(i, i + 5))] for i in (0, 5, 10, 15)]
    assert len(list(calibration.windows_of(torch.arange(23), 5, 2))) == 2


def log_probabilities(model, text: list[torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(input_ids=ids).logits[:, :-1].log_softmax(-1).flatten(0, 1) for ids in text])


def divergence_of_a_cut(model, linear, factors, text, before: torch.Tensor) -> float:
    """The mean Kullback-Leibler divergence of the predictions when a weight is cut: its curvature is the Fisher."""
    kept = linear.weight.detach().clone()
    with torch.no_grad():
        linear.weight.copy_(factors[0] @ factors[1])
    after = log_probabilities(model, text)
    with torch.no_grad():
        linear.weight.copy_(kept)
    return float((before.exp() * (before - after)).sum(-1).mean())


@pytest.mark.parametrize("rank", [4, 12])
def test_cut_values_are_the_change_of_the_loss_where_inputs_and_gradients_are_independent(rank, model):
    """In a head of small weights: the gradients at the logits are those of uniform predictions, whatever the input."""
    model, text = model.double(), windows(16, batch=10, length=51)
    moments = calibration.collect(model, {"head": model.lm_head}, text, two_sided=True)["head"]
    found = decompose(model.lm_head.weight, moments.input, moments.output, damping=1e-9)
    factors, before = found.factors(model.lm_head.weight, rank), log_probabilities(model, text)
    changed = divergence_of_a_cut(model, model.lm_head, factors, text, before)
    # 61 labels drawn 8,000 times: eigenvalues of their second moment are off by up to 2 sqrt(61 / 8000) = 17 %
    assert changed == pytest.approx(0.5 * float(found.values[rank:].square().sum()), rel=0.17)


def test_cut_values_are_near_the_change_of_the_loss_of_a_trained_model(stories):
    """Inputs and gradients are not independent there: summed over linears of each kind, within a factor of two."""
    model = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(stories)
    ids = [i for story in made_text.stories(30, "calibration") for i in tokenizer(story).input_ids]
    text = list(calibration.windows_of(torch.tensor(ids), 256))
    linears = dict(list(select(model, None).items())[::6])
    moments = calibration.collect(model, linears, text, two_sided=True)
    predicted, measured, before = 0.0, 0.0, log_probabilities(model, text)
    for name, linear in linears.items():
        found = decompose(linear.weight, moments[name].input, moments[name].output)
        rank = int(found.values.numel() * 0.8)
        measured += divergence_of_a_cut(model, linear, found.factors(linear.weight, rank), text, before)
        predicted += 0.5 * float(found.values[rank:].square().sum())
    assert 0.5 < measured / predicted < 2
