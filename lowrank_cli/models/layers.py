"""The part of a model that text goes through: its decoder, its repeating layers; and what lies beside it."""

from __future__ import annotations

import re

from torch import nn

# a layer is an entry of a list: model.layers.3., transformer.h.0., bert.encoder.layer.11.
IN_LAYER = re.compile(r"(^|\.)\d+\.")


def decoder_of(model: nn.Module) -> nn.Module:
    """Return the part of a model that reads text: its decoder, or all of it where the decoder is not told apart."""
    found = model.get_decoder() if hasattr(model, "get_decoder") else None
    names = (name for name, _ in found.named_parameters()) if isinstance(found, nn.Module) else ()
    return found if any(map(IN_LAYER.search, names)) else model


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Return the layers: the list of as many modules as the configuration says; empty if there is none."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    count = getattr(config, "num_hidden_layers", None)
    modules = decoder_of(model).modules()
    lists = [module for module in modules if isinstance(module, nn.ModuleList) and len(module) == count]
    return list(lists[0]) if lists else []


def outside_text(model: nn.Module) -> set[nn.Module]:
    """Return the modules that text does not go through: the towers of a multimodal model and their projectors.

    Args:
        model: any; one for text alone has none.
    """
    if not _has_other_inputs(model):
        return set()
    inside = {module for part in _text_parts(model) for module in part.modules()}
    return {module for module in _body(model).modules() if inside.isdisjoint(module.modules())}


def freeze_outside_text(model: nn.Module) -> None:
    """Leave what text does not go through as it is: a loss of text has no gradient for it."""
    if _has_other_inputs(model):
        used = {p for part in _text_parts(model) for p in part.parameters()}
        for p in _body(model).parameters():
            p.requires_grad_(p.requires_grad and p in used)


def _text_parts(model: nn.Module) -> list[nn.Module]:
    parts = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
    return [part for part in parts if part is not None]


def _body(model: nn.Module) -> nn.Module:
    # the head of a classifier stands beside it
    return model.base_model if "SequenceClassification" in type(model).__name__ else model


def _has_other_inputs(model: nn.Module) -> bool:
    config = getattr(model, "config", None)
    return hasattr(model, "get_decoder") and config.get_text_config() is not config
