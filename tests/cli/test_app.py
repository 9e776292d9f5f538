"""The command as a user meets it: help, configuration, dry runs, machine-readable output."""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from lowrank_cli import config, foreign, methods
from lowrank_cli.errors import UsageError
from lowrank_cli.fields import base_type, key_of
from lowrank_cli.settings import COMMANDS

HEAVY = ("torch", "transformers", "datasets", "lm_eval", "peft", "matplotlib", "bitsandbytes", "numpy")


@pytest.mark.parametrize("line", ["--help", "pretrain --help", "pretrain --method galore --help", "--version"])
def test_help_imports_nothing_heavy(line):
    script = (
        f"import sys; from lowrank_cli.main import main; code = main({line.split()!r}); "
        f"print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr); sys.exit(code)"
    )
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    assert child.stderr.strip() == "[]"
    assert child.stdout


def test_help_lists_methods_presets_and_only_the_chosen_methods_flags(lowrank):
    _, out, _ = lowrank("pretrain --help")
    assert "galore: AdamW on gradients" in " ".join(out.split())
    assert "galore-llama-60m" in out
    assert "--galore-rank" not in out
    _, out, _ = lowrank("pretrain --method galore --help")
    assert "--galore-rank" in out
    _, out, _ = lowrank("pretrain --preset galore-llama-60m --help")
    assert "--galore-rank" in out


def test_no_command_shows_the_help_and_nothing_else(lowrank):
    code, out, err = lowrank()
    assert (code, err) == (0, "")
    assert out == lowrank("--help")[1]
    assert "pretrain" in out


