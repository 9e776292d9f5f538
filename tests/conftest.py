"""What every test shares: real data, a cache of its own, no network."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

TINY = {"model_type": "llama", "architectures": ["LLaMAForCausalLM"], "hidden_size": 32, "intermediate_size": 88,
        "num_attention_heads": 2, "num_hidden_layers": 2, "max_sequence_length": 128, "vocab_size": 32000,
        "pad_token_id": -1, "rms_norm_eps": 1e-6}  # fmt: skip


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real data; without it the test is skipped with the reason."""
    folder = Path(os.environ.get("LOWRANK_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder}: set LOWRANK_TEST_DATA")
    return folder


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """One cache for the whole test run, shared by its workers, away from the user's."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"
    shared.mkdir(exist_ok=True)
    os.environ["LOWRANK_CACHE"] = str(shared)
    # a kernel that the user has built would be taken by --kernel auto
    os.environ["TORCH_EXTENSIONS_DIR"] = str(shared / "extensions")


@pytest.fixture(autouse=True)
def no_kernel_of_another_test(request, monkeypatch):
    """What another test has compiled and loaded is not there for --kernel auto, as in a process of its own."""
    from lowrank_cli.ops import build

    if not {"ops", "optim"} & set(request.path.parts):
        monkeypatch.setattr(build, "is_built", lambda kind: build.library(kind).is_file())


@pytest.fixture(scope="session")
def news(test_data, tmp_path_factory) -> Path:
    """A small file of real text: 120 Wikinews articles, one JSON object a line."""
    import gzip

    path = tmp_path_factory.mktemp("news") / "news.jsonl"
    with gzip.open(test_data / "wikinews_en" / "validation.json.gz", "rt", encoding="utf-8") as file:
        path.write_text("".join(line for _, line in zip(range(120), file, strict=False)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory) -> Path:
    """A model of two layers, in the form of GaLore's files."""
    path = tmp_path_factory.mktemp("config") / "tiny.json"
    path.write_text(json.dumps(TINY))
    return path


@pytest.fixture
def tiny_flags(news, tiny_config) -> list[str]:
    """Flags of a run that takes a second: a tiny model on real text."""
    return [
        *("--dataset", str(news), "--model-config", str(tiny_config), "--vocab-size", "512", "--max-length", "64"),
        *("--batch-size", "4", "--eval-tokens", "1000", "--log-every", "1", "--save-every", "1000", "--no-plots"),
    ]


@pytest.fixture
def lowrank(tmp_path, monkeypatch, capsys):
    """Run the command in this process, in a folder of its own: returns its exit code, stdout and stderr."""
    from lowrank_cli import console
    from lowrank_cli.main import main

    monkeypatch.chdir(tmp_path)

    def call(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(a) for a in argv])
        console.log_to(None)
        console.set_level(console.NORMAL)
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


@pytest.fixture
def process(tmp_path):
    """Start the command as a process of its own, in the test's folder."""
    started = []

    def start(*argv: object, **env: str) -> subprocess.Popen:
        child = subprocess.Popen(
            [sys.executable, "-m", "lowrank_cli", *map(str, argv)],
            cwd=tmp_path,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **env},
        )
        started.append(child)
        return child

    yield start
    for child in started:
        if child.poll() is None:
            child.kill()
            child.wait()
