"""`lowrank compress` and bad input: what it refuses, what it says beforehand, and how it ends when it is stopped."""

import json
import math
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel


def test_merging_refuses_settings_that_it_would_not_heed(compress):
    compress("--welore-rank 30 --eval-tokens 0 --welore-weighting none --no-plots --out factored")
    said = compress("--format dense --welore-rank 50 --welore-pifa --out merged", code=2, model="factored")
    assert "--welore-rank and --welore-pifa would have no effect" in said
    assert not Path("merged").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--welore-param-budget 0.01", "less than every linear at rank 1 takes"),
        ("--welore-rank 20 --welore-allocation uniform", "leaves every linear dense"),
    ],
)
def test_refuses_a_target_that_cannot_be_reached(line, message, compress):
    for out, more in {"memory": "", "files": "--eval-tokens 0 --welore-weighting none"}.items():
        assert message in compress(f"{line} {more} --no-plots --out {out}", code=2)
        assert not list(Path().rglob("*.safetensors"))


def test_says_how_far_from_the_target_a_rule_stays(compress):
    said = compress(
        "--welore-rank 40 --welore-allocation uniform --eval-tokens 0 --welore-weighting none --no-plots --out run"
    )
    assert "instead of 40 % of the singular values cut" in said


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("--welore-rank 0", 2, "--welore-rank is 0"),
        ("--welore-rank 100", 2, "--welore-rank is 100"),
        ("--welore-param-budget 1.2", 2, "--welore-param-budget is 1.2"),
        ("--welore-rank 50 --welore-param-budget 0.5", 2, "both say how much"),
        ("--welore-rank 50 --spectra nowhere", 4, "no singular values at"),
    ],
)
def test_refuses_settings_and_writes_nothing(line, code, message, compress):
    assert message in compress(f"{line} --out run", code)
    assert not Path("run").exists()


def test_names_the_weight_that_is_not_finite(compress, stories):
    shutil.copytree(stories, "broken")
    tensors = load_file(stories / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"][5, 7] = math.nan
    save_file(tensors, "broken/model.safetensors", metadata={"format": "pt"})
    said = compress("--welore-rank 50 --out run", code=2, model="broken")
    assert "model.layers.3.mlp.up_proj.weight" in said
    assert not Path("run").exists()


def test_refuses_spectra_of_another_model(compress):
    torch.save({0: {"self_attn.q_proj": torch.ones(64)}}, "other.pt")
    said = compress("--welore-rank 50 --spectra other.pt --out run", code=2)
    assert "of another model" in said
    assert "k_proj" in said


def test_reads_no_pickled_object(compress):
    torch.save({0: Path("anything")}, "evil.pt")
    said = compress("--welore-rank 50 --spectra evil.pt --out run", code=2)
    assert "evil.pt holds more than tensors" in said
    assert "weights_only" not in said


def test_refuses_a_text_shorter_than_a_window(compress):
    Path("short.txt").write_text("Once upon a time.")
    said = compress("--welore-calibrate short.txt --out run", code=2)
    assert "shorter than one window of 128 tokens" in said
    assert not Path("run").exists()


def test_calibration_on_little_text_is_refused_or_said(compress, text):
    Path("some.txt").write_text(text.read_text()[:200])
    said = compress("--welore-rank 50 --max-length 32 --welore-calibrate some.txt --out a", code=2)
    assert "too short to calibrate" in said
    assert not Path("a").exists()
    said = compress("--welore-rank 50 --welore-calibrate stories.txt --no-plots --out b")
    assert "windows of the 128 asked for" in said
    result = json.loads(Path("b/result.json").read_text())
    assert result["calibration_tokens"] == 128 * result["calibration_windows"] > 172
    few = "--welore-rank 50 --welore-calibrate stories.txt --max-length 16 --welore-samples 1"
    assert "raise --welore-samples" in compress(f"{few} --out c", code=2)


@pytest.mark.parametrize("line", ["compress --welore-rank 50", "svd-dump --gradients 2"])
def test_refuses_windows_longer_than_the_model(line, lowrank, stories, text):
    code, _, err = lowrank(f"{line} --dataset {text.name} --max-length 1024 --out run --model", stories)
    assert code == 2, err
    assert "take --max-length 512" in err
    assert not Path("run").exists()


READING = ["compress --welore-rank 50 --eval-tokens 0", "svd-dump"]


@pytest.mark.parametrize("line", READING)
def test_names_the_file_that_is_damaged(line, lowrank, stories):
    shutil.copytree(stories, "cut")
    whole = (stories / "model.safetensors").read_bytes()
    Path("cut/model.safetensors").write_bytes(whole[: len(whole) // 2])
    code, _, err = lowrank(f"{line} --model cut --out run")
    assert code == 1, err
    assert "model.safetensors is damaged" in err
    assert "bug" not in err
    assert not Path("run").exists()


@pytest.mark.parametrize("line", READING)
def test_names_the_part_of_a_model_that_is_missing(line, lowrank, stories):
    AutoModelForCausalLM.from_pretrained(stories).save_pretrained("parts", max_shard_size="400KB")
    gone = sorted(Path("parts").glob("model-*.safetensors"))[1]
    gone.unlink()
    code, _, err = lowrank(f"{line} --model parts --out run")
    assert code == 2, err
    assert f"names {gone.name}, which is not there" in err
    Path("parts/model.safetensors.index.json").write_text("{")
    code, _, err = lowrank(f"{line} --model parts --out run")
    assert code == 2, err
    assert "index.json: not JSON" in err
    assert not Path("run").exists()


def test_refuses_spectra_that_the_rule_does_not_read(compress, lowrank, stories):
    assert lowrank("svd-dump --out dump --no-plots --model", stories)[0] == 0
    for more in ("", "--dry-run"):
        said = compress(f"--welore-param-budget 0.7 --spectra dump --out run {more}", code=2)
        assert "the rule budget does not read them" in said


def test_where_a_runs_own_text_is_short_the_model_writes_one(lowrank, stories):
    shutil.copytree(stories, "run/model")
    Path("few.txt").write_text("a tree " * 40)
    Path("run/run.json").write_text("{}")
    Path("run/config.yaml").write_text("command: pretrain\ndataset: few.txt\nvalidation_dataset: few.txt\n")
    line = "compress --model run --max-length 64 --eval-tokens 100 --no-plots --json --out small"
    code, out, err = lowrank(line)
    assert code == 0, err
    assert "too short to calibrate" in err
    result = json.loads(out)
    assert result["weighting"] == "two-sided"
    assert result["calibration_text"] == "self"


def random_llama(**sizes: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=64, num_attention_heads=2, **sizes))


def test_windows_are_no_longer_than_the_model_by_themselves(lowrank, stories, text):
    random_llama(num_hidden_layers=1, vocab_size=512, max_position_embeddings=128).save_pretrained("short")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(stories / name, "short")
    code, out, err = lowrank(f"compress --model short --dataset {text.name} --no-plots --json --out run")
    assert code == 0, err
    assert json.loads(out)["evaluated_tokens_after"] % 127 == 0


@pytest.mark.parametrize("more", ["", "--dry-run"])
def test_refuses_what_is_no_language_model(more, compress, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "resnet"}))
    assert "is not a language model of a type that is supported" in compress(
        f"--welore-rank 50 --out run {more}", code=2, model=tmp_path
    )
    assert not Path("run").exists()


