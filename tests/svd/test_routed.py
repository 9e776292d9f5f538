"""Moments of experts against the tokens of each, collected by hand."""

import pytest
import tiny_models
import torch
import torch.nn.functional as F

from lowrank_cli.models.lowrank_linear import shape_of
from lowrank_cli.models.targets import select, table
from lowrank_cli.svd import calibration, layerwise
from lowrank_cli.svd.routed import key_of
from lowrank_cli.svd.shelf import Shelf

pytestmark = pytest.mark.numerical

EXPERTS = 8


def made(model_type: str):
    torch.manual_seed(0)
    return tiny_models.tiny(model_type, num_experts=EXPERTS, num_local_experts=EXPERTS).float().eval()


def text(length: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, tiny_models.V, (1, length), generator=generator) for _ in range(2)]


def targets(model) -> dict:
    return select(model, None) | {row.name: row for row in table(model) if row.weight.dim() == 3 and not row.why}


def stacks(model) -> dict:
    return {name: t for name, t in targets(model).items() if len(shape_of(t)) == 3}


def by_hand(model, windows: list[torch.Tensor], seed: int) -> dict[str, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Inputs and gradients at the outputs of every expert, float64, from an expert's forward written out."""
    rows = {key_of(name, e): [] for name in stacks(model) for e in range(EXPERTS)}

    def install(prefix: str, experts, kept: dict):
        def multiplied(x, leaf: str, e: int):
            weight = getattr(experts, leaf)[e]
            y = x @ (weight if experts.is_transposed else weight.T)
            y.retain_grad()
            kept[key_of(f"{prefix}.{leaf}", e)] = (x, y)
            return y + getattr(experts, f"{leaf}_bias")[e] if experts.has_bias else y

        def forward(hidden, chosen, weights):
            out = torch.zeros_like(hidden)
            for e in range(EXPERTS):
                token, place = torch.where(chosen == e)
                inner = experts._apply_gate(multiplied(hidden[token], "gate_up_proj", e))
                out = out.index_add(0, token, multiplied(inner, "down_proj", e) * weights[token, place, None])
            return out

        experts.forward = forward

    generator = torch.Generator().manual_seed(seed)
    for ids in windows:
        kept = {}
        for i, layer in enumerate(model.model.layers):
            install(f"model.layers.{i}.mlp.experts", layer.mlp.experts, kept)
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).squeeze(1)
        F.cross_entropy(logits, labels, reduction="sum").backward()
        for key, (x, y) in kept.items():
            rows[key].append((x.detach().double(), y.grad.double()))
    for layer in model.model.layers:
        del layer.mlp.experts.forward
    return rows


def joined(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
    return [torch.cat(side) for side in zip(*pairs, strict=True)]


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_moments_are_of_the_tokens_of_each_expert_and_of_all_of_them(model_type, implementation):
    model, windows = made(model_type), text(5)
    rows = by_hand(model, windows, seed=5)
    model.set_experts_implementation(implementation)
    found = calibration.collect(model, targets(model), windows, two_sided=True, seed=5)
    seen = set()
    for name, row in stacks(model).items():
        of_all = joined([pair for e in range(EXPERTS) for pair in rows[key_of(name, e)]])
        for e in range(EXPERTS):
            own, moments = joined(rows[key_of(name, e)]), found[key_of(name, e)]
            for x, everyones, moment in zip(own, of_all, (moments.input, moments.output), strict=True):
                # as much of the mean over all experts' tokens as d tokens of its own
                side = x.shape[1]
                mean = everyones.T @ everyones / len(everyones)
                expected = (x.T @ x + side * mean) / (len(x) + side)
                torch.testing.assert_close(moment, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
            assert moments.share == max(len(own[0]), 1) / 10
            columns, lines = moments.sides
            assert (len(lines), len(columns)) == tuple(row.weight.shape[1:])
            seen.add(min(len(own[0]), 2))
    # with no token, one, and more
    assert seen == {0, 1, 2}


def test_an_expert_that_is_given_all_tokens_saw_those_that_are_not_zero():
    """Llama 4 multiplies the tokens of others by zero instead of leaving them out."""
    torch.manual_seed(0)
    model = tiny_models.tiny("llama4_text").float()
    model.config.num_experts_per_tok = 2
    chosen = {}
    for name, module in model.named_modules():
        if "router" in type(module).__name__.lower():
            module.register_forward_hook(lambda m, x, y, name=name: chosen.update({name: (y[0] > 0).sum(0)}))
    (ids,) = text(20)[:1]
    found = calibration.collect(model, stacks(model), [ids], two_sided=True)
    for name, router in (("gate_up_proj", chosen), ("down_proj", chosen)):
        for layer, counts in enumerate(router.values()):
            shares = [found[f"model.layers.{layer}.feed_forward.experts.{name}.{e}"].share for e in range(len(counts))]
            assert shares == [max(int(count), 1) / 20 for count in counts]


@pytest.mark.parametrize("two_sided", [True, False])
def test_experts_cut_over_passes_have_the_moments_of_one(two_sided, tmp_path):
    model, windows = made("mixtral"), text(12)
    whole = calibration.collect(model, targets(model), windows, two_sided=two_sided, seed=3)
    shapes = {name: shape_of(t) for name, t in targets(model).items()}
    groups = calibration.groups(shapes, 8 * 3 * 48**2, two_sided)
    assert len(groups) > 5
    counts = {name: sum(len(group.get(name, ())) for group in groups) for name in shapes}
    assert counts == {name: shape[0] if len(shape) == 3 else 1 for name, shape in shapes.items()}
    parts = {}
    for group in groups:
        chosen = {name: targets(model)[name] for name in group}
        parts |= calibration.collect(model, chosen, windows, two_sided=two_sided, experts=group, seed=3)
    chain = layerwise.chain_of(model)
    by_layer = layerwise.of_layers(chain, targets(model))
    shelf = Shelf(tmp_path, 1 << 20)
    passing = layerwise.LayerMoments(
        chain, by_layer, windows, two_sided=two_sided, shelf=shelf, budget=8 * 3 * 48**2, seed=3
    )
    passing.forward()
    layers, passes = {}, 0
    for of_part in passing.moments():
        layers, passes = layers | of_part, passes + 1
    assert passes == sum(map(len, passing.parts)) > 2 * len(by_layer)
    assert not shelf.held
    for found in (parts, layers):
        assert set(found) == set(whole)
        for key, moments in whole.items():
            assert (found[key].share, found[key].transposed) == (moments.share, moments.transposed)
            for one, other in ((found[key].input, moments.input), (found[key].output, moments.output)):
                if other is not None:
                    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


def test_the_parameter_is_there_again_afterwards():
    model = made("mixtral")
    before = dict(model.named_parameters())
    calibration.collect(model, targets(model), text(5), two_sided=False)
    after = dict(model.named_parameters())
    assert all(after[name] is p for name, p in before.items())
    experts = model.model.layers[0].mlp.experts
    assert experts.down_proj is before["model.layers.0.mlp.experts.down_proj"]
