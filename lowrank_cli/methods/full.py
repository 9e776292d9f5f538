"""Full-rank training: the baseline that the other methods are compared with."""

from dataclasses import dataclass

from lowrank_cli.methods.base import Method


class Full(Method):
    title = "full-rank AdamW"
    paper = "https://arxiv.org/abs/1711.05101"
    summary = "every weight with torch's own AdamW: the baseline"
    commands = frozenset({"pretrain", "finetune"})
    command_defaults = {"finetune": {"lr": 2e-5}}

    @dataclass(frozen=True)
    class Config:
        """No settings of its own."""
