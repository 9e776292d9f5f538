"""What the machine lacks, and options given twice: one sentence and the right exit code, whatever the command."""

import errno
import os

import pytest
import torch

from lowrank_cli import errors, settings
from lowrank_cli.errors import LowrankError, PreflightError
from lowrank_cli.misfortune import explained, writing


def raised(action) -> BaseException:
    with pytest.raises(BaseException) as caught:
        action()
    return caught.value


@pytest.mark.parametrize("action", [
    lambda: torch.empty(1 << 55),
    lambda: torch.empty(1 << 50).numpy(),
    lambda: bytearray(1 << 60),
    lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")),
    lambda: (_ for _ in ()).throw(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")),
    lambda: (_ for _ in ()).throw(OSError(errno.ENOMEM, "Cannot allocate memory")),
])  # fmt: skip
def test_out_of_memory(action):
    known = explained(raised(action))
    assert isinstance(known, PreflightError)
    assert "out of memory" in known.message
    for flag in ("--batch-size", "--dtype bfloat16", "--dry-run", "--memory-budget"):
        assert flag in known.hint


def test_errors_of_programmers_are_not_explained():
    for error in (ValueError("x"), RuntimeError("mat1 and mat2 shapes cannot be multiplied"), KeyError("x")):
        assert explained(error) is None
        with pytest.raises(type(error)), writing("here"):
            raise error


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    Exception("No space left on device (os error 28)"),
    RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
])  # fmt: skip
def test_a_full_disk(error):
    with pytest.raises(LowrankError) as caught, writing("some/folder"):
        raise error
    assert caught.value.message.startswith("could not write some/folder: ")
    assert "make room" in caught.value.hint
    assert caught.value.message == explained(error, "some/folder").message


def test_a_place_that_may_not_be_written():
    with pytest.raises(LowrankError) as caught, writing("x"):
        raise PermissionError(errno.EACCES, "Permission denied", "x/y")
    assert (caught.value.message, caught.value.hint) == (
        "could not write x: permission denied", "choose a place that you may write with --out",
    )  # fmt: skip
    known = explained(raised(lambda: os.stat("/nowhere/at/all")))
    assert "/nowhere/at/all" in known.message


def test_no_home():
    known = explained(RuntimeError("Could not determine home directory."))
    assert "LOWRANK_CACHE" in known.hint


@pytest.mark.parametrize(("error", "code"), [
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."), errors.PREFLIGHT),
    (MemoryError(), errors.PREFLIGHT),
    (OSError(errno.ENOSPC, "No space left on device"), errors.FAILED),
])  # fmt: skip
def test_every_command_says_it_in_its_own_words(error, code, lowrank, monkeypatch):
    from lowrank_cli import config

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(config, "resolve", fail)
    for command in settings.COMMANDS:
        found, out, err = lowrank(f"{command}{' ppl' if command == 'eval' else ''}")
        assert (found, out) == (code, "")
        assert "this is a bug" not in err
        assert err.startswith("error: ")


REPEATED = {
    "pretrain": ["dataset", "lr", "out", "method", "config", "max-steps"],
    "finetune": ["dataset", "model", "task", "template"],
    "compress": ["model", "out", "welore-rank", "format"],
    "svd-dump": ["model", "gradients"],
    "eval": ["model", "dataset", "limit"],
}


@pytest.mark.parametrize("command", settings.COMMANDS)
def test_an_option_with_two_values(command, lowrank):
    for name in REPEATED[command]:
        for line in (f"--{name} 1 --{name} 2", f"--{name}=1 --seed 3 --{name} 2"):
            code, out, err = lowrank(f"{command} {line}")
            assert (code, out) == (2, ""), err
            assert f"--{name} is given twice: 1 and 2" in err
    assert not os.path.exists("runs")


def test_the_same_value_twice_and_switches_are_taken(lowrank):
    code, out, err = lowrank("pretrain --lr 1 --lr=1 --no-plots --plots --dataset --out --print-config")
    assert code == 0, err
    assert "plots: true" in out
    assert "dataset: --out" in out
