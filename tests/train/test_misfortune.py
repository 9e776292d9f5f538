"""Numbers that break, disks that fill, signals at bad moments: the run ends with the truth and loses nothing."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


def original_call(write_model, *args, **settings) -> None:
    write_model(*args, **settings)


def disk_is_full(write_model, *args, **settings) -> None:
    raise OSError(28, "No space left on device")


def poison(monkeypatch, step: int) -> None:
    """NaN in one weight's gradient at an update, after backward."""
    from lowrank_cli.train import loop

    calls, original = iter(range(1, 999)), loop.backward

    def backward(session, gradients, stop):
        result = original(session, gradients, stop)
        if next(calls) == step:
            session.model.model.layers[0].mlp.up_proj.weight.grad[2, 3] = float("nan")
        return result

    monkeypatch.setattr(loop, "backward", backward)


def test_nan_at_a_refresh_names_step_tensor_and_checkpoint(lowrank, tiny_flags, monkeypatch):
    poison(monkeypatch, 6)
    line = "pretrain --method galore --no-galore-in-backward --galore-update-proj-gap 5 --max-steps 12 --out run"
    code, _, err = lowrank(line, *tiny_flags, "--log-every", 50, "--save-every", 4)
    assert code == 1
    assert "the gradient of model.layers.0.mlp.up_proj.weight is not finite at a refresh at step 6" in err
    assert "run/checkpoints/step-000004 is good" in err


def test_interrupt_does_not_save_broken_weights(lowrank, tiny_flags, monkeypatch):
    from lowrank_cli.train import loop

    poison(monkeypatch, 7)
    original = loop.Session.mark

    def mark(self):
        original(self)
        if self.progress.step == 7:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(loop.Session, "mark", mark)
    line = "pretrain --eval-every 50 --max-steps 20 --keep 1 --out run"
    code, _, err = lowrank(line, *tiny_flags, "--log-every", 50, "--save-every", 4)
    assert code == 1, err
    assert "holds a value that is not finite after step 7" in err
    assert "step-000004 is good" in err
    assert [p.name for p in Path("run/checkpoints").iterdir()] == ["step-000004"]
    assert all(torch.isfinite(t).all() for t in load_file("run/checkpoints/step-000004/model.safetensors").values())


def test_interrupt_during_evaluation_does_not_wait_for_its_end(lowrank, tiny_flags, monkeypatch):
    from lowrank_cli.measure import perplexity as module

    seen, original = [], module.causal_lm_loss

    def watched(model, batch, targets):
        seen.append(1)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(model, batch, targets)

    monkeypatch.setattr(module, "causal_lm_loss", watched)
    code, _, err = lowrank("pretrain --max-steps 5 --out run", *tiny_flags, "--eval-tokens", 5000)
    assert code == 130, err
    assert len(seen) == 2


def test_a_disk_that_fills_after_the_last_checkpoint(lowrank, tiny_flags, monkeypatch):
    from lowrank_cli.train import checkpoint

    original, calls = checkpoint.write_model, iter([original_call, disk_is_full])
    monkeypatch.setattr(checkpoint, "write_model", lambda *args, **settings: next(calls)(original, *args, **settings))
    code, _, err = lowrank("pretrain --max-steps 2 --out run", *tiny_flags)
    assert code == 1, err
    assert "no space left on device" in err
    assert "--resume" in err
    assert "this is a bug" not in err
    assert not list(Path("run").glob(".model*"))
    assert json.loads(Path("run/run.json").read_text())["status"] == "failed"


def test_a_resume_from_an_older_checkpoint_leaves_the_later_ones_behind(lowrank, tiny_flags):
    assert lowrank("pretrain --max-steps 8 --keep 9 --out run", *tiny_flags, "--save-every", 2)[0] == 0
    code, _, err = lowrank("pretrain --resume run/checkpoints/step-000002 --save-every 3 --keep 2")
    assert code == 0, err
    assert sorted(p.name for p in Path("run/checkpoints").iterdir()) == ["step-000006", "step-000008"]


def test_checkpoints_are_ordered_by_number(tmp_path):
    from lowrank_cli.train import checkpoint

    for step in (999_000, 1_000_000, 20):
        (tmp_path / f"step-{step:06d}").mkdir()
    assert [checkpoint.step_of(p) for p in checkpoint.listing(tmp_path)] == [20, 999_000, 1_000_000]
    assert checkpoint.newest(tmp_path, 999_500).name == "step-999000"


def test_a_run_from_before_a_setting_existed_resumes(lowrank, tiny_flags):
    assert lowrank("pretrain --max-steps 2 --out run", *tiny_flags)[0] == 0
    path = Path("run/config.yaml")
    path.write_text("".join(line for line in path.read_text().splitlines(True) if "stochastic_rounding" not in line))
    code, _, err = lowrank("pretrain --resume run")
    assert code == 0, err


def test_a_tiny_learning_rate_is_no_bug(lowrank, tiny_flags):
    code, _, err = lowrank("pretrain --lr 1e-5 --warmup-steps 1000 --max-steps 1000 --epochs 1", *tiny_flags)
    assert code == 2
    code, _, err = lowrank("pretrain --lr 1e-8 --max-steps 3 --out run", *tiny_flags)
    assert code == 0, err


@pytest.mark.parametrize("mode", ["", "--per-layer"])
def test_a_tensor_without_a_signal_passes_the_audit(mode, lowrank, tiny_flags, monkeypatch):
    from lowrank_cli.models import load as models

    original = models.load

    def load(*args, **kwargs):
        model = original(*args, **kwargs)
        # gate and up get no gradient through a down projection of zeros
        torch.nn.init.zeros_(model.model.layers[0].mlp.down_proj.weight)
        return model

    monkeypatch.setattr(models, "load", load)
    code, _, err = lowrank(f"pretrain --method galore --max-steps 3 {mode} --out run", *tiny_flags)
    assert code == 0, err


def test_a_model_of_few_positions_finishes(lowrank, tiny_flags, tmp_path):
    Path("gpt2.json").write_text(
        json.dumps({"model_type": "gpt2", "n_positions": 32, "n_embd": 32, "n_layer": 1, "n_head": 2})
    )
    flags = [f for f in tiny_flags if f not in ("--model-config", tiny_flags[3])]
    code, out, err = lowrank("pretrain --model-config gpt2.json --max-steps 2 --json", *flags, "--max-length", 32)
    assert code == 0, err
    assert json.loads(out)["sample"]
