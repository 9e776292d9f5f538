"""Say what share of a model's layers a run acts on, and stop one that would leave most of them alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lowrank_cli import console
from lowrank_cli.errors import UsageError
from lowrank_cli.models.layers import IN_LAYER, decoder_of
from lowrank_cli.models.targets import is_linear, out_features, table

# a run that asks for every matrix and reaches less than this of the layers is not what was asked for
ENOUGH = 0.5
# less would be shown as nothing
SHOWN = 0.0005
VECTORS, OTHERS, FROZEN = "norms and biases", "other matrices", "frozen"


@dataclass(frozen=True)
class Inventory:
    """An Inventory is what a model's repeating layers are made of, before a method changes them.

    Attributes:
        sizes: of their parameters, by name; of a quantized weight, of what it stands for.
        whys: the kind of those that methods leave alone, by name.
    """

    sizes: dict[str, int]
    whys: dict[str, str]

    def freezing(self, model: nn.Module) -> Inventory:
        """Return it with what a method has frozen in a model as a kind of its own."""
        frozen = {name: FROZEN for name, p in model.named_parameters() if not p.requires_grad}
        return replace(self, whys=self.whys | frozen)

    def share(self, treated: Collection[str]) -> Share:
        """Return the share of the layers that is treated, and of what is left by its kind."""
        total = max(1, sum(self.sizes.values()))
        left: Counter[str] = Counter()
        for name, size in self.sizes.items():
            if name not in treated:
                left[self.whys.get(name, OTHERS)] += size
        return Share(1 - sum(left.values()) / total, {why: size / total for why, size in left.most_common()})


@dataclass(frozen=True)
class Share:
    """A Share says how much of the repeating layers' parameters a run acts on.

    Attributes:
        treated: from 0 to 1.
        left: from 0 to 1, by the kind of what is left as it is, the largest first.
    """

    treated: float
    left: Mapping[str, float]

    def __str__(self) -> str:
        left = ", ".join(f"{why} {part:.1%}" for why, part in self.left.items() if part >= SHOWN)
        return f"{self.treated:.1%} of the layers' parameters" + (f" (not: {left})" if left else "")

    def record(self) -> dict[str, Any]:
        """For --json and run.json."""
        return {"treated_share": self.treated, "left_share": dict(self.left)}

    def say(self, who: str, does: str, *, check: bool) -> None:
        """Print it, and stop where it is too small.

        Args:
            who: the method.
            does: what it does with them.
            check: stop a run that acts on less than half of what is not frozen.
        Raises:
            UsageError: it does.
        """
        if check and self.treated < ENOUGH * (1 - self.left.get(FROZEN, 0.0)):
            raise UsageError(
                f"{who} {does} only {self}", "--allow-partial goes on all the same; or choose another method or model"
            )
        console.note(f"{who} {does} {self}")


def inventory(model: nn.Module) -> Inventory:
    """Return what the repeating layers of a model are made of."""
    inside = decoder_of(model)
    names = {p: name for name, p in model.named_parameters()}
    sizes, whys = {}, {}
    for path, module in inside.named_modules():
        for p in module.parameters(recurse=False) if IN_LAYER.search(f"{path}.") else ():
            sizes[names[p]] = p.numel()
            if p.dim() < 2:
                whys[names[p]] = VECTORS
            elif is_linear(module) and p is module.weight and hasattr(module, "in_features"):
                # 4 bits are packed into bytes
                sizes[names[p]] = out_features(module) * module.in_features
    whys |= {row.name: row.why.removeprefix("a ") for row in table(model) if row.why}
    return Inventory(sizes, whys)
