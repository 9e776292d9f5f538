"""GradNormLoRP: weights as magnitude times direction, with the direction's gradient projected as in GaLore.

Two forms of one idea; rows are normalised, W is m x n (out x in).

    full      W = g V / ||V||                           every linear is trained whole, V by projected gradients
    adapter   W = M (W0 + s I J) / ||W0 + s I J||       W0 is frozen; I (m x r) and J (r x n) by projected gradients

Both train the magnitude by the plain rule, and the gradient of V, I or J by the rule of the projected space. Huang et
al., arXiv:2412.19616, eq. 2-6 and Alg. 1, which project two-sided; their code projects one-sided. Gradients are exact,
with the tangent part that their code leaves out; `detached_norm` leaves it out as DoRA does, arXiv:2402.09353.

Full mode keeps no copy of the weight: the step is in `methods/gradnormlorp/space.py`, on
`optim/projected.py`. The adapter is `methods/gradnormlorp/linear.py`. What is the paper's and what is reconstructed is
in docs/methods/gradnormlorp.md.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING

from lowrank_cli import console
from lowrank_cli.errors import UsageError
from lowrank_cli.fields import option
from lowrank_cli.methods.base import Memory, Method
from lowrank_cli.methods.galore import ENGINES, RANKS, REFRESH, GaLore
from lowrank_cli.optim import state_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from lowrank_cli.config import RunConfig

# settings that are open, by mode: pretraining of the authors' scripts, and their fine-tuning
OPEN = {
    "full": {"update_proj_gap": 200, "scale": 0.25, "proj_type": "std"},
    "adapter": {"update_proj_gap": 500, "scale": 4.0, "proj_type": "full"},
}


class GradNormLoRP(Method):
    title = "GradNormLoRP"
    paper = "https://arxiv.org/abs/2412.19616"
    summary = "magnitude times direction, whose gradient is projected"
    acts_on = frozenset({"gradients", "weights"})
    commands = frozenset({"pretrain", "finetune"})
    defaults = {"lr": 0.01}
    # clipping would make every gradient wait, whole, for the norm of all
    command_defaults = {"finetune": {"lr": 3e-5, "grad_clipping": 0.0}}
    presets = {model: {"rank": rank} for model, rank in RANKS.items()} | {
        "llama-7b": {"rank": 1024, "update_proj_gap": 500}
    }

    @dataclass(frozen=True)
    class Config:
        mode: str = option(
            "auto",
            "full: the weights themselves; adapter: a low-rank one beside frozen weights; auto: full in pretrain, "
            "adapter in finetune",
            choices=("auto", "full", "adapter"),
        )
        rank: int | None = option(
            None,
            "columns of the basis; full: the paper's for the llama presets, else a quarter of the matrix's shorter "
            "side; adapter: half of its rank",
            min=1,
        )
        update_proj_gap: int | None = option(
            None, "updates between refreshes of the basis (T); 200 in full mode, 500 in adapter mode", min=1
        )
        scale: float | None = option(
            None, "factor of the projected update (alpha); 0.25 in full mode, 4 in adapter mode", above=0
        )
        proj_type: str | None = option(
            None,
            "side to project: std is the shorter one, full is both; std in full mode, full in adapter mode",
            choices=("std", "reverse_std", "left", "right", "full"),
        )
        refresh: str = option("auto", REFRESH, choices=ENGINES)
        moments: str = option(
            "keep",
            "the moments at a refresh: kept, kept with the basis's signs aligned to the old one's, rotated or reset",
            choices=("keep", "align", "rotate", "reset"),
        )
        stagger: bool = option(False, "spread the refreshes of the tensors over the gap")
        lazy_refresh: bool = option(False, "double the gap of a basis that has stopped moving (Q-GaLore)")
        in_backward: bool = option(
            False,
            "full mode: project inside backward, so that no full gradient is formed between refreshes; each linear "
            "then keeps its output for backward",
        )
        detached_norm: bool = option(False, "the norm counts as a constant in backward, as in DoRA: no tangent part")
        magnitude_scale: float = option(1.0, "full mode: factor of the magnitude's learning rate", above=0)
        adapter_rank: int = option(8, "rank of the adapter (r)", min=1)
        adapter_alpha: float = option(16.0, "the adapter's product is scaled by this over its rank", above=0)
        adapter_dropout: float = option(0.1, "dropout of the adapter's input", min=0, below=1)
        target_modules: str = option(
            "all-linear",
            "matrices to train so: all-linear (of the layers, never the head), or comma-separated parts of names",
        )

    @property
    def mode(self) -> str:
        """full or adapter, with auto decided by the command."""
        chosen = self.config.mode
        return chosen if chosen != "auto" else "adapter" if self.command == "finetune" else "full"

    @property
    def is_adapter(self) -> bool:
        return self.mode == "adapter"

    def check(self, run: RunConfig) -> None:
        self.command = run.command
        others = [name for name in run.methods if name != "gradnormlorp"]
        if self.config.moments == "rotate" and run.optim.optimizer == "adafactor":
            raise UsageError(
                "--gradnormlorp-moments rotate does not go with --optimizer adafactor: factored moments cannot be "
                "rotated",
                "take --gradnormlorp-moments keep or reset, or --optimizer adamw",
            )
        if self.is_adapter and run.command == "pretrain":
            raise UsageError(
                "--gradnormlorp-mode adapter trains beside frozen weights, and those of a pretraining are random",
                "take --gradnormlorp-mode full, or lowrank finetune",
            )
        if self.is_adapter and others:
            raise UsageError(
                f"--gradnormlorp-mode adapter does not combine with {others[0]}: its linears are replaced",
                "take --gradnormlorp-mode full, or --method gradnormlorp alone",
            )
        if not self.is_adapter and run.task is not None and run.task.quantize:
            raise UsageError(
                "--gradnormlorp-mode full trains the weights themselves, which --quantize freezes",
                "take --gradnormlorp-mode adapter, or leave out --quantize",
            )

    def projection(self, rank: int | None) -> GaLore:
        """The projection of this mode, which is galore's own."""
        shared = {f.name for f in fields(GaLore.Config)}
        given = {k: v for k, v in asdict(self.config).items() if k in shared and v is not None}
        return GaLore(GaLore.Config(**{**OPEN[self.mode], **given, "rank": rank}))

    def wrap(self, model: nn.Module) -> None:
        if not self.is_adapter:
            return
        from lowrank_cli.methods.gradnormlorp import linear as weight_norm_linear
        from lowrank_cli.models.adapted import adapted, linears_of
        from lowrank_cli.models.adapters import why_not

        # its files are those of PEFT's DoRA
        weights = adapted(model, self.config.target_modules, self.title, why_not(model, dora=True))
        weight_norm_linear.wrap(
            model,
            linears_of(model, weights),
            rank=self.config.adapter_rank,
            alpha=self.config.adapter_alpha,
            dropout=self.config.adapter_dropout,
            detached=self.config.detached_norm,
        )

    def param_groups(self, model: nn.Module, groups: list[dict]) -> list[dict]:
        return self.adapter_groups(model, groups) if self.is_adapter else self.full_groups(model, groups)

    def full_groups(self, model: nn.Module, groups: list[dict]) -> list[dict]:
        """galore's groups, each with its weights normalised."""
        from lowrank_cli.methods.gradnormlorp.space import Normalised

        own = {
            "role": "gradnormlorp",
            "space": Normalised,
            "weight_norm": "detached" if self.config.detached_norm else "exact",
            "magnitude_scale": self.config.magnitude_scale,
            "in_backward": self.config.in_backward,
        }
        # a linear whose gradient another method has in factored form is that method's
        taken = {f"{n}.weight" for n, m in model.named_modules() if hasattr(m, "factored_gradient")}
        groups, others = split(groups, taken)
        tagged = self.projection(self.config.rank).param_groups(model, groups)
        return [group | own if group["role"] == "galore" else group for group in tagged] + others

    def adapter_groups(self, model: nn.Module, groups: list[dict]) -> list[dict]:
        """The factors projected where that makes them smaller; magnitudes and the head of a task by the plain rule."""
        from lowrank_cli.methods.gradnormlorp.linear import layers
        from lowrank_cli.optim.projected import Projected

        magnitudes = {f"{name}.lora_magnitude_vector" for name in layers(model)}
        factors = {f"{name}.{leaf}" for name in layers(model) for leaf in ("lora_A", "lora_B")}
        rank = self.config.rank or max(1, self.config.adapter_rank // 2)
        # a factor's shorter side is nearly always the adapter's rank
        rotated = {n for g in groups for n, p in g["params"] if n in factors and rank >= min(p.shape)}
        heads, own = split(groups, magnitudes | factors)
        own, plain = split(own, magnitudes | rotated)
        if rotated:
            why = f"a basis of rank {rank} would only rotate them"
            console.note(f"{len(rotated)} factors of the adapter are not projected: {why}")
        tags = asdict(self.projection(rank).config) | {"role": "gradnormlorp", "space": Projected}
        projected = [g | tags for g in own]
        plain = [g | {"role": "gradnormlorp", "why": "not projected"} for g in plain]
        return [*projected, *plain, *(g | {"why": "the head of the task"} for g in heads)]

    def treated(self, model: nn.Module, groups: list[dict]) -> set[str]:
        from lowrank_cli.methods.gradnormlorp.linear import layers

        adapted = {f"{name}.weight" for name in layers(model)}
        return adapted if self.is_adapter else super().treated(model, groups)

    def merge(self, model: nn.Module) -> None:
        if self.is_adapter:
            from lowrank_cli.methods.gradnormlorp import linear as weight_norm_linear

            weight_norm_linear.merge(model)

    def save_adapter(self, model: nn.Module, folder: Path, base: str) -> None:
        from lowrank_cli.methods.gradnormlorp import linear as weight_norm_linear

        weight_norm_linear.save(model, folder, base)

    def memory(
        self, shape: tuple[int, ...], dtype_bytes: int = 4, optimizer: str = "adamw", group: dict | None = None
    ) -> Memory:
        group = group or {"weight_norm": "exact", "rank": self.config.rank}
        if "rank" not in group:
            return super().memory(shape, dtype_bytes, optimizer)
        memory = self.projection(group["rank"]).memory(shape, dtype_bytes, optimizer)
        if "weight_norm" not in group:
            return memory
        # the magnitude, the direction's norm, and the rule on the magnitude
        return replace(memory, states=memory.states + 8 * math.prod(shape[:-1]) + state_bytes(optimizer, shape[:-1]))


def split(groups: list[dict], names: set[str]) -> tuple[list[dict], list[dict]]:
    """The groups without the named parameters, and with only those; none is empty."""
    sides = []
    for wanted in (False, True):
        parts = [g | {"params": [(n, p) for n, p in g["params"] if (n in names) is wanted]} for g in groups]
        sides.append([g for g in parts if g["params"]])
    return sides[0], sides[1]
