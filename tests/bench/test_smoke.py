"""Every bench still runs; what it measures here means nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from run import BENCHES


@pytest.mark.slow
def test_smoke_compares_every_bench_with_its_peers(tmp_path):
    record = tmp_path / "record.json"
    command = [sys.executable, str(Path(__file__).with_name("run.py")), "--smoke", "--json", str(record)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(record.read_text(encoding="utf-8"))["rows"]
    assert {row["bench"] for row in rows} == set(BENCHES)
    assert all(row["ratio"] > 0 and row["spread"][0] <= row["ratio"] <= row["spread"][1] for row in rows)
    assert "machine:" in done.stdout


@pytest.mark.slow
def test_what_methods_are_worth_goes_on_where_it_was_stopped(tmp_path, news):
    script = Path(__file__).with_name("worth.py")
    line = f"--dataset {news} --out worth --steps 8 --rows full --speed"
    runs = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, str(script), *line.split()], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        began = {path: path.stat().st_mtime_ns for path in tmp_path.glob("worth/full*/run.json")}
        # nine pairs of rates, the best three of them, and the best one from three seeds
        assert len(began) == 9 + 3 + 3
        runs.append(began)
    assert runs[0] == runs[1]
    (row,) = json.loads((tmp_path / "worth/worth.json").read_text(encoding="utf-8"))
    assert len(row["perplexity"]) == 3
    assert all(value > 1 for value in [*row["perplexity"], row["optimizer_bytes"], row["peak_bytes"]])
    assert row["speed"] == [1, 1, 1]
