import json
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from lowrank_cli.data import supervised
from lowrank_cli.data.conversations import Record, Turn
from lowrank_cli.data.examples import NO_TARGET, encode_texts
from lowrank_cli.data.templates import Segment, Text
from lowrank_cli.data.templates import load as load_template
from lowrank_cli.data.tokenizer import named_tokenizer
from lowrank_cli.errors import MissingError, UsageError
from lowrank_cli.settings.finetune import TaskConfig
from lowrank_cli.settings.training import DataConfig

SHARED = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TOKENIZERS = ["gpt2", "llama", "t5-base", "roberta-base"]


@pytest.fixture(scope="session")
def tokenizers(test_data) -> dict[str, PreTrainedTokenizerFast]:
    return {name: named_tokenizer(str(test_data / "tokenizers" / name)) for name in TOKENIZERS}


@pytest.fixture
def records(write):
    letters = "abcdefghijklmnopqrstuvw"
    rows = [{"instruction": f"Say letters {i}.", "output": " ".join(letters[: 1 + i * 7 % 23])} for i in range(61)]
    return str(write("records.jsonl", rows))


@pytest.fixture
def bert(tmp_path):
    """A tokenizer with BERT's form of pairs."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizerFast

    words = BertWordPieceTokenizer()
    words.train_from_iterator(["the cat sat on a mat while another one looked on"], min_frequency=1)
    words.save_model(str(tmp_path))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    return named_tokenizer(str(tmp_path))


def build(dataset, tokenizer, *, task=None, max_length=64, status=lambda _: None, **options):
    defaults = {"batch_size": 2, "total_batch_size": 4, "eval_tokens": 10_000, "seed": 0, "offline": True}
    settings_of_task = TaskConfig(**{"template": "plain", **(task or {})})
    config = DataConfig(dataset=dataset, max_length=max_length)
    return supervised.build(config, settings_of_task, tokenizer=tokenizer, status=status, **defaults | options)


def rows_of(batches):
    """(ids, labels) of each row without its padding."""
    rows = []
    for batch in batches:
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        rows += [
            (i[m].tolist(), y[m].tolist()) for i, y, m in zip(batch["input_ids"], batch["labels"], mask, strict=True)
        ]
    return rows


def text_of(prompt, response, **options):
    return Text("here", ((Segment(prompt, False), Segment(response, True)),), **options)


def parted(row):
    return (
        [int(i) for i, y in zip(row.ids, row.labels, strict=True) if y == NO_TARGET],
        [int(y) for y in row.labels if y != NO_TARGET],
    )


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("template", ["alpaca", "plain", "qa"])
def test_the_prompt_is_what_a_model_meets_and_the_response_is_whole(name, template, tokenizers, test_data):
    tokenizer = tokenizers[name]
    raw = json.loads((test_data / "instruct" / "instruction_1100.json").read_text())[:150]
    render = load_template(template, tokenizer).render
    turns = [Turn(r["instruction"], r["input"], r["output"]) for r in raw]
    texts = [render(Record("here", (turn,))) for turn in turns]
    encoded = encode_texts(texts, tokenizer, 2048)
    assert encoded.cut.rows == 0
    bos = [tokenizer.bos_token_id] if name in ("llama", "roberta-base") else []
    for text, turn, row in zip(texts, turns, encoded.rows, strict=True):
        prompt, response = parted(row)
        assert prompt == bos + tokenizer(text.parts[0][0].text, add_special_tokens=False)["input_ids"]
        assert response[-1] == tokenizer.eos_token_id
        # T5's vocabulary has no line breaks and few rare characters; its text is compared without them
        said, meant = (" ".join(t.split()) for t in (tokenizer.decode(response[:-1]), turn.response))
        if name != "t5-base" or "<unk>" not in said:
            assert said.replace(" ", "") == meant.replace(" ", "")
        # where nothing reaches over the boundary the row is the tokens of the joined text
        joined = bos + tokenizer("".join(s.text for s in text.parts[0]), add_special_tokens=False)["input_ids"]
        if joined[: len(prompt)] == prompt:
            assert [*prompt, *response[:-1]] == joined


def test_a_token_that_would_reach_over_the_boundary_is_not_used(tokenizers):
    tokenizer = tokenizers["gpt2"]
    ids = lambda text: tokenizer(text)["input_ids"]  # noqa: E731
    assert ids("the counc" + "il")[: len(ids("the counc"))] != ids("the counc")
    (row,) = encode_texts([text_of("the counc", "il")], tokenizer, 32).rows
    assert parted(row) == (ids("the counc"), [*ids("il"), tokenizer.eos_token_id])


@given(prompt=st.integers(0, 60), response=st.integers(1, 60), max_length=st.integers(4, 80), bos=st.booleans())
@SHARED
def test_truncation_never_takes_the_whole_response(prompt, response, max_length, bos, tokenizers):
    tokenizer = tokenizers["llama"]
    text = text_of(" a" * prompt, " b" * response, bos=bos)
    (whole,) = encode_texts([text], tokenizer, 10_000).rows
    encoded = encode_texts([text], tokenizer, max_length)
    (row,) = encoded.rows
    before, said = parted(row)
    whole_before, whole_said = parted(whole)
    assert len(row) == min(max_length, len(whole))
    assert row.targets >= 1
    if bos:
        assert before.pop(0) == whole_before.pop(0) == tokenizer.bos_token_id
    # the prompt loses its left, the response its right
    assert before == whole_before[len(whole_before) - len(before) :]
    assert said == whole_said[: len(said)]
    assert len(before) >= min(len(whole_before), max_length // 4) or len(row) == len(whole)
    if len(said) < len(whole_said):
        assert len(before) == min(len(whole_before), max_length // 4)
    assert (encoded.cut.rows, encoded.cut.responses) == (len(whole) > max_length, len(said) < len(whole_said))


def test_cut_records_are_counted_and_named_once(write, tokenizers):
    rows = [{"prompt": f"Question {i}", "response": "so " * (2 if i else 300)} for i in range(30)]
    path, said = str(write("long.jsonl", rows)), []
    data = build(path, tokenizers["gpt2"], status=said.append)
    (line,) = [line for line in said if "longer than" in line]
    assert "1 of" in line
    assert f"{path}, line 1" in line
    assert "1 of them in the response" in line
    longest = int(line.split("--max-length ")[1].split()[0])
    assert data.description["truncated"] + (line.count("validation")) == 1
    again = []
    build(path, tokenizers["gpt2"], max_length=longest, status=again.append)
    assert not [line for line in again if "longer than" in line]


def test_loss_is_on_responses_unless_told_otherwise(records, tokenizers):
    tokenizer = tokenizers["gpt2"]
    for row, labels in rows_of(build(records, tokenizer).train.next_update()):
        learned = [y for y in labels if y != NO_TARGET]
        assert labels == [NO_TARGET] * (len(row) - len(learned)) + row[-len(learned) :]
        assert tokenizer.decode(learned).startswith("a")
        assert learned[-1] == tokenizer.eos_token_id
    for row, labels in rows_of(build(records, tokenizer, task={"train_on_inputs": True}).train.next_update()):
        assert row == labels


def test_every_turn_of_a_conversation_is_learned_with_its_end(tokenizers):
    tokenizer = tokenizers["llama"]
    record = Record("here", (Turn("One?", "", "Yes."), Turn("Two?", "", "No.")))
    (row,) = encode_texts([load_template("plain", tokenizer).render(record)], tokenizer, 64).rows
    assert tokenizer.decode(parted(row)[1]) == "Yes.</s>No.</s>"
    assert list(row.ids).count(tokenizer.bos_token_id) == 1


def test_batches_are_padded_to_eights_and_padding_is_no_target(records, tokenizers):
    tokenizer = tokenizers["gpt2"]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    data = build(records, tokenizer, max_length=21, batch_size=3, total_batch_size=57)
    for batch in chain(data.train.next_update(), data.validation()):
        longest = max(len(ids) for ids, _ in rows_of([batch]))
        assert batch["input_ids"].shape == batch["labels"].shape
        assert batch["input_ids"].shape[1] == min(21, -(-longest // 8) * 8)
        if "attention_mask" in batch:
            assert (batch["labels"][batch["attention_mask"] == 0] == NO_TARGET).all()
            assert (batch["input_ids"][batch["attention_mask"] == 0] == tokenizer.pad_token_id).all()
    # the end of text is a target although padding has its number
    whole = build(records, tokenizer, max_length=128)
    assert all(labels[-1] == tokenizer.eos_token_id for _, labels in rows_of(whole.validation()))


@given(
    batch_size=st.sampled_from([1, 2, 3, 6]),
    world_size=st.sampled_from([1, 2]),
    grouped=st.booleans(),
    updates=st.integers(1, 12),
    seed=st.integers(0, 3),
)
@SHARED
def test_updates_are_the_same_whatever_the_batch_and_the_ranks(
    batch_size, world_size, grouped, updates, seed, records, tokenizers
):
    task = {"group_by_length": grouped}
    alone = build(records, tokenizers["gpt2"], task=task, batch_size=12, total_batch_size=12, seed=seed)
    ranks = [
        build(records, tokenizers["gpt2"], task=task, batch_size=batch_size, total_batch_size=12, seed=seed,
              rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]  # fmt: skip
    for _ in range(updates):
        expected = rows_of(alone.train.next_update())
        parts = [rank.train.next_update() for rank in ranks]
        assert all(len(batch["input_ids"]) == batch_size for part in parts for batch in part)
        assert rows_of(chain(*parts)) == expected
    assert all(rank.train.state_dict() == alone.train.state_dict() for rank in ranks)


@given(before=st.integers(0, 11), grouped=st.booleans(), total=st.sampled_from([2, 4, 6]))
@SHARED
def test_a_resumed_stream_goes_on_exactly(before, grouped, total, records, tokenizers):
    task = {"group_by_length": grouped}
    data, again = (build(records, tokenizers["gpt2"], task=task) for _ in range(2))
    for _ in range(before):
        data.train.next_update()
    position = json.loads(json.dumps(data.train.state_dict()))
    again = build(records, tokenizers["gpt2"], task=task, total_batch_size=total)
    again.train.load_state_dict(position)
    expected = rows_of(chain(*(data.train.next_update() for _ in range(6))))
    found = rows_of(chain(*(again.train.next_update() for _ in range(24 // total))))
    assert found == expected


@pytest.mark.parametrize(
    "change", [{"template": "qa"}, {"train_on_inputs": True}, {"group_by_length": True}, {"validation_share": 0.5}]
)
def test_a_position_of_other_rows_is_refused(change, records, tokenizers):
    position = build(records, tokenizers["gpt2"]).train.state_dict()
    with pytest.raises(UsageError, match="the saved"):
        build(records, tokenizers["gpt2"], task=change).train.load_state_dict(position)


@pytest.mark.parametrize("grouped", [False, True])
def test_an_epoch_has_every_record_once_in_another_order_each_time(grouped, records, tokenizers):
    data = build(records, tokenizers["gpt2"], task={"group_by_length": grouped}, batch_size=1, total_batch_size=1)
    count = data.train.updates_per_epoch
    assert count == data.description["records"] == 58
    epochs = [rows_of(chain(*(data.train.next_update() for _ in range(count)))) for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0] != epochs[1]
    assert len({tuple(ids) for ids, _ in epochs[0]}) == count


def test_grouping_by_length_saves_padding(write, tokenizers):
    # 4 to 400 words, a short answer as likely as one of ten times its length
    rows = [{"prompt": f"Question {i}", "response": "so " * int(4 * 100 ** (i / 1600))} for i in range(1600)]
    path = str(write("lengths.jsonl", rows))

    def padding(grouped):
        data = build(path, tokenizers["gpt2"], task={"group_by_length": grouped}, max_length=512,
                     batch_size=16, total_batch_size=16)  # fmt: skip
        batches = [batch for _ in range(60) for batch in data.train.next_update()]
        return sum(b["input_ids"].numel() for b in batches) / sum(len(ids) for ids, _ in rows_of(batches))

    plain, grouped = padding(False), padding(True)
    assert grouped < 1.1 < 2.0 < plain


def test_validation_is_the_same_every_time_whatever_the_seed(records, tokenizers):
    first, other = (build(records, tokenizers["gpt2"], seed=seed) for seed in (0, 7))
    assert rows_of(first.validation()) == rows_of(first.validation()) == rows_of(other.validation())
    learned = {tuple(ids) for _ in range(20) for ids, _ in rows_of(first.train.next_update())}
    assert not learned & {tuple(ids) for ids, _ in rows_of(first.validation())}


def test_eval_tokens_bounds_the_targets_of_validation(test_data, tokenizers):
    path = str(test_data / "instruct" / "instruction_1100.json")
    data = build(path, tokenizers["gpt2"], max_length=256, eval_tokens=200)
    targets = sum(int((b["labels"][:, 1:] != NO_TARGET).sum()) for b in data.validation())
    assert 100 < targets <= 200
    assert data.description["validation_targets"] == targets


def test_a_causal_task_asks_each_validation_question_once(test_data, tokenizers):
    task = {"task": "strategyqa", "data_dir": str(test_data / "downstream"), "template": "auto"}
    data = build("", tokenizers["llama"], task=task, max_length=128, batch_size=50, total_batch_size=50)
    assert (data.kind, data.num_labels, data.best) == ("causal", 0, ("loss", False))
    yes, no = (tokenizers["llama"](f"\n {word}", add_special_tokens=False)["input_ids"][-1] for word in ("yes", "no"))
    raw = json.loads((test_data / "downstream" / "StrategyQA" / "task.json").read_text())["examples"]
    raw = raw[len(raw) * 7 // 10 :]
    asked = list(data.answers())
    assert sorted(n for batch in asked for n in batch["record"].tolist()) == list(range(len(raw)))
    for batch in asked:
        assert (batch["choices"] == torch.tensor([yes, no])).all()
    rights = {n: r for batch in asked for n, r in zip(batch["record"].tolist(), batch["right"].tolist(), strict=True)}
    assert [rights[i] for i in range(len(raw))] == [example["target_scores"]["No"] for example in raw]
    assert data.score([1] * len(raw), list(rights.values()))["accuracy"] == pytest.approx(
        sum(e["target_scores"]["No"] for e in raw) / len(raw)
    )


def test_an_open_task_has_one_row_a_question_with_the_whole_answer(test_data, tokenizers):
    task = {"task": "svamp", "data_dir": str(test_data / "downstream"), "template": "auto"}
    data = build("", tokenizers["llama"], task=task, max_length=256, batch_size=60, total_batch_size=60)
    rows, records_ = [], []
    for batch in data.answers():
        records_ += batch["record"].tolist()
        rows += rows_of([{k: batch[k] for k in ("input_ids", "labels", "attention_mask") if k in batch}])
    assert sorted(records_) == list(range(30))
    assert sorted(rows) == sorted(rows_of(data.validation()))


def test_choices_of_several_tokens_have_a_row_each(tokenizers):
    from lowrank_cli.data.questions import Questions

    tokenizer = tokenizers["gpt2"]
    choices = ("definitely not", "unbelievably", "no")
    record = Record("here", (Turn("Well?", "", "unbelievably"),), choices=choices)
    render = load_template("qa", tokenizer).render
    questions = Questions(
        [record],
        lambda records: encode_texts(map(render, records), tokenizer, 64),
        lambda rows: supervised.collate(rows, tokenizer.pad_token_id, 64),
        tokenizer.eos_token_id,
    )
    (batch,) = questions.batches(8)
    assert batch["right"].tolist() == [1, 1, 1]
    said = {c: tokenizer.decode([y for y in row if y != NO_TARGET])
            for c, row in zip(batch["choice"].tolist(), batch["labels"].tolist(), strict=True)}  # fmt: skip
    assert said == {i: f" {choice}" for i, choice in enumerate(choices)}


@pytest.mark.parametrize(("task", "dtype"), [("mrpc", torch.int64), ("stsb", torch.float32)])
def test_labelled_pairs_are_the_tokenizers_own_rows(task, dtype, test_data, tokenizers):
    from lowrank_cli.data import glue, tasks

    tokenizer = tokenizers["roberta-base"]
    data = build("", tokenizer, task={"task": task, "data_dir": str(test_data / "glue")}, max_length=48, batch_size=50,
                 total_batch_size=50)  # fmt: skip
    _, examples = glue.load(tasks.describe(task), str(test_data / "glue"))
    found = []
    for batch in data.validation():
        assert batch["labels"].dtype == dtype
        assert batch["input_ids"].shape[1] % 8 == 0
        for ids, mask, label in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            found.append((ids[mask.bool()].tolist(), float(label)))
    backend = tokenizer.backend_tokenizer
    backend.enable_truncation(48, strategy="longest_first")
    expected = [(backend.encode(*e.texts).ids, float(np.float32(e.label))) for e in examples]
    backend.no_truncation()
    assert sorted(found) == sorted(expected)
    assert data.best == (("f1", True) if task == "mrpc" else ("pearson", True))
    assert data.score([1.0, 0.0, 1.0], [1.0, 0.0, 1.0])[data.best[0]] == pytest.approx(1)


def test_pairs_have_types_where_the_tokenizer_tells_them(bert, write, tmp_path):
    for part in ("train", "dev"):
        write(f"RTE/{part}.tsv", "sentence1\tsentence2\tlabel\nthe cat sat\ton a mat\tentailment\n" * 1
              + "".join("another one\tthe cat\tnot_entailment\n" for _ in range(3)))  # fmt: skip
    data = build("", bert, task={"task": "rte", "data_dir": str(tmp_path)}, batch_size=4, total_batch_size=4)
    (batch,) = data.validation()
    own = bert(["the cat sat"], ["on a mat"])
    length = len(own["input_ids"][0])
    assert batch["input_ids"][0, :length].tolist() == own["input_ids"][0]
    assert batch["token_type_ids"][0, :length].tolist() == own["token_type_ids"][0]
    assert batch["labels"].tolist() == [0, 1, 1, 1]
    assert data.label_names == ("entailment", "not_entailment")


def test_the_tokenizer_is_left_as_it_was(test_data, tokenizers):
    tokenizer = tokenizers["roberta-base"]
    before = tokenizer.backend_tokenizer.to_str()
    build("", tokenizer, task={"task": "rte", "data_dir": str(test_data / "glue")}, max_length=32)
    assert tokenizer.backend_tokenizer.to_str() == before


def test_the_embedded_set_needs_nothing(tokenizers):
    data = build("docstrings", tokenizers["gpt2"], max_length=128)
    assert data.description["records"] > 3000
    assert data.train.next_update()[0]["input_ids"].shape[0] == 2
    json.dumps(data.description)


def test_bad_batch_sizes_tasks_and_data_fail_early(records, tokenizers):
    with pytest.raises(UsageError, match="total batch"):
        build(records, tokenizers["gpt2"], batch_size=3, total_batch_size=4)
    with pytest.raises(UsageError, match="unknown task"):
        build(records, tokenizers["gpt2"], task={"task": "glue"})
    with pytest.raises(MissingError):
        build("none.json", tokenizers["gpt2"])


@pytest.mark.parametrize("name", ["chat.jsonl", "sharegpt.json"])
def test_chat_rows_are_the_tokenizers_own(name, test_data, tmp_path):
    tokenizer = named_tokenizer(str(test_data / "tokenizers" / "gpt2"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token = "<|im_end|>"
    # a system message of its own where a conversation has none, as SmolLM2's
    tokenizer.chat_template = (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path)
    tokenizer = named_tokenizer(str(tmp_path))
    folder, task = test_data / "instruct", {"template": "auto"}
    data = build(str(folder / name), tokenizer, task=task, max_length=512, batch_size=200, total_batch_size=200)
    found = {tuple(row) for row, _ in rows_of([*data.train.next_update(), *data.validation()])}
    expected = set()
    for line in (folder / "chat.jsonl").read_text().splitlines():
        whole = tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=False)
        end = whole.rindex(tokenizer.eos_token) + len(tokenizer.eos_token)
        expected.add(tuple(tokenizer(whole[:end], add_special_tokens=False)["input_ids"]))
    assert found == expected


def test_records_that_are_cut_are_counted_over_those_that_are_kept(records, tokenizers):
    said = []
    data = build(records, tokenizers["gpt2"], task={"validation_share": 0.5}, max_length=8, eval_tokens=9,
                 status=said.append)  # fmt: skip
    kept = data.description["validation_records"]
    assert kept < 20
    (line,) = [line for line in said if "validation records are longer" in line]
    cut, _, total, *_ = line.split()
    assert 0 < int(cut) <= int(total) == kept
