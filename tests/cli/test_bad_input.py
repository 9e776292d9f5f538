"""Mistakes and misfortunes: one sentence, the right exit code, nothing written and nothing lost."""

import json
import resource
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from lowrank_cli import methods


def assert_error(result, code: int, *parts: str) -> None:
    """The exit code, and an error and a hint of one line each that contain the parts."""
    found, out, err = result
    assert found == code, err
    lines = [line for line in err.splitlines() if line.startswith(("error:", "hint:"))]
    assert [line.split(":")[0] for line in lines] in (["error"], ["error", "hint"])
    for part in parts:
        assert part in "\n".join(lines), err
    assert "Traceback" not in err
    assert out == ""


KNOWN = f"methods: {', '.join(methods.names())}"


@pytest.mark.parametrize(("line", "parts"), [
    ("--method galroe", ["unknown method 'galroe'", "did you mean 'galore'?", KNOWN]),
    ("--method galore+full", ["galore and full do not combine"]),
    ("--method galore+galore", ["galore is named twice in galore+galore"]),
    ("--preset galore-llama-6m", ["unknown preset 'galore-llama-6m'", "did you mean 'galore-llama-60m'?"]),
    ("--galroe-rank 3", ["no option --galroe-rank"]),
    ("--galore-rank 3", ["--galore-rank is an option of galore, which was not chosen", "add --method galore"]),
    ("--method galore --galore-rnk 3", ["no option --galore-rnk", "did you mean --galore-rank?"]),
    ("--method galore --galore-rank 0", ["--galore-rank is 0", "at least 1"]),
    ("--method galore --galore-rank -4", ["--galore-rank is -4", "at least 1"]),
    ("--method galore --galore-rank many", ["--galore-rank is 'many'", "a whole number"]),
    ("--method galore --galore-scale 0", ["--galore-scale is 0.0", "larger than 0"]),
    ("--lr nan", ["--lr is nan", "larger than 0"]),
    ("--lr inf", ["--lr is inf"]),
    ("--max-steps 2.5", ["--max-steps is '2.5'", "a whole number"]),
    ("--max-train-tokens lots", ["--max-train-tokens is 'lots'"]),
    ("--scheduler step", ["--scheduler is 'step'", "linear, cosine, cosine_restarts, constant"]),
    ("--config missing.yaml", ["no file missing.yaml"]),
    ("--model llama-8m", ["unknown preset 'llama-8m' in --model", "did you mean 'llama-9m'?"]),
    ("--total-batch-size 30", ["30", "16", "32"]),
    ("--max-steps 3 --epochs 2", ["the length is given twice"]),
    ("--memory-budget big", ["--memory-budget is 'big'", "24GB"]),
    ("--memory-budget inf", ["--memory-budget is 'inf'", "24GB"]),
    ("--max-train-tokens inf", ["--max-train-tokens is 'inf'", "such as 100M"]),
    ("--beta1 1", ["--beta1 is 1.0", "smaller than 1"]),
    ("--beta2 1.5", ["--beta2 is 1.5", "smaller than 1"]),
    ("--min-lr-ratio 5", ["--min-lr-ratio is 5.0", "at most 1"]),
    (f"--seed {2**64}", [f"--seed is {2**64}", f"at most {2**64 - 1}"]),
    ("--method", ["--method needs a value", "lowrank pretrain --help"]),
    ("--offline=3", ["--offline takes no value"]),
    ("--method galore --galore-moments rotate --optimizer adafactor",
     ["rotate does not go with --optimizer adafactor", "keep or reset"]),
    ("--device tpu", ["--device is 'tpu'"]),
    ("--log tensorbord --max-steps 1", ["unknown logger 'tensorbord'", "did you mean 'tensorboard'?"]),
])  # fmt: skip
def test_wrong_usage(line, parts, lowrank, news):
    assert_error(lowrank(f"pretrain --dataset {news} --vocab-size 512 {line}"), 2, *parts)
    assert not Path("runs").exists()


def test_wrong_settings_are_found_before_a_run_folder_is_made(lowrank):
    assert_error(lowrank("pretrain --lr -1"), 2, "--lr is -1.0")
    assert_error(lowrank("pretrain --model llama-8m"), 2, "llama-8m")
    assert_error(lowrank("pretrain --dataset nowhere.txt"), 4, "nowhere.txt")
    assert_error(lowrank("pretrain --total-batch-size 30"), 2, "30")
    assert not Path("runs").exists()


def test_config_file(lowrank):
    Path("a.yaml").write_text("method: galore\ngalore:\n  rnk: 3\n")
    unknown = "unknown setting of galore 'rnk' in a.yaml"
    assert_error(lowrank("pretrain --config a.yaml"), 2, unknown, "did you mean 'rank'?")
    Path("a.yaml").write_text("learning_rate: 3\n")
    assert_error(lowrank("pretrain --config a.yaml"), 2, "unknown setting 'learning_rate' in a.yaml")
    Path("a.yaml").write_text("lr: [1, 2\n")
    assert_error(lowrank("pretrain --config a.yaml"), 2, "a.yaml is not YAML", "line 2")
    Path("a.yaml").write_text("- lr\n")
    assert_error(lowrank("pretrain --config a.yaml"), 2, "a.yaml holds no settings")
    Path("a.yaml").write_text("method: full\ngalore: {rank: 3}\n")
    assert_error(lowrank("pretrain --config a.yaml"), 2, "settings of galore are given, but the method is full")


