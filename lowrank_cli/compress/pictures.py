"""Pictures of singular values and ranks: layers against kinds of matrices, and the curves of each kind."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Set
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from lowrank_cli.svd.rank_selection import normalise

DPI = 130
# more points than a curve can show
POINTS = 400
_LAYER = re.compile(r"(?:^|\.)(\d+)\.(.+)")


def place_of(name: str) -> tuple[int, str]:
    """The layer's number and the name within the layer: model.layers.3.self_attn.q_proj is (3, self_attn.q_proj)."""
    found = _LAYER.search(name)
    return (int(found[1]), found[2]) if found else (0, name)


def grid(values: Mapping[str, float]) -> tuple[list[int], list[str], list[list[float]]]:
    """Layers, kinds and a table of values, kinds x layers, NaN where a layer lacks a kind."""
    places = {place_of(name): value for name, value in values.items()}
    layers = sorted({layer for layer, _ in places})
    kinds = list(dict.fromkeys(kind for _, kind in places))
    return layers, kinds, [[places.get((layer, kind), math.nan) for layer in layers] for kind in kinds]


def heat_map(
    path: Path, values: Mapping[str, float], *, title: str, label: str, marked: Set[str] = frozenset()
) -> None:
    """Layers against kinds of linears, a colour for each value from 0 to 1; a dot for what is marked."""
    layers, kinds, table = grid(values)
    figure = Figure(figsize=(max(6.5, 2.8 + 0.27 * len(layers)), 1.7 + 0.38 * len(kinds)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(table, aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    every = max(1, len(layers) // 16)
    axes.set_xticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]])
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set(title=title, xlabel="layer")
    spots = [place_of(name) for name in marked]
    if spots:
        axes.scatter(
            [layers.index(layer) for layer, _ in spots], [kinds.index(kind) for _, kind in spots],
            s=14, color="white", edgecolors="black", linewidths=0.5, label="dense (N-LRC)",
        )  # fmt: skip
        figure.legend(loc="outside lower center", frameon=False)
    figure.colorbar(image, ax=axes, label=label)
    figure.savefig(path, dpi=DPI)


def rank_map(path: Path, kept: Mapping[str, float], dense: Set[str]) -> None:
    """The share of its rank that each linear keeps."""
    heat_map(path, kept, title="Rank kept by each linear", label="rank / full rank", marked=dense)


def curves(path: Path, spectra: Mapping[str, Tensor], *, title: str) -> None:
    """Normalised singular values, a panel for each kind of matrix and a curve for each layer; of experts (E, k) a
    faint curve for each, and their mean."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator

    layers, kinds, _ = grid(dict.fromkeys(spectra, 0.0))
    columns = min(4, len(kinds))
    lines = -(-len(kinds) // columns)
    figure = Figure(figsize=(3.1 * columns + 0.9, 2.6 * lines + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    scale = Normalize(layers[0], max(layers[-1], layers[0] + 1))
    colours = colormaps["viridis"]
    for name, values in spectra.items():
        layer, kind = place_of(name)
        axes = panels.flat[kinds.index(kind)]
        count = values.shape[-1]
        chosen = torch.linspace(0, count - 1, min(POINTS, count)).round().long()
        x = chosen / max(1, count - 1)
        experts = [] if values.dim() == 1 else list(values)
        for one in experts:
            axes.plot(x, normalise(one.double())[chosen], color=colours(scale(layer)), linewidth=0.3, alpha=0.3)
        mean = values.mean(0) if experts else values
        axes.plot(x, normalise(mean.double())[chosen], color=colours(scale(layer)), linewidth=0.9)
    for i, axes in enumerate(panels.flat):
        axes.set_visible(i < len(kinds))
        if i < len(kinds):
            axes.set_title(kinds[i], fontsize=10)
            axes.grid(alpha=0.3)
            # the panel below may be an empty one
            axes.tick_params(labelbottom=i + columns >= len(kinds))
    figure.suptitle(title)
    figure.supxlabel("index of the singular value / number of them")
    figure.supylabel("normalised singular value")
    ticks = MaxNLocator(integer=True)
    figure.colorbar(ScalarMappable(scale, colours), ax=panels, label="layer", ticks=ticks)
    figure.savefig(path, dpi=DPI)
