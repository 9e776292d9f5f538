"""The command on a model that has learned stories."""

import json
import shlex
from pathlib import Path

import made_text
import pytest

from lowrank_cli.compress import pipeline


@pytest.fixture
def text(tmp_path) -> Path:
    """Return a file of stories that the model has not seen, `stories.txt` in the folder of the test."""
    path = tmp_path / "stories.txt"
    path.write_text("\n\n".join(made_text.stories(30, "compress")), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def mixture(once, stories) -> Path:
    """Return the folder of a Mixtral of two layers and four experts that has learned made stories."""
    import made_model

    return once("mixture", lambda folder: made_model.write_mixture(folder, stories))


@pytest.fixture(autouse=True)
def speed_of_few_passes(monkeypatch):
    """The speed that is printed is not tested, and takes no seconds."""
    monkeypatch.setattr(pipeline, "TIMED_SECONDS", 0)


@pytest.fixture
def compress(lowrank, stories, text):
    """Compress the model, measuring 500 tokens: returns the result of --json, or what was printed."""

    def call(line: str, code: int = 0, model: object = stories):
        always = f"compress --dataset {text.name} --max-length 128 --eval-tokens 500"
        found, out, err = lowrank(always, *shlex.split(line), "--model", model)
        assert found == code, err
        return json.loads(out) if "--json" in shlex.split(line) and not code else out + err

    return call
