"""Perplexity of texts: exact, and in the windows that the literature means."""

import gzip
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from lowrank_cli.errors import MissingError, UsageError
from lowrank_cli.evaluate import text_perplexity
from lowrank_cli.evaluate.subject import open_subject
from lowrank_cli.evaluate.text_perplexity import Text, evaluate, read_text, windows
from lowrank_cli.settings.common import SourceConfig
from lowrank_cli.settings.evaluate import HarnessConfig


@given(st.integers(2, 60), st.integers(2, 20), st.integers(1, 19))
def test_overlapping_windows_score_every_token_but_the_first_once(length, window, stride):
    if stride >= window:
        return
    tokens, scored = list(range(length)), []
    for part, new in windows(tokens, window, stride):
        assert part == tokens[part[0] : part[0] + len(part)]
        assert len(part) <= window
        assert new < len(part)
        scored += part[-new:]
        # what is scored has at least so much before it, unless the text begins there
        assert part[-new] == 1 or len(part) - new >= window - stride
    assert scored == tokens[1:]


@given(st.integers(2, 60), st.integers(2, 20))
def test_windows_side_by_side_are_whole_and_leave_out_a_rest(length, window):
    tokens = list(range(length))
    found = list(windows(tokens, window, None))
    assert [new for _, new in found] == [len(part) - 1 for part, _ in found]
    joined = [token for part, _ in found for token in part]
    assert joined == (tokens if length < window else tokens[: length // window * window])


@pytest.fixture(scope="module")
def double(subject):
    from copy import deepcopy

    return deepcopy(subject.model).double()


@pytest.fixture(scope="module")
def stories_text(stories):
    return (stories / "sample.txt").read_text(encoding="utf-8")


@torch.no_grad()
def nats(model, ids: list[int], first: int) -> float:
    """The sum over the tokens from `first` on, in float64, of one row by itself."""
    log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return -sum(float(log_probs[i - 1, ids[i]]) for i in range(first, len(ids)))


@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_windows_side_by_side_against_float64(batch_size, subject, double, stories_text):
    settings = HarnessConfig(window=100)
    ids = subject.tokenizer(stories_text)["input_ids"]
    text = Text("stories", [stories_text], len(stories_text.split()))
    result = evaluate(subject, text, settings, batch_size)
    whole = len(ids) // 100
    total = sum(nats(double, ids[i * 100 : (i + 1) * 100], 1) for i in range(whole))
    assert result["num_scored"] == whole * 99
    assert result["perplexity"] == pytest.approx(math.exp(total / (whole * 99)), rel=1e-5)


@pytest.mark.parametrize("stride", [1, 37, 99])
def test_overlapping_windows_against_float64(stride, subject, double, stories_text):
    text = stories_text[:600]
    ids = subject.tokenizer(text)["input_ids"]
    result = evaluate(subject, Text("", [text], len(text.split())), HarnessConfig(window=100, stride=stride), None)
    total, end = nats(double, ids[:100], 1), 100
    while end < len(ids):
        new = min(stride, len(ids) - end)
        end += new
        total += nats(double, ids[end - 100 : end], 100 - new)
    assert result["num_scored"] == len(ids) - 1
    assert result["loss"] == pytest.approx(total / (len(ids) - 1), rel=1e-5)
    nats_of_all = total / (len(ids) - 1) * len(ids)
    assert result["word_perplexity"] == pytest.approx(math.exp(nats_of_all / len(text.split())), rel=1e-5)


def test_documents_by_themselves_against_float64(subject, double, stories_text):
    documents = [stories_text[:300], stories_text[300:340], stories_text[500:2500]]
    settings = HarnessConfig(window=64, documents="separate")
    result = evaluate(subject, Text("", documents, 1), settings, None)
    rows = [ids[:64] for ids in subject.tokenizer(documents)["input_ids"]]
    total, count = sum(nats(double, ids, 1) for ids in rows), sum(len(ids) - 1 for ids in rows)
    assert result["num_scored"] == count
    assert result["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)


def test_published_model_has_the_loss_stated_with_it(published_data):
    folder = published_data / "models" / "stories260K"
    model = open_subject(SourceConfig(name=str(folder)), device="cpu", offline=True)
    # each story from <s>, its first 512 tokens
    sample = (folder / "tinystories_sample.txt").read_text(encoding="utf-8")
    stories = [story.strip() for story in sample.split("<|endoftext|>") if story.strip()]
    settings = HarnessConfig(window=512, documents="separate")
    assert evaluate(model, Text("", stories, 1), settings, None)["loss"] == pytest.approx(1.2664, abs=0.02)


def test_wikitext2_is_the_text_of_the_literature(published_data):
    # 341,469 tokens of LLaMA are what papers count for this text
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(published_data / "tokenizers" / "llama" / "tokenizer.json"))
    text = read_text(HarnessConfig(data_dir=str(published_data)), offline=True)
    assert len(tokenizer(text.documents[0])["input_ids"]) == 341_469


def test_rows_of_wikitext2_are_joined_by_two_line_ends(tmp_path):
    (tmp_path / "wiki.test.raw").write_text(" \n = A = \n \n One line . \n Two words \n", encoding="utf-8")
    text = read_text(HarnessConfig(data_dir=str(tmp_path)), offline=True)
    assert text.documents == ["\n\n = A = \n\n\n\n\n One line . \n\n\n Two words \n"]
    assert text.num_words == 8


def test_files_are_read_whole(tmp_path, test_data):
    path = tmp_path / "text.txt"
    path.write_text("One line.\n\nAnother.\n" * 3000, encoding="utf-8")
    text = read_text(HarnessConfig(dataset=str(path)), offline=True)
    assert text.documents == [path.read_text(encoding="utf-8")]
    records = tmp_path / "text.jsonl"
    records.write_text('{"text": "a b"}\n{"text": "c"}\n', encoding="utf-8")
    assert read_text(HarnessConfig(dataset=str(records)), offline=True).documents == ["a b\n\nc"]
    apart = read_text(HarnessConfig(dataset=str(records), documents="separate"), offline=True)
    assert (apart.documents, apart.num_words) == (["a b", "c"], 3)
    c4 = read_text(HarnessConfig(dataset="c4", data_dir=str(test_data)), offline=True)
    with gzip.open(test_data / "c4" / "c4_en_1500.json.gz", "rt", encoding="utf-8") as file:
        assert c4.documents == [" ".join(json.loads(line)["text"] for line in file)]


def test_a_limit_of_tokens_is_kept(subject, stories_text):
    settings = HarnessConfig(window=64, max_tokens=200)
    result = evaluate(subject, Text("", [stories_text], 1), settings, None)
    assert (result["num_tokens"], result["num_windows"]) == (200, 3)


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"dataset": "wikitext2"}, MissingError, "WikiText-2 is not in the cache"),
        ({"dataset": "wikitext2", "data_dir": "/"}, MissingError, "has no wiki.test.raw"),
        ({"dataset": "nothing.txt"}, MissingError, "no file or folder nothing.txt"),
    ],
)
def test_text_that_is_not_there(settings, error, said):
    with pytest.raises(error, match=said):
        read_text(HarnessConfig(**settings), offline=True)


def test_settings_that_cannot_be(subject):
    text = Text("", ["Once upon a time there was"], 6)
    with pytest.raises(UsageError, match="leaves no context"):
        evaluate(subject, text, HarnessConfig(window=8, stride=8), None)
    with pytest.raises(UsageError, match="fewer than two tokens"):
        evaluate(subject, Text("empty", [""], 0), HarnessConfig(), None)
    # a window larger than the context is the context
    assert evaluate(subject, text, HarnessConfig(window=4096), None)["window"] == 512


def test_names_tell_measurements_apart():
    names = {
        text_perplexity.name_of(HarnessConfig(**settings), 512)
        for settings in ({}, {"stride": 5}, {"documents": "separate"}, {"max_tokens": 9}, {"dataset": "a/b.txt"})
    }
    assert len(names) == 5
