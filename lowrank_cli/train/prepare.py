"""Before the first step: data, model, methods and optimizer of a run, with whatever is wrong found here."""

from __future__ import annotations

import random
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lowrank_cli import console, data, optim
from lowrank_cli.config import RunConfig
from lowrank_cli.errors import UsageError
from lowrank_cli.models import load as models
from lowrank_cli.models.share import inventory
from lowrank_cli.models.source import locate
from lowrank_cli.parallel import sharding
from lowrank_cli.parallel.launch import World
from lowrank_cli.parallel.replicas import Alone, Replicas
from lowrank_cli.settings import COMMANDS
from lowrank_cli.settings.training import DataConfig
from lowrank_cli.train import audit, checkpoint, plan
from lowrank_cli.train.loop import Session
from lowrank_cli.train.metrics import check_sinks
from lowrank_cli.train.objective import objective
from lowrank_cli.train.setup import adapter_of, apply_methods, head_of, reached

RUNNING_TEXT = "text"  # the task whose data is documents, not prompts and responses


def fitted(config: RunConfig) -> RunConfig:
    """Return the configuration with sequences no longer than the positions of the model that it starts from.

    Raises:
        UsageError: longer ones were asked for.
    """
    if config.command == "pretrain" and config.model.continue_from is None:
        return config
    architecture, length = models.config_of(config.model, offline=config.common.offline), config.data.max_length
    bound = models.positions(architecture)
    default = COMMANDS[config.command].defaults.get("max_length", DataConfig.max_length)
    if bound is not None and length == default > bound:
        console.note(f"sequences of {bound} tokens: the model has no more positions")
        return replace(config, data=replace(config.data, max_length=bound))
    models.check_length(architecture, length)
    return config


def prepare(config: RunConfig, world: World | None = None) -> Session:
    """Data, model, methods and optimizer of a run, with the table of what is trained how.

    Whatever is wrong with the configuration, the data or the model is found here, before a run folder is made.

    Args:
        config: the configuration; with several processes the same on each but for the device.
        world: the processes, if there are several.
    """
    console.quiet_libraries()
    replicas = Alone() if world is None else world.replicas
    torch.manual_seed(config.common.seed)
    random.seed(config.common.seed)
    place = device = models.device_of(config.common.device)
    if replicas.sharded:
        # no GPU has to hold the whole model: it is cut layer by layer
        device = torch.device("cpu")
    dtype = models.dtype_of(config.model.dtype, place)
    check_sinks(config.train.log)
    plan.check(config)
    supervised = config.task is not None and config.task.task != RUNNING_TEXT
    batches, model, base = (labelled if supervised else running_text)(config, device, dtype, world)
    before = inventory(model)
    parts, groups = apply_methods(config, model)
    if config.task is not None:
        check_task(config, adapter_of(parts) is not None)
    targets = audit.targets(model, groups)
    audit.show_targets(targets)
    share = reached(config, before, model, parts, groups)
    if world:
        # the seed gives them the same weights already; other versions of a library may not
        replicas.broadcast_([p for group in groups for _, p in group["params"]])
    if replicas.sharded:
        groups = sharded(config, model, groups, adapter_of(parts), replicas, place)
    with ahead(world, "kernel"):
        optimizer = optim.build(config.optim, groups)
    if world:
        world.agree("kernels", {"kernel": [group.get("kernel") for group in optimizer.param_groups]})
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    model.train()
    return Session(
        config=config,
        data=batches,
        model=model,
        parts=parts,
        optimizer=optimizer,
        plan=plan.make(
            config,
            batches.train.updates_per_epoch,
            batches.kind if supervised else None,
            batches.description["tokens"] / batches.description["records"] if supervised else None,
        ),
        device=place,
        targets=targets,
        share=share,
        objective=objective(batches),
        base=base,
        replicas=replicas,
    )


def sharded(
    config: RunConfig,
    model: nn.Module,
    groups: list[dict],
    adapter: Any,
    replicas: Replicas,
    device: torch.device,
) -> list[dict]:
    """The groups of this process's parts of the parameters, after cutting the model's weights over the processes.

    What an adapter trains is small and stays whole; its frozen base is cut.
    """
    check_sharded(config, groups)
    vars(model)[checkpoint.FINGERPRINT] = checkpoint.base_fingerprint(model)
    whole = {p for group in groups for _, p in group["params"]} if adapter is not None else set()
    for group in groups:
        # what FSDP2 has cut is freed on the device only if nobody holds on to it
        group["params"] = [name for name, _ in group["params"]]
    parts = sharding.shard(model, replicas, device, whole)
    held = {name: parts.get(name, p) for name, p in model.named_parameters()}
    return [group | {"params": [(name, held[name]) for name in group["params"]]} for group in groups]


