"""Local files give the requests that lm-eval's own tasks give on the hub's records, and broken files are named."""

import shutil
from collections import Counter

import pytest

from lowrank_cli.errors import MissingError, UsageError
from lowrank_cli.evaluate import local_tasks, tasks


def ours(name, test_data, shots):
    loaded = tasks.load([name], str(test_data), offline=True, num_fewshot=shots)[0]
    return loaded.content["tasks"]


def test_mmlu_requests_are_lm_evals(test_data, published, by_hand, requests_of):
    records = {}
    for subject in local_tasks.subjects():
        records[subject] = {
            split: [
                {"question": r[0], "subject": subject, "choices": r[1:5], "answer": "ABCD".index(r[5])}
                for r in published(f"mmlu/{part}/{subject}_{part}.csv")
            ]
            for part, split in (("test", "test"), ("val", "validation"), ("dev", "dev"))
        }
    _, wanted = by_hand("mmlu/default", "mmlu", records)
    got = ours("mmlu", test_data, None)
    # five examples without being asked, as the benchmark is defined
    assert requests_of(got, None, 3) == requests_of(wanted["tasks"], 5, 3)
    assert requests_of(got, 0, 1) == requests_of(wanted["tasks"], 0, 1)


def test_mmlu_is_whole(test_data):
    tasks_of = ours("mmlu", test_data, None)
    assert len(tasks_of) == 57
    assert sum(len(task.eval_docs) for task in tasks_of.values()) == 14_042
    assert all(len(list(task.fewshot_docs())) == 5 for task in tasks_of.values())


def test_boolq_requests_are_lm_evals(test_data, published, by_hand, requests_of):
    rows = [
        {"question": r["question"], "passage": r["passage"], "idx": i, "label": int(r["answer"])}
        for i, r in enumerate(published("downstream/boolq/boolq_dev.jsonl"))
    ]
    # without a train file lm-eval's rule for a set without one holds
    _, wanted = by_hand("super_glue/boolq", "boolq", {"validation": rows, "train": rows[:1]})
    wanted["tasks"]["boolq"].config.training_split = None
    assert requests_of(ours("boolq", test_data, 0), 0, 20) == requests_of(wanted["tasks"], 0, 20)
    held_out = ours("boolq_held_out", test_data, 0)["boolq"]
    assert [doc["question"] for doc in held_out.eval_docs] == [r["question"] for r in rows[int(0.7 * len(rows)) :]]


def test_commonsense_qa_requests_are_lm_evals(test_data, published, by_hand, requests_of):
    def split(name):
        return [
            {
                "id": r["id"],
                "question": r["question"]["stem"],
                "choices": {k: [c[k] for c in r["question"]["choices"]] for k in ("label", "text")},
                "answerKey": r["answerKey"],
            }
            for r in published(f"downstream/CommonsenseQA/{name}_rand_split.jsonl")
        ]

    _, wanted = by_hand("commonsense_qa", "commonsense_qa", {"validation": split("dev"), "train": split("train")})
    assert requests_of(ours("commonsense_qa", test_data, 2), 2, 20) == requests_of(wanted["tasks"], 2, 20)


def test_gsm8k_requests_are_lm_evals(test_data, published, by_hand, requests_of):
    records = {split: published(f"downstream/gsm8k/{split}.jsonl") for split in ("train", "test")}
    _, wanted = by_hand("gsm8k", "gsm8k", records)
    got = requests_of(ours("gsm8k", test_data, None), None, 5)
    assert got == requests_of(wanted["tasks"], None, 5)
    assert got[0][-1][0].count("Question:") == 6


def test_math500_requests_and_scores_are_lm_evals(test_data, published, by_hand, requests_of):
    rows = [{"problem": r["question"], "solution": r["answer"]} for r in published("downstream/math500/test.jsonl")]
    _, wanted = by_hand("hendrycks_math", "hendrycks_math500", {"test": rows, "train": rows})
    got = ours("math500", test_data, None)
    assert requests_of(got, 0, 10) == requests_of(wanted["tasks"], 0, 10)
    task = got["hendrycks_math500"]
    doc = task.eval_docs[0]
    right = task.process_results(doc, [f"so ${doc['answer']}$."])
    # an answer that cannot be read counts as wrong
    assert (right["exact_match"], task.process_results(doc, [""])["exact_match"]) == (1, 0)


def test_wikitext_requests_are_the_articles(test_data, by_hand, requests_of):
    text = (test_data / "wikitext-2" / "wiki.test.raw").read_text(encoding="utf-8")
    tasks_of = ours("wikitext", test_data, None)
    pages = [doc["page"] for doc in tasks_of["wikitext"].eval_docs]
    assert len(pages) == 62
    # nothing is lost but the blank line before the first heading
    assert " \n" + "\n".join(pages) == text
    assert all(page.startswith(" = ") and not page.startswith(" = =") for page in pages)
    _, wanted = by_hand(
        "wikitext", "wikitext", {s: [{"page": p} for p in pages] for s in ("train", "test", "validation")}
    )
    assert requests_of(tasks_of, 0, None) == requests_of(wanted["tasks"], 0, None)


