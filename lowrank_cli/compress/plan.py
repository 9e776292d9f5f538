"""Plan a compression from its settings and the model's configuration (`--dry-run`): what it compresses and needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lowrank_cli import console
from lowrank_cli.compress.decomposition import HELD, find_targets
from lowrank_cli.compress.preparation import check_budget, given_spectra, loaded_dtype, outline, reached
from lowrank_cli.compress.report import by
from lowrank_cli.config import RunConfig
from lowrank_cli.models import load as models
from lowrank_cli.models.layers import layers_of
from lowrank_cli.models.share import Share
from lowrank_cli.svd.calibration import groups, moment_bytes
from lowrank_cli.svd.rank_selection import Spectra


@dataclass(frozen=True)
class Plan:
    """A Plan says what a compression would do.

    Attributes:
        shapes: (out, in) of the linears that would be compressed, and (E, m, n) of experts, by name.
        skipped: why others would not, by name.
        weighting: "none", "input" or "two-sided".
        needs: bytes by what they are for.
        share: of the layers' parameters that would be compressed.
    """

    shapes: dict[str, tuple[int, ...]]
    skipped: dict[str, str]
    weighting: str
    needs: dict[str, int]
    share: Share | None = None

    def show(self) -> None:
        """Print the plan as tables."""
        rows = [[name, by(shape)] for name, shape in self.shapes.items()]
        rows += [[name, why] for name, why in self.skipped.items()]
        if not rows:
            console.note("the model is compressed already: its factors would be multiplied out")
        else:
            console.table("What would be compressed", ["linear", "shape"], rows)
        needs = [[what, console.human_bytes(size)] for what, size in self.needs.items()]
        console.table(f"What it would need, weighting {self.weighting}", ["for", "bytes"], needs, right=(1,))

    def record(self) -> dict[str, Any]:
        """For --json."""
        return {"linears": self.shapes, "skipped": self.skipped, "weighting": self.weighting, "bytes": self.needs} | (
            self.share.record() if self.share else {}
        )


def plan(config: RunConfig) -> Plan:
    """The plan of a compression; raises as the command would for what the configurations tell."""
    about = outline(config)
    skeleton = models.meta(about.architecture)
    dtype = loaded_dtype(config, models.device_of(config.common.device))
    needs = {"the model": sum(p.numel() for p in skeleton.parameters()) * dtype.itemsize}
    if about.merging:
        return Plan({}, {}, "none", needs)
    targets, settings = find_targets(skeleton), about.part.config
    share = reached(config, skeleton, targets)
    check_budget(about.part, targets.shapes)
    given_spectra(config, targets.shapes)
    if about.weighting != "none":
        passing = settings.samples * about.length * about.architecture.get_text_config().hidden_size * dtype.itemsize
        bounds = Spectra({}, targets.shapes, pifa=settings.pifa, allow_growth=settings.paper)
        needs |= weighted_needs(bounds, about.weighting == "two-sided", passing, len(layers_of(skeleton)))
    return Plan(targets.shapes, targets.skipped, about.weighting, needs, share)


def weighted_needs(bounds: Spectra, two_sided: bool, passing: int, layers: int) -> dict[str, int]:
    """Bytes of moments, of what is passed from layer to layer, and of decompositions.

    Args:
        bounds: the shapes of linears and experts, and the form they would be in.
        two_sided: by the gradients at the outputs too.
        passing: bytes of one layer's inputs.
        layers: of the model.
    """
    sizes = {name: bounds.count(name) * moment_bytes(shape, two_sided) for name, shape in bounds.shapes.items()}
    needs = {"second moments": sum(sizes.values())}
    if len(groups(bounds.shapes, HELD, two_sided)) > 1:
        linears = sum(size for name, size in sizes.items() if len(bounds.shapes[name]) == 2)
        of_layer, of_linears = (size // max(1, layers) for size in (sum(sizes.values()), linears))
        # experts are taken as they fit beside the layer's linears, and then the layer is passed again
        needs = {"second moments, of a layer": min(of_layer, max(HELD, of_linears))}
        needs["layers' inputs, on disk beyond 4 GiB"] = passing * (layers + 1 if two_sided else 1)
    bases = sum(
        8 * bounds.count(name) * min(shape[-2:]) * bounds.largest_rank(name)
        * (2 if two_sided or shape[-2] > shape[-1] else 1)
        for name, shape in bounds.shapes.items()
    )  # fmt: skip
    return {**needs, "decompositions, on disk beyond 4 GiB": bases}