@pytest.mark.parametrize(("text", "parts"), [
    ("model: [a]", ["model in a.yaml is ['a']", "takes a text"]),
    ("model: 5", ["5", "--model"]),
    ("dataset_config: no", ["dataset_config in a.yaml is False", "takes a text"]),
    ("1: 3", ["a.yaml has the key 1"]),
    ("method: galore\ngalore: {2: 3}", ["a.yaml has the key 2"]),
    ("method: galore\ngalore: 3", ["galore in a.yaml is 3", "below it"]),
    ("method: [galore]", ["method in a.yaml is ['galore']", KNOWN]),
    ("method:", ["method in a.yaml is None"]),
    ("lr: {a: 1}", ["lr in a.yaml is {'a': 1}", "takes a number"]),
    ("galroe: {rank: 1}", ["unknown method 'galroe'", "did you mean 'galore'?"]),
    ("max_steps: .inf", ["max_steps in a.yaml is inf", "a whole number"]),
])  # fmt: skip
def test_wrong_kinds_in_a_config_file(text, parts, lowrank):
    Path("a.yaml").write_text(text + "\n")
    assert_error(lowrank("pretrain --config a.yaml"), 2, *parts)
    assert not Path("runs").exists()


def test_only_a_close_flag_is_suggested(lowrank):
    _, out, err = lowrank("pretrain --foo")
    assert "did you mean" not in out + err
    assert "lowrank pretrain --help lists the options" in err
    assert "did you mean --max-steps?" in lowrank("pretrain --max-step 3")[2]


def test_dataset_files(lowrank, tmp_path):
    Path("empty.jsonl").touch()
    assert_error(lowrank("pretrain --dataset empty.jsonl"), 2, "empty.jsonl")
    lines = [json.dumps({"text": "some words " * 40})] * 6
    Path("broken.jsonl").write_text("\n".join([*lines[:4], '{"text": "no end', *lines[4:]]) + "\n")
    assert_error(lowrank("pretrain --dataset broken.jsonl"), 2, "broken.jsonl", "line 5")
    assert_error(lowrank("pretrain --dataset missing.jsonl"), 4, "missing.jsonl")
    assert not Path("runs").exists()


def test_out_that_is_not_empty(lowrank):
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("ten years")
    assert_error(lowrank("pretrain --out mine"), 2, "--out mine is not empty", "take another folder")
    assert [p.name for p in Path("mine").iterdir()] == ["thesis.txt"]
    assert Path("mine/thesis.txt").read_text() == "ten years"


def test_nothing_to_resume(lowrank):
    assert_error(lowrank("pretrain --resume auto"), 4, "no run under ./runs yet")
    assert_error(lowrank("pretrain --resume elsewhere"), 4, "no run at elsewhere")


def test_rank_over_the_matrix_is_clamped_and_said(lowrank, tiny_flags):
    code, _, err = lowrank("pretrain --method galore --galore-rank 40 --max-steps 2 --out r", *tiny_flags)
    assert code == 0, err
    assert "rank 40 is larger than some matrices: clamped to 32 there" in err
    ranks = {row["rank"] for row in json.loads(Path("r/targets.json").read_text()) if row["role"] == "galore"}
    assert ranks == {32}


@contextmanager
def largest_file(size: int):
    """Files grow no larger than this, as where the disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_leaves_the_last_checkpoint_whole(lowrank, tiny_flags):
    code, _, err = lowrank("pretrain --max-steps 4 --out run --keep 9", *tiny_flags, "--save-every", 2)
    assert code == 0, err
    size = max(p.stat().st_size for p in Path("run/checkpoints/step-000004").iterdir())
    with largest_file(size // 2):
        result = lowrank("pretrain --max-steps 4 --out full", *tiny_flags, "--save-every", 2)
    assert_error(result, 1, "could not write the checkpoint of step 2", "make room")
    # nothing half-written is left behind
    assert list(Path("full/checkpoints").iterdir()) == []
    assert json.loads(Path("full/run.json").read_text())["status"] == "failed"

    # a run that has a checkpoint keeps it, and its hint is the way on
    whole = sorted(p.name for p in Path("run/checkpoints/step-000002").iterdir())
    with largest_file(size // 2):
        result = lowrank("pretrain --resume run/checkpoints/step-000002 --save-every 1")
    way_on = f"make room, then go on from step-000002: --resume {Path('run').resolve()}"
    assert_error(result, 1, "could not write the checkpoint of step 3", way_on)
    assert sorted(p.name for p in Path("run/checkpoints").iterdir()) == ["step-000002", "step-000004"]
    assert sorted(p.name for p in Path("run/checkpoints/step-000002").iterdir()) == whole
    code, _, err = lowrank("pretrain --resume run/checkpoints/step-000002")
    assert code == 0, err


def test_missing_logger_names_the_install_command(lowrank, tiny_flags, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    result = lowrank("pretrain --max-steps 1 --log trackio", *tiny_flags)
    assert_error(result, 4, "pip install trackio, or 'lowrank-cli[trackio]'")


def test_tokenizer_of_another_vocabulary(lowrank, stories, test_data, news):
    tokenizer = test_data / "tokenizers" / "t5-base"
    result = lowrank("pretrain --max-steps 1 --continue-from", stories, "--dataset", news, "--tokenizer", tokenizer)
    assert_error(result, 2, "a vocabulary of 512", "one of 1300")


def test_quiet_prints_only_errors_and_the_result(lowrank, tiny_flags):
    code, out, err = lowrank("pretrain --max-steps 1 -q --out q", *tiny_flags)
    assert (code, err) == (0, "")
    assert out.startswith("validation perplexity ")
    assert out.rstrip().endswith("q/model")
