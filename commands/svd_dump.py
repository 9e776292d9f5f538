"""`lowrank svd-dump`: the singular values of a model's linears, as files and pictures."""

from __future__ import annotations

from typing import Any

from lowrank_cli import config, console, options
from lowrank_cli.settings.common import Call
from lowrank_cli.strict_json import dumps

HELP = """Write the singular values of every linear of a model, and of its gradients with --gradients.

With no options: those of the newest run's model."""


def register(app, argv) -> None:
    """Add the command to the application."""
    options.register(app, "svd-dump", HELP, svd_dump, argv)


def svd_dump(given: dict[str, Any], method_given: dict[str, dict[str, Any]], call: Call) -> None:
    """Dump and say where."""
    from lowrank_cli.config import to_yaml

    console.set_level(console.QUIET if call.quiet else console.VERBOSE if call.verbose else console.NORMAL)
    resolved = config.resolve("svd-dump", given, method_given, config_file=call.config)
    if call.print_config:
        console.output(to_yaml(resolved).rstrip())
        return
    from lowrank_cli.compress import folder
    from lowrank_cli.compress import svd_dump as dump

    folder.check(call.out, "svd-dump")

    dumped = dump.prepare(resolved)
    if call.dry_run:
        console.table("Linears", ["name", "shape"], [[n, f"{m} x {k}"] for n, (m, k) in dumped.reader.shapes.items()])
        if call.json:
            console.output(dumps({"linears": dumped.reader.shapes}))
        return
    dumped.reader.check()
    result = folder.recorded(call.out, "svd-dump", resolved, to_yaml(resolved), lambda place: dump.run(dumped, place))
    console.output(dumps(result) if call.json else dump.summary(result))
