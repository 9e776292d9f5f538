"""The command on a real model."""

import json
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def stories(test_data) -> Path:
    return test_data / "models" / "stories260K"


@pytest.fixture(scope="module")
def text(stories) -> Path:
    return stories / "tinystories_sample.txt"


@pytest.fixture
def compress(lowrank, stories, text):
    def call(*flags: object, code: int = 0, model: object = stories):
        found, out, err = lowrank(
            "compress", "--model", model, "--dataset", text, "--max-length", 128, "--eval-tokens", 500, *flags
        )
        assert found == code, err
        return json.loads(out) if "--json" in flags and not code else out + err

    return call
