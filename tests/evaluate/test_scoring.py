"""Log-likelihoods with shared beginnings are those of every row by itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from lowrank_cli.evaluate.scoring import Row, Scorer, clusters, common_prefix, rows_that_fit

TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=12).map(tuple)
MODELS = {
    "llama": {"num_key_value_heads": 1, "intermediate_size": 40},
    "gpt2": {"n_positions": 256},
    "gpt_neox": {"intermediate_size": 40},
    "qwen2": {"num_key_value_heads": 2, "intermediate_size": 40},
    # its layers keep the last tokens only: nothing may be shared
    "mistral": {"num_key_value_heads": 2, "intermediate_size": 40, "sliding_window": 7},
    # no keys and values at all
    "mamba": {"state_size": 4},
}


@pytest.fixture(params=MODELS)
def model(request):
    shape = {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 50}
    config = AutoConfig.for_model(request.param, **shape, **MODELS[request.param])
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def rows_with_shared_beginnings() -> list[Row]:
    torch.manual_seed(1)

    def draw(count):
        return tuple(torch.randint(0, 50, (count,)).tolist())

    rows = []
    for shared in (draw(60), draw(45)):
        for length in (1, 3, 17, 5, 1):
            tokens = shared + draw(length)
            targets = tuple((token,) for token in draw(4)) if length != 17 else (tokens[-2:] + draw(1), draw(1))
            rows.append(Row(tokens, targets))
    rows += [Row(draw(9), (draw(9),)), Row(draw(70), (draw(2), draw(5))), Row(draw(1), (draw(1),))]
    # the shared tokens reach into what is scored
    rows.append(Row(rows[0].tokens[:50], (rows[0].tokens[40:50] + draw(1),)))
    return rows


def reference(model, row: Row) -> list[tuple[float, bool]]:
    """One row by itself, in float64."""
    log_probs = model(torch.tensor([row.tokens])).logits[0].double().log_softmax(-1)
    found = []
    for target in row.targets:
        tail, tokens = log_probs[len(row.tokens) - len(target) :], torch.tensor(target)
        found.append((float(tail[range(len(target)), tokens].sum()), bool((tail.argmax(-1) == tokens).all())))
    return found


@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_scores_are_those_of_rows_by_themselves(model, batch_size):
    rows = rows_with_shared_beginnings()
    scorer = Scorer(model, batch_size)
    found = dict(scorer.score(rows))
    assert sorted(found) == list(range(len(rows)))
    with torch.no_grad():
        for i, row in enumerate(rows):
            for (value, greedy), (wanted, likeliest) in zip(found[i], reference(model, row), strict=True):
                assert value == pytest.approx(wanted, abs=2e-5 * len(row.tokens))
                assert greedy == likeliest


def test_shares_only_where_every_token_is_kept(model):
    assert Scorer(model, None).shares == (model.config.model_type not in ("mistral", "mamba"))


def test_shared_tokens_are_computed_once(stories_model):
    rows = [Row((*range(100), i), ((5,), (6,))) for i in range(20)]
    seen = []
    hook = stories_model.register_forward_pre_hook(lambda _, args: seen.append(args[0].numel()))
    try:
        list(Scorer(stories_model, 8).score(rows))
    finally:
        hook.remove()
    assert sum(seen) == 100 + 20


@pytest.fixture(scope="module")
def stories_model(subject):
    return subject.model


@given(st.lists(TOKENS, min_size=1, max_size=12), st.integers(1, 4))
@settings(deadline=None)
def test_clusters_hold_each_row_once_and_share_what_they_say(inputs, min_shared):
    rows = [Row(tokens, ((1,) * max(1, len(tokens) // 2),)) for tokens in inputs]
    found = clusters(rows, min_shared)
    assert sorted(i for cluster in found for i in cluster.rows) == list(range(len(rows)))
    for cluster in found:
        assert len({rows[i].tokens[: cluster.shared] for i in cluster.rows}) == 1
        # logits that are needed are never among the shared tokens, and something is left to compute
        assert all(cluster.shared <= rows[i].unscored < len(rows[i].tokens) for i in cluster.rows)
        assert cluster.shared == 0 or (cluster.shared >= min_shared and len(cluster.rows) > 1)


@given(TOKENS, TOKENS)
def test_common_prefix_is_that_of_a_plain_loop(a, b):
    length = 0
    while length < min(len(a), len(b)) and a[length] == b[length]:
        length += 1
    assert common_prefix(a, b) == length


def test_fewer_rows_fit_when_they_are_longer(stories_model):
    few = rows_that_fit(stories_model, 512, 512, 0)
    assert 1 <= few <= rows_that_fit(stories_model, 64, 64, 0)


def test_batches_shrink_until_they_fit(stories_model, monkeypatch):
    rows = rows_with_shared_beginnings()
    scorer = Scorer(stories_model, 8)
    wanted = dict(scorer.score(rows))
    original = Scorer._batch
    sizes = []

    def small(self, batch, *args):
        sizes.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("no room")
        return original(self, batch, *args)

    monkeypatch.setattr(Scorer, "_batch", small)
    found = dict(Scorer(stories_model, 8).score(rows))
    assert max(sizes) > 2
    for i in range(len(rows)):
        assert [value for value, _ in found[i]] == pytest.approx([value for value, _ in wanted[i]], abs=1e-4)
    monkeypatch.setattr(Scorer, "_batch", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no room")))
    with pytest.raises(torch.OutOfMemoryError):
        list(Scorer(stories_model, 8).score(rows))
