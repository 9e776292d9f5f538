import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_cli.data import docstrings, hub, instructions
from lowrank_cli.data.documents import FileSource
from lowrank_cli.data.instructions import Record, Turn, form_of, hold_out
from lowrank_cli.errors import MissingError, UsageError
from lowrank_cli.settings.finetune import TaskConfig
from lowrank_cli.settings.training import DataConfig

ALPACA = {"instruction": "Add.", "input": "2 and 3", "output": "5"}
CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Hello?"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "No."},
]


def load(path, status=lambda _: None, **task):
    return instructions.load(DataConfig(dataset=str(path)), TaskConfig(**task), status=status)


def everything(data):
    return [record.turns for record in (*data.train, *data.validation)]


@pytest.mark.parametrize(
    ("record", "turn"),
    [
        (ALPACA, Turn("Add.", "2 and 3", "5")),
        ({"instruction": "Add.", "output": "5"}, Turn("Add.", "", "5")),
        ({"instruction": "Who?", "context": "A text.", "response": "Ada", "category": "qa"},
         Turn("Who?", "A text.", "Ada")),
        ({"prompt": "Q", "response": "A"}, Turn("Q", "", "A")),
        ({"prompt": "Q", "completion": "A"}, Turn("Q", "", "A")),
        ({"query": "Q", "response": "A", "type": "GSM"}, Turn("Q", "", "A")),
        ({"question": "Q", "answer": "A"}, Turn("Q", "", "A")),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.parquet", "a.csv"])
def test_each_form_reads_alike_from_each_kind_of_file(record, turn, name, tmp_path, write):
    records = [{key: f"{text} {i}" if text else text for key, text in record.items()} for i in range(4)]
    path = tmp_path / name
    if name == "a.parquet":
        from pyarrow import Table, parquet

        parquet.write_table(Table.from_pylist(records), path)
    elif name == "a.csv":
        import csv

        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(record))
            writer.writeheader()
            writer.writerows(records)
    else:
        write(name, json.dumps(records) if name == "a.json" else records)
    expected = {
        tuple(f"{text} {i}" if text else text for text in (turn.instruction, turn.input, turn.response))
        for i in range(4)
    }
    found = {(t.instruction, t.input, t.response) for (t,) in everything(load(path))}
    assert found == expected


@pytest.mark.parametrize("key", ["messages", "conversations"])
@pytest.mark.parametrize("share_gpt", [False, True])
def test_conversations_become_turns(key, share_gpt, write):
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    said = [{"from": names[m["role"]], "value": m["content"]} for m in CHAT] if share_gpt else CHAT
    path = write("chat.jsonl", [{key: said}, {key: [{**m} for m in said[1:3]]}])
    records = sorted([*load(path).train, *load(path).validation], key=lambda r: len(r.turns))
    assert records[0].turns == (Turn("Hello?", "", "Hi."),)
    assert records[0].system == ""
    assert records[1].turns == (Turn("Hello?", "", "Hi."), Turn("And?", "", "No."))
    assert records[1].system == "Be short."


def test_says_which_form_was_taken(write):
    said = []
    load(write("a.jsonl", [ALPACA, {**ALPACA, "input": "1 and 1"}]), said.append)
    assert len(said) == 1
    assert "2 records of the Alpaca form (instruction, output)" in said[0]


@pytest.mark.parametrize(
    ("records", "place", "words"),
    [
        ([ALPACA, {"instruction": "x", "text": "y"}], "line 2", "no 'output'; keys: instruction, text"),
        ([ALPACA, {**ALPACA, "output": "  \n"}], "line 2", "the response is empty"),
        ([ALPACA, {**ALPACA, "output": None}], "line 2", "the response is empty"),
        ([{**ALPACA, "instruction": "", "input": ""}], "line 1", "the prompt is empty"),
        ([ALPACA, {**ALPACA, "output": 5}], "line 2", "'output' is a number, not text"),
        ([ALPACA, ["x"]], "line 2", "no 'instruction'"),
        ([{"text": "x"}], "line 1", "fit no form"),
        ([["x"]], "line 1", "not a list"),
        ([{"messages": "x"}], "line 1", "'messages' is a string"),
        ([{"messages": CHAT[:2]}], "line 1", "the response is empty"),
        ([{"messages": []}], "line 1", "the response is empty"),
        ([{"messages": [CHAT[1], CHAT[3]]}], "line 1", "the response is empty"),
        ([{"messages": [CHAT[2]]}], "line 1", "the prompt is empty"),
        ([{"messages": [{"role": "critic", "content": "x"}]}], "line 1", "role 'critic'"),
        ([{"messages": [{"role": ["user"], "content": "x"}]}], "line 1", "role ['user']"),
        ([{"messages": [CHAT[1], {**CHAT[2], "weight": 0}]}], "line 1", "no answer has a weight"),
        ([{"messages": [CHAT[1], {**CHAT[2], "weight": 0.5}]}], "line 1", "'weight' of a message is 0.5"),
        ([{"messages": [CHAT[1], {**CHAT[2], "mask": 1}]}], "line 1", "'mask' of a message is not read"),
        ([{"messages": CHAT, "system": "Be long."}], "line 1", "'system' beside a message of the role system"),
        ([{"messages": CHAT, "history": [["a", "b"]]}], "line 1", "'history' beside 'messages'"),
        ([{"messages": CHAT, "tools": "x"}], "line 1", "not JSON"),
        ([{"messages": CHAT, "functions": [{"name": "x"}]}], "line 1", "'functions' is not read"),
        ([{**ALPACA, "tools": [{"name": "x"}]}], "line 1", "'tools' in a record without messages"),
        ([{**ALPACA, "history": ["x"]}], "line 1", "'history' is no list of pairs"),
        ([{**ALPACA, "output": [{"type": "image", "image": "x"}]}], "line 1", "a part of type 'image'"),
        ([{"messages": [CHAT[1], {"role": "assistant", "tool_calls": [{"id": 1}]}]}], "line 1", "name of a tool"),
        ([{"instruction": "x", "instances": "y"}], "line 1", "'instances' is a string"),
    ],
)
def test_a_broken_record_is_named_by_file_and_number(records, place, words, write):
    path = write("broken.jsonl", records)
    with pytest.raises(UsageError) as caught:
        load(path)
    assert f"{path}, {place}" in caught.value.message
    assert words in caught.value.message
    assert "--skip-bad" in caught.value.hint


@pytest.mark.parametrize(("name", "place"), [("a.jsonl", "line 4"), ("a.json", "record 4")])
def test_skips_bad_records_only_when_told_and_counts_them(name, place, write):
    rows = [{**ALPACA, "instruction": f"Task {i}"} for i in range(10)]
    rows[3]["output"] = rows[7]["output"] = ""
    path, said = write(name, rows if name == "a.jsonl" else json.dumps(rows)), []
    with pytest.raises(UsageError, match=f"{place}: the response is empty") as caught:
        load(path)
    assert "--skip-bad" in caught.value.hint
    data = load(path, said.append, skip_bad=True)
    assert len(everything(data)) == 8
    assert data.description["skipped"] == 2
    assert "2 bad records left out, the first is" in said[1]
    assert place in said[1]


@pytest.mark.parametrize(("name", "broken"), [("a.jsonl", '{"instruction": "x"'), ("a.csv", "x,y,z"), ("a.csv", "x")])
def test_broken_lines_are_left_out_only_when_told(name, broken, write):
    lines = ["instruction,output", *(f"task {i},done" for i in range(5))]
    if name == "a.jsonl":
        lines = [json.dumps({"instruction": f"task {i}", "output": "done"}) for i in range(5)]
    path, said = write(name, "\n".join([*lines[:3], broken, *lines[3:]])), []
    with pytest.raises(UsageError, match="line 4") as caught:
        load(path)
    assert "--skip-bad" in caught.value.hint
    data = load(path, said.append, skip_bad=True)
    assert len(everything(data)) == 5
    assert "1 bad records left out, the first is" in said[1]
    assert "line 4" in said[1]


def test_system_and_history_beside_other_keys_are_part_of_the_record(write):
    rows = [
        {**ALPACA, "system": "Be short.", "history": [["Hello?", "Hi."]]},
        {**ALPACA, "instruction": "Subtract.", "system_prompt": "Be long.", "history": None},
    ]
    data = load(write("a.jsonl", rows))
    first, second = sorted([*data.train, *data.validation], key=lambda r: r.where)
    assert (first.system, first.turns) == ("Be short.", (Turn("Hello?", "", "Hi."), Turn("Add.", "2 and 3", "5")))
    assert (second.system, len(second.turns)) == ("Be long.", 1)


@pytest.mark.parametrize("content", ["", "[]", "\n\n"])
def test_a_file_without_records_is_an_error(content, write):
    with pytest.raises(UsageError, match="has no records"):
        load(write("a.json", content))


def test_text_and_missing_files_are_errors_with_a_way_out(write, tmp_path):
    with pytest.raises(UsageError, match="plain text"):
        load(write("a.txt", "words"))
    with pytest.raises(UsageError, match="without instructions") as caught:
        load("stdlib")
    assert "docstrings" in caught.value.hint
    with pytest.raises(MissingError, match="no file or folder") as missing:
        load(tmp_path / "none.json")
    assert "docstrings" in missing.value.hint


def test_the_hub_offline_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    with pytest.raises(MissingError, match="offline"):
        instructions.load(DataConfig(dataset="nobody/none-such"), TaskConfig(), offline=True)


def test_hub_splits_are_read_whole_and_named(monkeypatch):
    splits = {"train": [ALPACA, {**ALPACA, "output": "6"}], "test": [{**ALPACA, "output": "7"}]}
    monkeypatch.setattr(hub, "whole", lambda name, config, offline: splits)
    data = instructions.load(DataConfig(dataset="some/set"), TaskConfig())
    assert [r.where for r in data.train] == ["some/set (train), record 1", "some/set (train), record 2"]
    assert [r.turns[0].response for r in data.validation] == ["7"]


def test_a_folder_uses_its_own_validation_file(write, tmp_path):
    write("set/train.jsonl", [{**ALPACA, "instruction": f"t{i}"} for i in range(9)])
    write("set/validation.jsonl", [{**ALPACA, "instruction": "v"}])
    data = load(tmp_path / "set")
    assert len(data.train) == 9
    assert [r.turns[0].instruction for r in data.validation] == ["v"]


def test_validation_records_given_apart_hold_nothing_back(write):
    train = write("a.jsonl", [{**ALPACA, "instruction": f"t{i}"} for i in range(9)])
    other = write("b.jsonl", [{"prompt": "p", "response": "r"}])
    data = instructions.load(DataConfig(dataset=str(train), validation_dataset=str(other)), TaskConfig())
    assert len(data.train) == 9
    assert data.validation[0].turns == (Turn("p", "", "r"),)
    assert data.description["form"] == "Alpaca and pair"


@given(st.lists(st.integers(0, 30), min_size=1, max_size=60), st.floats(0.01, 0.9), st.randoms())
@settings(deadline=None)
def test_held_out_prompts_are_never_trained_on_and_do_not_depend_on_the_order(prompts, share, random):
    records = [Record(str(i), (Turn(f"q{p}", "", f"a{i}"),)) for i, p in enumerate(prompts)]
    if len(set(prompts)) == 1:
        with pytest.raises(UsageError, match="one prompt only"):
            hold_out(records, share, "x")
        return
    train, validation = hold_out(records, share, "x")
    assert train
    assert validation
    assert not {r.prompt for r in train} & {r.prompt for r in validation}
    assert sorted(r.where for r in (*train, *validation)) == sorted(r.where for r in records)
    # each prompt has at most 60 copies, so the share is met to within one prompt's records
    copies = max(prompts.count(p) for p in prompts)
    assert len(validation) <= max(1, round(share * len(records))) + copies - 1
    shuffled = list(records)
    random.shuffle(shuffled)
    assert {r.where for r in hold_out(shuffled, share, "x")[1]} == {r.where for r in validation}


@pytest.mark.parametrize(("share", "held_out"), [(0.05, 10), (0.1, 20), (0.2, 20), (0.5, 20), (0.9, 20)])
def test_a_prompt_with_most_of_the_records_is_not_held_out(share, held_out, capsys):
    records = [Record(str(i), (Turn(f"q{max(i, 180)}", "", f"a{i}"),)) for i in range(201)]
    train, validation = hold_out(records, share, "x")
    assert len(validation) in (held_out, held_out + 1)
    assert len(train) + len(validation) == 201
    warning = capsys.readouterr().err
    assert bool(warning) == (share > 0.2)
    if warning:
        assert f"{len(validation)} of 201 records validate instead of {round(share * 201)}" in warning


def test_of_prompts_with_several_records_as_many_are_held_out_as_come_nearest():
    records = [Record(f"{i} {j}", (Turn(f"q{i}", "", f"a{j}"),)) for i in range(20) for j in range(5)]
    assert [len(hold_out(records, share, "x")[1]) for share in (0.01, 0.05, 0.07, 0.08, 0.1)] == [5, 5, 5, 10, 10]


def test_the_same_prompt_with_another_input_is_another_prompt():
    record = Record("a", (Turn("Add.", "1", "1"),))
    assert record.prompt != replace(record, turns=(Turn("Add.", "2", "2"),)).prompt
    # what the answer is does not matter
    assert record.prompt == replace(record, turns=(Turn("Add.", "1", "3"),)).prompt


def test_published_sets_are_read_whole(published_data):
    expected = {
        "alpaca_random_9k.json": (9229, 4),
        "alpaca_filtered_claude_t45.json": (5305, 4),
        "dolly_3k.json": (2996, 0),
        "alpaca_en_demo.json": (999, 0),
        "instruction_1100.json": (1100, 0),
        "self_instruct_seed_tasks.jsonl": (175, 0),
    }
    found = {}
    for name in expected:
        data = load(published_data / "instruct" / name, skip_bad=True)
        empty = data.description["skipped"] or 0
        found[name] = (len(everything(data)) + empty, empty)
    assert found == expected


@pytest.mark.parametrize("name", ["alpaca_random_9k.json", "dolly_3k.json", "self_instruct_seed_tasks.jsonl"])
def test_lists_of_records_are_read_whole_and_one_in_twenty_is_held_out(name, test_data):
    path = test_data / "instruct" / name
    text = path.read_text()
    raw = [json.loads(line) for line in text.splitlines()] if name.endswith("l") else json.loads(text)
    pairs = [(r["instruction"], r["instances"][0] if "instances" in r else r) for r in raw]
    asked = [(instruction, pair["input"], pair["output"]) for instruction, pair in pairs]
    data = load(path)
    turns = [turn for (turn,) in everything(data)]
    assert sorted((t.instruction, t.input, t.response) for t in turns) == sorted(asked)
    assert abs(len(data.validation) - 0.05 * len(raw)) <= 5


def test_docstrings_are_thousands_of_real_answers():
    data = load("docstrings")
    assert len(data.train) > 3000
    assert len(data.validation) > 100
    known = {turn.instruction: turn for record in data.train for turn in record.turns}
    asked = known["What does the function `calendar.isleap` do?"]
    assert asked == Turn(asked.instruction, "isleap(year)", "Return True for leap years, False for non-leap years.")
    # the modules part, and no answer stands in both
    answers = [{r.turns[0].response for r in part} for part in (data.train, data.validation)]
    assert not answers[0] & answers[1]
    modules = [{r.turns[0].instruction.split("`")[1].split(".")[0] for r in p} for p in (data.train, data.validation)]
    assert len(modules[0]) > 100
    assert not any("._" in turn.instruction for turn in known.values())


def test_docstrings_are_made_once_and_alike(tmp_path, monkeypatch):
    files = sorted(Path(json.__file__).parent.glob("*.py"))
    monkeypatch.setattr(
        docstrings, "open_source", lambda config, part: FileSource(part, files if part == "train" else [], iter)
    )
    made = []
    for cache in ("a", "b"):
        monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path / cache))
        path = docstrings.part("train")
        stamp = path.stat().st_mtime_ns
        assert docstrings.part("train") == path
        assert path.stat().st_mtime_ns == stamp
        assert path.is_relative_to(tmp_path / cache)
        made.append(path.read_bytes())
    assert made[0] == made[1] != b""


def test_forms_are_told_in_a_fixed_order():
    # what a chat set says of its first message beside the messages is not the record
    assert form_of({"prompt": "x", "response": "y", "messages": []}, "here").keys == ("messages",)
