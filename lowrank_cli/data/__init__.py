"""Batches of tokens: sources of text, tokenizers, packed and padded streams; instructions and tasks."""

from typing import Any

__all__ = ["TextData", "build"]


def __getattr__(name: str) -> Any:
    # on first use: what a task is can be asked without torch
    if name in __all__:
        from lowrank_cli.data import tokens

        return getattr(tokens, name)
    raise AttributeError(f"module 'lowrank_cli.data' has no attribute {name!r}")
