"""`lowrank compress` and bad input: what it refuses, what it says beforehand, and how it ends when it is stopped."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def test_merging_refuses_settings_that_it_would_not_heed(compress):
    compress("--welore-rank", 30, "--eval-tokens", 0, "--no-plots", "--out", "factored")
    said = compress("--format", "dense", "--welore-rank", 50, "--welore-pifa", "--out", "merged", model="factored",
                    code=2)  # fmt: skip
    assert "--welore-rank and --welore-pifa would have no effect" in said
    assert not Path("merged").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--welore-param-budget", 0.01), "less than every linear at rank 1 takes"),
        (("--welore-rank", 20, "--welore-allocation", "uniform"), "leaves every linear dense"),
    ],
)
def test_refuses_a_target_that_cannot_be_reached(flags, message, compress):
    for more in ((), ("--eval-tokens", 0)):
        said = compress(*flags, *more, "--no-plots", "--out", f"run{len(more)}", code=2)
        assert message in said
        assert not list(Path().rglob("*.safetensors"))


def test_says_how_far_from_the_target_a_rule_stays(compress):
    said = compress("--welore-rank", 40, "--welore-allocation", "uniform", "--eval-tokens", 0, "--out", "run")
    assert "instead of 40 % of the singular values cut" in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--welore-rank", 0), "--welore-rank is 0"),
        (("--welore-rank", 100), "--welore-rank is 100"),
        (("--welore-param-budget", 1.2), "--welore-param-budget is 1.2"),
        (("--welore-rank", 50, "--welore-param-budget", 0.5), "both say how much"),
        (("--welore-weighting", "input"), "needs text"),
        (("--welore-rank", 50, "--spectra", "nowhere"), "no singular values at"),
    ],
)
def test_refuses_settings_and_writes_nothing(flags, message, compress):
    said = compress(*flags, "--out", "run", code=4 if "nowhere" in flags else 2)
    assert message in said
    assert not Path("run").exists()


def test_names_the_weight_that_is_not_finite(compress, stories, tmp_path):
    shutil.copytree(stories, tmp_path / "broken")
    tensors = load_file(stories / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"][5, 7] = math.nan
    save_file(tensors, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    said = compress("--welore-rank", 50, "--out", "run", code=2, model=tmp_path / "broken")
    assert "model.layers.3.mlp.up_proj.weight" in said
    assert not Path("run").exists()


def test_refuses_spectra_of_another_model(compress, tmp_path):
    torch.save({0: {"self_attn.q_proj": torch.ones(64)}}, tmp_path / "other.pt")
    said = compress("--welore-rank", 50, "--spectra", tmp_path / "other.pt", "--out", "run", code=2)
    assert "of another model" in said
    assert "k_proj" in said


def test_reads_no_pickled_object(compress, tmp_path):
    torch.save({0: Path("anything")}, tmp_path / "evil.pt")
    said = compress("--welore-rank", 50, "--spectra", tmp_path / "evil.pt", "--out", "run", code=2)
    assert "is no file of singular values" in said


def test_refuses_a_text_shorter_than_a_window(compress, tmp_path):
    (tmp_path / "short.txt").write_text("Once upon a time.")
    said = compress("--welore-calibrate", tmp_path / "short.txt", "--out", "run", code=2)
    assert "shorter than one window of 128 tokens" in said
    assert not Path("run").exists()


def test_calibration_on_little_text_is_refused_or_said(compress, tmp_path, text):
    (tmp_path / "some.txt").write_text(text.read_text()[:200])
    said = compress("--welore-rank", 50, "--max-length", 32, "--welore-calibrate", tmp_path / "some.txt", "--out", "a",
                    code=2)  # fmt: skip
    assert "too short to calibrate" in said
    assert not Path("a").exists()
    said = compress("--welore-rank", 50, "--welore-calibrate", text, "--out", "b")
    assert "windows of the 128 asked for" in said
    few = ("--max-length", 16, "--welore-samples", 1)
    said = compress("--welore-rank", 50, "--welore-calibrate", text, *few, "--out", "c", code=2)
    assert "raise --welore-samples" in said
    result = json.loads(Path("b/result.json").read_text())
    assert result["calibration_tokens"] == 128 * result["calibration_windows"] > 172


@pytest.mark.parametrize("command", ["compress", "svd-dump"])
def test_refuses_windows_longer_than_the_model(command, lowrank, stories, text):
    more = ("--gradients", 2) if command == "svd-dump" else ("--welore-rank", 50)
    flags = ("--model", stories, "--dataset", text, "--max-length", 1024, "--out", "run")
    code, _, err = lowrank(command, *flags, *more)
    assert code == 2, err
    assert "take --max-length 512" in err
    assert not Path("run").exists()


@pytest.mark.parametrize("command", ["compress", "svd-dump"])
def test_names_the_file_that_is_damaged(command, lowrank, stories, tmp_path):
    shutil.copytree(stories, tmp_path / "cut")
    whole = (stories / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    more = ("--eval-tokens", 0, "--welore-rank", 50) if command == "compress" else ()
    code, _, err = lowrank(command, "--model", tmp_path / "cut", "--out", "run", *more)
    assert code == 1, err
    assert "model.safetensors is damaged" in err
    assert "bug" not in err
    assert not Path("run").exists()


@pytest.mark.parametrize("command", ["compress", "svd-dump"])
def test_names_the_part_of_a_model_that_is_missing(command, lowrank, stories, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(stories)
    model.save_pretrained(tmp_path / "parts", max_shard_size="400KB")
    gone = sorted((tmp_path / "parts").glob("model-*.safetensors"))[1]
    gone.unlink()
    more = ("--eval-tokens", 0, "--welore-rank", 50) if command == "compress" else ()
    code, _, err = lowrank(command, "--model", tmp_path / "parts", "--out", "run", *more)
    assert code == 1, err
    assert f"{gone.name} cannot be read" in err
    (tmp_path / "parts" / "model.safetensors.index.json").write_text("{")
    code, _, err = lowrank(command, "--model", tmp_path / "parts", "--out", "run", *more)
    assert code == 1, err
    assert "index.json is damaged" in err
    assert not Path("run").exists()


def test_refuses_spectra_that_the_rule_does_not_read(compress, lowrank, stories):
    assert lowrank("svd-dump", "--model", stories, "--out", "dump", "--no-plots")[0] == 0
    for more in ((), ("--dry-run",)):
        said = compress("--welore-param-budget", 0.7, "--spectra", "dump", "--out", "run", *more, code=2)
        assert "the rule budget does not read them" in said


def test_a_runs_own_short_text_is_not_used(lowrank, stories, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copytree(stories, tmp_path / "run" / "model")
    (tmp_path / "few.txt").write_text("a tree " * 40)
    (tmp_path / "run" / "run.json").write_text("{}")
    settings = f"command: pretrain\ndataset: {tmp_path}/few.txt\nvalidation_dataset: {tmp_path}/few.txt\n"
    (tmp_path / "run" / "config.yaml").write_text(settings)
    flags = ("--max-length", 64, "--eval-tokens", 100, "--no-plots", "--json", "--out", "small")
    code, out, err = lowrank("compress", "--model", tmp_path / "run", *flags)
    assert code == 0, err
    assert "too short to calibrate" in err
    result = json.loads(out)
    assert result["weighting"] == "none"
    assert result["calibration_text"] is None


def test_windows_are_no_longer_than_the_model_by_themselves(lowrank, text, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                         num_key_value_heads=2, vocab_size=512, max_position_embeddings=128)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "short")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(text.parent / name, tmp_path / "short")
    code, out, err = lowrank("compress", "--model", tmp_path / "short", "--dataset", text, "--json", "--out", "run")
    assert code == 0, err
    assert json.loads(out)["evaluated_tokens_after"] % 127 == 0


def test_sigterm_leaves_no_scratch_and_says_how_the_run_ended(stories, text, tmp_path):
    """A real process, ended while its decompositions are on disk."""
    script = """
