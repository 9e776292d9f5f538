"""What a run must not lose, whatever happens to its files and its terminal: checkpoints, record and numbers."""

import json
import os
import shutil
import signal
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowrank_cli.optim.adamw import GaLoreAdamW
from lowrank_cli.train import audit, checkpoint


def weights(run: str = "run") -> dict[str, torch.Tensor]:
    return load_file(Path(run, "model", "model.safetensors"))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(t, other[key]) for key, t in one.items())


@pytest.fixture
def ended(lowrank, tiny_flags):
    """A run of six updates that lost its end: the checkpoint of step 4 is the newest."""
    code, _, err = lowrank("pretrain --method galore --max-steps 6 --keep 9 --out run", *tiny_flags, "--save-every", 2)
    assert code == 0, err
    whole = weights()
    shutil.rmtree("run/model")
    shutil.rmtree("run/checkpoints/step-000006")
    return whole


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        pytest.param(name, damage, marks=() if damage == quick else pytest.mark.slow)
        for name, quick in (
            ("run.json", "gone"), ("metrics.jsonl", "half"), ("config.yaml", "empty"), ("targets.json", "NULs"),
            ("log.txt", "gone"),
        )
        for damage in ("gone", "empty", "NULs", "a list", "half")
    ],
)  # fmt: skip
def test_a_good_checkpoint_goes_on_whatever_the_other_files_hold(name, damage, lowrank, ended):
    file = Path("run", name)
    if damage == "gone":
        file.unlink()
    else:
        text = file.read_bytes()
        file.write_bytes(
            {"empty": b"", "NULs": bytes(200), "a list": b"[1]\n", "half": text[: len(text) // 2]}[damage]
        )
    code, _, err = lowrank("pretrain --resume run")
    assert code == 0, err
    assert same(weights(), ended)
    assert json.loads(Path("run/run.json").read_text())["status"] == "done"
    assert [json.loads(line)["step"] for line in Path("run/metrics.jsonl").read_text().splitlines()][-1] == 6


def test_a_run_without_its_record_and_its_settings_goes_on(lowrank, ended):
    for name in ("run.json", "config.yaml", "metrics.jsonl", "log.txt", "targets.json"):
        Path("run", name).unlink()
    code, _, err = lowrank("pretrain --resume run/checkpoints/step-000004")
    assert code == 0, err
    assert same(weights(), ended)


@pytest.mark.parametrize(
    "name", ["model", *(pytest.param(n, marks=pytest.mark.slow) for n in ("optimizer", "method", "rng"))]
)
def test_a_flipped_bit_is_named_and_an_older_checkpoint_goes_on(name, lowrank, ended):
    file = Path(f"run/checkpoints/step-000004/{name}.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    code, _, err = lowrank("pretrain --resume run")
    assert code == 2
    assert f"step-000004 is damaged: {name}.safetensors has changed since it was written" in err
    assert "--resume run/checkpoints/step-000002" in err
    code, _, err = lowrank("pretrain --resume run/checkpoints/step-000002")
    assert code == 0, err
    assert same(weights(), ended)


def test_a_manifest_never_leads_out_of_its_folder(lowrank, ended):
    file = Path("run/checkpoints/step-000004/manifest.json")
    file.write_text(json.dumps({"../../config.yaml": 1, **json.loads(file.read_text())}))
    code, _, err = lowrank("pretrain --resume run")
    assert code == 2
    assert "which is not in its folder" in err


def test_what_a_run_left_that_was_killed_at_its_beginning_is_taken(lowrank, tiny_flags):
    Path("run").mkdir()
    for name in ("log.txt", "config.yaml", ".run.json.4242", "targets.json"):
        Path("run", name).write_text("half")
    for resume in ("", "--resume auto"):
        code, _, err = lowrank(f"pretrain --max-steps 1 {resume} --out run", *tiny_flags)
        assert code == 0, err
        shutil.rmtree("run/checkpoints")
        for path in Path("run").iterdir():
            if path.name not in ("log.txt", "config.yaml"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    Path("run/notes.txt").write_text("mine")
    code, _, err = lowrank("pretrain --max-steps 1 --out run", *tiny_flags)
    assert code == 2
    assert "is not empty" in err


def test_a_run_that_has_ended_is_left_as_it_is(lowrank, tiny_flags):
    assert lowrank("pretrain --max-steps 2 --out run", *tiny_flags)[0] == 0
    before = {p: p.read_bytes() for p in Path("run").rglob("*") if p.is_file()}
    code, out, err = lowrank("pretrain --resume run --json")
    assert code == 0, err
    assert "nothing is left to do" in err
    assert json.loads(out)["steps"] == 2
    assert {p: p.read_bytes() for p in Path("run").rglob("*") if p.is_file()} == before


def test_files_have_the_users_own_permissions(lowrank, tiny_flags):
    before = os.umask(0o027)
    try:
        assert lowrank("pretrain --max-steps 1 --out run", *tiny_flags)[0] == 0
    finally:
        os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in Path("run/model").iterdir()}
    assert set(modes.values()) == {0o640}


@pytest.mark.slow
def test_step_0_stands_once_where_the_first_checkpoint_was_not_reached(process, lowrank, tiny_flags, tmp_path):
    child = process("pretrain --max-steps 300 --out run", *tiny_flags, "--save-every", 300, "--eval-every", 300)
    metrics = tmp_path / "run/metrics.jsonl"
    while not (metrics.is_file() and "eval_loss" in metrics.read_text()):
        assert child.poll() is None, child.communicate()[1]
    child.kill()
    child.wait()
    assert not list(tmp_path.glob("run/checkpoints/step-*"))
    line = "pretrain --max-steps 300 --resume auto --out run"
    code, _, err = lowrank(line, *tiny_flags, "--save-every", 300, "--eval-every", 300)
    assert code == 0, err
    evaluated = [json.loads(line)["step"] for line in metrics.read_text().splitlines() if "eval_loss" in line]
    assert evaluated == [0, 300]


def wait_for_training(child, folder: Path) -> None:
    """Until the run has reported an update."""
    metrics = folder / "metrics.jsonl"
    while not (metrics.is_file() and '"loss"' in metrics.read_text()):
        assert child.poll() is None, child.communicate()[1]


def test_two_processes_never_train_one_run(process, lowrank, tiny_flags, tmp_path):
    child = process("pretrain --max-steps 4000 --out run", *tiny_flags, "--save-every", 5)
    while not list(tmp_path.glob("run/checkpoints/step-*")):
        assert child.poll() is None, child.communicate()[1]
    code, _, err = lowrank("pretrain --resume run")
    assert code == 2
    assert f"process {child.pid} on {os.uname().nodename}" in err


@pytest.mark.slow
def test_a_lost_terminal_saves_and_ends(process, tiny_flags, tmp_path):
    child = process("pretrain --max-steps 4000 --out run", *tiny_flags, "--log-every", 1)
    wait_for_training(child, tmp_path / "run")
    child.send_signal(signal.SIGHUP)
    _, err = child.communicate()
    assert child.returncode == 130, err
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "interrupted"
    assert list((tmp_path / "run/checkpoints").glob("step-*"))


@pytest.mark.parametrize("what", ["weight", "moment", "basis", "projected gradient"])
def test_what_is_not_finite_is_named_and_never_saved(what, lowrank, tiny_flags, monkeypatch):
    from lowrank_cli.train import loop

    original, name = loop.Session.mark, "model.layers.0.mlp.up_proj.weight"

    def mark(self):
        original(self)
        if self.progress.step == 4:
            p, state = dict(self.model.named_parameters())[name], self.optimizer.state
            {
                "weight": lambda: p.data[0, 0].fill_(float("nan")),
                "moment": lambda: state[p]["exp_avg"][0, 0].fill_(float("inf")),
                "basis": lambda: next(v for k, v in state[p].items() if k.startswith("basis"))[0, 0].fill_(
                    float("nan")
                ),
                "projected gradient": lambda: self.optimizer.spaces[p].accumulate([torch.full((2, 2), float("nan"))]),
            }[what]()

    monkeypatch.setattr(loop.Session, "mark", mark)
    line = "pretrain --method galore --galore-update-proj-gap 100 --max-steps 6 --out run"
    code, _, err = lowrank(line, *tiny_flags, "--save-every", 2)
    assert code == 1
    said = {"weight": f"the weight {name}", "moment": f"exp_avg of {name}", "basis": f"of {name}"}
    assert said.get(what, f"the projected gradient of {name}") in err
    assert "step 4" in err
    assert "step-000002 is good" in err
    assert [p.name for p in Path("run/checkpoints").iterdir()] == ["step-000002"]
    assert not Path("run/model").exists()
    assert json.loads(Path("run/run.json").read_text())["status"] == "failed"


def test_a_run_goes_on_with_the_kernel_that_it_began_with(lowrank, ended, monkeypatch):
    """A kernel that was built in between changes nothing; one that is gone is said."""
    progress = json.loads(Path("run/checkpoints/step-000004/progress.json").read_text())
    assert set(progress["kernels"]) == {"torch"}
    taken = []
    original = GaLoreAdamW.take_kernels
    monkeypatch.setattr(
        GaLoreAdamW, "take_kernels", lambda self, kernels: taken.append(kernels) or original(self, kernels)
    )
    assert lowrank("pretrain --resume run")[0] == 0
    assert taken == [progress["kernels"]]
    assert same(weights(), ended)


@pytest.mark.parametrize("task", [False, True], ids=["text", "task"])
def test_a_run_that_diverged_is_an_error_and_hands_nothing_back(task, lowrank, tiny_flags, stories, once, tmp_path):
    if task:
        Path("r.jsonl").write_text("".join(
            json.dumps({"prompt": f"Say {i}.", "response": f"It is {i} and a cat."}) + "\n" for i in range(60)
        ))  # fmt: skip
        line = f"finetune --model {stories} --dataset r.jsonl --template plain --method full --no-plots"
        result = lowrank(f"{line} --lr 1 --max-steps 6 --batch-size 4 --out run")
    else:
        result = lowrank("pretrain --lr 10 --max-steps 12 --grad-clipping 0 --out run", *tiny_flags)
    code, _, err = result
    assert code == 1, err
    assert "training diverged" in err
    assert "lower --lr" in err
    assert not Path("run/model").exists()
    assert json.loads(Path("run/run.json").read_text())["status"] == "failed"


def test_the_best_step_is_said_and_the_start_is_never_it(lowrank, stories):
    Path("r.jsonl").write_text("".join(
        json.dumps({"prompt": f"Say {i}.", "response": f"It is {i} and a cat."}) + "\n" for i in range(60)
    ))  # fmt: skip
    line = f"finetune --model {stories} --dataset r.jsonl --template plain --no-plots --batch-size 4 --json"
    code, out, err = lowrank(f"{line} --method full --max-steps 4 --eval-every 1 --lr 1e-3 --out run")
    assert code == 0, err
    result = json.loads(out)
    assert result["best_step"] in (1, 2, 3, 4)
    assert json.loads(Path("run/run.json").read_text())["result"]["best_step"] == result["best_step"]


@pytest.mark.parametrize(
    ("loss", "ends"), [(1.9, "better"), (2.0, "no better"), (3.9, "no better"), (4.1, "diverged")]
)
def test_what_is_handed_back_is_judged_against_the_start(loss, ends, capsys):
    from types import SimpleNamespace

    from lowrank_cli.errors import LowrankError
    from lowrank_cli.train import finish, objective

    progress = SimpleNamespace(step=4, start={"loss": 2.0}, best={"loss": loss, "step": 2}, evaluation={"loss": 9.0})
    config = SimpleNamespace(task=object(), optim=SimpleNamespace(lr=1.0))
    session = SimpleNamespace(progress=progress, config=config, objective=objective.Causal())
    if ends == "diverged":
        with pytest.raises(LowrankError, match="training diverged"):
            finish.judge(session)
    else:
        finish.judge(session)
        assert ("did not improve on its start" in capsys.readouterr().err) == (ends == "no better")


def test_the_guard_sees_every_float_of_a_run():
    p = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = GaLoreAdamW([{"params": [("w", p)], "rank": 2}])
    p.grad = torch.ones(4, 4)
    optimizer.step()
    model = torch.nn.Module()
    model.register_parameter("w", p)
    from lowrank_cli.parallel.replicas import Alone

    assert audit.first_broken(model, optimizer, Alone(), {}) == ""
    assert audit.first_broken(model, optimizer, Alone(), {"v": torch.tensor(float("nan"))}) == "the method's v"
    p.grad[0, 0] = float("nan")
    assert audit.first_broken(model, optimizer, Alone(), {}) == "the gradient of w"


def test_a_sharded_checkpoint_runs_nothing(tmp_path):
    import pickle

    from lowrank_cli.errors import UsageError
    from lowrank_cli.parallel import sharded_checkpoint

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(UsageError, match="which no checkpoint holds"):
        sharded_checkpoint.metadata(tmp_path)
    (tmp_path / ".metadata").write_bytes(b"nothing")
    with pytest.raises(UsageError, match=r"\.metadata cannot be read"):
        sharded_checkpoint.metadata(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_rank_that_is_no_number_is_refused(lowrank, monkeypatch):
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "x"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "9")):
        monkeypatch.setenv(name, value)
    code, _, err = lowrank("pretrain --max-steps 1")
    assert code == 2
    assert "RANK is 'x'" in err


def test_a_rank_that_never_starts_is_waited_for_as_long_as_asked(lowrank, monkeypatch):
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "9")):
        monkeypatch.setenv(name, value)
    code, _, err = lowrank("pretrain --max-steps 1 --rank-timeout 1")
    assert code == 1
    assert "rank 1 cannot reach rank 0 at 127.0.0.1:9: connection refused for 1 s" in err


