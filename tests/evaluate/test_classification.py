import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from lowrank_cli.errors import LowrankError
from lowrank_cli.measure import answers
from lowrank_cli.measure.answers import answer
from lowrank_cli.measure.classification import METRICS, label_loss, predict, score

PAIRS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=50)


@given(PAIRS)
@settings(deadline=None)
def test_class_metrics_are_their_formulas(pairs):
    predictions, labels = map(np.array, zip(*pairs, strict=True))
    tp, tn = sum(p == y == 1 for p, y in pairs), sum(p == y == 0 for p, y in pairs)
    fp, fn = sum(p > y for p, y in pairs), sum(p < y for p, y in pairs)
    found = score(("accuracy", "f1", "matthews_correlation"), predictions, labels)
    assert found["accuracy"] == pytest.approx((tp + tn) / len(pairs))
    assert found["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 0.0)
    root = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert found["matthews_correlation"] == pytest.approx((tp * tn - fp * fn) / root if root else 0.0)


def ranks(values):
    return np.array([(values < v).sum() + ((values == v).sum() + 1) / 2 for v in values])


@given(st.lists(st.tuples(st.integers(0, 10), st.integers(0, 5)), min_size=2, max_size=40))
@settings(deadline=None)
def test_correlations_are_their_formulas_and_never_nan(pairs):
    predictions, labels = (np.array(column, dtype=np.float64) for column in zip(*pairs, strict=True))
    found = score(("pearson", "spearman"), predictions, labels)
    for name, (x, y) in {
        "pearson": (predictions, labels),
        "spearman": (ranks(predictions), ranks(labels)),
    }.items():
        varies = len(set(x)) > 1 and len(set(y)) > 1
        assert found[name] == pytest.approx(np.corrcoef(x, y)[0, 1] if varies else 0.0, abs=1e-12)


def test_predicting_the_majority_has_no_correlation():
    labels = [1] * 70 + [0] * 30
    found = score(METRICS, [1] * 100, labels)
    assert found["accuracy"] == 0.7
    assert found["matthews_correlation"] == found["pearson"] == found["spearman"] == 0.0


@pytest.mark.parametrize(("predictions", "labels"), [([], []), ([1], [1, 0]), ([[1]], [[1]])])
def test_predictions_and_labels_have_to_match(predictions, labels):
    with pytest.raises(ValueError, match="shape"):
        score(("accuracy",), predictions, labels)


@pytest.fixture(params=["classification", "regression"])
def head(request):
    torch.manual_seed(0)
    kind = request.param
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=32, num_labels=3 if kind == "classification" else 1)  # fmt: skip
    batches = []
    for size in (4, 3):
        labels = torch.randint(0, 3, (size,)) if kind == "classification" else torch.rand(size) * 5
        ids = torch.randint(0, 50, (size, 8))
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return kind, BertForSequenceClassification(config), batches


def test_predictions_and_loss_are_the_models_own(head):
    kind, model, batches = head
    model.train()
    model.config.problem_type = "regression" if kind == "regression" else "single_label_classification"
    result = predict(model, batches, kind)
    assert model.training
    model.eval()
    with torch.no_grad():
        outputs = [model(**batch) for batch in batches]
    logits = torch.cat([output.logits for output in outputs])
    expected = logits.argmax(-1) if kind == "classification" else logits[:, 0]
    np.testing.assert_array_equal(result.predictions, expected.double().numpy())
    np.testing.assert_array_equal(result.labels, torch.cat([b["labels"] for b in batches]).double().numpy())
    assert result.loss == pytest.approx(sum(float(o.loss) * n for o, n in zip(outputs, (4, 3), strict=True)) / 7)


def test_micro_batches_add_up_to_their_update(head):
    kind, model, batches = head
    model.eval()
    whole = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    together = label_loss(model, whole, kind)
    apart = sum(label_loss(model, batch, kind, 7) for batch in batches)
    torch.testing.assert_close(together, apart)


