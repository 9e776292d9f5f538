"""Runs on several processes: real ones, over gloo, kept alive from test to test."""

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("worker.py")


@dataclass
class Result:
    """What one rank's run came to."""

    code: int
    out: str
    err: str
    sent: list[tuple[str, int, bool]]


class Ranks:
    """A pool of workers; `start` as many runs as there are command lines."""

    def __init__(self):
        self.workers: list[subprocess.Popen] = []

    def run(self, *lines: list, folder: Path, before: str = "", env: dict[str, str] | None = None) -> list[Result]:
        """Run one command line on each rank of a new process group; returns when all have ended."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        while len(self.workers) < len(lines):
            self.workers.append(
                subprocess.Popen([sys.executable, WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
        used = self.workers[: len(lines)]
        for rank, (worker, argv) in enumerate(zip(used, lines, strict=True)):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": len(lines), "MASTER_PORT": port}
            place = {key: str(value) for key, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"} | (env or {})
            request = {"argv": [str(a) for a in argv], "env": place, "folder": str(folder), "before": before}
            worker.stdin.write(json.dumps(request) + "\n")
            worker.stdin.flush()
        return [Result(**json.loads(worker.stdout.readline())) for worker in used]

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()
            worker.wait()


@pytest.fixture(scope="session")
def pool(own_cache):
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    ranks = Ranks()
    yield ranks
    ranks.close()


@pytest.fixture
def ranks(pool, tmp_path):
    """Run the same command line on n ranks; fails with what was printed if the exit codes are not `code`."""

    def call(n: int, *argv: object, code: int = 0, **more) -> list[Result]:
        results = pool.run(*[list(argv)] * n, folder=tmp_path, **more)
        assert [r.code for r in results] == [code] * n, [r.err for r in results]
        return results

    return call


@pytest.fixture
def wait_for_step():
    """Wait until a run that is another process has written the metrics of a step."""

    def wait(run: Path, step: int, child, timeout: float = 120) -> None:
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if child.poll() is not None:
                pytest.fail(f"the run ended before step {step}: {child.stderr.read()}")
            metrics = run / "metrics.jsonl"
            if metrics.is_file() and f'{{"step": {step},' in metrics.read_text():
                return
            time.sleep(0.01)
        pytest.fail(f"step {step} was not reached within {timeout} s")

    return wait


@pytest.fixture(scope="session")
def base(pool, news, tiny_config, tmp_path_factory) -> Path:
    """The folder of a tiny LLaMA that was trained for a moment."""
    folder = tmp_path_factory.mktemp("base")
    flags = ["--dataset", news, "--model-config", tiny_config, "--vocab-size", 512, "--max-length", 64, "--no-plots"]
    (result,) = pool.run(["pretrain", *flags, "--max-steps", 4, "--eval-tokens", 200, "--out", "run"], folder=folder)
    assert result.code == 0, result.err
    return folder / "run" / "model"


@pytest.fixture(scope="session")
def records(tmp_path_factory) -> Path:
    """Sixty instruction records."""
    path = tmp_path_factory.mktemp("records") / "records.jsonl"
    words = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in "lmnrst"][:60]
    lines = [{"instruction": f"Spell {w} in capitals.", "input": "", "output": w.upper()} for w in words]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path
