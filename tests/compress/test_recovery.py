"""What a compression lost is trained back against the dense model."""

import json
from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM

from lowrank_cli.compress.recovery import Recovery, divergence, relative
from lowrank_cli.models.lowrank_linear import replace_linear, weight_of
from lowrank_cli.models.targets import select
from lowrank_cli.svd.calibration import frozen
from lowrank_cli.svd.layerwise import chain_of
from lowrank_cli.svd.shelf import Shelf
from lowrank_cli.svd.spectrum import decompose

LINE = "compress --welore-param-budget 0.5 --max-length 64 --welore-samples 64 --eval-tokens 2000 --no-plots --json"


@pytest.fixture
def line(stories, text) -> str:
    return f"{LINE} --model {stories} --dataset {text.name} --welore-calibrate {text.name}"


def halved(model):
    """Make every linear of a model one of half its rank, in place."""
    for name, linear in select(model, None).items():
        weight = weight_of(linear)
        rank = min(weight.shape) // 2
        first, second = decompose(weight).factors(weight, rank)
        replace_linear(model, name, rank, "factored").assign(first, second, linear.bias)


@pytest.mark.numerical
@pytest.mark.parametrize("more", ["", pytest.param("--welore-pifa", marks=pytest.mark.slow)])
def test_blocks_that_are_tuned_lose_less_and_all_together_still_less(more, line, lowrank):
    found = {}
    for recover in ("none", "local", "lrc"):
        code, out, err = lowrank(f"{line} {more} --recover {recover} --out {recover}")
        assert code == 0, err
        found[recover] = json.loads(out)
    perplexity = {recover: result["perplexity_after"] for recover, result in found.items()}
    assert perplexity["lrc"] < perplexity["local"] < perplexity["none"], perplexity
    assert found["local"]["block_error_after"] < found["local"]["block_error_before"]
    assert found["lrc"]["divergence_after"] < found["lrc"]["divergence_before"]
    # no parameter more, and a model that loads
    assert len({result["parameters_after"] for result in found.values()}) == 1
    torch.manual_seed(0)
    ids = torch.randint(0, 60, (1, 20))
    low = AutoModelForCausalLM.from_pretrained("lrc/model", dtype=torch.float64)
    assert low(ids).logits.isfinite().all()
    assert not any(p.grad is not None for p in low.parameters())


@pytest.mark.slow
def test_the_same_command_gives_the_same_model(line, lowrank):
    ends = []
    for out in ("one", "two"):
        code, _, err = lowrank(f"{line} --recover local --out {out}")
        assert code == 0, err
        ends.append(AutoModelForCausalLM.from_pretrained(f"{out}/model").state_dict())
    assert all(value.equal(ends[1][name]) for name, value in ends[0].items())


@pytest.mark.numerical
def test_a_block_is_tuned_on_what_reaches_it(stories, tmp_path):
    """The kept error of each block is the one that can be measured from outside, and what is dense stays."""
    dense = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32).eval()
    model = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32).eval()
    draw = torch.Generator().manual_seed(0)
    windows = [torch.randint(3, 400, (2, 24), generator=draw) for _ in range(8)]
    recovery = Recovery(chain_of(model), windows, Shelf(tmp_path / "shelf", 1 << 30), seed=0)
    recovery.remember()
    halved(model)
    embeddings = model.get_input_embeddings().weight.detach().clone()
    with frozen(model):
        errors = recovery.tune()
    assert all(after <= before for before, after in errors)
    assert sum(after for _, after in errors) < 0.95 * sum(before for before, _ in errors)
    assert model.get_input_embeddings().weight.equal(embeddings)
    assert not recovery.shelf.held
    for index, (_, after) in enumerate(errors):
        last = [windows[w] for w in recovery.held_out]
        with torch.no_grad():
            pairs = [
                [m(ids, output_hidden_states=True).hidden_states[index + 1] for m in (model, dense)] for ids in last
            ]
        if index + 1 < len(errors):
            # the last hidden state that Transformers gives has the final norm
            measured = sum(float(relative(found, wanted)) for found, wanted in pairs) / len(last)
            assert measured == pytest.approx(after, rel=1e-4)


@pytest.mark.numerical
def test_a_model_diverges_from_itself_by_nothing(stories):
    model = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float64)
    ids = torch.arange(3, 40)[None]
    # the divergence is computed in float32
    assert abs(float(divergence(model, model, ids))) < 1e-6
    other = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float64)
    halved(other)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=model(ids).logits),
        torch.distributions.Categorical(logits=other(ids).logits),
    ).mean()
    assert float(divergence(other, model, ids)) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--welore-samples 4", "fewer than two batches"),
        ("--welore-weighting none", "trains on the text that errors are weighted by"),
    ],
)
def test_recovery_without_a_text_says_what_to_type(more, said, line, lowrank):
    if "weighting" in more:
        # a text that is not used is refused before
        line = line.partition(" --welore-calibrate")[0]
    line = line.replace("--welore-samples 64 ", "")
    code, _, err = lowrank(f"{line} {more} --recover local --out a")
    assert code == 2
    assert said in err


@pytest.mark.parametrize("number", [2, 3, 7, 12, 32])
def test_what_is_held_out_is_from_all_over_the_text_and_not_trained_on(number):
    windows = [torch.zeros(1, 4, dtype=torch.long)] * number
    recovery = Recovery(None, windows, None, 0)
    held, fit = recovery.held_out, recovery.fitted
    assert sorted(held + fit) == list(range(number))
    assert held
    assert fit
    ends = [-1, *held, number]
    # no part of the text longer than a held-out window's share goes without one
    assert max(b - a for a, b in pairwise(ends)) <= number / len(held) + 1


def test_recovery_is_never_left_out_without_a_word(stories, lowrank):
    """From file to file, and of factors that are only multiplied out, nothing is trained."""
    line = "compress --recover local --no-plots --eval-tokens 0"
    code, _, err = lowrank(f"{line} --welore-weighting none --out a --model", stories)
    assert code == 2
    assert "--recover local trains on the text that errors are weighted by, and there is none" in err
    bare = "compress --welore-weighting none --eval-tokens 0 --no-plots --out small --model"
    assert lowrank(bare, stories)[0] == 0
    code, _, err = lowrank(f"{line} --format dense --out b --model small")
    assert code == 2
    assert "take --recover none" in err
