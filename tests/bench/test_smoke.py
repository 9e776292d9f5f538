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
