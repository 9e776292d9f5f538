"""Presets: every value names its source, resolves, and is what the authors' command has."""

from __future__ import annotations

import re

import pytest
import yaml

from lowrank_cli import config
from lowrank_cli.config import RunConfig, resolve

PRESETS = config.preset_names()
SOURCE = re.compile(r"^ *(?P<key>\w+): (?P<value>\S+)  # (?P<source>\S.*)$")
# where a value may come from; "ours" says why it has none
KINDS = re.compile(r"paper|\w+\.(py|sh|md)\b|Transformers' Trainer|PEFT's|the authors'|GaLoreAdamW|ours: \S+ \S+")
C4_60M = {
    "max_length": 256, "total_batch_size": 512, "max_steps": 10_000, "lr": 0.01, "warmup_steps": 1000,
    "scheduler": "cosine", "min_lr_ratio": 0.1, "weight_decay": 0.0, "grad_clipping": 0.0, "eval_every": 1000,
}  # fmt: skip
# what the authors' commands have, written down from them and not from the presets
AUTHORS = {
    "galore-llama-60m": C4_60M | {
        "dtype": "bfloat16", "batch_size": 256, "eps": 1e-6, "galore.rank": 128, "galore.update_proj_gap": 200,
        "galore.scale": 0.25,
    },
    "galore-llama-1b": {"batch_size": 16, "max_steps": 100_000, "warmup_steps": 10_000, "galore.rank": 512},
    "galore-llama-7b": {
        "optimizer": "adamw8bit", "per_layer": True, "activation_checkpointing": True, "eps": 1e-8, "lr": 0.005,
        "batch_size": 16, "total_batch_size": 512, "max_steps": 150_000, "warmup_steps": 15_000, "grad_clipping": 1.0,
        "galore.rank": 1024, "galore.update_proj_gap": 500,
    },
    "galore-roberta-glue": {
        "lr": 3e-5, "eps": 1e-6, "warmup_steps": 0, "scheduler": "linear", "min_lr_ratio": 0.0, "epochs": 30,
        "batch_size": 16, "max_length": 512, "seed": 1234, "galore.rank": 4, "galore.scale": 4.0,
        "galore.update_proj_gap": 500,
    },
    # 115 updates an epoch
    "vblora-roberta-glue": {
        "lr": 4e-3, "warmup_steps": round(0.06 * 30 * 115), "grad_clipping": 1.0, "batch_size": 32, "epochs": 30,
        "max_length": 512, "vblora.num_vectors": 90, "vblora.rank": 4, "vblora.topk": 2,
        "vblora.lr_vector_bank": 1e-3, "vblora.lr_logits": 1e-2,
    },
    "vblora-llama2-7b-alpaca": {
        "dataset": "yahma/alpaca-cleaned", "quantize": "nf4", "grad_clipping": 0.3, "batch_size": 4,
        "total_batch_size": 16, "epochs": 1, "scheduler": "linear", "group_by_length": True,
        "activation_checkpointing": True, "vblora.dropout": 0.05, "vblora.num_vectors": 2048, "vblora.rank": 4,
    },
    "velora-llama-60m": C4_60M | {
        "dtype": "float32", "batch_size": 128, "eps": 1e-8, "velora.layers": "vd", "velora.num_groups": "64,86",
        "velora.init": "batch_average_once",
    },
    "velora-llama-130m": C4_60M | {
        "lr": 0.003, "max_steps": 20_000, "warmup_steps": 2000, "batch_size": 128, "velora.num_groups": "64,64",
    },
    "velora-llama-7b-alpaca": {
        "train_on_inputs": True, "group_by_length": True, "warmup_steps": 100, "grad_clipping": 1.0, "max_length": 512,
        "batch_size": 16, "epochs": 4, "lr": 4e-4, "scheduler": "linear", "min_lr_ratio": 0.0, "eval_every": 1000,
        "lora.rank": 32, "lora.alpha": 16, "lora.dropout": 0.1, "velora.num_groups": "32", "velora.scale": 0.1,
    },
}  # fmt: skip


def resolved(name: str) -> RunConfig:
    return resolve(yaml.safe_load(PRESETS[name].read_text())["command"], {}, {}, preset=name)


@pytest.mark.parametrize("name", PRESETS)
def test_every_value_names_its_source_on_its_own_line(name):
    lines = PRESETS[name].read_text(encoding="utf-8").splitlines()
    # the summary of --help
    assert "arXiv" in lines[0]
    values = [line for line in lines if not line.startswith("#") and not re.fullmatch(r"\w+:", line)]
    assert len(values) > 10
    for line in values:
        found = SOURCE.match(line)
        assert found, f"{line}: no source"
        assert KINDS.search(found["source"]), f"{line}: what source is that?"


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_resolves_to_what_it_says(name):
    content, flat = yaml.safe_load(PRESETS[name].read_text()), resolved(name).flat()
    for key, value in content.items():
        if isinstance(value, dict):
            assert {k: flat[key][k] for k in value} == value
        elif key not in ("model", "eval_tokens"):
            assert str(flat[key]).removesuffix(".0") == str(value).removesuffix(".0"), key


@pytest.mark.parametrize("name", AUTHORS)
def test_a_preset_has_the_values_of_the_authors_command(name):
    flat = resolved(name).flat()
    found = {}
    for key in AUTHORS[name]:
        method, _, own = key.rpartition(".")
        found[key] = flat[method][own] if method else flat[key]
    assert found == AUTHORS[name]


@pytest.mark.parametrize(
    ("name", "records"), [("velora-llama-7b-alpaca", 52_002), ("vblora-llama2-7b-alpaca", 51_760)]
)
def test_validation_takes_as_many_records_as_the_authors(name, records):
    assert round(resolved(name).task.validation_share * records) == 1024