def test_refuses_a_folder_that_is_not_empty(compress):
    Path("full").mkdir()
    Path("full/notes.txt").write_text("mine")
    assert "not empty" in compress("--welore-rank 50 --out full", code=2)
    assert [p.name for p in Path("full").iterdir()] == ["notes.txt"]


def test_a_write_that_fails_leaves_no_half_model(compress, monkeypatch):
    def full_disk(self, folder, **_):
        Path(folder, "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full_disk)
    assert "could not write run: no space left on device" in compress("--welore-rank 50 --out run", code=1)
    assert not list(Path("run").rglob("*.safetensors"))
    assert json.loads(Path("run/run.json").read_text())["status"] == "failed"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_no_decompositions_and_says_how_the_run_ended(number, compress, monkeypatch):
    from lowrank_cli.compress import decomposition, pipeline

    def stopped(model, targets, ranks, store, form):
        assert list(Path("run").glob(".decompositions.*/*.safetensors"))
        signal.raise_signal(number)
        pytest.fail("went on")

    monkeypatch.setattr(pipeline, "Store", lambda folder: decomposition.Store(folder, budget=0))
    monkeypatch.setattr(pipeline, "factor", stopped)
    # a suite that a shell has put into the background has it ignored
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        said = compress("--welore-rank 50 --welore-calibrate stories.txt --out run", code=130)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert "no model was written" in said
    assert not list(Path("run").glob(".*"))
    assert json.loads(Path("run/run.json").read_text())["status"] == "interrupted"


def test_dry_run_reads_no_weights(compress, stories, monkeypatch):
    from lowrank_cli.compress import plan

    # the configuration is enough
    Path("bare").mkdir()
    shutil.copy(stories / "config.json", "bare")
    line = "--welore-rank 50 --dry-run --json --out run"
    result = compress(f"{line} --welore-weighting none", model="bare")
    assert result["linears"]["model.layers.0.self_attn.q_proj"] == [64, 64]
    assert result["weighting"] == "none"
    assert set(result["bytes"]) == {"the model"}
    weighted = compress(f"{line} --welore-calibrate stories.txt", model="bare")
    widths = [(m, n) for m, n in weighted["linears"].values()]
    assert weighted["bytes"]["second moments"] == sum(8 * (m * m + n * n) for m, n in widths)
    # two bases of the shorter side, up to the largest rank that makes a linear smaller
    largest = [-(-m * n // (m + n)) - 1 for m, n in widths]
    bases = sum(2 * 8 * min(shape) * rank for shape, rank in zip(widths, largest, strict=True))
    assert weighted["bytes"]["decompositions, on disk beyond 4 GiB"] == bases
    monkeypatch.setattr(plan, "HELD", 1_000_000)
    layers = compress(f"{line} --welore-calibrate stories.txt --welore-samples 4", model="bare")
    assert layers["bytes"]["second moments, of a layer"] == weighted["bytes"]["second moments"] // 5
    # five layers' inputs and what is passed: windows x tokens x width x 4 bytes
    assert layers["bytes"]["layers' inputs, on disk beyond 4 GiB"] == 6 * 4 * 128 * 64 * 4
    assert not Path("run").exists()


def test_dry_run_says_what_is_skipped_and_what_is_merged(compress):
    model = random_llama(num_hidden_layers=2, vocab_size=70, num_key_value_heads=1, head_dim=1)
    model.save_pretrained("narrow")
    line = "--welore-param-budget 0.8 --eval-tokens 0 --welore-weighting none --no-plots --out small"
    said = compress(f"{line} --dry-run", model="narrow")
    planned = compress(f"{line} --dry-run --json", model="narrow")
    # k and v of both layers are one row
    assert len(planned["skipped"]) == 4 == said.count("is a gate")
    assert planned["bytes"]["the model"] == 4 * sum(p.numel() for p in model.parameters())
    compress(line, model="narrow")
    assert "compressed already" in compress("--format dense --dry-run --out run", model="small")
    assert "compressed already" in compress("--dry-run --out run", code=2, model="small")
