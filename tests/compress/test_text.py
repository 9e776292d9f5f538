"""The text of a run: what a compression is weighted by and measured on where nobody names one."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from lowrank_cli.compress.text import text_of_run, windows
from lowrank_cli.data.tokenizer import named_tokenizer
from lowrank_cli.models.source import Source


@pytest.fixture
def records(tmp_path) -> Path:
    """Return a file of records, in the folder of the test."""
    path = tmp_path / "records.jsonl"
    lines = [{"instruction": f"Tell me of cat {i}.", "output": f"Cat {i} sat on a mat. " * 3} for i in range(60)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def run_of(stories):
    """Make the folder of a run with a model from its config.yaml."""

    def make(settings: str, folder: str = "run") -> Source:
        shutil.copytree(stories, f"{folder}/model")
        Path(folder, "run.json").write_text('{"status": "done"}', encoding="utf-8")
        Path(folder, "config.yaml").write_text(settings, encoding="utf-8")
        return Source(f"{folder}/model", is_local=True)

    return make


FINETUNED = "command: finetune\ndataset: records.jsonl\nmax_length: 64\ntemplate: alpaca\n"
LINE = "compress --model run --welore-samples 6 --eval-tokens 100 --no-plots --json --out small"


def test_a_fine_tuned_model_is_weighted_by_its_records(lowrank, run_of, records):
    run_of(FINETUNED)
    code, out, err = lowrank(LINE)
    assert code == 0, err
    result = json.loads(out)
    assert (result["weighting"], result["calibration_text"]) == ("two-sided", "records.jsonl")
    assert (result["calibration_windows"], result["calibration_tokens"]) == (6, 6 * 64)
    assert result["evaluation_text"] == "records.jsonl"
    assert "not known" not in err


def test_windows_are_the_records_as_they_were_trained_on(lowrank, run_of, records, stories):
    text = text_of_run(run_of(FINETUNED))
    tokenizer = named_tokenizer(str(stories), offline=True)
    parts = {
        part: torch.cat(windows(text, part, tokenizer, length=64, count=9, offline=True, flag="", whole=False))
        for part in ("train", "validation")
    }
    for ids in parts.values():
        assert ids.shape[1] == 64
        written = tokenizer.decode(ids.flatten())
        assert "### Response:" in written
        assert "sat on a mat." in written
    # what was held out is not calibrated on
    asked = {
        part: {i for i in range(60) if f"cat {i}." in tokenizer.decode(ids.flatten())} for part, ids in parts.items()
    }
    assert asked["train"]
    assert asked["validation"]
    assert not asked["train"] & asked["validation"]


def test_the_text_is_the_adapters_not_the_one_of_its_base(lowrank, run_of, records):
    base, tuned = run_of("command: pretrain\ndataset: stdlib\n", "base"), run_of(FINETUNED)
    found = text_of_run(Source(base.location, is_local=True, adapter=tuned.location))
    assert found.dataset == "records.jsonl"
    assert text_of_run(base).dataset == "stdlib"


@pytest.mark.parametrize(("settings", "dataset"), [
    ("command: finetune\ntask: text\ndataset: some.txt\n", "some.txt"),
    ("command: finetune\ntask: svamp\n", "svamp"),
    ("command: finetune\ntask: mrpc\n", None),
    ("command: compress\n", None),
])  # fmt: skip
def test_the_text_of_other_runs(settings, dataset, lowrank, run_of):
    found = text_of_run(run_of(settings))
    assert (found and found.dataset) == dataset


def test_no_known_text_is_said_with_what_to_type(lowrank, stories, text):
    line = f"compress --dataset {text.name} --eval-tokens 100 --max-length 64 --no-plots"
    code, _, err = lowrank(f"{line} --out a --model", stories)
    assert code == 0, err
    assert f"warning: the text that {stories} was trained on is not known" in err
    assert "--welore-calibrate FILE" in err
    for flag in ("--welore-weighting none", f"--welore-calibrate {text.name} --welore-samples 2"):
        code, _, err = lowrank(f"{line} {flag} --dry-run --model", stories)
        assert code == 0, err
        assert "not known" not in err
