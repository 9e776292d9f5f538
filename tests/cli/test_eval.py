"""`lowrank eval` as a user meets it: where results go, what is said, exit codes, interruptions."""

import json
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest

from lowrank_cli.fields import key_of
from lowrank_cli.settings.evaluate import HarnessConfig

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def flags(stories, test_data) -> list:
    return ["--model", stories, "--data-dir", test_data]


def test_newest_run_is_evaluated_and_keeps_its_results(lowrank, tiny_flags, news, test_data):
    assert lowrank("pretrain --max-steps 2", *tiny_flags)[0] == 0
    code, out, err = lowrank("eval ppl,coin_flip --window 64", "--dataset", news, "--data-dir", test_data)
    assert code == 0, err
    lines = out.splitlines()
    assert "perplexity" in lines[0]
    assert lines[1].startswith("coin_flip (0-shot, 36 questions), ")
    assert lines[2].split() == ["questions", "metric", "value", "stderr", "majority"]
    assert lines[3].split()[:3] == ["coin_flip", "36", "acc"]
    run = Path("runs/latest").resolve()
    names = {path.name for path in (run / "eval").iterdir()}
    assert names == {"ppl-news-jsonl-w64.json", "coin_flip-0shot.json", "coin_flip-0shot.answers.jsonl"}
    answers = [json.loads(line) for line in (run / "eval" / "coin_flip-0shot.answers.jsonl").read_text().splitlines()]
    result = json.loads((run / "eval" / "coin_flip-0shot.json").read_text())
    assert len(answers) == 36
    assert sum(a["acc"] for a in answers) / 36 == pytest.approx(result["rows"][0]["value"])
    # a checkpoint's results are told apart from the final model's
    step = sorted((run / "checkpoints").iterdir())[-1]
    assert lowrank("eval ppl --window 64", "--dataset", news, "--model", step)[0] == 0
    assert (run / "eval" / f"ppl-news-jsonl-w64@{step.name}.json").is_file()


def test_json_is_the_only_thing_on_stdout(lowrank, flags):
    code, out, err = lowrank("eval boolq,wikitext --limit 1 --json", *flags)
    assert code == 0, err
    results = json.loads(out)["results"]
    assert [result["task"] for result in results] == ["boolq", "wikitext"]
    assert all(Path(result["file"]).is_file() for result in results)
    # a model that is no run's has a folder of its own, and the newest run stays what it was
    assert not Path("runs/latest").exists()
    folder = Path(results[0]["file"]).parent.parent
    again = json.loads(lowrank("eval boolq --limit 2 --json", *flags)[1])
    assert Path(again["results"][0]["file"]).parent.parent == folder


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("mmlu_anatomi", 2, ["unknown task 'mmlu_anatomi'", "did you mean", "mmlu_anatomy"]),
        # reads all of lm-eval's files for their names
        pytest.param("gsm8", 2, ["unknown task 'gsm8'", "gsm8k"], marks=pytest.mark.slow),
        ("", 2, ["no task to evaluate", "lowrank eval mmlu"]),
        ("mmlu", 4, ["no data for mmlu", "--data-dir FOLDER", "fetch cais/mmlu once with a network"]),
        ("boolq", 4, ["no data for boolq", "--data-dir FOLDER", "aps/super_glue"]),
        ("svamp", 4, ["SVAMP.json", "--data-dir FOLDER"]),
        ("mmlu --data-dir nowhere", 4, ["there is no folder nowhere"]),
        ("gsm8k --data-dir .", 4, [". has no files of gsm8k", "--data-dir FOLDER"]),
        ("mt-bench", 2, ["--questions question.jsonl"]),
        ("mmlu --batch-size x", 2, ["--batch-size is 'x'"]),
        ("mmlu --limit 0", 2, ["limit", "at least 1"]),
        ("mmlu --methd x", 2, ["no option --methd"]),
        ("--compare a", 2, ["two runs or more"]),
        ("--compare a b", 4, ["there is no run a"]),
    ],
)
def test_mistakes_end_with_what_to_type(line, code, said, lowrank):
    got, out, err = lowrank(f"eval {line}")
    assert (got, out) == (code, "")
    for text in said:
        assert text in err
    assert "Traceback" not in err


