"""The gate: what another program may have written is read as data, or named in one sentence."""

import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch

from lowrank_cli import foreign
from lowrank_cli.errors import LowrankError, UsageError


class Attack:
    """A pickle that makes a folder where it is loaded."""

    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


@pytest.fixture
def model(stories, tmp_path) -> Path:
    """A model's folder that may be damaged, with code beside it that leaves a trace where it is run."""
    folder = tmp_path / "model"
    shutil.copytree(stories, folder)
    (folder / "code.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\nclass Thing: pass\n")
    return folder


def edit(path: Path, **entries: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


COMMANDS = {
    "eval": "eval ppl --dataset t.jsonl --window 32 --max-tokens 100 --model model",
    "finetune": "finetune --task text --dataset t.jsonl --max-length 32 --max-steps 1 --model model",
    "pretrain": "pretrain --dataset t.jsonl --max-length 32 --max-steps 1 --continue-from model",
    "compress": "compress --dataset t.jsonl --max-length 32 --eval-tokens 100 --welore-weighting none --model model",
    "svd-dump": "svd-dump --dataset t.jsonl --max-length 32 --gradients 1 --model model",
}
every_command = pytest.mark.parametrize("command", COMMANDS)


def run(lowrank, command: str) -> tuple[int, str]:
    Path("t.jsonl").write_text(json.dumps({"text": "Once upon a time there was a cat. " * 9}) + "\n")
    Path("t.jsonl").write_text(Path("t.jsonl").read_text() * 60)
    code, _, err = lowrank(COMMANDS[command])
    assert "this is a bug" not in err
    assert "trust_remote_code" not in err
    assert "weights_only" not in err
    assert not Path("ran").exists()
    return code, err


@every_command
@pytest.mark.parametrize(
    "what", ["tokenizer", "configuration", pytest.param("both", marks=pytest.mark.slow), "kernel"]
)
def test_code_beside_a_model_never_runs(command, what, model, lowrank):
    maps = {"AutoTokenizer": ["code.Thing", None], "AutoConfig": "code.Thing", "AutoModelForCausalLM": "code.Thing"}
    if what in ("tokenizer", "both"):
        edit(model / "tokenizer_config.json", auto_map=maps, tokenizer_class="Thing")
    if what in ("configuration", "both"):
        edit(model / "config.json", auto_map=maps, model_type="thing")
    if what == "kernel":
        edit(model / "config.json", attn_implementation="somebody/kernel", _attn_implementation="somebody/kernel")
    code, err = run(lowrank, command)
    # a fast tokenizer is loaded as what it is, whatever class it asks for; an unknown architecture is refused
    assert code == (2 if what in ("configuration", "both") else 0) or "own code" in err


@every_command
@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin"])
def test_a_pickle_that_asks_for_more_than_tensors_is_refused(command, name, model, lowrank, tmp_path):
    content = pickle.dumps({"x": Attack(tmp_path / "ran")})
    if name == "pytorch_model.bin":
        (model / "model.safetensors").unlink()
        (model / name).write_bytes(content)
    else:
        shutil.copytree(model, tmp_path / "base")
        shutil.rmtree(model)
        model.mkdir()
        adapter = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM",
                   "base_model_name_or_path": str(tmp_path / "base")}  # fmt: skip
        (model / "adapter_config.json").write_text(json.dumps(adapter))
        (model / name).write_bytes(content)
    code, err = run(lowrank, command)
    assert code in (1, 2), err
    assert "model" in err


def test_a_file_of_singular_values_runs_nothing(tmp_path):
    torch.save({0: Attack(tmp_path / "ran")}, tmp_path / "values.pt")
    with pytest.raises(UsageError, match="nothing else is read") as caught:
        foreign.read_pickle(tmp_path / "values.pt", "make it again")
    assert "weights_only" not in caught.value.message
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no GGUF file"),
        (b"PK\3\4" + bytes(40), "no GGUF file"),
        (b"GGUF" + struct.pack("<I", 3), "ends after 8 bytes"),
        (b"GGUF" + struct.pack("<IQQ", 99, 1, 1) + bytes(99), "version 99"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 1) + bytes(99), "too many for"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 2**60) + bytes(99), "too many for"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + bytes(40), "x.gguf"),
    ],
)
def test_a_broken_gguf_file_is_named(content, said, lowrank):
    Path("x.gguf").write_bytes(content)
    code, _, err = lowrank("eval ppl --dataset stdlib --model x.gguf")
    assert code == 2, err
    assert said in err
    assert "this is a bug" not in err


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", 7, "gone.safetensors"])
def test_an_index_leads_nowhere_else(name, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UsageError, match="index"):
        foreign.weights_in(tmp_path)


def test_a_single_file_is_loaded_before_an_index(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "old.safetensors"}}))
    (tmp_path / "model.safetensors").touch()
    assert foreign.weights_in(tmp_path) == [tmp_path / "model.safetensors"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "nested too deep"),
        ("7" * 5000, "digits"),
        ('{"a": ["\\ud800"]}', "half of a surrogate pair"),
        ('{"\\uD83d": 1}', "half of a surrogate pair"),
        ("{", "not JSON"),
        ("", "not JSON"),
    ],
)
def test_json_that_cannot_be_taken_is_named_by_its_place(text, said):
    with pytest.raises(UsageError, match=rf"a\.jsonl, line 3.*{said}"):
        foreign.parse_json(text, "a.jsonl, line 3")
    assert foreign.parse_json('{"a": "\\ud83d\\ude00"}', "here") == {"a": "\N{GRINNING FACE}"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\na: 2\n", "a stands twice, again in line 2"),
        ("a: &x [1]\nb: *x\n", r"aliases \(\*x\)"),
        ("a: " + "[" * 100_000, "nested deeper"),
        ("a: " + "7" * 5000, "digits"),
        ("a: !!python/object/apply:os.mkdir [ran]", "not YAML"),
        ("- 1\n", "holds no settings"),
        ("3: 1\n", "no setting's name"),
        ("a: 2020-50-40\n", "month"),
    ],
)
def test_yaml_that_cannot_be_taken_is_named(text, said, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UsageError, match=rf"a\.yaml.*{said}"):
        foreign.read_yaml(tmp_path / "a.yaml")


@every_command
@pytest.mark.parametrize("text", ["[" * 3000 + "]" * 3000, "7" * 5000, '"\\ud800"', "null"], ids=range(4))
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_settings_of_a_model_that_cannot_be_taken_are_named(command, name, text, model, lowrank):
    (model / name).write_text(f'{{"x": {text}}}' if text != "null" else "null")
    code, err = run(lowrank, command)
    assert code == 2, err
    assert name in err


def test_a_safetensors_file_that_is_damaged_is_named(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(LowrankError, match=r"x\.safetensors is damaged"):
        foreign.read_tensors(tmp_path / "x.safetensors")