import os, signal, sys
from lowrank_cli.compress import decomposition, pipeline
from lowrank_cli.main import main

def stopped(model, targets, ranks, store, form):
    assert list(store.shelf.folder.iterdir())
    os.kill(os.getpid(), signal.SIGTERM)

pipeline.Store = lambda folder: decomposition.Store(folder, budget=0)
pipeline.factor = stopped
sys.exit(main(sys.argv[1:]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, "compress", "--model", stories, "--welore-calibrate", text, "--dataset", text,
         "--max-length", "128", "--out", tmp_path / "run"],
        capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    assert done.returncode == 130, done.stderr
    assert not list((tmp_path / "run").glob(".decompositions*"))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "interrupted"


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_refuses_what_is_no_language_model(more, compress, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "resnet"}))
    said = compress("--welore-rank", 50, "--out", "run", *more, code=2, model=tmp_path)
    assert "not a causal language model" in said
    assert not Path("run").exists()


def test_refuses_a_folder_that_is_not_empty(compress, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    said = compress("--welore-rank", 50, "--out", "full", code=2)
    assert "not empty" in said
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["notes.txt"]


def test_a_write_that_fails_leaves_no_half_model(compress, monkeypatch):
    from transformers import PreTrainedModel

    def full_disk(self, folder, **_):
        Path(folder, "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full_disk)
    said = compress("--welore-rank", 50, "--out", "run", code=1)
    assert "No space left" in said
    assert not list(Path("run").rglob("*.safetensors"))
    assert json.loads(Path("run/run.json").read_text())["status"] == "failed"


def test_a_stop_leaves_no_decompositions(compress, text, monkeypatch):
    from lowrank_cli.compress import decomposition, pipeline

    def stopped(model, targets, ranks, store, form):
        assert list(Path("run").glob(".decompositions.*/*.safetensors"))
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "Store", lambda folder: decomposition.Store(folder, budget=0))
    monkeypatch.setattr(pipeline, "factor", stopped)
    said = compress("--welore-rank", 50, "--welore-calibrate", text, "--out", "run", code=130)
    assert "no model was written" in said
    assert not list(Path("run").glob(".*"))
    assert json.loads(Path("run/run.json").read_text())["status"] == "interrupted"


def test_dry_run_reads_no_weights(compress, stories, text, tmp_path, monkeypatch):
    from lowrank_cli.compress import plan

    # the configuration is enough
    (tmp_path / "bare").mkdir()
    shutil.copy(stories / "config.json", tmp_path / "bare")
    flags = ("--welore-rank", 50, "--dry-run", "--json", "--out", "run")
    result = compress(*flags, model=tmp_path / "bare")
    assert result["linears"]["model.layers.0.self_attn.q_proj"] == [64, 64]
    assert result["weighting"] == "none"
    assert set(result["bytes"]) == {"the model"}
    weighted = compress(*flags, "--welore-calibrate", text, model=tmp_path / "bare")
    widths = [(m, n) for m, n in weighted["linears"].values()]
    assert weighted["bytes"]["second moments"] == sum(8 * (m * m + n * n) for m, n in widths)
    # two bases of the shorter side, up to the largest rank that makes a linear smaller
    largest = [-(-m * n // (m + n)) - 1 for m, n in widths]
    bases = sum(2 * 8 * min(shape) * rank for shape, rank in zip(widths, largest, strict=True))
    assert weighted["bytes"]["decompositions, on disk beyond 4 GiB"] == bases
    monkeypatch.setattr(plan, "HELD", 1_000_000)
    layers = compress(*flags, "--welore-calibrate", text, "--welore-samples", 4, model=tmp_path / "bare")
    assert layers["bytes"]["second moments, of a layer"] == weighted["bytes"]["second moments"] // 5
    # five layers' inputs and what is passed: windows x tokens x width x 4 bytes
    assert layers["bytes"]["layers' inputs, on disk beyond 4 GiB"] == 6 * 4 * 128 * 64 * 4
    assert not Path("run").exists()


def test_dry_run_says_what_is_skipped_and_what_is_merged(compress, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=70,
                    num_key_value_heads=1, head_dim=1)
    )  # fmt: skip
    model.save_pretrained(tmp_path / "narrow")
    flags = ("--welore-param-budget", 0.8, "--eval-tokens", 0, "--no-plots")
    said = compress(*flags, "--dry-run", "--out", "small", model=tmp_path / "narrow")
    planned = compress(*flags, "--dry-run", "--json", "--out", "small", model=tmp_path / "narrow")
    # k and v of both layers are one row
    assert len(planned["skipped"]) == 4 == said.count("has one row or column")
    assert planned["bytes"]["the model"] == 4 * sum(p.numel() for p in model.parameters())
    compress(*flags, "--out", "small", model=tmp_path / "narrow")
    said = compress("--format", "dense", "--dry-run", "--out", "run", model="small")
    assert "compressed already" in said
    assert "compressed already" in compress("--dry-run", "--out", "run", model="small", code=2)
