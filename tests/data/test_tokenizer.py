import gzip
import json
import shutil

import pytest
from transformers import AutoTokenizer

from lowrank_cli.data.documents import open_source
from lowrank_cli.data.tokenizer import adds_bos, load_tokenizer
from lowrank_cli.errors import MissingError, UsageError
from lowrank_cli.settings.training import DataConfig


def load(name, **settings):
    return load_tokenizer(DataConfig(tokenizer=str(name), **settings), None, offline=True)


def c4(folder):
    with gzip.open(folder / "c4" / "c4_en_1500.json.gz", "rt") as file:
        return [json.loads(line)["text"] for line in file][:200]


@pytest.fixture(scope="session")
def texts(test_data):
    return [*c4(test_data), "Zoë  ate\n\na crème brûlée", " ½ of a 日本 ", ""]


def test_trained_tokenizer_is_cached_and_deterministic(tmp_path, monkeypatch, write, documents):
    config = DataConfig(
        dataset=str(write("a.jsonl", [{"text": t + " é \U0001f600"} for t in documents])), vocab_size=300
    )
    told = []
    first = load_tokenizer(config, open_source(config), offline=True, status=told.append)
    assert told == [f"training a 300-entry tokenizer on {config.dataset} (train)"]
    again = load_tokenizer(config, open_source(config), offline=True, status=told.append)
    assert len(told) == 1
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path / "other"))
    anew = load_tokenizer(config, open_source(config), offline=True)
    assert first.get_vocab() == again.get_vocab() == anew.get_vocab()
    assert len(first) == 300
    assert (first.bos_token, first.eos_token, first.pad_token) == ("<s>", "</s>", "<pad>")
    text = "any text: \t日本 \U0001f600\n\n  x"
    assert first.decode(first(text, add_special_tokens=False)["input_ids"]) == text
    assert not [p for p in (tmp_path / "other" / "tokenizers").iterdir() if p.name.startswith(".")]


# end of text, padding, and whether a text begins with a token of its own
SPECIALS = {
    "t5-base": ("</s>", "<pad>", False),
    "llama": ("</s>", "</s>", True),
    "gpt2": ("<|endoftext|>", "<|endoftext|>", False),
    "roberta-base": ("</s>", "<pad>", True),
}
SENTENCEPIECE = {"t5-base": "spiece.model", "llama": "tokenizer.model"}


def specials(tokenizer):
    return tokenizer.eos_token, tokenizer.pad_token, adds_bos(tokenizer)


def test_published_tokenizers_have_eos_and_pad_and_known_ids(published_data):
    loaded = {name: load(published_data / "tokenizers" / name) for name in SPECIALS}
    assert {name: specials(tokenizer) for name, tokenizer in loaded.items()} == SPECIALS
    assert [len(tokenizer) for tokenizer in loaded.values()] == [32_100, 32_000, 50_257, 50_265]
    assert loaded["gpt2"]("Hello world")["input_ids"] == [15496, 995]
    assert loaded["roberta-base"]("Hello world")["input_ids"] == [0, 31414, 232, 2]


@pytest.mark.parametrize("name", SPECIALS)
def test_tokenizers_have_eos_and_pad_and_survive_saving(name, test_data, texts, tmp_path):
    tokenizer = load(test_data / "tokenizers" / name)
    assert specials(tokenizer) == SPECIALS[name]
    size = len(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert (again.eos_token_id, again.pad_token_id, len(again)) == (
        tokenizer.eos_token_id, tokenizer.pad_token_id, size)  # fmt: skip
    assert again(texts[:20])["input_ids"] == tokenizer(texts[:20])["input_ids"]
    # beside a tokenizer_config.json
    assert specials(load(tmp_path)) == SPECIALS[name]


def test_published_sentencepiece_files_give_the_ids_of_tokenizer_json(published_data):
    texts = c4(published_data)
    for name, file in SENTENCEPIECE.items():
        origin = published_data / "tokenizers" / name
        assert load(origin / file)(texts)["input_ids"] == load(origin / "tokenizer.json")(texts)["input_ids"], name


@pytest.mark.parametrize(("name", "file"), SENTENCEPIECE.items())
def test_sentencepiece_files_give_the_ids_of_tokenizer_json(name, file, test_data, texts, tmp_path):
    origin = test_data / "tokenizers" / name
    shutil.copy(origin / file, tmp_path)
    expected = load(origin / "tokenizer.json")(texts)["input_ids"]
    assert load(origin / file)(texts)["input_ids"] == expected
    assert load(tmp_path)(texts)["input_ids"] == expected


def test_vocabulary_and_merges_give_the_ids_of_tokenizer_json(test_data, texts, tmp_path):
    origin = test_data / "tokenizers" / "roberta-base"
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(origin / name, tmp_path)
    assert load(tmp_path)(texts)["input_ids"] == load(origin / "tokenizer.json")(texts)["input_ids"]


def test_fallback_is_used_when_none_is_named(test_data):
    folder = str(test_data / "tokenizers" / "llama")
    assert len(load_tokenizer(DataConfig(), None, fallback=folder, offline=True)) == 1200


@pytest.mark.parametrize("name", ["./nowhere", "nowhere.json", "a/b/c", "no/such-tokenizer"])
def test_missing_tokenizer_is_exit_4(name):
    with pytest.raises(MissingError) as caught:
        load(name)
    assert "--tokenizer takes" in caught.value.hint


def test_folder_without_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(MissingError, match="has no tokenizer"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [("tokenizer.json", b"{"), ("tokenizer.json", b'{"a": 1}'), ("a.model", b"\xff\xff"), ("b.model", b"")],
)
def test_files_that_are_no_tokenizers(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match="is not a |not JSON"):
        load(tmp_path / name)
