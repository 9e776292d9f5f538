"""`lowrank compress`: a model with low-rank linears in the place of those that allow it."""

from __future__ import annotations

from typing import Any

from lowrank_cli import config, console, options
from lowrank_cli.settings.common import Call
from lowrank_cli.strict_json import dumps

HELP = """Compress a model: the matrices that allow it become low-rank, experts included.

With no options: the newest run's model to 80 % of its matrices' parameters, errors weighted by the text that it
was trained on, or, where that is not known, by text that the model writes."""


def register(app, argv) -> None:
    """Add the command to the application."""
    options.register(app, "compress", HELP, compress, argv)


def compress(given: dict[str, Any], method_given: dict[str, dict[str, Any]], call: Call) -> None:
    """Compress and say what was lost."""
    from lowrank_cli.config import to_yaml

    console.set_level(console.QUIET if call.quiet else console.VERBOSE if call.verbose else console.NORMAL)
    resolved = config.resolve("compress", given, method_given, config_file=call.config)
    if call.print_config:
        console.output(to_yaml(resolved).rstrip())
        return
    from lowrank_cli.compress import folder

    folder.check(call.out, "compress")
    if call.dry_run:
        from lowrank_cli.compress.plan import plan

        planned = plan(resolved)
        planned.show()
        if call.json:
            console.output(dumps(planned.record()))
        return
    from lowrank_cli.compress import pipeline, report
    from lowrank_cli.compress.preparation import prepare

    job = prepare(resolved)
    result = folder.recorded(
        call.out, f"compress-{resolved.method}", resolved, to_yaml(resolved), lambda place: pipeline.run(job, place)
    )
    console.output(dumps(result) if call.json else report.summary(result))