@pytest.mark.parametrize(
    ("name", "folder", "task", "evaluated", "first"),
    [
        ("strategyqa", "StrategyQA", "bigbench_strategyqa_multiple_choice", 687, "Q: "),
        ("bigbench_date", "Bigbench_Date", "bigbench_date_understanding_multiple_choice", 74, "Q: "),
        (
            "object_tracking",
            "Bigbench_object_tracking",
            "bigbench_tracking_shuffled_objects_multiple_choice",
            150,
            "Alice, Bob, and Claire",
        ),
    ],
)
def test_bigbench_requests_are_lm_evals(
    name, folder, task, evaluated, first, test_data, published, by_hand, requests_of
):
    examples = published(f"downstream/{folder}/task.json")["examples"]
    got = ours(name, test_data, 0)[task]
    assert len(got.eval_docs) == evaluated
    assert first in got.eval_docs[0]["inputs"]
    kept = examples[len(examples) - evaluated :]
    for doc, example in zip(got.eval_docs, kept, strict=True):
        assert example["input"].strip() in doc["inputs"]
        right = {choice for choice, score in example["target_scores"].items() if score == 1}
        assert doc["multiple_choice_targets"][got.doc_to_target(doc)] in right
    _, wanted = by_hand("bigbench", task, {"default": list(got.eval_docs)})
    made = [(doc_id, idx, kind, args) for _, doc_id, idx, kind, args in requests_of({"a": got}, 0, 10)]
    assert made == [(d, i, k, a) for _, d, i, k, a in requests_of(wanted["tasks"], 0, 10)]


def test_right_choices_do_not_come_first(test_data):
    task = next(iter(ours("bigbench_date", test_data, 0).values()))
    places = Counter(task.doc_to_target(doc) for doc in task.eval_docs)
    assert max(places.values()) < 0.4 * len(task.eval_docs)


def test_svamp_and_coin_flip_extract_answers(test_data):
    task = ours("svamp", test_data, 0)["svamp"]
    task.build_all_requests(limit=1)
    doc = task.eval_docs[0]

    def score(answer):
        task.instances[0].resps = [answer]
        task.apply_filters()
        return task.process_results(doc, [task.instances[0].filtered_resps["flexible-extract"]])["exact_match"]

    assert len(task.eval_docs) == 300
    right = doc["answer"]
    assert [score(t) for t in (right, f"It is {right}.", f"3 and 1 make ${right}.00")] == [1, 1, 1]
    assert [score(t) for t in ("", "none", f"{right}1")] == [0, 0, 0]
    coin = ours("coin_flip", test_data, 0)["coin_flip"]
    assert len(coin.eval_docs) == 150
    assert coin.doc_to_choice(coin.eval_docs[0])[coin.doc_to_target(coin.eval_docs[0])] in ("yes", "no")


def test_failures_of_generation_count_as_wrong(test_data):
    task = ours("gsm8k", test_data, 0)["gsm8k"]
    task.build_all_requests(limit=4)
    for instance in task.instances:
        instance.resps = [""]
    task.apply_filters()
    scores = [
        task.process_results(instance.doc, [instance.filtered_resps[name]])["exact_match"]
        for instance in task.instances
        for name in ("strict-match", "flexible-extract")
    ]
    assert scores == 8 * [0]


@pytest.fixture
def mmlu_copy(test_data, tmp_path):
    for part in ("dev", "test"):
        (tmp_path / "data" / part).mkdir(parents=True)
        for subject in local_tasks.subjects():
            shutil.copy(test_data / "mmlu" / part / f"{subject}_{part}.csv", tmp_path / "data" / part)
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
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([*lines[:2], row, *lines[2:]]), encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        ours("mmlu_anatomy", mmlu_copy, None)
    assert f"{path.resolve()}, {said}" in caught.value.message


def test_line_numbers_count_line_ends_within_quotes(mmlu_copy):
    path = mmlu_copy / "test" / "anatomy_test.csv"
    path.write_text('"What\nis\nit?",1,2,3,4,A\nWhat?,1,2,3,4,X\n', encoding="utf-8")
    with pytest.raises(UsageError, match="line 4: the label is 'X'"):
        ours("mmlu_anatomy", mmlu_copy, None)


def test_missing_subject_is_named(mmlu_copy):
    (mmlu_copy / "test" / "virology_test.csv").unlink()
    with pytest.raises(MissingError, match="virology_test.csv"):
        ours("mmlu", mmlu_copy, None)
    assert len(ours("mmlu_anatomy", mmlu_copy, None)) == 1


def test_data_of_another_folder_are_other_tasks(mmlu_copy, test_data):
    (mmlu_copy / "test" / "anatomy_test.csv").write_text("What?,1,2,3,4,A\n", encoding="utf-8")
    assert len(ours("mmlu_anatomy", mmlu_copy, None)["mmlu_anatomy"].eval_docs) == 1
    assert len(ours("mmlu_anatomy", test_data, None)["mmlu_anatomy"].eval_docs) == 135


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
        ("svamp", "SVAMP.json", '{"a": 1}', "holds no list of records"),
        ("coin_flip", "coin_flip.json", '{"examples": [{"question": "a", "answer": "maybe"}]}', "not yes or no"),
        ("math500", "math500/test.jsonl", '{"problem": "a", "solution": "4"}', "no \\\\boxed answer"),
        ("strategyqa", "StrategyQA/task.json", '{"examples": [{"input": "a", "target_scores": {}}]}', "record 1"),
    ],
)
def test_broken_records_are_named(name, file, text, said, tmp_path):
    for part in {file, file.replace("test", "train")}:
        path = tmp_path / part
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=said):
        ours(name, tmp_path, None)
