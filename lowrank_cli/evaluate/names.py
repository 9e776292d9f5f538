"""The names of tasks, looked up without lm-eval and what it imports, so that a mistyped one is said at once."""

from __future__ import annotations

import json
from collections.abc import Iterable
from difflib import get_close_matches
from importlib import metadata
from pathlib import Path

from lowrank_cli import console
from lowrank_cli.data.cache import cached_folder, fingerprint
from lowrank_cli.errors import UsageError
from lowrank_cli.evaluate.suites import SUITES, is_mmlu
from lowrank_cli.foreign import read_json

# that are not tasks of lm-eval's
PPL, MT_BENCH = "ppl", "mt-bench"


def check(names: Iterable[str]) -> None:
    """Raise UsageError for a name that nobody knows."""
    for name in names:
        if name not in (PPL, MT_BENCH) and name not in SUITES and not is_mmlu(name) and name not in all_names():
            raise unknown_task(name, all_names())


def all_names() -> set[str]:
    """Return every name of lm-eval's, read from all of its files once for each version."""

    def make(folder: Path) -> None:
        console.note("looking up the tasks of lm-eval, once for each version of it")
        console.quiet_libraries()
        from lm_eval.tasks import TaskManager

        (folder / "names.json").write_text(json.dumps(TaskManager().all_tasks), encoding="utf-8")

    folder = cached_folder("eval-names", fingerprint(metadata.version("lm_eval")), make)
    return set(read_json(folder / "names.json", list))


def unknown_task(name: str, known: Iterable[str]) -> UsageError:
    """Return the error for a name that nobody knows, with those that it may have meant."""
    near = get_close_matches(name, [*SUITES, "mmlu", PPL, MT_BENCH], n=2, cutoff=0.6)
    near += [n for n in get_close_matches(name, sorted(known), n=4, cutoff=0.6) if n not in near]
    start = f"did you mean {' or '.join(near[:4])}? " if near else ""
    return UsageError(
        f"unknown task '{name}'",
        f"{start}here: mmlu, ppl, mt-bench, {', '.join(sorted(SUITES))}, and every task of lm-eval by its own name",
    )
