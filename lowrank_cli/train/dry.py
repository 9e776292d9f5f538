"""--dry-run: the tensors that would be trained and the memory that they would take, without weights or documents."""

from __future__ import annotations

from typing import Any

from lowrank_cli import console, memory
from lowrank_cli.config import RunConfig
from lowrank_cli.data.tokenizer import named_tokenizer
from lowrank_cli.errors import MissingError
from lowrank_cli.models import load as models
from lowrank_cli.train import audit
from lowrank_cli.train.setup import apply_methods

# of t5-base, the tokenizer of the papers' pretraining runs
PAPERS_VOCABULARY = 32_100


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
        architecture = models.build_config(
            config.model,
            vocab_size=vocabulary(config),
            max_length=config.data.max_length,
        )
    else:
        architecture = models.config_of(config.model, offline=config.common.offline)
    model = models.meta(architecture, dtype)
    parts, groups = apply_methods(config, model)
    audit.show_targets(audit.targets(model, groups), config.method)
    items = memory.estimate(model, groups, parts, dtype.itemsize, config)
    total = memory.show(items)
    parameters = sum(p.numel() for p in model.parameters())
    console.note(f"{console.human_count(parameters)} parameters, {str(dtype).removeprefix('torch.')}")
    if budget is not None:
        memory.check_budget(total, budget, config)
    return {
        "parameters": parameters,
        "total_bytes": total,
        **{f"{k.replace(' ', '_')}_bytes": v for k, v in items.items()},
    }


def vocabulary(config: RunConfig) -> int:
    """Entries of the tokenizer that the run would have."""
    if config.data.tokenizer is None:
        return config.data.vocab_size
    try:
        return len(named_tokenizer(config.data.tokenizer, offline=True))
    except MissingError:
        console.note(f"{config.data.tokenizer} is not at hand: the estimate takes {PAPERS_VOCABULARY:,} entries")
        return PAPERS_VOCABULARY
