import json
import subprocess
import sys

import pytest

from lowrank_cli.data import downstream, glue, hub, tasks
from lowrank_cli.data.glue import Example
from lowrank_cli.errors import MissingError, UsageError

GLUE = ["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"]
PAIRS = {"sentence1": "a", "sentence2": "b"}


def load(name, folder=None, **options):
    task = tasks.describe(name)
    reader = downstream if task.kind == "causal" else glue
    return reader.load(task, None if folder is None else str(folder), **options)


def test_a_task_is_known_without_torch_or_its_data():
    script = (
        "import sys; from lowrank_cli.data import tasks; t = tasks.describe('mnli'); "
        "assert (t.kind, t.num_labels, t.metrics) == ('classification', 3, ('accuracy',)); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'datasets', 'sklearn')))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.mark.parametrize(
    ("name", "kind", "labels", "metric"),
    [
        ("cola", "classification", 2, "matthews_correlation"),
        ("mrpc", "classification", 2, "f1"),
        ("stsb", "regression", 1, "pearson"),
        ("boolq", "causal", 0, "accuracy"),
        ("svamp", "causal", 0, "greedy_exact_match"),
    ],
)
def test_describes_the_head_that_a_task_needs(name, kind, labels, metric):
    task = tasks.describe(name)
    assert (task.kind, task.num_labels, task.metrics[0]) == (kind, labels, metric)


def test_an_unknown_task_names_the_nearest():
    with pytest.raises(UsageError, match="unknown task 'mrcp'") as caught:
        tasks.describe("mrcp")
    assert "did you mean 'mrpc'" in caught.value.hint


def test_published_glue_files_have_all_their_rows(published_data):
    # the development sets' known majorities: 69.1, 50.9, 68.4, 52.7 (entailment, class 0) and 56.3 % (class 0)
    expected = {
        "cola": (8551, 1043, 721),
        "sst2": (67349, 872, 444),
        "mrpc": (3668, 408, 279),
        "rte": (2490, 277, 131),
        "wnli": (635, 71, 31),
    }
    found = {}
    for name in expected:
        train, validation = load(name, published_data / "glue")
        found[name] = (len(train), len(validation), sum(example.label for example in validation))
    assert found == expected
    assert tuple(map(len, load("stsb", published_data / "glue"))) == (5749, 1500)


def test_quotes_and_tabs_are_read_as_published(published_data):
    train, _ = load("mrpc", published_data / "glue" / "MRPC")
    assert train[0].texts == (
        'Amrozi accused his brother , whom he called " the witness " , of deliberately distorting his evidence .',
        'Referring to him as only " the witness " , Amrozi accused his brother of deliberately distorting his '
        "evidence .",
    )
    assert load("rte", published_data / "glue")[1][0].label == 1
    assert load("stsb", published_data / "glue")[1][1].label == 4.75


@pytest.mark.parametrize(
    ("name", "folder", "header", "texts", "label"),
    [
        ("cola", "CoLA", 0, [3], 1),
        ("sst2", "SST-2", 1, [0], 1),
        ("mrpc", "MRPC", 1, [3, 4], 0),
        ("rte", "RTE", 1, [1, 2], 3),
        ("wnli", "WNLI", 1, [1, 2], 3),
        ("stsb", "STS-B", 1, [7, 8], 9),
    ],
)
def test_every_row_of_a_glue_file_is_read_with_its_quotes(name, folder, header, texts, label, test_data):
    numbers = {"entailment": 0, "not_entailment": 1}
    found = load(name, test_data / "glue")
    for part, examples in zip(("train", "dev"), found, strict=True):
        text = (test_data / "glue" / folder / f"{part}.tsv").read_text(encoding="utf-8")
        rows = [line.split("\t") for line in text.split("\n")[header:-1]]
        assert [example.texts for example in examples] == [tuple(row[i] for i in texts) for row in rows]
        assert [example.label for example in examples] == [float(numbers.get(row[label], row[label])) for row in rows]
    if name in ("sst2", "mrpc"):
        assert any('"' in text for example in found[0] for text in example.texts)


