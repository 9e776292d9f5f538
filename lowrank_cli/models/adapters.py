"""Adapters through the PEFT library: put into a model, saved apart from it, merged into it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from lowrank_cli import foreign
from lowrank_cli.errors import UsageError
from lowrank_cli.ops.precision import wide

NAME = "default"
PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"


def inject(model: nn.Module, config: PeftConfig) -> None:
    """Put an adapter into a model, in place; every other parameter is frozen.

    Raises:
        UsageError: PEFT cannot adapt one of the targeted modules.
    """
    try:
        inject_adapter_in_model(config, model, adapter_name=NAME)
        for p in model.parameters():
            if p.requires_grad and p.is_floating_point():
                # in bfloat16 the small updates of a fine-tuning would round to nothing; PEFT casts the input
                p.data = p.data.to(wide(p.dtype))
    except ValueError as error:
        raise UsageError(
            f"the adapter does not fit this model: {' '.join(str(error).split())}", "name other targets"
        ) from None


def layers(model: nn.Module) -> dict[str, BaseTunerLayer]:
    """The adapted modules by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's own tensors, by PEFT's names in a file."""
    names = {
        f"{layer}.{name}": parameter
        for layer, module in layers(model).items()
        for name, parameter in module.named_parameters()
        if not name.startswith("base_layer.")
    }
    return {PREFIX + name.replace(f".{NAME}", ""): p.detach().contiguous() for name, p in names.items()}


def save(model: nn.Module, folder: Path, config: PeftConfig, base: str) -> None:
    """Write an adapter as `PeftModel.from_pretrained` loads it."""
    config.base_model_name_or_path = base
    config.inference_mode = True
    config.save_pretrained(folder)
    save_file(tensors(model), folder / WEIGHTS, metadata={"format": "pt"})


def merge(model: nn.Module) -> None:
    """Merge every adapter into its base weight and put the plain modules back, in place."""
    for name, layer in layers(model).items():
        layer.merge(safe_merge=True)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer.get_base_layer())


def add_head(folder: Path, head: dict[str, Tensor], modules: list[str], task_type: str) -> None:
    """Add the tensors of a trained head to a saved adapter, as PEFT's `modules_to_save`.

    Args:
        folder: with a saved adapter.
        head: tensors by their names in the model.
        modules: names of the modules that they are of.
        task_type: PEFT's name of the task, such as SEQ_CLS.
    """
    content: dict[str, Any] = foreign.read_tensors(folder / WEIGHTS)
    content |= {PREFIX + name: tensor.detach().contiguous() for name, tensor in head.items()}
    save_file(content, folder / WEIGHTS, metadata={"format": "pt"})
    config = foreign.from_pretrained(PeftConfig, folder)
    config.modules_to_save = modules
    config.task_type = task_type
    config.save_pretrained(folder)
