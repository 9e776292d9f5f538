"""Models of many equal layers from those of a few: bytes grow by the same amount with every further layer."""

from __future__ import annotations

import copy
from collections.abc import Iterable

from torch import nn
from transformers import PretrainedConfig

from lowrank_cli.memory.tracker import Peak
from lowrank_cli.models.layers import layers_of

# layers that are carried out; up to WHOLE a model is carried out as it is
FEW, WHOLE = (3, 4), 6
# layers at each end that have a peak of their own; between two of them it lies between theirs
ENDS = 2


def are_equal(model: nn.Module) -> bool:
    """Return whether all layers of a model are of the same kind and hold parameters of the same shapes and dtypes."""
    layers = layers_of(model)
    kinds = getattr(model.config.get_text_config(), "layer_types", None)
    if kinds is not None and len(set(kinds)) > 1:
        return False
    shapes = {tuple((name, tuple(p.shape), p.dtype) for name, p in layer.named_parameters()) for layer in layers}
    return len(shapes) == 1 and len({type(layer) for layer in layers}) == 1


def shortened(config: PretrainedConfig, num_layers: int) -> PretrainedConfig:
    """The same architecture with fewer layers."""
    short = copy.deepcopy(config)
    text = short.get_text_config()
    for key, value in vars(text).items():
        if isinstance(value, list) and len(value) == text.num_hidden_layers:
            setattr(text, key, value[:num_layers])
    text.num_hidden_layers = num_layers
    return short


def extended(few: list[Peak], more: list[Peak], num_layers: int) -> list[Peak]:
    """The peaks of a model of so many layers, from those with FEW[0] and with FEW[1].

    A part of an update that belongs to a layer is found by its distance from the first or from the last one; what it
    holds is then linear in the number of layers.
    """
    low, high = _by_place(few, FEW[0]), _by_place(more, FEW[1])
    factor = (num_layers - FEW[0]) / (FEW[1] - FEW[0])
    return [
        Peak(part.at, {k: v + factor * (high[place].bytes_by_label[k] - v) for k, v in part.bytes_by_label.items()})
        for place, part in low.items()
        if place in high
    ]


def _by_place(peaks: Iterable[Peak], num_layers: int) -> dict[tuple, Peak]:
    found = {}
    for peak in peaks:
        kind, part, index = peak.at
        if index < 0:
            found[kind, part] = peak
        if 0 <= index < ENDS:
            found[kind, part, "first", index] = peak
        if 0 <= num_layers - 1 - index < ENDS and index >= 0:
            found[kind, part, "last", num_layers - 1 - index] = peak
    return found
