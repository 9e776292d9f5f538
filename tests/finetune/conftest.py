"""A small base model with its tokenizer, and records to fine-tune it on: made here, so that nothing is downloaded."""

import json
import os
from pathlib import Path

import pytest

from lowrank_cli.main import main


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """The folder of a LLaMA of two layers with grouped queries, trained for a moment on Python's own sources."""
    folder = tmp_path_factory.mktemp("base")
    config = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
              "num_key_value_heads": 2, "num_hidden_layers": 2, "max_position_embeddings": 256}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    sources = sorted(Path(os.__file__).parent.glob("json/*.py"))
    (folder / "text.txt").write_text("\n".join(p.read_text(encoding="utf-8") for p in sources))
    flags = ["--dataset", "text.txt", "--model-config", "config.json", "--vocab-size", "400", "--max-length", "64"]
    here = Path.cwd()
    os.chdir(folder)
    try:
        code = main(
            ["pretrain", *flags, "--max-steps", "4", "--no-plots", "--eval-tokens", "200", "--out", "run", "-q"]
        )
    finally:
        os.chdir(here)
    assert code == 0
    return folder / "run" / "model"


@pytest.fixture(scope="session")
def records(tmp_path_factory) -> Path:
    """120 instruction records whose answers can be learned: the capital letters of a word."""
    path = tmp_path_factory.mktemp("records") / "records.jsonl"
    words = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in "lmnrst"][:120]
    lines = [{"instruction": f"Spell {w} in capitals.", "input": "", "output": w.upper()} for w in words]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def flags(base, records) -> list[str]:
    """Flags of a fine-tuning run that takes a second."""
    return [
        *("--model", str(base), "--dataset", str(records), "--max-length", "96", "--batch-size", "8"),
        *("--eval-tokens", "200", "--log-every", "1", "--template", "plain", "--no-plots", "--lr", "0.01"),
    ]
