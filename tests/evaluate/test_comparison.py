"""Runs side by side, from their folders."""

import json

import pytest

from lowrank_cli.errors import MissingError, UsageError
from lowrank_cli.evaluate import comparison


@pytest.fixture
def runs(tmp_path):
    def row(level, value):
        return {"metric": "acc", "filter": "none", "level": level, "value": value, "stderr": 0.01}

    for name, value in (("a", 0.5), ("b", 0.25)):
        folder = tmp_path / name / "eval"
        folder.mkdir(parents=True)
        about = {"date": "2026-01-01", "seconds": 3.0, "model": {"parameters": 1000, "weights_bytes": 4000}}
        result = {**about, "rows": [row(0, value), row(1, 0.9)]}
        (folder / "mmlu-5shot.json").write_text(json.dumps(result))
        record = {"method": "galore", "result": {"peak_memory_bytes": 2**30, "tokens_per_second": 1234.5}}
        (tmp_path / name / "run.json").write_text(json.dumps(record))
    ppl = {**about, "perplexity": 12.5, "word_perplexity": None}
    (tmp_path / "b" / "eval" / "ppl-x.json").write_text(json.dumps(ppl))
    return [str(tmp_path / "a"), str(tmp_path / "b")]


def test_quality_stands_beside_cost(runs):
    read = comparison.read(runs)
    assert [run["scores"]["mmlu-5shot acc"]["value"] for run in read] == [0.5, 0.25]
    assert "ppl-x perplexity" not in read[0]["scores"]
    assert read[1]["costs"]["eval_seconds"] == 6.0
    lines = comparison.table(read).splitlines()
    words = {line.split("  ")[0]: " ".join(line.split()) for line in lines}
    assert words["mmlu-5shot acc"] == "mmlu-5shot acc 50.00 +- 1.00 % 25.00 +- 1.00 %"
    assert words["ppl-x perplexity"] == "ppl-x perplexity 12.5"
    assert words["memory of training"] == "memory of training 1.0 GiB 1.0 GiB"
    assert words["method"] == "method galore galore"


def test_picture_is_drawn(runs, tmp_path):
    path = tmp_path / "deep" / "table.png"
    comparison.draw(comparison.read(runs), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UsageError, match="is no picture"):
        comparison.draw(comparison.read(runs), tmp_path / "table.txt")


def test_runs_that_cannot_be_compared(runs, tmp_path):
    with pytest.raises(UsageError, match="two runs or more"):
        comparison.read(runs[:1])
    with pytest.raises(MissingError, match="there is no run"):
        comparison.read([runs[0], str(tmp_path / "c")])
    (tmp_path / "c").mkdir()
    with pytest.raises(MissingError, match="has not been evaluated") as caught:
        comparison.read([runs[0], str(tmp_path / "c")])
    assert f"--model {tmp_path / 'c'}" in caught.value.hint
