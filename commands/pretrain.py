"""`lowrank pretrain`: train a language model from scratch, or on from a checkpoint."""

from __future__ import annotations

from functools import partial

from lowrank_cli.commands import training

from lowrank_cli import options

HELP = """Train a language model on text, from scratch or from --continue-from.

With no options: the llama-9m preset on the embedded corpus, in minutes on a laptop."""


def register(app, argv) -> None:
    """Add the command to the application."""
    options.register(app, "pretrain", HELP, partial(pretrain, argv=argv), argv)


def pretrain(given, method_given, call, argv=()) -> None:
    """Train and say where the result is."""
    training.run("pretrain", given, method_given, call, argv)