def test_data_are_checked_before_the_model(lowrank, test_data):
    Path("boolq_dev.jsonl").write_text('{"question": "a"}\n')
    code, _, err = lowrank("eval boolq --model no/model/here --data-dir .")
    assert code == 2
    assert "boolq_dev.jsonl, line 1" in err
    assert lowrank("eval boolq --model no/model/here", "--data-dir", test_data)[0] == 4


def test_no_model_at_all(lowrank, test_data):
    code, _, err = lowrank("eval boolq", "--data-dir", test_data)
    assert code == 4
    assert "lowrank pretrain" in err


def test_model_that_does_not_fit(lowrank, flags, monkeypatch):
    code, _, err = lowrank("eval boolq --limit 1 --memory-budget 1000KB", *flags)
    # 260,032 parameters of 4 bytes
    assert code == 3, err
    assert "need 1016 KiB, more than --memory-budget 1000KB" in err
    assert "--dtype bfloat16" in err
    assert lowrank("eval boolq --limit 1 --memory-budget 2MB", *flags)[0] == 0
    from lowrank_cli.evaluate import subject

    monkeypatch.setattr(subject, "free_bytes", lambda _: 1000)
    code, _, err = lowrank("eval boolq --limit 1", *flags)
    assert code == 3
    assert "1000 B that is free on cpu" in err


def test_help_needs_nothing_heavy_and_is_quick():
    heavy = ("torch", "transformers", "datasets", "lm_eval", "peft", "matplotlib", "numpy")
    script = (
        "import sys; from lowrank_cli.main import main; code = main(['eval', '--help']); "
        f"print([m for m in {heavy!r} if m in sys.modules], file=sys.stderr); sys.exit(code)"
    )
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (child.returncode, child.stderr.strip()) == (0, "[]")


def test_docs_name_every_setting():
    page = (ROOT / "docs" / "eval.md").read_text(encoding="utf-8")
    for f in fields(HarnessConfig):
        assert f"`--{key_of(f).replace('_', '-')}`" in page or key_of(f) == "tasks", key_of(f)


def test_dry_run_counts_questions_and_writes_nothing(lowrank, stories, flags):
    code, out, err = lowrank("eval mmlu,boolq --dry-run --json", *flags)
    assert code == 0, err
    assert json.loads(out) == {"model": str(stories), "mmlu": 57 * 8, "boolq": 150}
    Path("text.txt").write_text("one two three " * 20, encoding="utf-8")
    Path("questions.jsonl").write_text('{"question_id": 1, "category": "x", "turns": ["Why?"]}\n', encoding="utf-8")
    line = "eval ppl,mt-bench --dataset text.txt --questions questions.jsonl --dry-run --json"
    code, out, err = lowrank(line, *flags)
    assert code == 0, err
    assert json.loads(out)["mt-bench"] == 1
    assert json.loads(out)["ppl"].startswith("60 words of ")
    assert lowrank("eval ppl --dry-run --dataset nowhere.txt", *flags)[0] != 0
    assert not Path("runs").exists()


def test_two_models_in_one_folder_keep_their_results(lowrank, stories, test_data, tmp_path):
    from transformers import AutoModelForCausalLM

    other = tmp_path / "other"
    shutil.copytree(stories, other)
    model = AutoModelForCausalLM.from_pretrained(stories)
    model.get_input_embeddings().weight.data.mul_(1.5)
    model.save_pretrained(other)
    for folder in (stories, other, stories, other):
        line = "eval boolq --limit 2 --out results --no-samples"
        assert lowrank(line, "--model", folder, "--data-dir", test_data)[0] == 0
    results = {path.name: json.loads(path.read_text()) for path in Path("results/eval").iterdir()}
    assert len(results) == 2
    first, second = sorted(results, key=len)
    assert first == "boolq-0shot-limit2.json"
    assert second.startswith("boolq-0shot-limit2@other-")
    assert [results[name]["model"]["source"] for name in (first, second)] == [str(stories), str(other)]


