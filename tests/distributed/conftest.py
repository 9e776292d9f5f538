"""A base model and records for runs on several processes."""

import json
import time
from pathlib import Path

import pytest


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