def test_top_help_lists_methods_and_presets_with_one_line_each(lowrank, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = [line.strip(" \N{BULLET}") for line in lowrank("--help")[1].splitlines()]
    for name in methods.names():
        assert f"{name}: {methods.get(name).summary}" in lines
    for name in config.preset_names():
        assert f"{name}: {config.preset_summary(name)}" in lines
        assert "arXiv" in config.preset_summary(name)


@pytest.mark.parametrize(
    ("command", "name"),
    [(c, n) for c in COMMANDS for n in methods.names() if c in methods.get(n).commands]
    + [("eval", ""), ("svd-dump", "")],
)
def test_help_shows_every_flag_whole_at_80_columns(command, name, lowrank, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    words = set(lowrank(f"{command} --method {name} --help" if name else f"{command} --help")[1].split())
    spec = COMMANDS[command]
    plain = [(cls, f, "") for cls in spec.sections.values() for f in config.offered(command, cls)]
    plain = [(cls, f, "") for cls, f, _ in plain if key_of(f) != spec.argument]
    plain += [(spec.call, f, "") for f in fields(spec.call)]
    own = [(methods.get(name).Config, f, f"{name}-") for f in fields(methods.get(name).Config)] if name else []
    for cls, f, prefix in plain + own:
        flag = f"{prefix}{key_of(f).replace('_', '-')}"
        assert f"--{flag}" in words
        # the other form is said where it is the one that changes something
        if base_type(cls, f) is bool:
            assert (f"--no-{flag}" in words) == (f.default is not False)


def test_switches_are_turned_off_by_their_other_form(lowrank):
    Path("a.yaml").write_text("streaming: true\nmethod: galore\ngalore: {stagger: true}\n")
    shown = printed(lowrank, "--config a.yaml --no-streaming --no-galore-stagger --no-plots")
    assert (shown["streaming"], shown["galore"]["stagger"], shown["plots"]) == (False, False, False)
    assert printed(lowrank, "--no-plots --plots")["plots"] is True


def test_module_and_script_are_the_same(process):
    out, err = process("--version").communicate(timeout=60)
    assert out.startswith("lowrank 0."), err


def printed(lowrank, line: str = "") -> dict:
    code, out, err = lowrank(f"pretrain {line} --print-config")
    assert code == 0, err
    return yaml.safe_load(out)


def test_flags_win_over_yaml_over_preset_over_method_over_defaults(lowrank):
    assert printed(lowrank)["lr"] == 1e-3
    assert printed(lowrank, "--method galore")["lr"] == 1e-2
    Path("a.yaml").write_text("lr: 5e-4\nmax_train_tokens: 1.5M\ngalore:\n  rank: 7\n")
    shown = printed(lowrank, "--preset galore-llama-60m --config a.yaml")
    assert (shown["lr"], shown["galore"]["rank"], shown["warmup_steps"]) == (5e-4, 7, 1000)
    assert shown["max_train_tokens"] == 1_500_000
    shown = printed(lowrank, "--preset galore-llama-60m --config a.yaml --lr 0.5 --galore-rank 9")
    assert (shown["lr"], shown["galore"]["rank"]) == (0.5, 9)
    assert not Path("runs").exists()


def test_method_presets_follow_the_model(lowrank):
    assert printed(lowrank, "--method galore")["galore"]["rank"] == 32
    shown = printed(lowrank, "--method galore --model llama-7b")["galore"]
    assert (shown["rank"], shown["update_proj_gap"], shown["scale"]) == (1024, 500, 0.25)
    assert printed(lowrank, "--method galore --model llama-60m")["galore"]["rank"] == 128


def test_printed_configuration_is_read_back(lowrank):
    code, out, _ = lowrank("pretrain --preset galore-llama-130m --print-config")
    Path("a.yaml").write_text(out)
    assert printed(lowrank, "--config a.yaml") == yaml.safe_load(out)
    assert code == 0


@pytest.mark.parametrize("name", sorted(config.preset_names()))
def test_every_preset_resolves(name):
    path = config.preset_path(name)
    content = foreign.read_yaml(path)
    resolved = config.resolve(content["command"], {}, {}, preset=name)
    flat = resolved.flat()
    for key, value in content.items():
        if not isinstance(value, dict) and key != "eval_tokens":
            assert flat[key] == value, key
    if content["command"] == "pretrain":
        assert flat["eval_tokens"] == 10_000_000


@pytest.mark.parametrize("text", ["galore", "full"])
def test_compose_of_one(text):
    assert [m.name for m in methods.compose(text)] == [text]


def test_compose_orders_and_refuses(monkeypatch):
    with pytest.raises(UsageError, match="do not combine: one of them changes nothing"):
        methods.compose("full+galore")


@pytest.mark.parametrize("model", ["llama-9m", pytest.param("llama-7b", marks=pytest.mark.slow)])
def test_dry_run_needs_no_weights_and_writes_nothing(lowrank, model):
    code, out, err = lowrank(f"pretrain --method galore --model {model} --vocab-size 32000 --dry-run --json")
    assert code == 0, err
    estimate = json.loads(out)
    assert (
        estimate["parameters"] == {"llama-9m": 8_995_968, "llama-7b": 6_738_415_616}[model]
    )  # of the papers' configs
    # with the rotary frequencies
    assert 0 <= estimate["weights_bytes"] - 4 * estimate["parameters"] < 1024
    assert estimate["total_bytes"] == sum(estimate["at_peak"].values())
    assert "rank" in err
    assert not Path("runs").exists()


def test_json_is_the_only_thing_on_stdout(lowrank, tiny_flags):
    code, out, err = lowrank("pretrain --max-steps 2 --json --out run", *tiny_flags)
    assert code == 0, err
    result = json.loads(out)
    assert result["steps"] == 2
    record = json.loads(Path("run/run.json").read_text())
    assert record["result"] == result
    assert record["versions"]["torch"]
    assert record["command_line"]


def test_run_folder_holds_what_the_contract_says(lowrank, tiny_flags):
    assert lowrank("pretrain --method galore --max-steps 2", *tiny_flags, "--plots")[0] == 0
    run = Path("runs/latest")
    assert run.is_symlink()
    names = "run.json config.yaml targets.json metrics.jsonl log.txt model/model.safetensors plots/loss.png"
    for name in [*names.split(), "checkpoints/step-000002/manifest.json"]:
        assert (run / name).is_file(), name
    assert "validation perplexity" in (run / "log.txt").read_text()


def test_two_runs_in_the_same_second_do_not_collide(tmp_path, monkeypatch):
    from lowrank_cli.run import RunDir

    monkeypatch.chdir(tmp_path)
    paths = {RunDir.create(None, "x").path for _ in range(3)}
    assert len(paths) == 3


def test_a_recipe_takes_another_method(lowrank):
    shown = printed(lowrank, "--preset galore-llama-60m --method full")
    assert shown["method"] == "full"
    assert "galore" not in shown
    assert shown["warmup_steps"] == 1000
    # chosen by the recipe for GaLore: the new method has its own
    assert (shown["lr"], shown["eps"]) == (1e-3, 1e-8)
    assert printed(lowrank, "--preset galore-llama-60m --method full --lr 0.004")["lr"] == 0.004
    shown = printed(lowrank, "--preset galore-llama-60m --method galore+velora")
    assert (shown["lr"], shown["eps"]) == (0.01, 1e-6)
    # in a file of the user's own they stay
    Path("a.yaml").write_text("method: galore\nlr: 0.02\n")
    assert printed(lowrank, "--config a.yaml --method full")["lr"] == 0.02


def test_7b_recipe_is_the_papers_8_bit_one(lowrank):
    shown = printed(lowrank, "--preset galore-llama-7b")
    assert (shown["optimizer"], shown["per_layer"], shown["grad_clipping"]) == ("adamw8bit", True, 1.0)
    assert shown["galore"]["stagger"] is True


def test_latest_is_resolved_before_a_new_run_takes_the_name(lowrank, tiny_flags):
    assert lowrank("pretrain --max-steps 2", *tiny_flags)[0] == 0
    first = Path("runs/latest").resolve()
    flags = [f for f in tiny_flags if f not in ("--model-config", tiny_flags[3])]
    code, _, err = lowrank("pretrain --continue-from runs/latest --max-steps 1", *flags)
    assert code == 0, err
    assert Path("runs/latest").resolve() != first
    assert yaml.safe_load(Path("runs/latest/config.yaml").read_text())["continue_from"] == f"runs/{first.name}"


@pytest.mark.parametrize("key", ["model", "continue_from", "tokenizer", "model_config"])
def test_links_in_a_path_are_resolved(key, lowrank, tmp_path):
    Path("runs/first/model").mkdir(parents=True)
    Path("runs/latest").symlink_to("first")
    resolved = {
        "runs/latest": "runs/first",
        "runs/latest/model": "runs/first/model",
        f"../{tmp_path.name}/runs/latest/model": "runs/first/model",
        f"{tmp_path}/runs/latest/model": f"{tmp_path.resolve()}/runs/first/model",
        "./runs/first": "./runs/first",
        "someone/latest": "someone/latest",
    }
    for given, found in resolved.items():
        assert printed(lowrank, f"--{key.replace('_', '-')} {given}")[key] == found


def test_null_below_a_method_is_no_settings(lowrank):
    Path("a.yaml").write_text("method: galore\ngalore:\n")
    assert printed(lowrank, "--config a.yaml") == printed(lowrank, "--method galore")


def test_the_largest_seed_is_taken(lowrank, tiny_flags):
    assert printed(lowrank, f"--seed {2**53 + 1}")["seed"] == 2**53 + 1
    code, _, err = lowrank(f"pretrain --max-steps 1 --seed {2**64 - 1}", *tiny_flags)
    assert code == 0, err


def test_dry_run_counts_the_named_tokenizers_vocabulary(lowrank, test_data):
    code, out, err = lowrank("pretrain --dry-run --json --tokenizer", test_data / "tokenizers" / "t5-base")
    assert code == 0, err
    # with t5's hundred sentinels; 128 numbers of embedding and head for each entry
    assert json.loads(out)["parameters"] == 8_995_968 + 2 * (1300 - 32_000) * 128