def test_examples_that_a_task_does_not_take_are_named(monkeypatch, capsys, test_data):
    from lowrank_cli.evaluate import tasks

    def fixed(manager, *rest):
        content = original(manager, *rest)
        for part in content["tasks"].values():
            part.set_config("num_fewshot", 0)
        return content

    original = tasks._content
    (loaded,) = tasks.load(["boolq"], str(test_data), offline=True, num_fewshot=3)
    assert {part.get_config("num_fewshot") for part in loaded.content["tasks"].values()} == {3}
    assert "--num-fewshot" not in capsys.readouterr().err
    # such as gsm8k_cot_zeroshot, whose data is on the hub
    monkeypatch.setattr(tasks, "_content", fixed)
    (loaded,) = tasks.load(["boolq"], str(test_data), offline=True, num_fewshot=3)
    assert {part.get_config("num_fewshot") for part in loaded.content["tasks"].values()} == {0}
    assert "--num-fewshot 3 is not for boolq: lm-eval fixes no examples there" in capsys.readouterr().err


def test_interrupted_perplexity_goes_on(lowrank, cache, stories, monkeypatch):
    from lowrank_cli.evaluate import text_perplexity

    call = ["eval ppl --window 32 --batch-size 1 --json", "--model", stories, "--dataset", stories / "sample.txt"]
    whole = json.loads(lowrank(*call)[1])["results"][0]
    original, seen = text_perplexity.perplexity, []

    def dies(model, batches, between):
        if len(seen) == 5:
            raise KeyboardInterrupt
        seen.append(batches)
        return original(model, batches, between)

    monkeypatch.setattr(text_perplexity, "KEEP_EVERY_S", 0.0)
    monkeypatch.setattr(text_perplexity, "perplexity", dies)
    assert lowrank(*call)[0] == 130
    again = []
    monkeypatch.setattr(
        text_perplexity, "perplexity", lambda *args, **more: again.append(1) or original(*args, **more)
    )
    code, out, err = lowrank(*call)
    assert code == 0, err
    assert "windows of an interrupted evaluation are taken over" in err
    result = json.loads(out)["results"][0]
    assert result["perplexity"] == whole["perplexity"]
    assert len(again) == whole["num_windows"] - 5
    assert not list((cache / "eval-ppl").iterdir())


def test_comparison_of_two_runs(lowrank, flags):
    for name in ("a", "b"):
        assert lowrank(f"eval boolq --limit 2 --out {name} --no-samples", *flags)[0] == 0
        assert [path.name for path in Path(name, "eval").iterdir()] == ["boolq-0shot-limit2.json"]
    code, out, _ = lowrank("eval --compare a b --picture c.png")
    assert code == 0
    assert out.splitlines()[0].split() == ["a", "b"]
    assert Path("c.png").stat().st_size > 1000
    runs = json.loads(lowrank("eval --compare a,b --json")[1])["runs"]
    assert [run["run"] for run in runs] == ["a", "b"]
    assert runs[0]["scores"] == runs[1]["scores"]


def test_killed_evaluation_goes_on_from_its_answers(process, lowrank, cache, flags):
    line = "eval boolq --limit 50 --json"
    child = process(f"{line} --batch-size 1", *flags)
    deadline = time.monotonic() + 120
    while answers_in(cache) < 10 and time.monotonic() < deadline:
        assert child.poll() is None, child.communicate()[1]
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    kept = answers_in(cache)
    assert 10 <= kept < 100
    code, out, err = lowrank(line, *flags)
    assert code == 0, err
    assert "answers of an interrupted evaluation are taken over" in err
    resumed = json.loads(out)["results"][0]
    # answers are dropped with the result, and the next time everything is asked again
    assert answers_in(cache) == 0
    code, out, err = lowrank(f"{line} --fresh", *flags)
    assert "taken over" not in err
    whole = json.loads(out)["results"][0]
    assert (resumed["resumed"], whole["resumed"]) == (True, False)
    assert resumed["rows"] == whole["rows"]
    assert resumed["num_truncated"] == whole["num_truncated"] > 0


def answers_in(cache: Path) -> int:
    """How many answers of lm-eval's cache are on the disk."""
    count = 0
    for path in cache.glob("eval-answers/*/answers_rank0.db"):
        try:
            with sqlite3.connect(path) as database:
                rows = "SELECT COUNT(*) FROM unnamed WHERE key NOT LIKE 'truncated%'"
                count += database.execute(rows).fetchone()[0]
        except sqlite3.OperationalError:
            # its table is not made yet, or is being written
            continue
    return count


