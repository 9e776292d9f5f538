"""Local files give the requests that lm-eval's own tasks give on the hub's records, and broken files are named."""

import shutil
import subprocess
import sys
from collections import Counter

import pytest

from lowrank_cli.errors import MissingError, UsageError
from lowrank_cli.evaluate import local_tasks, published, tasks

BIGBENCH = {
    "strategyqa": ("StrategyQA", "bigbench_strategyqa_multiple_choice", 0.7, "Q: "),
    "bigbench_date": ("Bigbench_Date", "bigbench_date_understanding_multiple_choice", 0.8, "Q: "),
    "object_tracking": (
        "Bigbench_object_tracking",
        "bigbench_tracking_shuffled_objects_multiple_choice",
        0.8,
        "Anna,",
    ),
}


def ours(name, folder, shots=None):
    loaded = tasks.load([name], str(folder), offline=True, num_fewshot=shots)[0]
    return loaded.content["tasks"]


def test_published_sets_are_whole(published_data, raw):
    mmlu = ours("mmlu", published_data)
    assert len(mmlu) == 57
    assert sum(len(task.eval_docs) for task in mmlu.values()) == 14_042
    assert all(len(list(task.fewshot_docs())) == 5 for task in mmlu.values())
    for subject in local_tasks.subjects():
        docs = mmlu[f"mmlu_{subject}"].eval_docs
        read = [[d["question"], *d["choices"], "ABCD"[d["answer"]]] for d in docs]
        assert read == raw(published_data / "mmlu" / "test" / f"{subject}_test.csv"), subject
    evaluated = {
        "boolq": 3270, "boolq_held_out": 981, "commonsense_qa": 1221, "gsm8k": 1319, "math500": 500, "wikitext": 62,
        "svamp": 300, "coin_flip": 150, "strategyqa": 687, "bigbench_date": 74, "object_tracking": 150,
    }  # fmt: skip
    found = {name: next(iter(ours(name, published_data).values())) for name in evaluated}
    assert {name: len(task.eval_docs) for name, task in found.items()} == evaluated


def test_mmlu_requests_are_lm_evals(test_data, raw, by_hand, requests_of):
    records = {}
    for subject in local_tasks.subjects():
        records[subject] = {
            split: [
                {"question": r[0], "subject": subject, "choices": r[1:5], "answer": "ABCD".index(r[5])}
                for r in raw(test_data / "mmlu" / part / f"{subject}_{part}.csv")
            ]
            for part, split in (("test", "test"), ("val", "validation"), ("dev", "dev"))
        }
    _, wanted = by_hand("mmlu/default", "mmlu", records)
    got = ours("mmlu", test_data)
    assert len(got) == 57
    assert [len(got[f"mmlu_{name}"].eval_docs) for name in records] == [len(r["test"]) for r in records.values()]
    # five examples without being asked, as the benchmark is defined
    assert requests_of(got, None, 2) == requests_of(wanted["tasks"], 5, 2)
    assert requests_of(got, 0, 1) == requests_of(wanted["tasks"], 0, 1)


def test_boolq_requests_are_lm_evals(test_data, raw, by_hand, requests_of):
    rows = [
        {"question": r["question"], "passage": r["passage"], "idx": i, "label": int(r["answer"])}
        for i, r in enumerate(raw(test_data / "downstream" / "boolq" / "boolq_dev.jsonl"))
    ]
    # without a train file lm-eval's rule for a set without one holds
    _, wanted = by_hand("super_glue/boolq", "boolq", {"validation": rows, "train": rows[:1]})
    wanted["tasks"]["boolq"].config.training_split = None
    assert requests_of(ours("boolq", test_data, 0), 0, 20) == requests_of(wanted["tasks"], 0, 20)
    held_out = ours("boolq_held_out", test_data, 0)["boolq"]
    assert [doc["question"] for doc in held_out.eval_docs] == [r["question"] for r in rows[int(0.7 * len(rows)) :]]


def test_commonsense_qa_requests_are_lm_evals(test_data, raw, by_hand, requests_of):
    def split(name):
        return [
            {
                "id": r["id"],
                "question": r["question"]["stem"],
                "choices": {k: [c[k] for c in r["question"]["choices"]] for k in ("label", "text")},
                "answerKey": r["answerKey"],
            }
            for r in raw(test_data / "downstream" / "CommonsenseQA" / f"{name}_rand_split.jsonl")
        ]

    _, wanted = by_hand("commonsense_qa", "commonsense_qa", {"validation": split("dev"), "train": split("train")})
    assert requests_of(ours("commonsense_qa", test_data, 2), 2, 20) == requests_of(wanted["tasks"], 2, 20)


