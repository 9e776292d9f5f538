"""The text of a run: what a compression is weighted by and measured on where nobody names one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lowrank_cli.compress import own_text
from lowrank_cli.compress import text as text_module
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
        part: torch.stack(windows(text, part, tokenizer, length=64, count=9, offline=True, flag="", whole=False))
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


def test_a_model_without_a_text_writes_its_own(lowrank, stories, text, monkeypatch):
    line = f"compress --dataset {text.name} --eval-tokens 100 --max-length 64 --welore-samples 40 --no-plots --json"
    code, out, err = lowrank(f"{line} --out a --model", stories)
    assert code == 0, err
    first = json.loads(out)
    assert (first["weighting"], first["calibration_text"], first["calibration_windows"]) == ("two-sided", "self", 40)
    # written once, and the same when it is written again
    with monkeypatch.context() as patched:
        patched.setattr(own_text, "write", lambda *_: pytest.fail("written once more"))
        again = lowrank(f"{line} --out b --model", stories)
    monkeypatch.setenv("LOWRANK_CACHE", "empty")
    for code, out, err in (again, lowrank(f"{line} --out c --model", stories)):
        assert code == 0, err
        assert json.loads(out)["perplexity_after"] == first["perplexity_after"]


def test_what_a_model_writes_is_of_its_own_distribution():
    # a model whose next token depends on the last one: the written pairs have the model's own frequencies
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1, vocab_size=4, bos_token_id=1,
        eos_token_id=2, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    # what a generation_config asks for is not for this
    model.generation_config.temperature, model.generation_config.top_k = 0.1, 1
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(50)
        model.lm_head.weight.mul_(10)
        model.model.layers[0].self_attn.o_proj.weight.zero_()
    ids = own_text.write(model, length=60, count=70, seed=3).long()
    assert ids.shape == (70, 60)
    assert (ids[:, 0] == 1).all()
    with torch.no_grad():
        # the second half of the rows at temperature 2
        expected = (model(ids).logits[:, :-1] / torch.tensor([1.0] * 35 + [2.0] * 35)[:, None, None]).softmax(-1)
    counts = torch.zeros(4, 4)
    wanted = torch.zeros(4, 4)
    for token in range(4):
        there = ids[:, :-1] == token
        counts[token] = torch.nn.functional.one_hot(ids[:, 1:][there], 4).sum(0)
        wanted[token] = expected[there].sum(0)
    # five standard deviations of a count of independent draws
    assert ((counts - wanted).abs() <= 5 * wanted.sqrt() + 1).all()
    # the order of the rows of a batch is no pattern: no two texts are the same
    assert len({tuple(row) for row in ids.tolist()}) == 70
    assert model.generation_config.top_k == 1


@pytest.mark.parametrize(
    ("given", "shares"),
    [("a.txt", [1]), ("a.txt,self", [0.5, 0.5]), ("a.txt:0.75,self:0.25", [0.75, 0.25]), ("x:1,y:3", [0.25, 0.75])],
)
def test_several_texts_have_their_shares_of_the_windows(given, shares):
    parts = text_module.parts_of(given, "--calibrate")
    counts = text_module.counts_of(parts, 100)
    assert counts == [100 * share for share in shares]
    assert [part.data is None for part in parts] == [part.name == "self" for part in parts]


@pytest.mark.parametrize("given", ["a.txt:much", "a.txt:0", "a.txt:-1", "a.txt,,b.txt", ""])
def test_texts_that_cannot_be_read_as_such(given, lowrank, stories):
    code, _, err = lowrank("compress --out a --welore-calibrate", given, "--model", stories)
    assert code == 2
    assert "--welore-calibrate" in err


def test_a_mix_is_calibrated_on_and_named(lowrank, stories, text):
    line = f"--welore-calibrate {text.name}:0.8,self:0.2 --welore-samples 10 --max-length 64 --no-plots --json"
    code, out, err = lowrank(f"compress {line} --dataset {text.name} --eval-tokens 100 --out a --model", stories)
    assert code == 0, err
    result = json.loads(out)
    assert result["calibration_text"] == f"{text.name}, self"
    assert result["calibration_windows"] == 10
    # what it cost on another kind of text is said as well
    assert result["other_text"] == "stdlib"
    assert result["other_perplexity_after"] != result["other_perplexity_before"]


def test_a_perplexity_that_more_than_doubles_is_a_warning(lowrank, stories, text):
    line = f"compress --dataset {text.name} --eval-tokens 200 --max-length 64 --no-plots --welore-weighting none"
    code, _, err = lowrank(f"{line} --welore-param-budget 0.2 --out a --model", stories)
    assert code == 0, err
    assert "times what it was: cut less (--welore-param-budget)" in err
    assert "lowrank finetune --method welore --model a" in err
    code, _, err = lowrank(f"{line} --welore-param-budget 0.95 --out b --model", stories)
    assert "times what it was" not in err
