"""Several processes as a user meets them: how they start, agree, stop, fail and go on."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from double import BOUND, distance
from safetensors.torch import load_file
from watched import written

from lowrank_cli.errors import MissingError
from lowrank_cli.parallel.place import Place

GALORE = "--method galore --galore-rank 8 --galore-update-proj-gap 7 --eps 1e-3"


def weights(folder: Path) -> dict:
    return load_file(folder / "model" / "model.safetensors")


def apart(tmp_path: Path, a: str, b: str) -> float:
    """Return how far two runs of workers in float64 have ended from one another, over how far they have gone."""
    first, second = (tmp_path / f"{name}.safetensors" for name in (a, b))
    return distance(written(first), written(second), written(second, "start"))


def watched(name: str) -> dict[str, str]:
    """Return what makes a worker train in float64 and leave what trains in a file of that name."""
    return {"before": f"import watched; watched.in_worker(undo, rank, '{name}.safetensors')"}


def told(results: list) -> str:
    """What the ranks have printed; exactly one of them, whichever was quicker, said what was wrong."""
    printed = "".join(r.err for r in results)
    assert printed.count("error:") == 1, printed
    return printed


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(a[key].equal(b[key]) for key in a)


@pytest.fixture
def flags(tiny_flags) -> list:
    line = f"pretrain {GALORE} --batch-size 4 --total-batch-size 8 --max-steps 20"
    return [*line.split(), *tiny_flags]


def test_nproc_starts_the_processes_and_says_everything_once(process, flags, tmp_path, pool):
    child = process(*flags, "--nproc", 2, "--out", "run", "--json")
    out, err = child.communicate(timeout=120)
    assert child.returncode == 0, err
    assert json.loads(out)["steps"] == 20
    assert err.count("step 20/20") == 2  # the update, and its evaluation
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "done"
    assert (tmp_path / "run" / "config.yaml").read_text().count("nproc: 2") == 1
    assert "elastic" not in err
    assert "Warning" not in err


def test_the_total_batch_grows_with_the_processes_and_is_kept(ranks, tiny_flags, tmp_path):
    ranks(2, "pretrain --max-steps 4 --save-every 2 --out two", *tiny_flags, **watched("two"))
    ranks(1, "pretrain --max-steps 4 --out one", *tiny_flags, "--batch-size", 8, **watched("one"))
    assert "total_batch_size: 8" in (tmp_path / "two" / "config.yaml").read_text()
    assert apart(tmp_path, "two", "one") < BOUND


@pytest.mark.parametrize(
    "numbers", [(2, 1), *(pytest.param(numbers, marks=pytest.mark.slow) for numbers in ((1, 2), (2, 2), (2, 4)))]
)
def test_saved_on_some_processes_and_resumed_on_others(numbers, ranks, flags, tmp_path):
    first, then = numbers
    flags = [*flags, "--save-every", 9, "--keep", 3]
    ranks(1, *flags, "--out", "whole", **watched("whole"))
    ranks(first, *flags, "--out", "run", **watched("run"))
    broken = weights(tmp_path / "run")
    results = ranks(then, "pretrain --resume run/checkpoints/step-000009 --nproc 1", **watched("run"))
    assert "at step 9 of 20" in results[0].err
    assert apart(tmp_path, "run", "whole") < BOUND
    if first == then:
        assert same(weights(tmp_path / "run"), broken)


def test_dropout_differs_by_rank_and_not_by_resume(ranks, base, records, tmp_path):
    watch = """
from lowrank_cli.train import loop
import torch, json
original, seen = loop.backward, []
def backward(session, *rest):
    seen.append(torch.randn(1, generator=None).item())
    open(f"draws{rank}.json", "w").write(json.dumps(seen))
    return original(session, *rest)
