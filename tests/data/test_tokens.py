import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowrank_cli.data import streams, tokens
from lowrank_cli.data.documents import open_source
from lowrank_cli.errors import UsageError
from lowrank_cli.settings.training import DataConfig

FORMS = [(packing, streaming) for packing in ("packed", "padded") for streaming in (False, True)]
SHARED = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def config(write, documents):
    path = write("a.jsonl", [{"text": t} for t in documents])
    return DataConfig(dataset=str(path), vocab_size=300, max_length=32)


@pytest.fixture(autouse=True)
def small_pools(monkeypatch):
    monkeypatch.setattr(streams, "POOL", 16)


def build(config, **options):
    defaults = {"batch_size": 2, "total_batch_size": 4, "eval_tokens": 500, "seed": 0, "offline": True}
    return tokens.build(config, **defaults | options)


def sequences(batches):
    return [row.tolist() for batch in batches for row in batch["input_ids"]]


def equal(ours, theirs):
    return all(
        a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("streaming", [False, True])
def test_packed_blocks_are_the_documents_joined(config, streaming, monkeypatch):
    monkeypatch.setattr(np.random, "default_rng", lambda seed: type("", (), {"permutation": np.arange}))
    data = build(replace(config, streaming=streaming), batch_size=1, total_batch_size=1)
    expected = []
    for text in open_source(config):
        expected += [*data.tokenizer(text)["input_ids"], data.tokenizer.eos_token_id]
    blocks = len(expected) // 32
    joined = [batch for _ in range(blocks) for batch in data.train.next_update()]
    assert list(chain(*sequences(joined))) == expected[: blocks * 32]
    assert all(torch.equal(b["input_ids"], b["labels"]) and "attention_mask" not in b for b in joined)
    # the next epoch begins at the beginning
    assert sequences(data.train.next_update())[0] == expected[:32]


@pytest.mark.parametrize("tokenizer", ["t5-base", "llama"])
@pytest.mark.parametrize("streaming", [False, True])
def test_padded_rows_are_truncated_and_never_a_target(config, tokenizer, streaming, test_data, monkeypatch):
    monkeypatch.setattr(np.random, "default_rng", lambda seed: type("", (), {"permutation": np.arange}))
    config = replace(
        config, packing="padded", streaming=streaming, tokenizer=str(test_data / "tokenizers" / tokenizer)
    )
    data = build(config, batch_size=3, total_batch_size=57)
    texts = list(open_source(config))
    rows = []
    for batch in data.train.next_update():
        mask = batch.get("attention_mask", torch.ones(3, 32, dtype=torch.int64))
        rows += zip(batch["input_ids"], batch["labels"], mask, strict=True)
    assert len(rows) == len(texts) == 57
    pad = data.tokenizer.pad_token_id
    for text, (ids, labels, mask) in zip(texts, rows, strict=True):
        real = data.tokenizer(text, truncation=True, max_length=32)["input_ids"]
        rest = 32 - len(real)
        assert ids.tolist() == real + [pad] * rest
        assert labels.tolist() == real + [-100] * rest
        assert mask.tolist() == [1] * len(real) + [0] * rest


def test_eos_in_the_text_stays_a_target_where_pad_is_eos():
    batch = tokens.collate([np.array([5, 2, 2], dtype=np.int32)], pad_token_id=2, max_length=5)
    assert batch["labels"].tolist() == [[5, 2, 2, -100, -100]]


@pytest.mark.parametrize(("packing", "streaming"), FORMS)
@SHARED
@given(split=st.sampled_from([(1, 1), (2, 1), (4, 3), (6, 2), (12, 1), (3, 4)]), seed=st.integers(0, 3))
def test_order_is_independent_of_batch_size_and_ranks(config, packing, streaming, split, seed):
    config = replace(config, packing=packing, streaming=streaming)
    batch_size, world_size = split
    whole = build(config, batch_size=12, total_batch_size=12, seed=seed)
    ranks = [
        build(config, batch_size=batch_size, total_batch_size=12, seed=seed, rank=r, world_size=world_size)
        for r in range(world_size)
    ]
    for _ in range(4):
        parts = [r.train.next_update() for r in ranks]
        assert all(b["input_ids"].shape == (batch_size, 32) for part in parts for b in part)
        assert list(chain(*map(sequences, parts))) == sequences(whole.train.next_update())
    assert all(r.train.state_dict() == whole.train.state_dict() for r in ranks)
    expected = sequences(whole.validation())
    assert all(sequences(r.validation()) == expected for r in ranks)


@pytest.mark.parametrize(("packing", "streaming"), FORMS)
@SHARED
@given(rows=st.integers(0, 210), total=st.sampled_from([2, 10, 70]))
def test_resume_gives_the_same_batches(config, packing, streaming, rows, total):
    config = replace(config, packing=packing, streaming=streaming)
    first = build(config, total_batch_size=total)
    # up to the fourth epoch of 57 documents
    for _ in range(rows // total):
        first.train.next_update()
    state = json.loads(json.dumps(first.train.state_dict()))
    second = build(config, total_batch_size=total)
    second.train.next_update()
    second.train.load_state_dict(state)
    for _ in range(6):
        assert equal(first.train.next_update(), second.train.next_update())
        assert first.train.state_dict() == second.train.state_dict()


@pytest.mark.parametrize(("packing", "streaming"), FORMS)
def test_every_epoch_has_every_sequence_in_another_order(config, packing, streaming):
    data = build(replace(config, packing=packing, streaming=streaming), batch_size=1, total_batch_size=1)
    count = len(build(replace(config, packing=packing)).train._rows.corpus)
    epochs = [[sequences(data.train.next_update())[0] for _ in range(count)] for _ in range(2)]
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert data.train.updates_per_epoch == (None if streaming else count)


@pytest.mark.parametrize(("packing", "streaming"), FORMS)
@pytest.mark.parametrize("eval_tokens", [1, 50, 10**6])
def test_validation_is_the_same_every_time_and_ends_at_eval_tokens(config, packing, streaming, eval_tokens):
    config = replace(config, packing=packing, streaming=streaming)
    data = build(config, eval_tokens=eval_tokens)
    first = list(data.validation())
    data.train.next_update()
    assert equal(first, list(data.validation()))
    targets = sum((batch["labels"][:, 1:] != -100).sum().item() for batch in first)
    if eval_tokens < 100:
        assert targets == eval_tokens
    elif packing == "packed":
        joined = [
            i
            for text in open_source(config, "validation")
            for i in [*data.tokenizer(text)["input_ids"], data.tokenizer.eos_token_id]
        ]
        blocks = -(-len(joined) // 32)
        assert targets == len(joined) - blocks


def test_corpus_smaller_than_a_batch_goes_on_into_the_next_epoch(config):
    for streaming in (False, True):
        data = build(replace(config, packing="padded", streaming=streaming), batch_size=100, total_batch_size=100)
        assert data.train.next_update()[0]["input_ids"].shape == (100, 32)
    assert build(replace(config, packing="padded"), batch_size=100, total_batch_size=100).train.updates_per_epoch == 1


@pytest.mark.parametrize("streaming", [False, True])
def test_corpus_smaller_than_a_block_says_what_would_fit(config, streaming):
    with pytest.raises(UsageError, match=r"has [\d,]+ tokens, fewer than one sequence of 100,000") as caught:
        build(replace(config, max_length=100_000, streaming=streaming)).train.next_update()
    fits = int(caught.value.hint.split()[1])
    assert build(replace(config, max_length=fits), total_batch_size=2).train.updates_per_epoch == 1


@pytest.mark.parametrize(
    ("total", "batch", "world", "hint"), [(10, 4, 1, "8 or 12"), (10, 4, 2, "8 or 16"), (3, 4, 1, "4,")]
)
def test_total_batch_that_does_not_divide(config, total, batch, world, hint):
    with pytest.raises(UsageError, match="not a whole number") as caught:
        build(config, total_batch_size=total, batch_size=batch, world_size=world)
    assert f"--total-batch-size {hint}" in caught.value.hint


def test_position_of_other_data_or_settings_is_refused(config, write, documents):
    state = build(config).train.state_dict()
    for other in (replace(config, max_length=16), replace(config, packing="padded")):
        with pytest.raises(UsageError, match="position is of (max_length 32, this run has 16|packing packed)"):
            build(other).train.load_state_dict(state)
    with pytest.raises(UsageError, match="seed 0, this run has 1"):
        build(config, seed=1).train.load_state_dict(state)
    with pytest.raises(UsageError, match="streamed"):
        build(replace(config, streaming=True)).train.load_state_dict(state)
    folder = str(build(config).tokenizer.save_pretrained(config.dataset + "-tokenizer")[0])
    same = replace(config, tokenizer=os.path.dirname(folder))
    state = build(same).train.state_dict()
    write("a.jsonl", [{"text": t} for t in documents[1:]])
    with pytest.raises(UsageError, match="other tokens"):
        build(same).train.load_state_dict(state)


def test_streamed_position_of_other_data_or_another_tokenizer_is_refused(write, documents):
    for name in ("a", "b"):
        write(f"texts/{name}.jsonl", [{"text": t} for t in documents])
    folder = write("texts/c.jsonl", [{"text": "one more"}]).parent
    config = DataConfig(dataset=str(folder), vocab_size=300, max_length=32, streaming=True)
    data = build(config)
    data.train.next_update()
    state = json.loads(json.dumps(data.train.state_dict()))
    build(config).train.load_state_dict(state)
    tokenizer = replace(config, tokenizer=str(folder.parent / "kept"))
    data.tokenizer.save_pretrained(tokenizer.tokenizer)
    build(tokenizer).train.load_state_dict(state)

    with pytest.raises(UsageError, match="go on with a tokenizer of another vocabulary$"):
        build(replace(config, vocab_size=290)).train.load_state_dict(state)
    write("texts/a.jsonl", [{"text": "quite other words " + t[::-1]} for t in documents])
    with pytest.raises(UsageError, match=r"other data: \S*a.jsonl has changed$"):
        build(tokenizer).train.load_state_dict(state)
    (folder / "b.jsonl").rename(folder / "d.jsonl")
    with pytest.raises(
        UsageError, match=r"a.jsonl has changed, \S*b.jsonl is missing, \S*d.jsonl is new; and with a "
    ):
        build(config).train.load_state_dict(state)
    for name in "efg":
        write(f"texts/{name}.jsonl", [{"text": t} for t in documents])
    with pytest.raises(UsageError, match="and 3 more$"):
        build(tokenizer).train.load_state_dict(state)
    # the text field is part of what a file's documents are
    write("body/a.jsonl", [{"body": t} for t in documents])
    other = build(replace(tokenizer, dataset=str(folder.parent / "body"), text_field="body"))
    with pytest.raises(UsageError, match="'body'.* instead of .*'text'"):
        other.train.load_state_dict(state)


def test_cache_is_reused_and_shared_between_lengths(config):
    told = []
    build(config, status=told.append)
    assert [line.split()[0] for line in told] == ["training", "tokenizing", "tokenizing"]
    build(replace(config, max_length=48), status=told.append)
    assert len(told) == 3
    # the first epoch of padded rows must not change what later ones are keyed by
    padded = replace(config, packing="padded")
    build(padded, status=told.append)
    build(padded, status=told.append)
    assert len(told) == 5


def test_two_processes_that_make_a_cached_folder_at_once_use_the_first(tmp_path):
    code = """
import sys
from lowrank_cli.data.cache import cached_folder

def make(folder):
    # both have begun before either ends
    print("begun", flush=True)
    input()
    (folder / "by").write_text(sys.argv[1])

print((cached_folder("kind", "key", make) / "by").read_text())
"""
    environment = {**os.environ, "LOWRANK_CACHE": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, name],
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for name in "ab"
    ]
    assert [process.stdout.readline() for process in processes] == ["begun\n"] * 2
    assert [process.communicate("go\n", timeout=60)[0] for process in processes] == ["a\n"] * 2
    assert [path.name for path in (tmp_path / "cache" / "kind").iterdir()] == ["key"]


@pytest.mark.slow
def test_two_processes_build_the_cache_at_once(config, tmp_path):
    code = """
import json, sys
from lowrank_cli.settings.training import DataConfig
from lowrank_cli.data.tokens import build
input()
data = build(DataConfig(**json.loads(sys.argv[1])), batch_size=2, total_batch_size=4, eval_tokens=100, seed=0,
             rank=int(sys.argv[2]), world_size=2)
print(json.dumps([data.train.next_update()[0]["input_ids"].tolist(), data.train.state_dict()]))
"""
    environment = {**os.environ, "LOWRANK_CACHE": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
    settings = json.dumps({"dataset": config.dataset, "vocab_size": 300, "max_length": 32})
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, settings, str(rank)],
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    answers = [json.loads(process.communicate("go\n", timeout=60)[0]) for process in processes]
    assert answers[0][1] == answers[1][1]
    whole = sequences(build(config).train.next_update())
    assert answers[0][0] + answers[1][0] == whole
    for kind, count in (("tokenizers", 1), ("tokens", 2)):
        assert len(list((tmp_path / "cache" / kind).iterdir())) == count


def test_description_is_json_and_leaves_out_what_is_unknown(config):
    known = build(config).description
    assert json.loads(json.dumps(known)) == known
    assert known["documents"] == 57
    assert known["validation_documents"] == 3
    assert known["sequences"] == known["tokens"] // 32
    streamed = build(replace(config, streaming=True)).description
    assert streamed["streaming"] is True
    assert "tokens" not in streamed