def test_gsm8k_requests_are_lm_evals(test_data, raw, by_hand, requests_of):
    records = {split: raw(test_data / "downstream" / "gsm8k" / f"{split}.jsonl") for split in ("train", "test")}
    _, wanted = by_hand("gsm8k", "gsm8k", records)
    task = ours("gsm8k", test_data)
    got = requests_of(task, None, 5)
    assert got == requests_of(wanted["tasks"], None, 5)
    assert got[0][-1][0].count("Question:") == 6
    # an answer that cannot be read counts as wrong
    assert scores(task["gsm8k"], "exact_match", "") == 10 * [0]


def test_math500_requests_and_scores_are_lm_evals(test_data, raw, by_hand, requests_of):
    records = raw(test_data / "downstream" / "math500" / "test.jsonl")
    rows = [{"problem": r["question"], "solution": r["answer"]} for r in records]
    _, wanted = by_hand("hendrycks_math", "hendrycks_math500", {"test": rows, "train": rows})
    got = ours("math500", test_data)
    assert requests_of(got, 0, 10) == requests_of(wanted["tasks"], 0, 10)
    task = got["hendrycks_math500"]
    for doc in list(task.eval_docs)[:3]:
        right = task.process_results(doc, [f"so ${doc['answer']}$."])
        assert (right["exact_match"], task.process_results(doc, [""])["exact_match"]) == (1, 0)


def test_wikitext_requests_are_the_articles(test_data, by_hand, requests_of):
    text = (test_data / "wikitext-2" / "wiki.test.raw").read_text(encoding="utf-8")
    tasks_of = ours("wikitext", test_data)
    pages = [doc["page"] for doc in tasks_of["wikitext"].eval_docs]
    assert len(pages) == 20
    # nothing is lost but the blank line before the first heading
    assert " \n" + "\n".join(pages) == text
    assert all(page.startswith(" = ") and not page.startswith(" = =") for page in pages)
    splits = ("train", "test", "validation")
    _, wanted = by_hand("wikitext", "wikitext", {split: [{"page": p} for p in pages] for split in splits})
    assert requests_of(tasks_of, 0, None) == requests_of(wanted["tasks"], 0, None)


@pytest.mark.parametrize("name", BIGBENCH)
def test_bigbench_requests_are_lm_evals(name, test_data, raw, by_hand, requests_of):
    folder, task, train, first = BIGBENCH[name]
    examples = raw(test_data / "downstream" / folder / "task.json")["examples"]
    got = ours(name, test_data, 0)[task]
    assert got.eval_docs[0]["inputs"].startswith(first)
    for doc, example in zip(got.eval_docs, examples[int(train * len(examples)) :], strict=True):
        assert example["input"].strip() in doc["inputs"]
        (right,) = [choice for choice, score in example["target_scores"].items() if score == 1]
        assert doc["multiple_choice_targets"][got.doc_to_target(doc)] == right
    _, wanted = by_hand("bigbench", task, {"default": list(got.eval_docs)})
    made = [request[1:] for request in requests_of({"a": got}, 0, 10)]
    assert made == [request[1:] for request in requests_of(wanted["tasks"], 0, 10)]


def test_right_choices_do_not_come_first(test_data):
    (task,) = ours("bigbench_date", test_data, 0).values()
    places = Counter(task.doc_to_target(doc) for doc in task.eval_docs)
    assert max(places.values()) < 0.4 * len(task.eval_docs)


def scores(task, metric, answer):
    """Return what a task gives for the same answer to each question that it has asked, by each of its filters."""
    for instance in task.instances:
        instance.resps = [answer]
    task.apply_filters()
    found = [(i.doc, response) for i in task.instances for response in i.filtered_resps.values()]
    return [task.process_results(doc, [response])[metric] for doc, response in found]


def test_svamp_and_coin_flip_extract_answers(test_data):
    task = ours("svamp", test_data, 0)["svamp"]
    task.build_all_requests(limit=1)
    assert len(task.eval_docs) == 30
    right = task.eval_docs[0]["answer"]
    for answer in (right, f"It is {right}.", f"3 and 1 make ${right}.00"):
        assert scores(task, "exact_match", answer) == [1], answer
    for answer in ("", "none", f"{right}1"):
        assert scores(task, "exact_match", answer) == [0], answer
    coin = ours("coin_flip", test_data, 0)["coin_flip"]
    assert len(coin.eval_docs) == 36
    assert coin.doc_to_choice(coin.eval_docs[0])[coin.doc_to_target(coin.eval_docs[0])] in ("yes", "no")