def test_the_folder_may_be_the_tasks_own_or_above_it_in_any_spelling(write, tmp_path):
    for part in ("train", "dev"):
        write(f"all/sst2/{part}.tsv", 'sentence\tlabel\n"open\t1\nclosed"\t0\n')
    for folder in (tmp_path / "all", tmp_path / "all" / "sst2"):
        assert load("sst2", folder)[0] == [Example(('"open',), 1), Example(('closed"',), 0)]


def test_a_byte_order_mark_and_odd_line_separators_in_a_sentence_change_nothing(write, tmp_path):
    for part in ("train", "dev"):
        write(f"SST-2/{part}.tsv", "\ufeffsentence\tlabel\r\none\u2028two\x85\t1\r\n")
    assert load("sst2", tmp_path)[0] == [Example(("one\u2028two\x85",), 1)]


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv"])
def test_files_with_the_hubs_names_are_read_too(ending, write, tmp_path):
    row = {**PAIRS, "label": 1, "idx": 0}
    for part in ("train", "validation"):
        content = {
            "jsonl": json.dumps(row),
            "json": json.dumps([row]),
            "csv": "sentence1,sentence2,label\na,b,1\n",
        }[ending]
        write(f"MRPC/{part}.{ending}", content)
    assert load("mrpc", tmp_path) == ([Example(("a", "b"), 1)], [Example(("a", "b"), 1)])


def test_hub_rows_are_the_same_examples(monkeypatch):
    rows = {"premise": "a", "hypothesis": "b", "label": 2, "idx": 0}
    splits = {"train": [rows], "validation_matched": [rows, rows], "validation_mismatched": []}
    monkeypatch.setattr(hub, "whole", lambda name, config, offline: splits)
    train, validation = load("mnli")
    assert train == [Example(("a", "b"), 2)]
    assert len(validation) == 2


