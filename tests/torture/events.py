"""SIGKILL at the events of files: open for writing, rename, mkdir, unlink, fsync. The same line then ends as ever."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import children
from cases import WRONG, Case, Report, counted, digest, look
from materials import Materials

EVENTS = 125
SHORT = "--max-steps 6 --save-every 2 --eval-every 2 --keep 1 --resume auto"
PATHS = {"os.rename": 2, "os.mkdir": 1, "os.remove": 1, "os.rmdir": 1, "os.truncate": 1, "os.link": 2, "os.symlink": 2}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def lines(made: Materials) -> dict[str, list[str]]:
    """Return a line of each command that writes, by its row."""
    short = SHORT.split()
    text = f"--dataset {made.text}"
    return {
        "pretrain": [*made.base_line("galore"), *short],
        "finetune, best weights kept": [*made.tune_line("lora"), *short],
        "compress": f"compress --model {made.model} --eval-tokens 200 --max-length 32 {text} --out run".split(),
        "svd-dump": f"svd-dump --model {made.model} --published --out run".split(),
        "eval ppl": f"eval ppl --model {made.model} {text} --window 64 --out run".split(),
    }


def cases(made: Materials, scale: float) -> list[Case]:
    """Return cases at moments evenly over each command; k of n, since the number of events shows only in a run."""
    of = lines(made)
    each = counted(EVENTS / len(of), scale)
    return [
        Case("events", row, f"event {k + 1} of {each}", partial(struck, line, row, (k + 0.5) / each))
        for row, line in of.items()
        for k in range(each)
    ]


_alone: dict[str, tuple[int, str]] = {}


def struck(line: list[str], row: str, share: float, folder: Path) -> Report:
    """Kill a command at an event, then run the same line again: it ends with the result of a run left alone."""
    report = Report()
    if row not in _alone:
        count = folder / "count"
        (folder / "alone").mkdir()
        alone = children.run(line, folder / "alone", before=partial(counting, folder / "alone", count))
        if not look(report, alone, done=True):
            return report
        _alone[row] = int(count.read_text()), result(folder / "alone" / "run")
    events, wanted = _alone[row]
    place = folder / "struck"
    place.mkdir()
    first = children.run(line, place, before=partial(own_cache_and, place, partial(dying, int(share * events))))
    report.strokes += first.code == -signal.SIGKILL
    go_on(report, first, line, place, wanted)
    return report


def go_on(report: Report, first: children.Outcome, line: list[str], place: Path, wanted: str) -> None:
    """Run a line again that was cut off, unless its record says that it was done; its result is the one wanted."""
    left = tree(place)
    if record(place / "run").get("status") == "done" and "--resume" not in line:
        # such a folder is never written again
        if result(place / "run") != wanted:
            report.add(WRONG, "run.json says done, and the result is another one", first)
        return
    again = children.run(line, place, before=partial(own_cache, place))
    if look(report, again, done=True) and result(place / "run") != wanted:
        report.add(WRONG, "another result than that of a run left alone", again)
    for fault in report.faults:
        fault.shown = f"{first.text()}\n{left}\n{fault.shown}"


def record(run: Path) -> dict:
    """Return what run.json holds."""
    file = run / "run.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def result(folder: Path) -> str:
    """Return what a command came to: weights, singular values, or the scores of an evaluation."""
    found = digest(folder / "model") + digest(folder, "singular_values.*")
    for file in sorted(folder.glob("**/*ppl*.json")):
        found += json.dumps(json.loads(file.read_text()).get("results"), sort_keys=True)
    return found


def tree(folder: Path) -> str:
    """Return the files of a folder, one a line."""
    return "\n".join(str(file.relative_to(folder)) for file in sorted(folder.rglob("*")) if "cache" not in file.parts)


def own_cache(place: Path) -> None:
    """Have a cache that nothing has filled, so that its files are events too."""
    os.environ["LOWRANK_CACHE"] = str(place / "cache")


def own_cache_and(place: Path, then: Callable[[], None]) -> None:
    """Have a cache of its own, then do something."""
    own_cache(place)
    then()


def watch(event: Callable[[], None]) -> None:
    """Call `event` before every event of a file that changes it."""

    def hook(name: str, arguments: tuple) -> None:
        if name == "open":
            path, _, flags = arguments
            if isinstance(path, int) or not (flags or 0) & WRITING or str(path).startswith(("/dev", "/proc")):
                return
        elif name not in PATHS:
            return
        event()

    sys.addaudithook(hook)
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        event()
        fsync(descriptor)

    os.fsync = watched
    import safetensors.torch

    original = safetensors.torch.serialize_file

    # written by a library in Rust, which Python does not see
    def written(*arguments, **more) -> None:
        event()
        original(*arguments, **more)
        event()

    safetensors.torch.serialize_file = written


def counting(place: Path, file: Path) -> None:
    """Count the events of this process; the number is written when the command has ended."""
    from lowrank_cli import main

    own_cache(place)
    count, original = [0], main.main

    def event() -> None:
        count[0] += 1

    def counted_main(argv: list[str]) -> int:
        code = original(argv)
        file.write_text(str(count[0]))
        return code

    main.main = counted_main
    watch(event)


def dying(number: int) -> None:
    """Kill this process at an event."""
    count = [0]

    def event() -> None:
        count[0] += 1
        if count[0] > number:
            os.kill(os.getpid(), signal.SIGKILL)

    watch(event)