def check_sharded(config: RunConfig, groups: list[dict]) -> None:
    """Raises UsageError for what cannot be cut."""
    if config.optim.optimizer == "adafactor":
        raise UsageError(
            "--parallel fsdp: Adafactor's moments are means over rows and columns, which lie on several processes",
            "take --optimizer adamw or adamw8bit, or --parallel ddp",
        )
    if any(group.get("moments") == "rotate" for group in groups):
        raise UsageError(
            "--parallel fsdp does not rotate moments, which lie on several processes",
            "let them be kept, aligned or reset at a refresh, or take --parallel ddp",
        )
    if config.task is not None and config.task.quantize:
        raise UsageError(
            f"--parallel fsdp does not cut a base of 4 bits (--quantize {config.task.quantize})", "take --parallel ddp"
        )


def running_text(
    config: RunConfig, device: torch.device, dtype: torch.dtype, world: World | None
) -> tuple[Any, nn.Module, str]:
    """Documents as blocks of tokens, a causal language model, and where its weights came from."""
    scratch = config.command == "pretrain" and config.model.continue_from is None
    if scratch:
        # whether the shape makes sense is known before the text is read
        models.build_config(config.model, vocab_size=config.data.vocab_size, max_length=config.data.max_length)
    packing = config.data.packing if config.command == "pretrain" else "packed"
    with ahead(world, "data"):
        batches = data.build(
            replace(config.data, packing=packing),
            batch_size=config.train.batch_size,
            total_batch_size=plan.total_batch_size(config),
            eval_tokens=config.eval.eval_tokens,
            seed=config.common.seed,
            offline=config.common.offline,
            tokenizer_fallback=None if scratch else models.tokenizer_of(config.model),
            status=console.note,
            **share(world),
        )
    tokens = batches.tokenizer
    architecture = (
        models.build_config(
            config.model,
            vocab_size=len(tokens),
            bos_token_id=tokens.bos_token_id,
            eos_token_id=tokens.eos_token_id,
            pad_token_id=tokens.pad_token_id,
            max_length=config.data.max_length,
        )
        if scratch
        else None
    )
    model = models.load(
        config.model,
        config=architecture,
        dtype=dtype,
        device=device,
        seed=config.common.seed,
        offline=config.common.offline,
        quantize=config.task.quantize if config.task is not None else None,
    )
    models.check_vocabulary(model, tokens)
    return batches, model, "" if scratch else locate(config.model, offline=config.common.offline).name


def labelled(
    config: RunConfig, device: torch.device, dtype: torch.dtype, world: World | None
) -> tuple[Any, nn.Module, str]:
    """Records of a task as batches, the model with the head that the task needs, and where its weights came from."""
    from lowrank_cli.data import supervised
    from lowrank_cli.data.tokenizer import named_tokenizer

    offline = config.common.offline
    source = locate(config.model, offline=offline)
    name = config.data.tokenizer or models.tokenizer_of(config.model)
    if name is None:
        raise UsageError(f"{source.name} brings no tokenizer", "name the one that it was trained with: --tokenizer")
    tokenizer = named_tokenizer(name, offline=offline)
    with ahead(world, "data"):
        batches = supervised.build(
            config.data,
            config.task,
            batch_size=config.train.batch_size,
            total_batch_size=plan.total_batch_size(config),
            eval_tokens=config.eval.eval_tokens,
            seed=config.common.seed,
            offline=offline,
            tokenizer=tokenizer,
            status=console.note,
            **share(world),
        )
    model = models.load(
        config.model,
        config=None,
        dtype=dtype,
        device=device,
        seed=config.common.seed,
        offline=offline,
        head=head_of(batches),
        quantize=config.task.quantize,
    )
    models.check_vocabulary(model, tokenizer)
    return batches, model, source.name


def ahead(world: World | None, what: str) -> AbstractContextManager:
    """Work whose result the other processes of a machine find in the cache."""
    return nullcontext() if world is None else world.first_on_node(what)


def share(world: World | None) -> dict[str, int]:
    """Return this process's share of every update: its rank and the number of processes; {} for one that is alone."""
    return {} if world is None else {"rank": world.place.rank, "world_size": world.place.world_size}


def check_task(config: RunConfig, adapter: bool) -> None:
    """Raises UsageError for settings of adapters with a method that trains none, and for an adapter on an adapter."""
    source = locate(config.model, offline=config.common.offline)
    if adapter and source.adapter is not None:
        raise UsageError(
            f"{source.adapter} is an adapter, and a new one on it could be loaded by nobody: its files name one base",
            "merge the first one (its finetune command with --merge), or train the whole model: --method full",
        )
    if config.task.quantize and not adapter:
        raise UsageError(
            f"--quantize {config.task.quantize} freezes the base in 4 bits, and {config.method} trains it",
            "take a method that trains an adapter: --method lora",
        )