def test_a_best_that_is_damaged_is_named(tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / "method.safetensors")
    (tmp_path / "step.json").write_text('{"step": "x"}')
    from lowrank_cli.errors import UsageError

    with pytest.raises(UsageError, match=r"step\.json has a string as step"):
        checkpoint.best_step(tmp_path)


def test_the_newest_run_is_the_one_that_began_last_and_has_a_language_model(tmp_path, monkeypatch):
    from lowrank_cli.run import RunDir

    monkeypatch.chdir(tmp_path)

    def run(name: str, started: str | None, **config: object) -> Path:
        folder = tmp_path / "runs" / name
        (folder / "model").mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps({"started": started}) if started else "half")
        file = "adapter_config.json" if "peft_type" in config else "config.json"
        (folder / "model" / file).write_text(json.dumps(config))
        return Path("runs", name)

    last = run("20261127-1", "2026-11-27T10:00:00.500000+0000", architectures=["LlamaForCausalLM"])
    # a name that sorts later, an hour of summer time that comes twice, a second that two runs share, an older form
    run("baseline", "2026-11-27T09:59:59.900000+0000", architectures=["LlamaForCausalLM"])
    run("summer", "2026-11-27T11:59:59+0200", architectures=["LlamaForCausalLM"])
    run("zz", "2026-11-27T10:00:00.400000+0000", architectures=["LlamaForCausalLM"])
    adapter = run("adapter", "2026-11-27T10:00:01+0000", peft_type="LORA", task_type="CAUSAL_LM")
    run("classifier", "2026-11-27T10:00:02+0000", architectures=["LlamaForSequenceClassification"])
    run("judge", "2026-11-27T10:00:03+0000", peft_type="LORA", task_type="SEQ_CLS")
    assert RunDir.newest_with_model() == adapter
    assert RunDir.newest_with_model(plain=True) == last


@pytest.mark.parametrize(
    "entry",
    [
        {"model": 7},
        *(
            pytest.param(entry, marks=pytest.mark.slow)
            for entry in ({"steps": "4"}, {"sample": None}, {"validation_loss": "x"})
        ),
    ],
    ids=str,
)
def test_a_result_of_another_kind_is_made_again_from_the_checkpoint(entry, lowrank, tiny_flags):
    assert lowrank("pretrain --max-steps 2 --out run", *tiny_flags)[0] == 0
    whole, record = weights(), json.loads(Path("run/run.json").read_text())
    Path("run/run.json").write_text(json.dumps(record | {"result": record["result"] | entry}))
    code, _, err = lowrank("pretrain --resume run")
    assert code == 0, err
    assert same(weights(), whole)
    assert json.loads(Path("run/run.json").read_text())["result"]["model"] == "run/model"