@pytest.fixture
def mmlu_copy(test_data, tmp_path):
    for part in ("dev", "test"):
        shutil.copytree(test_data / "mmlu" / part, tmp_path / "data" / part)
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("What?,1,2,3,4,E", "line 3: the label is 'E', not one of A, B, C, D"),
        ("What?,1,2,3,4,a", "line 3: the label is 'a'"),
        ("What?,1,2,3,A", "line 3: 5 columns instead of 6"),
        ('"What?"x,1,2,3,4,A', "line 3: not CSV"),
        ('"never closed,1,2,3,4,A', "line 3: not CSV"),
    ],
)
def test_broken_rows_are_named_by_file_and_line(row, said, mmlu_copy):
    path = mmlu_copy / "test" / "anatomy_test.csv"
    path.write_text(f"What?,1,2,3,4,A\nWhy?,1,2,3,4,B\n{row}\nWho?,1,2,3,4,C\n", encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        ours("mmlu_anatomy", mmlu_copy)
    assert f"{path.resolve()}, {said}" in caught.value.message


def test_line_numbers_count_line_ends_within_quotes(mmlu_copy):
    path = mmlu_copy / "test" / "anatomy_test.csv"
    path.write_text('"What\nis\nit?",1,2,3,4,A\nWhat?,1,2,3,4,X\n', encoding="utf-8")
    with pytest.raises(UsageError, match="line 4: the label is 'X'"):
        ours("mmlu_anatomy", mmlu_copy)


def test_missing_subject_is_named(mmlu_copy):
    (mmlu_copy / "test" / "virology_test.csv").unlink()
    with pytest.raises(MissingError, match="virology_test.csv"):
        ours("mmlu", mmlu_copy)
    assert len(ours("mmlu_anatomy", mmlu_copy)) == 1


def test_data_of_another_folder_are_other_tasks(mmlu_copy, test_data):
    (mmlu_copy / "test" / "anatomy_test.csv").write_text("What?,1,2,3,4,A\n", encoding="utf-8")
    assert len(ours("mmlu_anatomy", mmlu_copy)["mmlu_anatomy"].eval_docs) == 1
    assert len(ours("mmlu_anatomy", test_data)["mmlu_anatomy"].eval_docs) == 8


@pytest.mark.parametrize(
    ("name", "file", "text", "said"),
    [
        (
            "boolq",
            "boolq_dev.jsonl",
            '{"question": "a", "passage": "b", "answer": "yes"}',
            "line 1: the answer is 'yes'",
        ),
        ("boolq", "boolq_dev.jsonl", '{"question": "a"\n', "line 1: not JSON"),
        ("gsm8k", "gsm8k/test.jsonl", '{"question": "a", "answer": "4"}', "has no '#### N'"),
        ("svamp", "SVAMP.json", '[{"Body": "a", "Question": "b", "Answer": "x"}]', "record 1: the answer is 'x'"),
        ("svamp", "SVAMP.json", '{"a": 1}', "holds an object, not a list"),
        ("coin_flip", "coin_flip.json", '{"examples": [{"question": "a", "answer": "maybe"}]}', "not yes or no"),
        ("math500", "math500/test.jsonl", '{"problem": "a", "solution": "4"}', "no \\\\boxed answer"),
        ("strategyqa", "StrategyQA/task.json", '{"examples": [{"input": "a", "target_scores": {}}]}', "record 1"),
        (
            "strategyqa",
            "StrategyQA/task.json",
            '{"examples": [{"input": "a", "target_scores": {"a": "1", "b": 0}}]}',
            "record 1",
        ),
        ("svamp", "SVAMP.json", '[{"Body": "a", "Question": "b", "Answer": 1e400}]', "record 1: the answer is inf"),
        ("gsm8k", "gsm8k/test.jsonl", '{"question": "a", "meta": ' + "[" * 3000 + "]" * 3000 + "}", "line 1: .*deep"),
        ("gsm8k", "gsm8k/test.jsonl", '{"question": "a", "answer": "\\ud83d #### 4"}', "line 1: .*surrogate"),
    ],
)
def test_broken_records_are_named(name, file, text, said, tmp_path):
    for part in {file, file.replace("test", "train")}:
        path = tmp_path / part
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=said):
        ours(name, tmp_path)


def test_an_error_while_local_files_are_read_is_not_missing_data(test_data, monkeypatch):
    def broken(files):
        raise ValueError("odd bytes")

    monkeypatch.setattr(published, "gsm8k", broken)
    with pytest.raises(UsageError, match="the files of gsm8k in .* cannot be read: odd bytes"):
        ours("gsm8k", test_data)


def test_a_mistyped_name_is_said_before_the_libraries_are_imported():
    script = (
        "import sys\n"
        "from lowrank_cli.errors import UsageError\n"
        "from lowrank_cli.evaluate import names, session\n"
        "names.all_names = lambda: {'hellaswag'}\n"
        "names.check(['hellaswag', 'ppl', 'mmlu', 'gsm8k'])\n"
        "try:\n    names.check(['hellaswg'])\n"
        "except UsageError as error:\n    assert 'did you mean hellaswag' in error.hint\n"
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'lm_eval')))\n"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
