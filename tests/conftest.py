"""Shared by every test: made data, a cache of its own, no network, the command in this process or another."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

TINY = {"model_type": "llama", "architectures": ["LLaMAForCausalLM"], "hidden_size": 32, "intermediate_size": 88,
        "num_attention_heads": 2, "num_hidden_layers": 2, "max_sequence_length": 128, "vocab_size": 32000,
        "pad_token_id": -1, "rms_norm_eps": 1e-6}  # fmt: skip


# tests of counts and values of published files; every other test runs on made data
MOST_PUBLISHED = 40


def pytest_collection_modifyitems(items):
    """Mark the tests that take the published data sets, and keep them few."""
    published = [item for item in items if "published_data" in item.fixturenames]
    for item in published:
        item.add_marker("published")
    if len(published) > MOST_PUBLISHED:
        names = ", ".join(sorted({item.location[0] for item in published}))
        raise pytest.UsageError(
            f"{len(published)} tests take published data, more than {MOST_PUBLISHED}, in {names}: "
            "take `test_data`, which is made, unless a published count or value is what is tested"
        )


def pytest_terminal_summary(terminalreporter):
    """Say why tests were skipped, in a line for each reason."""
    reasons = Counter(report.longrepr[2] for report in terminalreporter.stats.get("skipped", []))
    for reason, count in reasons.items():
        terminalreporter.write_line(f"{count} skipped: {reason.removeprefix('Skipped: ')}")


@pytest.fixture(scope="session")
def published_data() -> Path:
    """Return the folder of published data sets; without it the test is skipped with the reason."""
    folder = Path(os.environ.get("LOWRANK_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("published data sets are not here: LOWRANK_TEST_DATA names their folder")
    return folder


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory) -> Path:
    """Return the folder that all workers of this test run share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def once(shared_folder):
    """Make a folder of the test run once, whichever worker comes first: once(name, write) -> Path."""
    from filelock import FileLock

    def make(name: str, write) -> Path:
        folder, unfinished = shared_folder / name, shared_folder / f".{name}"
        with FileLock(shared_folder / f"{name}.lock"):
            if not folder.is_dir():
                shutil.rmtree(unfinished, ignore_errors=True)
                write(unfinished)
                unfinished.rename(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def test_data(once) -> Path:
    """Return a folder of made data in the layout of the published sets."""
    import made_sets

    return once("data", made_sets.write)


@pytest.fixture(scope="session")
def stories(once) -> Path:
    """Return the folder of a LLaMA of 260,032 parameters that has learned made stories; its context is 512 tokens."""
    import made_model

    return once("stories", made_model.write)


@pytest.fixture(autouse=True, scope="session")
def own_cache(shared_folder):
    """One cache for the whole test run, shared by its workers, away from the user's."""
    shared = shared_folder / "cache"
    shared.mkdir(exist_ok=True)
    os.environ["LOWRANK_CACHE"] = str(shared)
    # a kernel that the user has built would be taken by --kernel auto
    os.environ["TORCH_EXTENSIONS_DIR"] = str(shared / "extensions")


@pytest.fixture(autouse=True)
def no_kernel_of_another_test(request, monkeypatch):
    """What another test has compiled and loaded is not there for --kernel auto, as in a process of its own."""
    from lowrank_cli.ops import build

    if not {"ops", "optim"} & set(request.path.relative_to(ROOT).parts):
        monkeypatch.setattr(build, "is_built", lambda kind: build.library(kind).is_file())


@pytest.fixture(autouse=True)
def no_estimate_at_the_end(request, monkeypatch):
    """Leave out the estimate beside the measured peak, half of a tiny run's time, where it is not the point."""
    if not {"memory", "cli"} & set(request.path.relative_to(ROOT).parts):
        from lowrank_cli.train import finish

        monkeypatch.setattr(finish, "estimated_memory", lambda session: {})


@pytest.fixture(scope="session")
def news(tmp_path_factory) -> Path:
    """Return a file of 120 made news articles, one JSON object a line."""
    from made_text import articles

    path = tmp_path_factory.mktemp("news") / "news.jsonl"
    path.write_text("".join(json.dumps(a) + "\n" for a in articles(120, "news")), encoding="utf-8")
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


def settled(line: list[str], more: list[str]) -> list[str]:
    """Return a command line with the flags of a fixture in it: an option that stands again later is left out before.

    The command itself refuses an option with two values.
    """
    if not more:
        return line
    argv, last = [*line, *more], {}
    for i, word in enumerate(argv):
        if word.startswith("--"):
            last[word.partition("=")[0]] = i
    kept, dropping = [], False
    for i, word in enumerate(argv):
        if word.startswith("--"):
            dropping = last[word.partition("=")[0]] != i
        if not dropping:
            kept.append(word)
    return kept


@pytest.fixture
def lowrank(tmp_path, monkeypatch, capsys):
    """Run the command in this process, in a folder of its own: returns its exit code, stdout and stderr.

    The first argument is the command line as a user types it, without `lowrank`; further ones, such as paths, are
    added as they are: `lowrank("pretrain --method galore --max-steps 6", *tiny_flags)`.
    """
    from lowrank_cli import console
    from lowrank_cli.main import main

    monkeypatch.chdir(tmp_path)

    def call(line: str = "", *more: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(settled(shlex.split(line), [*map(str, more)]))
        console.log_to(None)
        console.set_level(console.NORMAL)
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


@pytest.fixture
def process(tmp_path):
    """Start the command as a process of its own, in the test's folder; arguments as those of `lowrank`."""
    started = []

    def start(line: str, *more: object, **env: str) -> subprocess.Popen:
        child = subprocess.Popen(
            [sys.executable, "-m", "lowrank_cli", *settled(shlex.split(line), [*map(str, more)])],
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


@pytest.fixture(scope="session")
def pool(own_cache):
    from ranks import Ranks

    # two workers with several threads each would wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    ranks = Ranks()
    yield ranks
    ranks.close()


@pytest.fixture
def ranks(pool, tmp_path):
    """Run the same command line on n ranks; fails with what was printed if the exit codes are not `code`.

    The line is written as that of `lowrank`.
    """

    def call(n: int, line: str = "", *argv: object, code: int = 0, **more) -> list:
        results = pool.run(*[settled(shlex.split(line), [*map(str, argv)])] * n, folder=tmp_path, **more)
        assert [r.code for r in results] == [code] * n, [r.err for r in results]
        return results

    return call