loop.backward = backward
undo.callback(setattr, loop, "backward", original)
"""
    line = "finetune --method lora --lora-dropout 0.2 --max-length 96 --batch-size 4 --template plain --no-plots"
    line += " --eval-tokens 200 --max-steps 6 --save-every 3 --eval-every 6 --out run"
    ranks(2, line, "--model", base, "--dataset", records, before=watch)
    adapter = tmp_path / "run" / "model" / "adapter_model.safetensors"
    whole = load_file(adapter)
    draws = [json.loads((tmp_path / f"draws{rank}.json").read_text()) for rank in range(2)]
    assert len({*draws[0], *draws[1]}) == 12
    ranks(2, "finetune --resume run/checkpoints/step-000003", before=watch)
    assert same(load_file(adapter), whole)
    again = [json.loads((tmp_path / f"draws{rank}.json").read_text()) for rank in range(2)]
    assert again == [mine[3:] for mine in draws]


def test_a_killed_rank_takes_the_run_down_and_it_goes_on(process, ranks, flags, tmp_path, wait_for_step):
    flags = [*flags, "--max-steps", 30, "--save-every", 5, "--nproc", 2]
    ranks(2, *flags, "--out", "whole")
    child = process(*flags, "--out", "killed")
    wait_for_step(tmp_path / "killed", 7, child)
    members = psutil.Process(child.pid).children(recursive=True)
    victim = next(p for p in members if p.environ().get("RANK") == "1")
    victim.send_signal(signal.SIGKILL)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 1, err
    assert err.count("error:") == 1, err
    assert "rank 1 does not answer at step" in err
    assert "rank 1 was killed by SIGKILL" in err
    assert "Traceback" not in err
    record = json.loads((tmp_path / "killed" / "run.json").read_text())
    assert record["status"] == "failed"
    assert "rank 1 does not answer" in record["error"]
    ranks(2, "pretrain --resume auto --out killed")
    assert same(weights(tmp_path / "killed"), weights(tmp_path / "whole"))


@pytest.mark.slow
def test_a_signal_stops_all_ranks_with_a_checkpoint(process, ranks, flags, tmp_path, wait_for_step):
    flags = [*flags, "--max-steps", 60, "--save-every", 50, "--nproc", 2]
    ranks(2, *flags, "--out", "whole")
    child = process(*flags, "--out", "stopped")
    wait_for_step(tmp_path / "stopped", 10, child)
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130, err
    assert err.count("error: stopped by") == 1, err
    assert "--resume stopped" in err
    assert json.loads((tmp_path / "stopped" / "run.json").read_text())["status"] == "interrupted"
    ranks(2, "pretrain --resume stopped")
    assert same(weights(tmp_path / "stopped"), weights(tmp_path / "whole"))


def test_a_signal_to_one_rank_stops_all_after_the_same_update(ranks, flags, tmp_path):
    asked = """
from lowrank_cli.train import loop
import os, signal
original = loop.Session.mark
def mark(self):
    original(self)
    if rank == 1 and self.progress.step == 6:
        os.kill(os.getpid(), signal.SIGTERM)
loop.Session.mark = mark
undo.callback(setattr, loop.Session, "mark", original)
"""
    results = ranks(2, *flags, "--out", "run", before=asked, code=130)
    assert "after step 6 of 20" in told(results)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000006"]


@pytest.mark.slow
def test_torchrun_starts_the_processes_too(flags, tmp_path, ranks):
    ranks(2, *flags, "--out", "pool")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "lowrank_cli", *map(str, flags), "--out", "torchrun"]
    child = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert child.returncode == 0, child.stderr
    assert child.stdout.count("validation perplexity") == 1
    assert same(weights(tmp_path / "torchrun"), weights(tmp_path / "pool"))


def test_a_failure_on_one_rank_is_told_by_name(ranks, flags, tmp_path):
    broken = """
from lowrank_cli.train import loop
from lowrank_cli.errors import LowrankError
if rank == 1:
    original = loop.backward
    def backward(session, *rest):
        if session.progress.step == 3:
            raise LowrankError("the disk is gone", "mount it again")
        return original(session, *rest)
    loop.backward = backward
    undo.callback(setattr, loop, "backward", original)
"""
    results = ranks(2, *flags, "--out", "run", before=broken, code=1)
    assert [r.err.count("error:") for r in results] == [0, 1]
    assert "the disk is gone" in results[1].err
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["error"] == "rank 1: the disk is gone"


@pytest.mark.parametrize("mode", ["--per-layer", pytest.param("--no-galore-in-backward", marks=pytest.mark.slow)])
def test_a_gradient_that_breaks_on_one_rank_ends_both(mode, ranks, flags):
    # the second update refreshes; the sum over the ranks is not finite, and the one that decomposes it finds out
    broken = """
