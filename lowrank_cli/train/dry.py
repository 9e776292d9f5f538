"""--dry-run: the tensors that would be trained and the memory that they would take, without weights or documents."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PretrainedConfig

from lowrank_cli import console, memory, methods
from lowrank_cli.config import RunConfig
from lowrank_cli.data import tasks
from lowrank_cli.data.tokenizer import named_tokenizer
from lowrank_cli.errors import MissingError
from lowrank_cli.models import load as models
from lowrank_cli.models.lowrank_quantizer import QUANT_METHOD, LowRankConfig, LowRankQuantizer
from lowrank_cli.models.share import inventory
from lowrank_cli.parallel.place import Place
from lowrank_cli.train import audit, plan
from lowrank_cli.train.objective import objective
from lowrank_cli.train.setup import adapter_of, apply_methods, reached

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
    console.quiet_libraries()
    description = Description(config, architecture(config))
    model = description.model()
    before = inventory(model)
    parts, groups = apply_methods(config, model)
    audit.show_targets(audit.targets(model, groups))
    share = reached(config, before, model, parts, groups)
    found = description.estimate()
    dtype = description.dtype
    paper = memory.weights_and_states(model, groups, dtype.itemsize)
    formula = memory.by_formula(model, memory.Parts(model, parts, groups), config.optim.optimizer)
    memory.show(found, formula, paper, dtype.itemsize)
    parameters = sum(p.numel() for p in model.parameters())
    console.note(f"{console.human_count(parameters)} parameters, {str(dtype).removeprefix('torch.')}")
    if budget is not None:
        # what makes a run smaller leaves its tokenizer, which takes a while to read
        entries = description.architecture.get_text_config().vocab_size

        def estimated(other: RunConfig, limit: int | None = None) -> memory.Estimate:
            return Description(other, architecture(other, entries)).estimate(limit)

        def bound(other: RunConfig) -> tuple[int, int]:
            part = estimated(other, budget)
            return part.total, part.kept

        memory.check(found.total, budget, config, lambda other: estimated(other).total, bound, found.kept)
    return {"parameters": parameters} | share.record() | memory.as_json(found, paper)


def architecture(config: RunConfig, vocab_size: int | None = None) -> PretrainedConfig:
    """The architecture of a run, without its weights.

    Args:
        config: the resolved configuration.
        vocab_size: entries of the tokenizer, where it is known already.
    """
    if config.command == "pretrain" and config.model.continue_from is None:
        entries = vocab_size or vocabulary(config)
        return models.build_config(config.model, vocab_size=entries, max_length=config.data.max_length)
    return models.config_of(config.model, offline=config.common.offline)


class Description:
    """A run as the estimate needs it: how its model is built, and what goes through it.

    Args:
        config: the resolved configuration.
        architecture: the model's.
    """

    def __init__(self, config: RunConfig, architecture: PretrainedConfig):
        self.config, self.architecture = config, architecture
        self.device = models.device_of(config.common.device)
        self.dtype = models.dtype_of(config.model.dtype, self.device)
        name = config.task.task if config.task is not None else None
        self.task = tasks.describe(name) if name not in (None, "text") else None
        place = Place.here()
        self.world_size = place.world_size if place else config.train.nproc

    def estimate(self, limit: int | None = None) -> memory.Estimate:
        """The estimate of one process; with a limit in bytes, no further than it takes to be over it."""
        parts = [methods.get(name)(part) for name, part in self.config.methods.items()]
        for part in parts:
            part.command = self.config.command
        return memory.estimate(
            self.run(),
            self.model(),
            world_size=self.world_size,
            parallel=self.config.train.parallel,
            adapter=adapter_of(parts) is not None,
            limit=limit,
        )

    def run(self) -> memory.Run:
        """Return what the memory of one process depends on."""
        train, batch = self.config.train, self.batch()
        return memory.Run(
            parts=self.parts,
            loss=partial(objective(self.task).loss, targets=batch["labels"].numel()),
            batch=batch,
            passes=max(1, plan.total_batch_size(self.config) // (train.batch_size * self.world_size)),
            optim=self.config.optim,
            device=self.device.type,
            refreshes=self.has_refresh(),
            sampled=audit.SAMPLE,
        )

    def model(self, num_layers: int | None = None) -> nn.Module:
        """The model on the meta device as the run loads it, without methods, with all layers or with so many."""
        config = self.architecture if num_layers is None else memory.shortened(self.architecture, num_layers)
        if self.task is None or self.task.kind == "causal":
            model = models.meta(config, self.dtype)
        else:
            # a run takes the tokenizer's padding token where the model has none
            pad = config.pad_token_id if config.pad_token_id is not None else 0
            head = models.Head(self.task.label_names or ("score",), self.task.kind == "regression", pad)
            for key, value in head.arguments.items():
                setattr(config, key, value)
            with torch.device("meta"):
                model = AutoModelForSequenceClassification.from_config(config, dtype=self.dtype)
        ranks = getattr(config, "quantization_config", None) or {}
        if isinstance(ranks, dict) and ranks.get("quant_method") == QUANT_METHOD:
            LowRankQuantizer(LowRankConfig(**ranks))._process_model_before_weight_loading(model)
        if self.config.task is not None and self.config.task.quantize:
            memory.quantize_(model, self.dtype)
        models.prepare(model, self.config.model.activation_checkpointing)
        return model

    def parts(self, num_layers: int | None) -> memory.Parts:
        """The model with the run's methods in it."""
        model = self.model(num_layers)
        return memory.Parts(model, *apply_methods(self.config, model))

    def batch(self) -> dict[str, torch.Tensor]:
        """A micro-batch: sequences of the full length; padded, where they may be."""
        shape = (self.config.train.batch_size, self.config.data.max_length)
        batch = {"input_ids": torch.empty(shape, dtype=torch.int64, device="meta")}
        if self.task is not None and self.task.kind != "causal":
            dtype = torch.float32 if self.task.kind == "regression" else torch.int64
            batch["labels"] = torch.empty(shape[:1], dtype=dtype, device="meta")
        else:
            batch["labels"] = torch.empty_like(batch["input_ids"])
        packed = self.config.data.packing == "packed" or (
            self.config.task is not None and self.config.task.task == "text"
        )
        if not packed:
            batch["attention_mask"] = torch.empty_like(batch["input_ids"])
        return batch

    def has_refresh(self) -> bool:
        """Return whether the run may have a second refresh: it is longer than a gap of a method, or one is unknown."""
        steps = self.config.train.max_steps
        # staggered, the second refresh of the first tensor comes at once
        gaps = [
            1 if getattr(own, "stagger", False) else getattr(own, "update_proj_gap", None)
            for own in self.config.methods.values()
        ]
        return steps is None or any(gap is None or steps > gap for gap in gaps)


def vocabulary(config: RunConfig) -> int:
    """Entries of the tokenizer that the run would have."""
    if config.data.tokenizer is None:
        return config.data.vocab_size
    try:
        return len(named_tokenizer(config.data.tokenizer, offline=True))
    except MissingError:
        console.note(f"{config.data.tokenizer} is not at hand: the estimate takes {PAPERS_VOCABULARY:,} entries")
        return PAPERS_VOCABULARY
