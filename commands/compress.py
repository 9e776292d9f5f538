"""`lowrank compress`: a model with low-rank linears in the place of those that allow it."""

from __future__ import annotations

import json
import signal
from typing import Any

from lowrank_cli import config, console, options
from lowrank_cli.config import Call
from lowrank_cli.errors import FAILED, INTERRUPTED, Interrupted, LowrankError
from lowrank_cli.run import RunDir

HELP = """Compress a model: the linears that allow it become low-rank.

With no options: the newest run's model to 80 % of its linears' parameters, weighted by its training text."""


def register(app, argv) -> None:
    """Add the command to the application."""
    options.register(app, "compress", HELP, compress, argv)


def compress(given: dict[str, Any], method_given: dict[str, dict[str, Any]], call: Call) -> None:
    """Compress and say what was lost."""
    from lowrank_cli.commands.training import to_yaml

    console.set_level(console.QUIET if call.quiet else console.VERBOSE if call.verbose else console.NORMAL)
    resolved = config.resolve("compress", given, method_given, config_file=call.config)
    if call.print_config:
        print(to_yaml(resolved), end="")
        return
    RunDir.check(call.out)
    if call.dry_run:
        from lowrank_cli.compress.plan import plan

        planned = plan(resolved)
        planned.show()
        if call.json:
            print(json.dumps(planned.record()))
        return
    from lowrank_cli.compress import pipeline, report
    from lowrank_cli.compress.preparation import prepare

    job = prepare(resolved)
    folder = RunDir.create(call.out, f"compress-{resolved.method}")
    (folder.path / "config.yaml").write_text(to_yaml(resolved), encoding="utf-8")
    result = recorded(folder, resolved, lambda: pipeline.run(job, folder))
    print(json.dumps(result) if call.json else report.summary(result))


def recorded(folder: RunDir, resolved: config.RunConfig, work) -> dict[str, Any]:
    """Do the work; run.json says how it ended, whatever happens."""
    from safetensors import SafetensorError

    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    folder.start(command=resolved.command, method=resolved.method, seed=resolved.common.seed)
    console.note(f"run {folder.path}")
    try:
        result = work()
    except KeyboardInterrupt:
        folder.finish("interrupted", error="stopped", exit_code=INTERRUPTED)
        raise Interrupted("stopped; no model was written", "type the command again with another --out") from None
    except LowrankError as error:
        folder.finish("failed", error=error.message, exit_code=error.exit_code)
        raise
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        folder.finish("failed", error=reason, exit_code=FAILED)
        where = getattr(error, "filename", None) or folder.path
        raise LowrankError(
            f"could not read or write {where}: {reason}", "make room or choose another --out, if it is full"
        ) from None
    except BaseException as error:
        folder.finish("failed", error=f"{type(error).__name__}: {error}", exit_code=FAILED)
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)
    folder.finish("done", exit_code=0, result=result)
    return result