def test_a_broken_model_has_no_predictions(head):
    kind, model, batches = head
    torch.nn.init.constant_(model.classifier.bias, torch.nan)
    with pytest.raises(LowrankError, match="not finite"):
        predict(model, batches, kind)
    assert model.training


@pytest.fixture
def language_model():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=2, initializer_range=0.5)  # fmt: skip
    return LlamaForCausalLM(config).eval()


def row(prompt, response):
    return [*prompt, *response], [-100] * len(prompt) + list(response)


def batch_of(rows, **columns):
    width = max(len(ids) for ids, _ in rows)
    padded = {"input_ids": 0, "labels": -100}
    batch = {
        key: torch.tensor([r[i] + [fill] * (width - len(r[i])) for r in rows])
        for i, (key, fill) in enumerate(padded.items())
    }
    batch["attention_mask"] = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows])
    return batch | {key: torch.tensor(values) for key, values in columns.items()}


def log_likelihood(model, prompt, response):
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *response]])).logits[0].double().log_softmax(-1)
    return sum(float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(response))


@pytest.mark.parametrize("keeps", [True, False])
def test_the_likeliest_choice_answers(language_model, keeps, monkeypatch):
    monkeypatch.setattr(answers, "_keeps_logits", lambda model: keeps)
    prompts = [[3, 4, 5], [6, 7, 8, 9, 10], [11, 12]]
    choices = [[[20], [21, 22], [23]], [[20, 25], [26]], [[30], [31], [32], [33, 34, 35]]]
    rows = [(row(p, c), i, j) for i, p in enumerate(prompts) for j, c in enumerate(choices[i])]
    batches = [
        batch_of([r for r, _, _ in part], record=[i for _, i, _ in part], choice=[j for _, _, j in part],
                 right=[1] * len(part))
        for part in (rows[:4], rows[4:])
    ]  # fmt: skip
    found, right = answer(language_model, batches)
    likelihoods = [[log_likelihood(language_model, p, c) for c in cs] for p, cs in zip(prompts, choices, strict=True)]
    assert found.tolist() == [int(np.argmax(values)) for values in likelihoods]
    assert right.tolist() == [1, 1, 1]


def test_choices_of_one_token_need_one_row(language_model):
    prompts, tokens = [[3, 4, 5], [6, 7, 8, 9, 10], [11, 12]], [[20, 21], [22, 23, 24], [25, 26, 27]]
    rows = [row(p, c[:1]) for p, c in zip(prompts, tokens, strict=True)]
    padded = [c + [-1] * (3 - len(c)) for c in tokens]
    batch = batch_of(rows, record=[2, 0, 1], right=[0, 1, 2], choices=padded)
    found, right = answer(language_model, [batch])
    expected = [
        int(np.argmax([log_likelihood(language_model, p, [t]) for t in c]))
        for p, c in zip(prompts, tokens, strict=True)
    ]
    # in the order of the records
    assert found.tolist() == [expected[1], expected[2], expected[0]]
    assert right.tolist() == [1, 2, 0]


def test_an_open_answer_is_right_where_greedy_decoding_writes_it(language_model):
    prompts = [[3, 4, 5], [6, 7, 8, 9]]
    written = [
        language_model.generate(
            torch.tensor([p]), max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None
        )[0, len(p) :].tolist()
        for p in prompts
    ]
    wrong = [*written[1][:2], (written[1][2] + 1) % 40]
    rows = [row(prompts[0], written[0]), row(prompts[1], wrong)]
    found, right = answer(language_model, [batch_of(rows, record=[0, 1], choice=[0, 0], right=[0, 0])])
    assert found.tolist() == [1, 0]
    assert right.tolist() == [1, 1]


def test_no_questions_have_no_answers(language_model):
    found, right = answer(language_model, [])
    assert len(found) == len(right) == 0


def test_logits_to_keep_is_found_through_an_adapter(language_model):
    assert answers._keeps_logits(language_model)
    assert answers._keeps_logits(SimpleNamespace(get_base_model=lambda: language_model))
    assert not answers._keeps_logits(torch.nn.Linear(1, 1))
