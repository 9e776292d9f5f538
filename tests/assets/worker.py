"""A process that runs `lowrank` command lines as one rank of several: a JSON object a line on stdin, one on stdout.

It lives through many runs, so that a test pays for the imports once; each run makes a process group of its own.
"""

import contextlib
import io
import json
import os
import sys

import torch
import torch.distributed as dist

# what has gone through torch's collectives, seen from outside the product
SENT: list[tuple[str, int, bool]] = []


def watch(name: str) -> None:
    """Note (name, bytes, whether floats of 64 bit or integers: numbers of the loop, no gradients) of every call."""
    original = getattr(dist, name)

    def watched(*args, **kwargs):
        tensor = next(t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor))
        SENT.append((name, tensor.nbytes, tensor.dtype in (torch.float64, torch.int64)))
        return original(*args, **kwargs)

    setattr(dist, name, watched)


def run(argv: list[str], env: dict[str, str], folder: str, before: str) -> dict:
    """Run a command line; `before` is Python that may patch the product first."""
    from lowrank_cli import console, main

    os.chdir(folder)
    SENT.clear()
    out, err = io.StringIO(), io.StringIO()
    kept = dict(os.environ)
    os.environ.update(env)
    undo = contextlib.ExitStack()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), undo:
            exec(before, {"undo": undo, "rank": int(env["RANK"])})
            code = main.main(argv)
    finally:
        os.environ.clear()
        os.environ.update(kept)
        console.log_to(None)
        console.set_level(console.NORMAL)
    return {"code": code, "out": out.getvalue(), "err": err.getvalue(), "sent": SENT}


if __name__ == "__main__":
    for name in ("all_reduce", "reduce", "broadcast", "reduce_scatter_single", "reduce_scatter_tensor"):
        if hasattr(dist, name):
            watch(name)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import lowrank_cli.train.prepare  # noqa: F401 before the first run is timed
    from lowrank_cli.train import finish

    # half of a tiny run's time, and tests/memory is about it
    finish.estimated_memory = lambda session: {}

    for line in sys.stdin:
        answers.write(json.dumps(run(**json.loads(line))) + "\n")
        answers.flush()