@pytest.mark.parametrize(
    ("name", "text", "place", "words"),
    [
        ("rte", "index\tsentence1\tlabel\n0\ta\tentailment\n", "train.tsv", "no column 'sentence2'"),
        ("rte", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tmaybe\n", "line 2", "the label is 'maybe'"),
        ("sst2", "sentence\tlabel\nx\t2\n", "line 2", "the label is '2'"),
        ("stsb", "sentence1\tsentence2\tscore\na\tb\thigh\n", "line 2", "the label is 'high'"),
        ("sst2", "sentence\tlabel\n", "train.tsv", "has no examples"),
        ("sst2", "sentence\tlabel\nx\nx\t1\n", "line 2", "1 rows of"),
        ("sst2", b"sentence\tlabel\n\xff\t1\n", "train.tsv", "not UTF-8"),
    ],
)
def test_a_broken_glue_file_is_named(name, text, place, words, write, tmp_path):
    for part in ("train", "dev"):
        write(f"{tasks.describe(name).folder}/{part}.tsv", text)
    with pytest.raises(UsageError) as caught:
        load(name, tmp_path)
    assert place in caught.value.message
    assert words in caught.value.message


def test_a_few_rows_that_lack_a_column_are_left_out_and_said(write, tmp_path):
    rows = "".join(f"a {i}\tb {i}\t1\n" for i in range(200))
    for part in ("train", "dev"):
        write(f"QQP/{part}.tsv", f"question1\tquestion2\tis_duplicate\n{rows}only one\n")
    said = []
    train, _ = load("qqp", tmp_path, status=said.append)
    assert len(train) == 200
    assert "1 rows of" in said[0]
    assert "line 202" in said[0]


def test_published_downstream_sets_have_welores_parts(published_data):
    expected = {
        "svamp": (700, 300),
        "strategyqa": (1603, 687),
        "boolq": (2289, 981),
        "commonsense_qa": (9741, 1221),
        "coin_flip": (350, 150),
        "bigbench_date": (295, 74),
        "object_tracking": (600, 150),
    }
    found = {name: tuple(map(len, load(name, published_data / "downstream"))) for name in expected}
    assert found == expected


def test_published_questions_read_as_in_lm_eval(published_data):
    folder = published_data / "downstream"
    question = load("commonsense_qa", folder)[0][0]
    assert question.turns[0].instruction.endswith(
        "had made to change?\nA. ignore\nB. enforce\nC. authoritarian\nD. yell at\nE. avoid"
    )
    assert question.turns[0].response == "A"
    boolq = load("boolq", folder)[0][0].turns[0]
    assert (boolq.instruction, boolq.response) == ("does ethanol take more energy make that produces?", "no")
    assert boolq.input.startswith("All biomass goes through")
    svamp = load("svamp", folder)[0][1].turns[0]
    assert svamp.instruction.endswith("at the start. How much did the candy bar cost?")
    assert svamp.response == "1"


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


QUESTIONS = {
    "svamp": (
        "SVAMP/SVAMP.json",
        lambda r: (f"{r['Body'].removesuffix('.')}. {r['Question']}", "", str(int(r["Answer"]))),
        (),
    ),
    "strategyqa": (
        "StrategyQA/task.json",
        lambda r: (r["input"], "", "yes" if r["target"].startswith("Yes") else "no"),
        ("yes", "no"),
    ),
    "boolq": (
        "boolq/boolq_dev.jsonl",
        lambda r: (r["question"] + "?", r["passage"], "yes" if r["answer"] else "no"),
        ("yes", "no"),
    ),
    "coin_flip": ("coin_flip/coin_flip.json", lambda r: (r["question"], "", r["answer"]), ("yes", "no")),
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_first_seven_tenths_are_trained_on_and_questions_read_as_in_lm_eval(name, test_data):
    file, expected, choices = QUESTIONS[name]
    path = test_data / "downstream" / file
    raw = lines(path) if file.endswith("l") else json.loads(path.read_text(encoding="utf-8"))
    raw = raw["examples"] if isinstance(raw, dict) else raw
    said = []
    train, validation = load(name, test_data / "downstream", status=said.append)
    assert len(train) == len(raw) * 7 // 10
    for record, example in zip([*train, *validation], raw, strict=True):
        (turn,) = record.turns
        assert (turn.instruction, turn.input, turn.response) == expected(example)
        assert record.choices == choices
    if name == "boolq":
        assert "there is no" in said[0]


def test_commonsense_qa_has_parts_of_its_own_and_lists_its_choices(test_data):
    parts = zip(("train", "dev"), load("commonsense_qa", test_data / "downstream"), strict=True)
    for part, records in parts:
        raw = lines(test_data / "downstream" / "CommonsenseQA" / f"{part}_rand_split.jsonl")
        for record, example in zip(records, raw, strict=True):
            (turn,) = record.turns
            listed = [f"{choice['label']}. {choice['text']}" for choice in example["question"]["choices"]]
            assert turn.instruction.split("\n") == [example["question"]["stem"], *listed]
            assert (turn.response, record.choices) == (example["answerKey"], tuple("ABCDE"))


@pytest.mark.parametrize("name", ["bigbench_date", "object_tracking"])
def test_the_right_choice_stands_anywhere_and_always_there(name, test_data):
    first, again = (load(name, test_data / "downstream") for _ in range(2))
    assert first == again
    records = [*first[0], *first[1]]
    assert len(first[0]) == len(records) * 8 // 10
    counts = {letter: sum(r.turns[0].response == letter for r in records) for letter in "ABC"}
    assert min(counts.values()) > len(records) / 10
    raw = json.loads((test_data / "downstream" / tasks.describe(name).folder / "task.json").read_text())["examples"]
    for example, record in zip(raw, records, strict=True):
        (right,) = [text for text, score in example["target_scores"].items() if score]
        letters = "ABCDEF"[: len(example["target_scores"])]
        assert record.choices == tuple(letters)
        (turn,) = record.turns
        question, *listed = turn.instruction.rsplit("\n", len(letters))
        assert question == example["input"].strip()
        assert sorted(listed) == listed
        assert sorted(line[3:] for line in listed) == sorted(example["target_scores"])
        assert f"{turn.response}. {right}" in listed


def test_hub_forms_of_the_downstream_sets(monkeypatch):
    choices = {"label": ["A", "B"], "text": ["x", "y"]}
    row = {"question": "Which?", "choices": choices, "answerKey": "B", "id": "1"}
    monkeypatch.setattr(hub, "whole", lambda name, config, offline: {"train": [row], "validation": [row]})
    record = load("commonsense_qa")[0][0]
    assert (record.turns[0].instruction, record.turns[0].response) == ("Which?\nA. x\nB. y", "B")
    assert record.where == "tau/commonsense_qa (train), record 1"


@pytest.mark.parametrize("name", ["cola", "boolq", "svamp"])
def test_offline_without_a_folder_says_both_ways_out(name, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    with pytest.raises(MissingError) as caught:
        load(name, offline=True)
    assert "--data-dir FOLDER" in caught.value.hint
    assert ("from the hub" in caught.value.hint) == (name != "svamp")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("sentence\tlabel\tsentence\n", "the column 'sentence' twice"),
        ("sentence\tlabel\n" + "a\t1\n" * 20 + "a\tb\t1\n", "line 22"),
        ("sentence\tlabel\na\0\t1\n", "line 2: a NUL byte"),
        ("sentence\tlabel\na\tnan\n", "line 2: the label is 'nan'"),
    ],
)
def test_a_broken_table_is_named(rows, words, write, tmp_path):
    for part in ("train", "dev"):
        write(f"SST-2/{part}.tsv", rows)
    with pytest.raises(UsageError) as caught:
        load("sst2", tmp_path)
    assert words in caught.value.message


@pytest.mark.parametrize("label", ["nan", "inf", "1e999"])
def test_a_score_is_a_finite_number(label, write, tmp_path):
    for part in ("train", "dev"):
        write(f"STS-B/{part}.tsv", f"sentence1\tsentence2\tscore\na\tb\t{label}\n")
    with pytest.raises(UsageError, match="line 2: the label is"):
        load("stsb", tmp_path)


@pytest.mark.parametrize("name", ["qnli", "mnli"])
def test_files_that_are_not_there_are_missing(name, test_data):
    with pytest.raises(MissingError, match="no train.tsv"):
        load(name, test_data / "glue")


def test_a_folder_that_is_not_there_is_missing(tmp_path):
    with pytest.raises(MissingError, match="no folder"):
        load("svamp", tmp_path / "none")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not JSON"),
        ('{"examples": 3}', "holds a number"),
        ('[{"Body": "b", "Question": "q"}, 1]', "record 1 is not an example of svamp: KeyError 'Answer'"),
        ('[{"Body": "b", "Question": "q", "Answer": "x"}, 1]', "record 1 is not an example of svamp"),
        ('[{"Body": "b", "Question": "q", "Answer": 1e999}, 1]', "record 1 is not an example of svamp"),
        ('[{"Body": "b", "Question": "q", "a": ' + "[" * 3000 + "]" * 3000 + "}]", "nested too deep"),
        ("[]", "part without examples"),
    ],
)
def test_a_broken_downstream_file_is_named(content, words, write, tmp_path):
    write("SVAMP/SVAMP.json", content)
    with pytest.raises(UsageError) as caught:
        load("svamp", tmp_path)
    assert words in caught.value.message


def test_every_task_of_the_settings_exists():
    from dataclasses import fields

    from lowrank_cli.settings.finetune import TaskConfig

    (field,) = [f for f in fields(TaskConfig) if f.name == "task"]
    for name in tasks.names():
        assert name in field.metadata["help"]
    assert set(GLUE) < set(tasks.names())
