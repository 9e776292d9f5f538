"""`lowrank eval`: a model's scores on test sets and its perplexity on texts, and runs side by side."""

from __future__ import annotations

from pathlib import Path

from lowrank_cli import config, console, options
from lowrank_cli.config import RunConfig
from lowrank_cli.settings.common import Call
from lowrank_cli.strict_json import dumps

HELP = """Evaluate a model with lm-eval: mmlu, gsm8k, wikitext, boolq ..., or its perplexity on a text: ppl.

Without --model: the newest run's model. Without a network: --data-dir FOLDER with the sets as they were published."""


def register(app, argv) -> None:
    """Add the command to the application."""
    options.register(app, "eval", HELP, evaluate, argv)


def evaluate(given, method_given, call: Call) -> None:
    """Evaluate, or compare what was evaluated; results on stdout."""
    console.set_level(console.QUIET if call.quiet else console.VERBOSE if call.verbose else console.NORMAL)
    resolved = config.resolve("eval", given, method_given, config_file=call.config)
    if call.print_config:
        import yaml

        console.output(yaml.safe_dump(resolved.flat(), sort_keys=False).rstrip())
        return
    if resolved.harness.compare:
        compare(resolved, call)
        return
    from lowrank_cli.evaluate import session
    from lowrank_cli.evaluate.report import summary

    if call.dry_run:
        plan = session.plan(resolved)
        console.output(dumps(plan) if call.json else "\n".join(f"{key}: {value}" for key, value in plan.items()))
        return
    results = []
    for result, path in session.run(resolved, call.out):
        results.append({**result, "file": str(path)})
        if not call.json:
            console.output(summary(result, verbose=call.verbose))
    if call.json:
        console.output(dumps({"results": results}))


def compare(resolved: RunConfig, call: Call) -> None:
    """--compare: the runs' table, and the picture."""
    from lowrank_cli.evaluate import comparison
    from lowrank_cli.evaluate.session import names_of

    runs = comparison.read(names_of(resolved.harness.tasks))
    console.output(dumps({"runs": runs}) if call.json else comparison.table(runs))
    if resolved.harness.picture:
        comparison.draw(runs, Path(resolved.harness.picture))
        console.note(f"picture {resolved.harness.picture}")
