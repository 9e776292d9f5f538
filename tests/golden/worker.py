"""A process that runs `lowrank` command lines of one tree: a JSON object a line on stdin, one on stdout.

Every run is a fork of this process, which has imported everything and run nothing: it starts at once, and whatever it
leaves behind it takes along.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import signal
import sys
import traceback
from contextlib import suppress
from dataclasses import fields
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "assets"))
from places import places

# seconds after which a run is given up
LIMIT = 300
OUT, ERR, IMPORTED = "stdout.txt", "stderr.txt", "imported.json"


def inventory() -> dict:
    """Return what the tree's registry has: commands, methods with their options, pairs that compose, presets."""
    import yaml

    from lowrank_cli import main, methods

    # every start of the command reads every preset three times: in Python a third of the time of a run
    yaml.SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    found = {name: methods.get(name) for name in methods.names()}
    training = [c for c in ("pretrain", "finetune") if c in main.COMMANDS]
    presets = sorted((Path(main.__file__).parent / "presets").glob("*.yaml"))
    return {
        "commands": list(main.COMMANDS),
        "methods": {name: sorted(cls.commands) for name, cls in found.items()},
        "options": {
            f"--{name}-{(f.metadata['flag'].partition('/')[0] or f.name).replace('_', '-')}": {
                "choices": f.metadata["choices"],
                "default": f.default,
            }
            for name, cls in found.items()
            for f in fields(cls.Config)
        },
        "pairs": [
            (command, f"{a}+{b}")
            for command in training
            for a, b in itertools.combinations(found, 2)
            if combine(methods, f"{a}+{b}", command)
        ],
        "presets": {file.stem: yaml.safe_load(file.read_text(encoding="utf-8"))["command"] for file in presets},
    }


def combine(methods, text: str, command: str) -> bool:
    """Say whether the methods of `a+b` go together in a command."""
    with suppress(Exception):
        return bool(methods.compose(text, command))
    return False


def run(argv: list[str], folder: str, ranks: int) -> dict:
    """Run a command line in a folder, on one rank or on several; returns the exit code and what was printed."""
    folders = [Path(folder), *(Path(folder) / f"rank-{i}" for i in range(1, ranks))]
    children = []
    for rank, (place, written) in enumerate(zip(places(ranks), folders, strict=True)):
        written.mkdir(exist_ok=True)
        pid = os.fork()
        if pid == 0:
            be_command(argv, Path(folder), written, place, measuring=rank == 0)
        children.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    import_what_was_imported(folders[0] / IMPORTED)
    out, err = ((folders[0] / name).read_text(encoding="utf-8", errors="replace") for name in (OUT, ERR))
    return {"code": next((code for code in codes if code), 0), "out": out, "err": err}


def be_command(argv: list[str], folder: Path, written: Path, place: dict[str, str], measuring: bool) -> None:
    """Run the command line as this process and end with its exit code."""
    code, known = 70, set(sys.modules)
    try:
        signal.alarm(LIMIT)
        os.environ.update(place)
        for number, name in ((0, os.devnull), (1, written / OUT), (2, written / ERR)):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
        os.chdir(folder)
        from lowrank_cli.main import main

        if argv[0] in ("pretrain", "finetune") and not {"--help", "--print-config", "--dry-run"} & set(argv):
            skip_what_is_not_compared()
        code = main(argv)
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        with suppress(ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        if measuring:
            (written / IMPORTED).write_text(json.dumps(sorted(set(sys.modules) - known)))
        os._exit(code)


def skip_what_is_not_compared() -> None:
    """Leave out what takes two thirds of a tiny run and comes after its last weight: an estimate and a sample."""
    with suppress(ImportError):
        finish = import_module("lowrank_cli.train.finish")
        for name, nothing in (("estimated_memory", {}), ("sample", "")):
            if hasattr(finish, name):
                setattr(finish, name, lambda *_, nothing=nothing, **__: nothing)


def import_what_was_imported(file: Path) -> None:
    """Import the modules that a run has needed, so that the next one finds them."""
    for name in json.loads(file.read_text()) if file.is_file() else []:
        with suppress(Exception):
            import_module(name)
    with suppress(Exception):
        # a table that Transformers makes when it first saves a model, in half of the time of a run
        sys.modules["transformers.conversion_mapping"].get_checkpoint_conversion_mapping("llama")
    # a fork's collector would go over all of this again, and copy it
    gc.freeze()


def serve(root: Path) -> None:
    """Answer requests until stdin ends; the first answer is the inventory."""
    import lowrank_cli

    if not Path(lowrank_cli.__file__).resolve().is_relative_to(root):
        sys.exit(f"{lowrank_cli.__file__} is not of the tree {root}")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    answers.write(json.dumps(inventory()) + "\n")
    answers.flush()
    for line in sys.stdin:
        answers.write(json.dumps(run(**json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve(Path(sys.argv[1]).resolve())
