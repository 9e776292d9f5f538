"""Second moments against autograd on the parameters, and what they do to a real model."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lowrank_cli.models.targets import select
from lowrank_cli.svd import calibration


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


def test_squared_values_predict_how_the_loss_of_a_real_model_changes(test_data):
    """Two-sided values are second-order changes of the loss: on a trained model, for small cuts, within a factor."""
    from transformers import AutoTokenizer

    from lowrank_cli.svd.spectrum import decompose

    folder = test_data / "models" / "stories260K"
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor(tokenizer((folder / "tinystories_sample.txt").read_text()).input_ids)
    text = list(calibration.windows_of(ids, 256))
    linears = select(model, None)
    moments = calibration.collect(model, linears, text, two_sided=True)

    def log_probabilities() -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([model(input_ids=w).logits.log_softmax(-1).flatten(0, 1) for w in text])

    before = log_probabilities()
    predicted, measured = [], []
    for name in list(linears)[::6]:
        module = linears[name]
        found = decompose(module.weight, moments[name].input, moments[name].output)
        rank = int(found.values.numel() * 0.8)
        kept = module.weight.detach().clone()
        with torch.no_grad():
            first, second = found.factors(kept, rank)
            module.weight.copy_(first @ second)
        after = log_probabilities()
        with torch.no_grad():
            module.weight.copy_(kept)
        # the Fisher matrix is the curvature of this divergence
        measured.append(float((before.exp() * (before - after)).sum(-1).mean()))
        predicted.append(0.5 * float(found.values[rank:].square().sum()))
    ratios = torch.tensor(measured) / torch.tensor(predicted)
    assert float(ratios.min()) > 0.2, ratios
    assert float(ratios.max()) < 5, ratios
