"""--dry-run: the tensors that would be trained and the memory that they would take, without weights or data."""

from __future__ import annotations

from typing import Any

from lowrank_cli import console, memory, methods, optim
from lowrank_cli.config import RunConfig
from lowrank_cli.models import load as models
from lowrank_cli.train import audit


def run(config: RunConfig, budget: int | None) -> dict[str, Any]:
    """Print the targets and the estimate.

    Args:
        config: the resolved configuration.
        budget: bytes that the run may take, or None.
    Returns:
        The estimate by item and its sum, in bytes.
    Raises:
        PreflightError: the estimate is over the budget.
    """
    device = models.device_of(config.common.device)
    dtype = models.dtype_of(config.model.dtype, device)
    if config.model.continue_from is None:
        # the tokenizer may not exist yet: the vocabulary is the one that would be trained, unless one is named
        architecture = models.build_config(
            config.model,
            vocab_size=config.data.vocab_size,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            max_length=config.data.max_length,
        )
    else:
        architecture = models.config_of(config.model, offline=config.common.offline)
    model = models.meta(architecture, dtype)
    parts = [methods.get(name)(part) for name, part in config.methods.items()]
    for part in parts:
        part.wrap(model)
    groups = optim.base_groups(model, config.optim)
    for part in parts:
        groups = part.param_groups(model, groups)
    audit.write_targets(None, model, groups, config.method)
    items = memory.estimate(model, groups, parts, dtype.itemsize)
    total = memory.show(items)
    parameters = sum(p.numel() for p in model.parameters())
    console.note(f"{console.human_count(parameters)} parameters, {str(dtype).removeprefix('torch.')}")
    if budget is not None:
        memory.check_budget(total, budget, items)
    return {
        "parameters": parameters,
        "total_bytes": total,
        **{f"{k.replace(' ', '_')}_bytes": v for k, v in items.items()},
    }
