"""LoRA, through the PEFT library: a low-rank update beside every frozen linear.

    y = W0 x + alpha / r * B (A x),   A: r x n drawn as Kaiming-uniform, B: m x r zero

Only A and B train. Hu et al., arXiv:2106.09685. The layer is PEFT's; what this file adds is the choice of targets,
the optimizer's groups and the files. A and B are ordinary linears, so GaLore and VeLoRA act on them like on any other.
Those of experts, (rank x experts, n) and (m, rank x experts), are the factors of a tensor's update: each is projected
as one matrix, and no text goes through them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowrank_cli.fields import option
from lowrank_cli.methods.base import Method

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from torch import nn

TARGETS = (
    "matrices to adapt: all-linear (of the layers, experts too, never the head), or comma-separated parts of names "
    "such as q_proj,v_proj,experts"
)


class LoRA(Method):
    title = "LoRA"
    paper = "https://arxiv.org/abs/2106.09685"
    summary = "a trained low-rank update beside frozen weights"
    acts_on = frozenset({"weights"})
    commands = frozenset({"finetune"})
    instead_of_full = frozenset({"finetune"})
    adapter = True
    dora = False

    @dataclass(frozen=True)
    class Config:
        rank: int = option(8, "rank of the update", min=1)
        alpha: float = option(16.0, "the update is scaled by alpha / rank", above=0)
        dropout: float = option(0.0, "dropout on the adapter's input", min=0, below=1)
        target_modules: str = option("all-linear", TARGETS)
        rslora: bool = option(False, "scale by alpha / sqrt(rank) instead (arXiv:2312.03732)")

    def wrap(self, model: nn.Module) -> None:
        from lowrank_cli.models import adapters
        from lowrank_cli.models.adapted import adapted

        why_not = adapters.why_not(model, dora=self.dora, dropout=self.config.dropout)
        weights = adapted(model, self.config.target_modules, self.title, why_not)
        adapters.inject(model, self.peft_config(model, weights), weights)

    def peft_config(self, model: nn.Module, weights: Iterable[str]):
        """PEFT's configuration of this adapter for weights of a model."""
        from peft import LoraConfig

        from lowrank_cli.models.adapters import target_names

        return LoraConfig(
            r=self.config.rank,
            lora_alpha=self.config.alpha,
            lora_dropout=self.config.dropout,
            use_rslora=self.config.rslora,
            use_dora=self.dora,
            **target_names(model, weights),
            fan_in_fan_out=_is_transposed(model),
            task_type="SEQ_CLS" if "SequenceClassification" in type(model).__name__ else "CAUSAL_LM",
        )

    def param_groups(self, model: nn.Module, groups: list[dict]) -> list[dict]:
        tagged = []
        for group in groups:
            own = [(name, p) for name, p in group["params"] if ".lora_" in name]
            rest = [(name, p) for name, p in group["params"] if ".lora_" not in name]
            # "full" is what methods on gradients and activations look for: they may still take A and B
            tagged += [{**group, "params": own, "adapter": self.name}] if own else []
            tagged += [{**group, "params": rest, "why": "the head of the task"}] if rest else []
        return tagged

    def treated(self, model: nn.Module, groups: list[dict]) -> set[str]:
        from lowrank_cli.models import adapters

        return {adapters.weight_of(name, layer) for name, layer in adapters.layers(model).items()}

    def merge(self, model: nn.Module) -> None:
        from lowrank_cli.models import adapters

        adapters.merge(model)

    def save_adapter(self, model: nn.Module, folder: Path, base: str) -> None:
        from lowrank_cli.models import adapters

        adapters.save(model, folder, model.peft_config[adapters.NAME], base)


def _is_transposed(model: nn.Module) -> bool:
    """Return whether the model has linears of GPT-2's kind, Conv1D, whose weights are transposed."""
    from transformers.pytorch_utils import Conv1D

    return any(isinstance(module, Conv1D) for module in model.modules())
