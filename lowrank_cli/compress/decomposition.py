"""The decomposition of every linear of a model, one after the other, weighted by text if there is some."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lowrank_cli.compress.progress import progress
from lowrank_cli.errors import UsageError
from lowrank_cli.models.lowrank_linear import shape_of, weight_of
from lowrank_cli.models.targets import select
from lowrank_cli.svd import calibration
from lowrank_cli.svd.spectrum import Decomposition, decompose, singular_values

# bytes of decompositions, and of second moments, that are held in memory
HELD = 4 << 30


@dataclass
class Store:
    """Decompositions by name: in memory up to a budget, then in a folder.

    Attributes:
        folder: for what does not fit.
        budget: bytes.
    """

    folder: Path
    budget: int = HELD
    held: dict[str, Decomposition] = field(default_factory=dict)
    sides: dict[str, str] = field(default_factory=dict)

    def put(self, name: str, found: Decomposition) -> None:
        """Keep one."""
        size = found.basis.nbytes + (found.dual.nbytes if found.dual is not found.basis else 0)
        self.sides[name] = found.side
        if size <= self.budget:
            self.budget -= size
            self.held[name] = found
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        same = found.dual is found.basis
        tensors = {"values": found.values, "basis": found.basis.contiguous()}
        save_file(tensors if same else {**tensors, "dual": found.dual.contiguous()}, self.path(name))

    def get(self, name: str) -> Decomposition:
        """The one of a linear."""
        if name in self.held:
            return self.held[name]
        tensors = load_file(self.path(name))
        return Decomposition(
            tensors["values"], tensors["basis"], tensors.get("dual", tensors["basis"]), self.sides[name]
        )

    def path(self, name: str) -> Path:
        """Its file, if it was not held."""
        return self.folder / f"{name}.safetensors"


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
    """Attention and feed-forward linears of every layer, but those that share their weight with another module.

    Args:
        model: any; on the meta device no weight is looked at.
    Raises:
        UsageError: the model has none, or is compressed already.
    """
    from lowrank_cli.models.lowrank_linear import low_rank_linears

    if low_rank_linears(model):
        raise UsageError(
            "the model is compressed already", "give the one that it was made from, or merge it: --format dense"
        )
    users: dict[Tensor, int] = {}
    for _, p in model.named_parameters(remove_duplicate=False):
        users[p] = users.get(p, 0) + 1
    linears, skipped = {}, {}
    for name, module in select(model, None).items():
        if users[module.weight] > 1:
            skipped[name] = "shares its weight with another module"
        elif min(shape_of(module)) < 2:
            skipped[name] = "has one row or column"
        else:
            linears[name] = module
    if not linears:
        raise UsageError("the model has no linear that can be compressed", "take a decoder such as llama or gpt2")
    check_finite(linears)
    return Targets(linears, skipped)


def check_finite(linears: Mapping[str, nn.Module]) -> None:
    """Raises UsageError naming the first weight with a value that is not finite."""
    for name, module in linears.items():
        if not module.weight.is_meta and not bool(torch.isfinite(module.weight).all()):
            raise UsageError(
                f"{name}.weight holds a value that is not finite", "the model is broken: load a sound copy of it"
            )


def plain_values(linears: Mapping[str, nn.Module], advance: Callable[[], None] = lambda: None) -> dict[str, Tensor]:
    """The singular values of every weight."""
    found = {}
    for name, module in linears.items():
        found[name] = singular_values(weight_of(module))
        advance()
    return found


def decompose_all(
    model: nn.Module,
    linears: Mapping[str, nn.Module],
    store: Store,
    *,
    windows: Iterable[Tensor] = (),
    weighting: str = "none",
    damping: float,
    seed: int = 0,
) -> None:
    """Decompose every linear into the store; with weighting, after collecting moments, group by group.

    Args:
        model: the model that the linears are of.
        linears: by name.
        store: takes them.
        windows: of calibration text, (B, T) each.
        weighting: "none", "input" or "two-sided".
        damping: see `svd.spectrum.decompose`.
        seed: of the labels drawn for two-sided weighting.
    """
    shapes = {name: shape_of(module) for name, module in linears.items()}
    windows = list(windows)
    two_sided = weighting == "two-sided"
    cut = [list(linears)] if weighting == "none" else calibration.groups(shapes, HELD, two_sided)
    passes = 0 if weighting == "none" else len(cut) * len(windows)
    with progress("calibrating" if passes else "decomposing", passes + len(linears)) as advance:
        for names in cut:
            moments: dict[str, calibration.Moments] = {}
            if weighting != "none":
                moments = calibration.collect(
                    model, {n: linears[n] for n in names}, windows, two_sided=two_sided, seed=seed, advance=advance
                )
            for name in names:
                given = moments.pop(name, calibration.Moments())
                store.put(name, decompose(weight_of(linears[name]), given.input, given.output, damping=damping))
                advance()
