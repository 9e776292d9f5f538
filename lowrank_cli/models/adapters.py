"""Adapters through the PEFT library: put into a model, saved apart from it, merged into it.

PEFT adapts linears, named in `target_modules`, and tensors of any module, such as those of experts, named in
`target_parameters`. On mixtures whose experts were linears once, it takes some names of linears for those of experts,
in adapters that are loaded too. Linears of such names are reached as tensors.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from lowrank_cli import foreign
from lowrank_cli.errors import UsageError
from lowrank_cli.models.adapted import WhyNot, shortest
from lowrank_cli.models.targets import last_parts, linears
from lowrank_cli.ops.precision import wide

NAME = "default"
PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"


def why_not(model: nn.Module, *, dora: bool = False, dropout: float = 0.0) -> WhyNot:
    """Return what says which weights PEFT has no LoRA for, or none of this kind.

    Args:
        model: without adapters.
        dora: of the adapter.
        dropout: of the adapter's input.
    """
    taken, kind = _taken_for_experts(model), getattr(getattr(model, "config", None), "model_type", "")

    def why(name: str, weight: Tensor) -> str:
        if not (weight.dim() == 3 or name in taken) or (weight.is_floating_point() and not dora and not dropout):
            return ""
        what = "tensors of experts" if weight.dim() == 3 else f"linears with names that {kind}'s experts had once"
        if dropout and not dora:
            return f"PEFT has no dropout for {what}: without it they are adapted"
        return f"PEFT has no {'DoRA' if dora else 'adapter in 4 bits'} for {what}"

    return why


def _taken_for_experts(model: nn.Module) -> set[str]:
    """Return the names of the weights whose linears PEFT takes for experts' if they are named."""
    found, taken = linears(model), set()
    for leaf in last_parts(found):
        config = LoraConfig(target_modules=[leaf])
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:
            # it wants others beside it, for parts of the same tensor
            taken.add(leaf)
        if config.target_parameters:
            taken.add(leaf)
    return {f"{name}.weight" for name in found if name.rpartition(".")[2] in taken}


def target_names(model: nn.Module, weights: Iterable[str]) -> dict[str, list[str] | None]:
    """Return the settings of PEFT that mean these weights of a model and no other.

    Args:
        model: without adapters.
        weights: names of parameters.
    """
    taken, named = _taken_for_experts(model), {f"{name}.weight" for name in linears(model)}
    modules = {name.removesuffix(".weight") for name in weights if name in named - taken}
    experts = {name for name in weights if name not in named}
    tensors = shortest(experts, (name for name, _ in model.named_parameters()))
    tensors += [name for name in weights if name in taken]
    return {
        "target_modules": shortest(modules, (name for name, _ in model.named_modules())),
        "target_parameters": tensors or None,
    }


def inject(model: nn.Module, config: PeftConfig, weights: Iterable[str]) -> None:
    """Put an adapter into a model, in place; every other parameter is frozen.

    Args:
        model: without adapters.
        config: PEFT's.
        weights: names of the parameters that it is for.
    Raises:
        UsageError: PEFT cannot adapt one of them, or adapts others.
    """
    try:
        inject_adapter_in_model(config, model, adapter_name=NAME)
    except ValueError as error:
        raise UsageError(
            f"the adapter does not fit this model: {' '.join(str(error).split())}", "name other targets"
        ) from None
    for p in model.parameters():
        if p.requires_grad and p.is_floating_point():
            # in bfloat16 the small updates of a fine-tuning would round to nothing; PEFT casts the input
            p.data = p.data.to(wide(p.dtype))
    found, wanted = {weight_of(name, layer) for name, layer in layers(model).items()}, set(weights)
    if found != wanted:
        others, missing = sorted(found - wanted), sorted(wanted - found)
        listed = [f"{len(others)} others, such as {others[0]}"] if others else []
        listed += [f"{len(missing)} fewer, such as {missing[0]}"] if missing else []
        raise UsageError(
            f"PEFT adapts other weights of this model than the chosen ones: {' and '.join(listed)}",
            f"name other targets; chosen and adapted are: {', '.join(last_parts(found & wanted)) or 'none'}",
        )


def layers(model: nn.Module) -> dict[str, BaseTunerLayer]:
    """The adapted modules by name; of several around the same module, such as experts, the outermost first."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def weight_of(name: str, layer: BaseTunerLayer) -> str:
    """Return the name that the weight of an adapted module had before."""
    return f"{name.replace('.base_layer', '')}.{getattr(layer, 'parameter_name', 'weight')}"


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
    found = layers(model)
    for layer in found.values():
        layer.merge(safe_merge=True)
    for name, layer in found.items():
        parent, _, leaf = name.rpartition(".")
        # of several around the same module the outermost goes, and the others with it
        if parent not in found:
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