from lowrank_cli.optim import exchange as module
original = module.Replicated._refresh_together
def refresh(self, due):
    if rank == 1 and self.replicas.update == 8 and due:
        due[-1].weight.grad.fill_(float("nan"))
    original(self, due)
module.Replicated._refresh_together = refresh
undo.callback(setattr, module.Replicated, "_refresh_together", original)
"""
    results = ranks(2, *flags, mode, "--log-every", 50, "--out", "run", before=broken, code=1)
    assert "is not finite at a refresh at step 8" in told(results)


def test_weights_that_differ_are_found_before_they_are_saved(ranks, flags, tmp_path):
    broken = """
from lowrank_cli.train import loop
original = loop.Session.mark
def mark(self):
    original(self)
    if rank == 1 and self.progress.step == 6:
        self.model.model.norm.weight.data[3] *= 1 + 1e-6
loop.Session.mark = mark
undo.callback(setattr, loop.Session, "mark", original)
"""
    results = ranks(2, *flags, "--save-every", 5, "--out", "run", before=broken, code=1)
    assert "the ranks have different weights in " in told(results)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000005"]


class TestBadInput:
    def test_a_batch_that_the_processes_do_not_divide(self, ranks, flags):
        results = ranks(2, *flags, "--total-batch-size", 12, "--batch-size", 4, code=2)
        assert "12 sequences is not a whole number of batches of 4 on 2 processes" in told(results)
        assert "--total-batch-size 8 or 16" in told(results)

    def test_a_resume_that_cannot_keep_the_total_batch(self, ranks, flags):
        ranks(1, *flags, "--batch-size", 3, "--total-batch-size", 9, "--max-steps", 2, "--out", "run")
        results = ranks(2, "pretrain --resume run", code=2)
        assert "total batch of 9 sequences cannot be shared by 2 processes" in told(results)
        assert "resume with 1 or 3 processes" in told(results)

    def test_ranks_with_other_settings(self, pool, flags, tmp_path):
        results = pool.run([*flags, "--lr", 0.1], [*flags, "--lr", 0.2], folder=tmp_path)
        assert [r.code for r in results] == [2, 2]
        assert "rank 1 has other settings than rank 0: lr: 0.1 -> 0.2" in told(results)
        assert not (tmp_path / "runs").exists()

    def test_a_setting_that_one_rank_refuses(self, pool, flags, tmp_path):
        results = pool.run(flags, [*flags, "--lr", -1], folder=tmp_path)
        assert [r.code for r in results] == [2, 2]
        assert [r.err.count("error:") for r in results] == [0, 1]
        assert "--lr is -1" in results[1].err

    def test_a_rank_that_never_comes(self, pool, flags, tmp_path):
        begin = time.monotonic()
        (result,) = pool.run([*flags, "--rank-timeout", 1], folder=tmp_path, env={"WORLD_SIZE": "2"})
        assert result.code == 1
        assert "rank 1 of 2 did not join within 1 s" in result.err
        assert time.monotonic() - begin < 20

    def test_a_rank_that_hangs(self, ranks, flags):
        hanging = """
from lowrank_cli.train import loop
import time
if rank == 1:
    original = loop.backward
    def backward(session, *rest):
        if session.progress.step == 3:
            time.sleep(6)
        return original(session, *rest)
    loop.backward = backward
    undo.callback(setattr, loop, "backward", original)
"""
        results = ranks(2, *flags, "--rank-timeout", 2, "--out", "run", before=hanging, code=1)
        assert "rank 1 does not answer at step 4" in told(results)
        assert "--resume run" in told(results)

    def test_one_gpu_for_two_processes(self, ranks, flags):
        results = ranks(2, *flags, "--device", "cuda:1", code=2)
        assert "--device cuda:1 is one device for 2 processes" in told(results)

    def test_a_torch_that_cannot_talk_between_gpus(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        place = Place(rank=1, world_size=2, local_rank=1, node=0, host="localhost", port=1)
        monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
        assert place.device("auto") == "cuda:1"
        monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
        with pytest.raises(MissingError, match="this torch has no NCCL") as caught:
            place.device("auto")
        assert "--device cpu" in caught.value.hint

    def test_more_processes_than_gpus(self, ranks, flags):
        # hidden from these processes, should the machine have some
        results = ranks(2, *flags, "--device", "cuda", code=2, env={"CUDA_VISIBLE_DEVICES": ""})
        assert "has no GPU of its own" in told(results)