@pytest.mark.parametrize("kind", ["lora", "vblora"])
def test_adapter_is_evaluated_as_the_merged_model_is(kind, lowrank, stories, test_data, tmp_path):
    import torch
    from peft import LoraConfig, VBLoRAConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    modules = ["q_proj", "v_proj"]
    config = {
        "lora": lambda: LoraConfig(r=4, target_modules=modules, init_lora_weights=False, task_type="CAUSAL_LM"),
        "vblora": lambda: VBLoRAConfig(
            r=4, target_modules=modules, num_vectors=20, vector_length=16, topk=2, task_type="CAUSAL_LM"
        ),
    }[kind]()
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(stories), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "vector_bank" in name or "logits" in name:
                parameter.normal_(0, 0.2)
    model.save_pretrained(tmp_path / "adapter")
    merged = tmp_path / "merged"
    model.merge_and_unload().save_pretrained(merged)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(stories / file, merged)

    def perplexity(folder):
        line = "eval ppl,coin_flip --limit 4 --window 128 --json"
        text = ["--dataset", stories / "sample.txt", "--data-dir", test_data]
        code, out, err = lowrank(line, "--model", folder, *text)
        assert code == 0, err
        ppl, coins = json.loads(out)["results"]
        return ppl["perplexity"], coins["rows"][0]["value"], ppl["model"]["sha256"]

    adapter, whole, plain = perplexity(tmp_path / "adapter"), perplexity(merged), perplexity(stories)
    assert adapter[0] == pytest.approx(whole[0], rel=1e-5)
    assert adapter[1] == whole[1]
    assert abs(adapter[0] / plain[0] - 1) > 0.01
    assert len({adapter[2], whole[2], plain[2]}) == 3


def test_compressed_model_is_evaluated(lowrank, stories, test_data):
    code, _, err = lowrank(
        "compress --welore-rank 50 --eval-tokens 0 --welore-weighting none --out small", "--model", stories
    )
    assert code == 0, err
    line, text = "eval ppl,coin_flip --limit 4 --window 128 --json", ["--dataset", stories / "sample.txt"]
    code, out, err = lowrank(f"{line} --model small", *text, "--data-dir", test_data)
    assert code == 0, err
    small = json.loads(out)["results"][0]
    whole = json.loads(lowrank(line, *text, "--model", stories, "--data-dir", test_data)[1])["results"][0]
    assert small["model"]["parameters"] < whole["model"]["parameters"]
    assert small["perplexity"] > whole["perplexity"]


def write_gguf(folder: Path, file: Path) -> None:
    """Write the LLaMA of a folder as a GGUF file, with the names and the order of rows that llama.cpp's have."""
    from gguf import GGUFWriter
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    writer = GGUFWriter(file, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    words = json.loads((folder / "tokenizer.json").read_text())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(words["vocab"], key=words["vocab"].get))
    writer.add_token_types([3] * 3 + [1] * (config["vocab_size"] - 3))
    writer.add_token_merges([" ".join(pair) for pair in words["merges"]])
    writer.add_bos_token_id(1)
    writer.add_add_bos_token(True)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    parts = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "model.layers": "blk",
    }  # fmt: skip
    for name, weight in load_file(folder / "model.safetensors").items():
        for heads, part in (("num_attention_heads", "q_proj"), ("num_key_value_heads", "k_proj")):
            if part in name:
                # the two halves of a head's rows stand in turns
                weight = weight.view(config[heads], 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        for ours, theirs in parts.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, (weight.half() if weight.ndim == 2 else weight).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_file_is_evaluated_as_its_model_is(lowrank, stories, test_data, tmp_path):
    write_gguf(stories, tmp_path / "stories.gguf")
    found = []
    for model in (stories, "stories.gguf"):
        line = f"eval ppl,boolq --limit 4 --window 128 --json --model {model}"
        code, out, err = lowrank(line, "--dataset", stories / "sample.txt", "--data-dir", test_data)
        assert code == 0, err
        found.append(json.loads(out)["results"])
    (ppl, boolq), (wanted, answers) = found[1], found[0]
    assert ppl["num_tokens"] == wanted["num_tokens"]
    assert ppl["perplexity"] == pytest.approx(wanted["perplexity"], rel=1e-3)
    assert boolq["rows"] == answers["rows"]
    # the file holds the weights in 16 bits, the model in 32
    assert Path("stories.gguf").stat().st_size < 800_000
    code, _, err = lowrank("eval boolq --model stories.gguf --memory-budget 1000KB", "--data-dir", test_data)
    assert code == 3
    assert "need 1016 KiB" in err
