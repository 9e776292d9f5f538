"""The decomposition of every matrix of a model, one after the other, weighted by text if there is some."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lowrank_cli.compress.progress import progress
from lowrank_cli.errors import UsageError
from lowrank_cli.models.lowrank_linear import low_rank_linears, shape_of, weight_of
from lowrank_cli.models.targets import select, table
from lowrank_cli.svd import calibration, layerwise
from lowrank_cli.svd.calibration import Target
from lowrank_cli.svd.routed import key_of
from lowrank_cli.svd.shelf import Shelf
from lowrank_cli.svd.spectrum import Decomposition, decompose

# bytes of decompositions and layers' inputs, or of second moments, that are held in memory
HELD = 4 << 30


class Store:
    """Decompositions of matrices by name, on a shelf; of experts by `key_of` the name and the expert.

    Args:
        folder: for what does not fit in memory.
        budget: bytes held in memory, of decompositions and of what calibration keeps meanwhile.
    Attributes:
        values: the singular values, by name.
    """

    def __init__(self, folder: Path, budget: int = HELD):
        self.shelf = Shelf(folder, budget)
        self.values: dict[str, Tensor] = {}
        self.sides: dict[str, str] = {}

    def put(self, name: str, found: Decomposition) -> None:
        """Keep one."""
        self.values[name], self.sides[name] = found.values.cpu(), found.side
        tensors = {"basis": found.basis}
        self.shelf.put(name, tensors if found.dual is found.basis else {**tensors, "dual": found.dual})

    def get(self, name: str) -> Decomposition:
        """The one of a matrix."""
        tensors = self.shelf.get(name)
        basis = tensors["basis"]
        return Decomposition(self.values[name].to(basis.device), basis, tensors.get("dual", basis), self.sides[name])

    def values_of(self, name: str, target: Target) -> Tensor:
        """The singular values of a linear, (k,), or of experts, (E, k)."""
        found = [self.values[key] for key in matrices_of(name, target)]
        return torch.stack(found) if len(shape_of(target)) == 3 else found[0]


def matrices_of(name: str, target: Target) -> dict[str, Tensor]:
    """The matrices of a linear, which is one, or of experts, by name, as views."""
    weight = weight_of(target)
    return {name: weight} if weight.dim() == 2 else {key_of(name, e): one for e, one in enumerate(weight)}


@dataclass
class Targets:
    """The linears and experts of a model that can be compressed.

    Attributes:
        linears: by name; parameters of experts by the parameter's.
        skipped: why others were left out, by name.
    """

    linears: dict[str, Target]
    skipped: dict[str, str]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """(out, in) by name; (E, m, n) of experts, as they are stored."""
        return {name: shape_of(module) for name, module in self.linears.items()}


def find_targets(model: nn.Module) -> Targets:
    """Find the matrices of every layer, but those that share their weight with another module; say what is left out.

    Args:
        model: any, on the meta device too.
    Raises:
        UsageError: the model has none, or is compressed already.
    """
    if low_rank_linears(model):
        raise already_compressed()
    users: dict[Tensor, int] = {}
    for _, p in model.named_parameters(remove_duplicate=False):
        users[p] = users.get(p, 0) + 1
    linears, skipped, chosen = {}, {}, select(model, None)
    for row in table(model):
        is_stack = row.weight.dim() == 3
        name = row.name if is_stack else row.name.removesuffix(".weight")
        if row.why or not (is_stack or name in chosen):
            skipped[name] = f"is {row.why or 'of another part of the model'}"
        elif users[row.weight] > 1:
            skipped[name] = "shares its weight with another module"
        elif min(row.weight.shape[-2:]) < 2:
            skipped[name] = "has one row or column"
        else:
            linears[name] = row if is_stack else chosen[name]
    if not linears:
        raise UsageError("the model has no linear that can be compressed", "take a decoder such as llama or gpt2")
    return Targets(linears, skipped)


def already_compressed() -> UsageError:
    """For a model that has low-rank linears."""
    return UsageError(
        "the model is compressed already", "give the one that it was made from, or merge it: --format dense"
    )


def decompose_all(
    model: nn.Module,
    linears: Mapping[str, Target],
    store: Store,
    *,
    windows: Sequence[Tensor],
    two_sided: bool,
    damping: float,
    largest: Callable[[str], int],
    seed: int = 0,
) -> None:
    """Decompose every matrix into the store, weighted by text: as a whole if its moments fit, else layer by layer.

    Args:
        model: the model that the linears are of.
        linears: by name, and experts.
        store: takes them.
        windows: of calibration text, (B, T) each.
        two_sided: by the gradients at the outputs too.
        damping: see `svd.spectrum.decompose`.
        largest: of a linear, the largest rank that it could be factored at: directions after it are not kept.
        seed: of the labels drawn for two-sided weighting.
    """
    names = {key: name for name, m in linears.items() for key in matrices_of(name, m)}

    def keep(moments: dict[str, calibration.Moments]) -> None:
        # a matrix's moments are freed once it is decomposed
        key, own = moments.popitem()
        name = names[key]
        found = decompose(matrices_of(name, linears[name])[key], *own.sides, damping=damping)
        found = replace(found, values=found.values * math.sqrt(own.share))
        store.put(key, found.first(largest(name)))

    groups = calibration.groups({name: shape_of(m) for name, m in linears.items()}, HELD, two_sided)
    chain = layerwise.chain_of(model) if len(groups) > 1 else None
    by_layer = layerwise.of_layers(chain, linears) if chain else None
    if chain and by_layer:
        passing = layerwise.LayerMoments(
            chain, by_layer, windows, two_sided=two_sided, shelf=store.shelf, budget=HELD, seed=seed
        )
        with progress("passing text through the layers", len(windows)) as advance:
            passing.forward(advance)
        with progress("calibrating and decomposing layers", sum(map(len, passing.parts))) as advance:
            for moments in passing.moments():
                while moments:
                    keep(moments)
                advance()
        return
    for number, group in enumerate(groups, 1):
        part = f", group {number} of {len(groups)}" if len(groups) > 1 else ""
        chosen = {name: linears[name] for name in group}
        with progress(f"calibrating{part}", len(windows)) as advance:
            moments = calibration.collect(
                model, chosen, windows, two_sided=two_sided, experts=group, seed=seed, advance=advance
            )
        with progress(f"decomposing{part}", len(moments)) as advance:
            while moments:
                keep(moments)
                advance()
