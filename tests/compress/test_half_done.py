"""compress and svd-dump that are killed: the same --out works afterwards, and nobody else's folder is ever taken."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lowrank_cli.compress import folder
from lowrank_cli.errors import UsageError
from lowrank_cli.lock import NAME, locked

KILLED = """
import importlib, os, signal, sys
module, _, name = sys.argv[1].rpartition(".")
owner = importlib.import_module("lowrank_cli." + module.partition(":")[0])
owner = getattr(owner, module.partition(":")[2]) if ":" in module else owner
before = getattr(owner, name)

def kill(*arguments, **named):
    if sys.argv[2] == "after":
        before(*arguments, **named)
    os.kill(os.getpid(), signal.SIGKILL)

setattr(owner, name, kill)
from lowrank_cli.main import main
main(sys.argv[3:])
"""
LINES = {
    "compress": "compress --welore-rank 50 --eval-tokens 0 --welore-weighting none --no-plots --out run",
    "svd-dump": "svd-dump --no-plots --out run",
}
# the first two of each are fast enough for every day
POINTS = {
    "compress": [
        ("run:RunDir.start", "before"), ("train.checkpoint.commit", "before"), ("run:RunDir.create", "after"),
        ("run:RunDir.start", "after"), ("train.checkpoint.commit", "after"), ("compress.report.write", "after"),
        ("run:RunDir.finish", "before"),
    ],
    "svd-dump": [
        ("run:RunDir.start", "before"), ("compress.files.write_spectra", "after"), ("run:RunDir.create", "after"),
        ("compress.svd_dump.values_of", "after"), ("run:RunDir.finish", "before"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(("command", "where", "when"), [
    pytest.param(command, *point, marks=() if (command, i) == ("compress", 0) else pytest.mark.slow)
    for command, points in POINTS.items() for i, point in enumerate(points)
])  # fmt: skip
def test_the_same_folder_works_after_a_kill(command, where, when, lowrank, stories):
    line = [*LINES[command].split(), "--model", str(stories)]
    child = subprocess.run([sys.executable, "-c", KILLED, where, when, *line], capture_output=True, check=False)
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert Path("run").is_dir()
    code, _, err = lowrank(LINES[command], "--model", stories)
    assert code == 0, err
    assert json.loads(Path("run/run.json").read_text())["status"] == "done"
    names = {path.name for path in Path("run").iterdir()}
    assert not [name for name in names if name.startswith(".")]
    assert ("model" if command == "compress" else "singular_values.safetensors") in names
    # what is finished stays
    code, _, err = lowrank(LINES[command], "--model", stories)
    assert code == 2
    assert "--out run is not empty" in err


@pytest.fixture
def left(tmp_path, monkeypatch):
    """Make a folder with files, run.json from its entries."""
    monkeypatch.chdir(tmp_path)

    def make(*names: str, **record) -> Path:
        place = Path("run")
        place.mkdir()
        for name in names:
            (place / name).write_text("x", encoding="utf-8")
        if record:
            (place / "run.json").write_text(json.dumps(record), encoding="utf-8")
        return place

    return make


@pytest.mark.parametrize(("names", "record"), [
    (["thesis.txt"], {}),
    (["thesis.txt"], {"command": "compress", "status": "running"}),
    (["eval"], {"command": "compress", "status": "failed"}),
    ([], {"command": "compress", "status": "done"}),
    ([], {"command": "pretrain", "status": "running"}),
    ([], {"command": "svd-dump", "status": "running"}),
    (["model"], {}),
])  # fmt: skip
def test_a_foreign_or_finished_folder_is_never_taken(names, record, left):
    place = left(*names, **record)
    before = sorted(path.name for path in place.iterdir())
    with pytest.raises(UsageError, match="is not empty"):
        folder.check("run", "compress")
    assert sorted(path.name for path in place.iterdir()) == before


def test_what_was_stopped_or_failed_is_taken_too(left):
    left("log.txt", "config.yaml", "ranks.csv", ".tmpa1B2c3", command="compress", status="interrupted")
    folder.check("run", "compress")
    assert folder.is_half_done(Path("run"), "compress")
    folder.clear(Path("run"))
    assert list(Path("run").iterdir()) == []


HOLD = """
import sys
from pathlib import Path
from lowrank_cli.lock import locked
with locked(Path("run")):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("command", LINES)
def test_a_folder_that_is_being_written_is_in_use(command, left, lowrank, stories):
    left(command=command, status="running")
    child = subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "locked\n"
    try:
        code, _, err = lowrank(LINES[command], "--model", stories)
        assert code == 2
        assert f"run is in use: process {child.pid}" in err
    finally:
        child.communicate("")
    assert not Path("run", NAME).exists()
    with locked(Path("run")):
        assert str(os.getpid()) in Path("run", NAME).read_text()


@pytest.mark.parametrize("command", LINES)
def test_a_place_that_cannot_be_written_is_refused_before_the_work(command, lowrank):
    Path("file.txt").write_text("mine")
    code, _, err = lowrank(LINES[command].replace("--out run", "--out file.txt/run --model nowhere"))
    assert code == 1
    assert "could not write file.txt/run: not a directory" in err
