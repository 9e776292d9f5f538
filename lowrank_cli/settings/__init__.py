"""List the settings of each command: the dataclasses behind its flags, its YAML and its part of the docs."""

from dataclasses import dataclass, field
from typing import Any

from lowrank_cli.settings.common import Call, CommonConfig, Invocation, SourceConfig
from lowrank_cli.settings.compress import CompressConfig, SpectraConfig
from lowrank_cli.settings.evaluate import HarnessConfig
from lowrank_cli.settings.finetune import TaskConfig
from lowrank_cli.settings.training import DataConfig, EvalConfig, ModelConfig, OptimConfig, TrainConfig


@dataclass(frozen=True)
class Command:
    """The settings of one command.

    Attributes:
        sections: dataclasses by their name in `RunConfig`.
        method: the method without --method; None for a command that has no methods.
        call: what concerns one call only.
        argument: a setting that is typed without a flag: `lowrank eval mmlu`.
        hidden: keys of the sections that this command does not offer.
        defaults: settings that differ in this command.
    """

    sections: dict[str, type]
    method: str | None
    call: type = Call
    argument: str = ""
    hidden: frozenset[str] = frozenset()
    defaults: dict[str, Any] = field(default_factory=dict)


TRAINING = {
    "model": ModelConfig,
    "data": DataConfig,
    "optim": OptimConfig,
    "train": TrainConfig,
    "eval": EvalConfig,
    "common": CommonConfig,
}
COMMANDS = {
    "pretrain": Command(TRAINING, method="full", call=Invocation),
    "finetune": Command(
        {"model": ModelConfig, "task": TaskConfig, **{k: v for k, v in TRAINING.items() if k != "model"}},
        method="lora",
        call=Invocation,
        hidden=frozenset({"model_config", "continue_from", "vocab_size", "packing", "streaming"}),
        defaults={
            "dataset": "docstrings",
            "packing": "padded",
            "max_length": 512,
            "scheduler": "linear",
            "min_lr_ratio": 0.0,
            "lr": 2e-4,
            "grad_clipping": 1.0,
        },
    ),
    "compress": Command({"model": SourceConfig, "compress": CompressConfig, "common": CommonConfig}, method="welore"),
    "svd-dump": Command({"model": SourceConfig, "spectra": SpectraConfig, "common": CommonConfig}, method=None),
    "eval": Command(
        {"model": SourceConfig, "harness": HarnessConfig, "common": CommonConfig}, method=None, argument="tasks"
    ),
}
