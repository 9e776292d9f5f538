"""The repeating layers of a model."""

from torch import nn


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The decoder or encoder layers: the list of as many modules as the configuration says; empty if there is none."""
    count = getattr(model.config, "num_hidden_layers", None)
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    return list(lists[0]) if lists else []
