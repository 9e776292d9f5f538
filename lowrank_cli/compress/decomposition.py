"""The decomposition of every linear of a model, one after the other, weighted by text if there is some."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from lowrank_cli.compress.progress import progress
from lowrank_cli.errors import UsageError
from lowrank_cli.models.lowrank_linear import low_rank_linears, shape_of, weight_of
from lowrank_cli.models.targets import select, table
from lowrank_cli.svd import calibration, layerwise
from lowrank_cli.svd.shelf import Shelf
from lowrank_cli.svd.spectrum import Decomposition, decompose

# bytes of decompositions and layers' inputs, or of second moments, that are held in memory
HELD = 4 << 30


class Store:
    """Decompositions by name, on a shelf.

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
        """The one of a linear."""
        tensors = self.shelf.get(name)
        basis = tensors["basis"]
        return Decomposition(self.values[name].to(basis.device), basis, tensors.get("dual", basis), self.sides[name])


@dataclass
class Targets:
    """The linears of a model that can be compressed.

    Attributes:
        linears: by name.
        skipped: why others were left out, by name.
    """

    linears: dict[str, nn.Module]
    skipped: dict[str, str]

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) by name."""
        return {name: shape_of(module) for name, module in self.linears.items()}


def find_targets(model: nn.Module) -> Targets:
    """Find the linears of every layer, but those that share their weight with another module; say what is left out.

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
    linears, chosen = {}, select(model, None)
    left = {row.name.removesuffix(".weight"): row.why for row in table(model)}
    skipped = {name: f"is {why or 'of experts, which stay as they are'}" for name, why in left.items()
               if name not in chosen}  # fmt: skip
    for name, module in chosen.items():
        if users[module.weight] > 1:
            skipped[name] = "shares its weight with another module"
        elif min(shape_of(module)) < 2:
            skipped[name] = "has one row or column"
        else:
            linears[name] = module
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
    linears: Mapping[str, nn.Module],
    store: Store,
    *,
    windows: Sequence[Tensor],
    two_sided: bool,
    damping: float,
    largest: Callable[[str], int],
    seed: int = 0,
) -> None:
    """Decompose every linear into the store, weighted by text: as a whole if its moments fit, else layer by layer.

    Args:
        model: the model that the linears are of.
        linears: by name.
        store: takes them.
        windows: of calibration text, (B, T) each.
        two_sided: by the gradients at the outputs too.
        damping: see `svd.spectrum.decompose`.
        largest: of a linear, the largest rank that it could be factored at: directions after it are not kept.
        seed: of the labels drawn for two-sided weighting.
    """

    def keep(moments: dict[str, calibration.Moments]) -> None:
        # a linear's moments are freed once it is decomposed
        name, own = moments.popitem()
        found = decompose(weight_of(linears[name]), own.input, own.output, damping=damping)
        store.put(name, found.first(largest(name)))

    groups = calibration.groups({name: shape_of(m) for name, m in linears.items()}, HELD, two_sided)
    chain = layerwise.chain_of(model) if len(groups) > 1 else None
    by_layer = layerwise.of_layers(chain, linears) if chain else None
    if chain and by_layer:
        passing = layerwise.LayerMoments(chain, by_layer, windows, two_sided=two_sided, shelf=store.shelf, seed=seed)
        with progress("passing text through the layers", len(windows)) as advance:
            passing.forward(advance)
        with progress("calibrating and decomposing layers", sum(map(bool, by_layer))) as advance:
            for moments in passing.moments():
                while moments:
                    keep(moments)
                advance()
        return
    for number, names in enumerate(groups, 1):
        part = f", group {number} of {len(groups)}" if len(groups) > 1 else ""
        chosen = {name: linears[name] for name in names}
        with progress(f"calibrating{part}", len(windows)) as advance:
            moments = calibration.collect(model, chosen, windows, two_sided=two_sided, seed=seed, advance=advance)
        with progress(f"decomposing{part}", len(moments)) as advance:
            while moments:
                keep(moments)
                advance()
