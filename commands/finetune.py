"""`lowrank finetune`: train a model on instructions, on a task or on text, whole or through an adapter."""

from __future__ import annotations

from functools import partial

from lowrank_cli.commands import training

from lowrank_cli import options

HELP = """Fine-tune a model: on instructions (--dataset), on a task (--task mrpc) or on plain text (--task text).

With no options: LoRA on the newest run's model, on questions made from Python's own docstrings."""


def register(app, argv) -> None:
    """Add the command to the application."""
    options.register(app, "finetune", HELP, partial(finetune, argv=argv), argv)


def finetune(given, method_given, call, argv=()) -> None:
    """Train and say where the result is."""
    training.run("finetune", given, method_given, call, argv)
