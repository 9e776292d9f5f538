"""WeLore: weights whose singular values fall off fast become low-rank components, and only those are trained on.

A weight's singular values are normalised to (s - min) / (max - min), and one threshold over all weights says how many
each keeps. A weight that loses more than `min_ratio` of them is a low-rank component (LRC): W = A B with r columns,
which is compressed well and, fine-tuned, learns most of what training everything would. The others (N-LRC) stay dense
and frozen. Jaiswal et al., arXiv:2407.11239.

`lowrank compress` decomposes a model; `lowrank finetune` trains A and B of one that was. Beyond the paper: ranks for a
budget of parameters, and factors weighted by what an error costs on text (`svd/spectrum.py`), without which a small
dense model does not survive.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowrank_cli.errors import UsageError
from lowrank_cli.fields import option
from lowrank_cli.methods.base import Method

if TYPE_CHECKING:
    from torch import nn

    from lowrank_cli.config import RunConfig
    from lowrank_cli.svd.rank_selection import Ranks, Spectra

# kept of the matrices' parameters where neither a rank nor a budget is given
DEFAULT_BUDGET = 0.8
# settings that only a compression reads
COMPRESSING = (
    "rank", "param_budget", "allocation", "counting", "min_ratio", "calibrate", "samples", "weighting", "damping",
    "pifa", "paper",
)  # fmt: skip


class WeLore(Method):
    title = "WeLore"
    paper = "https://arxiv.org/abs/2407.11239"
    summary = "low-rank factors for weights that allow it; only those train"
    acts_on = frozenset({"weights"})
    commands = frozenset({"compress", "finetune"})
    defaults = {"lr": 5e-5}

    @dataclass(frozen=True)
    class Config:
        rank: float | None = option(
            None, "percent of all singular values to cut: the paper's effective rank reduction", above=0, below=100
        )
        param_budget: float | None = option(
            None,
            "share of the layers' matrices to keep, experts included, instead of a rank; 0.8 without either",
            above=0,
            max=1,
        )
        allocation: str | None = option(
            None,
            "which values go: welore as in the paper (default for a rank), budget: the least weighted error per "
            "parameter (default for a budget), uniform, energy",
            choices=("welore", "budget", "uniform", "energy"),
        )
        counting: str = option(
            "factored",
            "which values count as cut: those that low-rank weights lost, or all below the threshold, those of "
            "weights left dense as well",
            choices=("factored", "all"),
        )
        min_ratio: float = option(
            0.5,
            "a weight that loses a smaller share of its values stays dense; the authors' code has 0",
            min=0,
            below=1,
        )
        calibrate: str | None = option(
            None,
            "text that errors are weighted by: as --dataset; self, which the model writes; several, such as "
            "a.jsonl:0.7,self:0.3; unless given a run's own text, else self",
        )
        samples: int = option(128, "windows of that text", min=1)
        weighting: str | None = option(
            None,
            "of errors: none, input (whitening), two-sided (Kronecker-factored Fisher, where there is text)",
            choices=("none", "input", "two-sided"),
        )
        damping: float = option(0.03, "share of a moment's mean eigenvalue added to its diagonal", above=0)
        pifa: bool = option(False, "store r rows and the others' coordinates: fewer parameters for the same weight")
        paper: bool = option(
            False, "the paper's rule to the letter: its grid of thresholds, also where a weight grows by it"
        )
        train_norms: bool = option(False, "finetune: train the norms as well, as the authors' code does")

    def check(self, run: RunConfig) -> None:
        config = self.config
        if run.command != "compress":
            return
        if config.rank is not None and config.param_budget is not None:
            raise UsageError("--welore-rank and --welore-param-budget both say how much to cut", "drop one of them")
        if config.paper:
            for flag, wrong in (
                ("--welore-param-budget", config.param_budget is not None),
                ("--welore-pifa", config.pifa),
                ("--welore-calibrate", config.calibrate is not None),
                (f"--welore-weighting {config.weighting}", config.weighting not in (None, "none")),
                (f"--welore-allocation {config.allocation}", config.allocation not in (None, "welore")),
            ):
                if wrong:
                    raise UsageError(f"{flag} is not in the paper", "drop it, or drop --welore-paper")
            if config.rank is None:
                raise UsageError("--welore-paper needs a rank reduction", "add --welore-rank 50")
        if config.counting == "all" and (config.rank is None or self.allocation != "welore"):
            raise UsageError(
                "--welore-counting all is a way to count for the rule welore with a rank",
                "add --welore-rank 50, without another --welore-allocation",
            )
        if config.weighting == "none" and config.calibrate is not None:
            raise UsageError(
                "--welore-weighting none uses no text, and --welore-calibrate gives one", "drop one of them"
            )

    def refuse_unused(self, run: RunConfig, typed: frozenset[str]) -> None:
        def refuse(names: tuple[str, ...], why: str) -> None:
            for name in names:
                if name in typed:
                    raise UsageError(f"--welore-{name.replace('_', '-')} is {why}", "drop it")

        if run.command != "compress":
            refuse(COMPRESSING, "a setting of lowrank compress, and this command trains what that made")
            return
        refuse(("train_norms",), "a setting of lowrank finetune")
        if self.allocation != "welore":
            refuse(("min_ratio",), f"a setting of the rule welore, and this one is {self.allocation}")
        if self.config.paper or self.config.weighting == "none":
            refuse(("samples", "damping"), "a setting of weighting by text, and there is none")

    @property
    def allocation(self) -> str:
        """The rule that chooses the ranks."""
        return self.config.allocation or ("welore" if self.config.rank is not None else "budget")

    @property
    def target(self) -> str:
        """Return the target in a user's words."""
        if self.config.rank is not None:
            which = "cut" if self.config.counting == "factored" else "below the threshold"
            return f"{self.config.rank:g} % of the singular values {which}"
        return f"{100 * self.budget:g} % of the matrices' parameters kept"

    @property
    def budget(self) -> float:
        """Share of the matrices' parameters to keep, where no rank is given."""
        return self.config.param_budget if self.config.param_budget is not None else DEFAULT_BUDGET

    @property
    def reads_own_values(self) -> bool:
        """Return whether the rule reads the weights' own singular values; others read weighted ones, or shapes."""
        return self.allocation == "welore"

    def reached(self, spectra: Spectra, ranks: Ranks) -> tuple[float, float]:
        """Return what these ranks come to and what was asked for, as shares between 0 and 1 in the unit of the target.

        Args:
            spectra: the weights' own, if the rule reads them.
            ranks: as `ranks` gave them.
        """
        from lowrank_cli.svd import rank_selection as select

        if self.config.rank is None:
            return spectra.parameter_share(ranks), self.budget
        target = self.config.rank / 100
        if self.config.counting == "all":
            threshold = select.pooled_threshold(spectra, target, paper=self.config.paper)
            return select.pooled_reduction(spectra, threshold), target
        return spectra.rank_reduction(ranks), target

    def ranks(self, plain: Spectra, weighted: Spectra) -> Ranks:
        """The rank of every weight; None leaves it dense.

        Args:
            plain: the weights' own singular values, which the paper's rule reads.
            weighted: those of the weighted matrices, whose squares are errors.
        """
        from lowrank_cli.svd import rank_selection as select

        config = self.config
        if config.rank is None:
            share = self.budget
            return {
                "welore": lambda: select.welore_for_parameters(plain, share, min_ratio=config.min_ratio),
                "budget": lambda: select.cheapest(weighted, share),
                "uniform": lambda: select.uniform_for_parameters(plain, share),
                "energy": lambda: select.energy(weighted, 1 - share, lambda r: 1 - weighted.parameter_share(r)),
            }[self.allocation]()
        target = config.rank / 100
        return {
            "welore": lambda: select.welore(
                plain, target, min_ratio=config.min_ratio, counting=config.counting, paper=config.paper
            ),
            "budget": lambda: select.cheapest(weighted, 1 - target, unit="rank"),
            "uniform": lambda: select.uniform(plain, target),
            "energy": lambda: select.energy(weighted, target, weighted.rank_reduction),
        }[self.allocation]()

    def wrap(self, model: nn.Module) -> None:
        from lowrank_cli.models.lowrank_linear import low_rank_linears

        found = low_rank_linears(model)
        if not found:
            raise UsageError(
                "this model has no low-rank components to train",
                "compress it first (lowrank compress --welore-rank 50) and give its folder with --model",
            )
        trained = {p for module in found.values() for p in module.parameters()}
        for name, p in model.named_parameters():
            wanted = p in trained or (self.config.train_norms and is_norm(name))
            p.requires_grad_(p.requires_grad and wanted)

    def param_groups(self, model: nn.Module, groups: list[dict]) -> list[dict]:
        from lowrank_cli.models.lowrank_linear import low_rank_linears

        found = low_rank_linears(model)
        owner = {f"{name}.{part}": module for name, module in found.items() for part, _ in module.named_parameters()}
        tagged = []
        for group in groups:
            own = [(n, p) for n, p in group["params"] if n in owner]
            rest = [(n, p) for n, p in group["params"] if n not in owner]
            by_rank: dict[int, list] = {}
            for name, p in own:
                by_rank.setdefault(owner[name].rank, []).append((name, p))
            tagged += [
                # the role stays "full": methods on gradients may take A and B; `rank` would tell one to project
                group | {"params": params, "adapter": self.name, "why": f"low-rank component of rank {rank}"}
                for rank, params in sorted(by_rank.items())
            ]
            if rest:
                tagged.append(group | {"params": rest})
        return tagged

    def treated(self, model: nn.Module, groups: list[dict]) -> set[str]:
        from lowrank_cli.models.lowrank_linear import low_rank_linears

        found = low_rank_linears(model)
        return {f"{name}.{part}" for name, module in found.items() for part, _ in module.named_parameters()}


def is_norm(name: str) -> bool:
    """Return whether a parameter's name is that of a normalisation layer's."""
    return "norm" in name or ".ln_" in name or name.rpartition(".")[0].endswith(("ln_f", "ln"))
