"""Optimizers: one is built from tagged groups, whatever the method that tagged them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from lowrank_cli.settings.training import OptimConfig


def base_groups(model: nn.Module, config: OptimConfig) -> list[dict]:
    """Every trainable tensor once: matrices with weight decay, vectors and scalars without.

    Returns:
        Groups whose `params` are (name, parameter) pairs; methods split and tag them.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [(name, p) for name, p in named if p.dim() >= 2]
    vectors = [(name, p) for name, p in named if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay, "role": "full"},
        {"params": vectors, "weight_decay": 0.0, "role": "full"},
    ]
    return [g for g in groups if g["params"]]


def build(config: OptimConfig, groups: list[dict]) -> Optimizer:
    """Return the optimizer for these groups: torch's own fused AdamW where nothing is projected, 16-bit or per layer.

    Whichever class it is, Adam is that of torch.optim.AdamW: eps is added to the corrected root, decoupled decay comes
    before the update (docs/methods/galore.md, "The optimizers").
    """
    betas, rounding = (config.beta1, config.beta2), config.stochastic_rounding
    parameters = [p for group in groups for _, p in group["params"]]
    small = any("space" in group or "rank" in group for group in groups)
    if config.optimizer == "adafactor":
        from lowrank_cli.optim.adafactor import GaLoreAdafactor

        return GaLoreAdafactor(
            groups, lr=config.lr, scale_parameter=False, relative_step=False, stochastic_rounding=rounding
        )
    if config.optimizer == "adamw8bit":
        from lowrank_cli.optim.adamw8bit import GaLoreAdamW8bit

        optimizer = GaLoreAdamW8bit(
            groups, lr=config.lr, betas=betas, eps=config.eps, weight_decay=0.0, stochastic_rounding=rounding,
            convention="torch",
        )  # fmt: skip
        return _on_kernel(optimizer, config.kernel) if small else optimizer
    # torch's keeps moments in the weight's dtype, ours in float32: both sides of a comparison get the same
    if not small and not config.per_layer and all(p.element_size() >= 4 for p in parameters):
        from torch.optim import AdamW

        return AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, weight_decay=0.0, fused=True)
    from lowrank_cli.optim.adamw import GaLoreAdamW

    optimizer = GaLoreAdamW(
        groups,
        lr=config.lr,
        betas=betas,
        eps=config.eps,
        stochastic_rounding=rounding,
        convention="torch",
    )
    return _on_kernel(optimizer, config.kernel) if small else optimizer


def _on_kernel(optimizer, kernel: str) -> Optimizer:
    """The optimizer on the kernel for a setting and its weights' device, with the line that says which, and why."""
    from lowrank_cli import console
    from lowrank_cli.ops import fused_step

    choice = fused_step.choose(kernel, optimizer.param_groups[0]["params"][0].device)
    console.note(str(choice))
    optimizer.kernel_is_auto = choice.is_auto
    for group in optimizer.param_groups:
        group["kernel"] = choice.name
    return optimizer


def state_bytes(optimizer: str, shape: tuple[int, ...]) -> int:
    """Bytes that an update rule keeps for a gradient of this shape, projected or not."""
    size = math.prod(shape)
    if optimizer == "adafactor":
        return 4 * (math.prod(shape[:-1]) + math.prod((*shape[:-2], shape[-1]))) if len(shape) > 1 else 4 * size
    if optimizer == "adamw8bit" and size >= 4096:
        # two moments of a byte an element and a float32 scale for every block of 256
        return 2 * (size + 4 * math.ceil(size / 256))
    return 8 * size
