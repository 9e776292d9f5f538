"""Files of singular values: ours, and the layout that WeLore's authors published."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from lowrank_cli import foreign
from lowrank_cli.compress.pictures import place_of
from lowrank_cli.errors import MissingError, UsageError
from lowrank_cli.svd.spectrum import effective_rank

VALUES = "singular_values.safetensors"
PUBLISHED = "singular_values.pt"
GIVE = "give the folder of an svd-dump, or a .pt file of tensors {layer: {name: values}}"
COLUMNS = (
    "name",
    "expert",
    "layer",
    "kind",
    "out",
    "in",
    "rank",
    "largest",
    "smallest",
    "effective_rank",
    "rank_of_90_percent",
)


def write_spectra(
    folder: Path, values: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], stem: str = "singular_values"
) -> None:
    """STEM.safetensors with every value, and STEM.csv with a line for each linear, each expert, and experts' mean."""
    content = save({name: v.float().contiguous() for name, v in values.items()})
    (folder / f"{stem}.safetensors").write_bytes(content)
    with (folder / f"{stem}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for name, v in values.items():
            for expert, one in spectra_of(v).items():
                writer.writerow(line(name, expert, one, shapes[name][-2:]))


def spectra_of(values: Tensor) -> dict[int | str | None, Tensor]:
    """The spectrum of a linear, or those of experts by number, and their mean."""
    return {None: values} if values.dim() == 1 else {**dict(enumerate(values)), "mean": values.mean(0)}


def line(name: str, expert: int | str | None, values: Tensor, shape: tuple[int, int]) -> dict[str, Any]:
    """A matrix's row of the CSV file."""
    layer, kind = place_of(name)
    squares = values.double().square()
    share = squares.cumsum(0) / squares.sum().clamp(min=1e-300)
    return {
        "name": name, "expert": expert, "layer": layer, "kind": kind, "out": shape[0], "in": shape[1],
        "rank": values.numel(), "largest": float(values[0]), "smallest": float(values[-1]),
        "effective_rank": round(effective_rank(values), 2), "rank_of_90_percent": int((share < 0.9).sum()) + 1,
    }  # fmt: skip


def write_published(path: Path, values: Mapping[str, Tensor]) -> None:
    """The layout of the authors' files: {layer: {name in the layer: singular values}}, of experts (E, k)."""
    content: dict[int, dict[str, Tensor]] = {}
    for name, v in values.items():
        layer, kind = place_of(name)
        content.setdefault(layer, {})[kind] = v.float()
    torch.save(content, path)


def read_spectra(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Singular values from a dump's folder, its file, or a published .pt file, for the linears of a model.

    Args:
        path: what was given.
        shapes: (out, in) of the model's linears, (E, m, n) of experts, by name.
    Returns:
        Values by name, (k,) or (E, k), descending, in float64, for exactly these linears and experts.
    Raises:
        MissingError: nothing there.
        UsageError: no file of singular values, or that of another model.
    """
    file = path / VALUES if path.is_dir() else path
    if not file.is_file():
        raise MissingError(f"no singular values at {file}", "make them: lowrank svd-dump")
    with foreign.reading(file, "singular values", GIVE):
        read = foreign.read_tensors(file, hint=GIVE) if file.suffix == ".safetensors" else published(file)
        found = {name: v.double() for name, v in read.items()}
    by_place = {place_of(name): v for name, v in found.items()}
    values = {}
    for name, (*experts, m, n) in shapes.items():
        v = found.get(name, by_place.get(place_of(name)))
        if v is None or v.numel() != math.prod([*experts, min(m, n)]):
            there = "none" if v is None else f"{v.numel()}"
            raise UsageError(
                f"{file} is of another model: it has {there} singular values for {name}, which is "
                f"{' x '.join(map(str, (*experts, m, n)))}",
                "make those of this model: lowrank svd-dump",
            )
        if not bool(torch.isfinite(v).all()) or bool((v < 0).any()):
            raise UsageError(f"{file} holds impossible singular values for {name}", "make the file again")
        values[name] = v.reshape(*experts, min(m, n)).sort(descending=True).values
    return values


def published(file: Path) -> dict[str, Tensor]:
    """The values of a .pt file by LAYER.NAME; only tensors and plain containers are read.

    Raises:
        ValueError: another layout.
    """
    content = foreign.read_pickle(file, GIVE)
    if not isinstance(content, dict):
        raise ValueError("it holds no mapping of layers")
    found = {}
    for layer, entries in content.items():
        if not isinstance(entries, dict):
            raise ValueError(f"layer {layer} holds no mapping of names")
        for name, v in entries.items():
            if not isinstance(v, (Tensor, list, tuple)):
                raise ValueError(f"{name} of layer {layer} is no tensor")
            found[f"{int(layer)}.{str(name).removesuffix('.weight')}"] = torch.as_tensor(v)
    return found
