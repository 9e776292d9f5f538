"""VB-LoRA adapters on disk, in PEFT's format: adapter_config.json and adapter_model.safetensors.

    base_model.vblora_vector_bank                      (h, b)
    base_model.model.LINEAR.vblora_logits_A            (r, d1 / b, h)
    base_model.model.LINEAR.vblora_logits_B            (d2 / b, r, h)
    base_model.model.PARAMETER                         of a trained head

The slim form (`save_only_topk_weights`) has `..._topk_indices` (..., k) and `..._topk_weights` (..., k - 1) instead of
the logits: enough for inference and merging, not for training.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lowrank_cli import foreign
from lowrank_cli.errors import MissingError, UsageError
from lowrank_cli.methods.vblora.bank import pack, unpack
from lowrank_cli.methods.vblora.layer import ATTRIBUTE, Shape, VectorBank, dtype_of, sizes_of
from lowrank_cli.models.adapted import shortest

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
BANK = "base_model.vblora_vector_bank"
# tasks that PEFT knows, by the end of a model class's name
TASKS = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS",
         "ForTokenClassification": "TOKEN_CLS", "ForQuestionAnswering": "QUESTION_ANS",
         "ForConditionalGeneration": "SEQ_2_SEQ_LM"}  # fmt: skip


def save(model: nn.Module, bank: VectorBank, folder: Path, *, base: str, slim: bool) -> None:
    """Write an adapter, and what else of the model is trained, where PEFT finds them.

    Args:
        model: what the adapter is attached to; whatever else of it trains is its head.
        bank: the adapter; one that has no logits is written in the slim form in any case.
        folder: made if it is not there.
        base: where the base model is, for whoever loads the adapter.
        slim: only the selected indices and their weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    slim = slim or bank.is_fixed
    head = {
        name: p
        for name, p in model.named_parameters()
        if name in bank.head or (p.requires_grad and not name.startswith(f"{ATTRIBUTE}."))
    }
    tensors = {PREFIX + name: p for name, p in head.items()} | {BANK: bank.vector_bank} | entries(bank, slim)
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    kind = type(model).__name__
    linears = [model.get_submodule(name) for name in bank.slots]
    config = {
        "peft_type": "VBLORA",
        "task_type": next((task for end, task in TASKS.items() if kind.endswith(end)), None),
        "base_model_name_or_path": base,
        "r": bank.shape.rank,
        "num_vectors": bank.shape.num_vectors,
        "vector_length": bank.shape.vector_length,
        "topk": bank.shape.topk,
        "target_modules": shortest(bank.slots, (name for name, _ in model.named_modules())),
        "vblora_dropout": bank.dropout,
        "save_only_topk_weights": slim,
        "fan_in_fan_out": isinstance(linears[0], Conv1D),
        "modules_to_save": sorted({name.split(".")[0] for name in head}) or None,
        "bias": "none",
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def entries(bank: VectorBank, slim: bool) -> dict[str, Tensor]:
    """The tensors of each linear in PEFT's layout, without the bank."""
    shape, found = bank.shape, {}
    if slim:
        indices, weights = pack(*bank.selection(), shape.num_vectors)
        # PEFT puts them into a float32 table
        parts = {"_topk_indices": indices, "_topk_weights": weights.float()}
    else:
        parts = {"": bank.logits}
    for name, slot in bank.slots.items():
        for suffix, rows in parts.items():
            a = rows[slot.start : slot.middle].unflatten(0, (shape.rank, -1))
            b = rows[slot.middle : slot.end].unflatten(0, (shape.rank, -1)).transpose(0, 1)
            # a tensor of its own each: safetensors refuses views of one storage
            found[f"{PREFIX}{name}.vblora_logits_A{suffix}"] = a.clone()
            found[f"{PREFIX}{name}.vblora_logits_B{suffix}"] = b.clone(memory_format=torch.contiguous_format)
    return found


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensors of an adapter.

    Raises:
        MissingError: a file is not there.
        UsageError: they are unreadable, or of another kind of adapter.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise MissingError(
                f"{folder} holds no adapter: {name} is not there", f"give a folder with {CONFIG} and {WEIGHTS}"
            )
    config = foreign.read_json(folder / CONFIG)
    tensors = foreign.read_tensors(folder / WEIGHTS)
    kind = config.get("peft_type")
    if kind != "VBLORA" or BANK not in tensors:
        raise UsageError(f"the adapter in {folder} is of kind {kind}, not VBLORA", "load it with the peft library")
    return config, tensors


def load(model: nn.Module, folder: Path) -> VectorBank:
    """The adapter of a folder, for this model; weights of a trained head are copied into the model.

    Nothing of the model is changed unless all of the adapter fits.

    Raises:
        MissingError, UsageError: as `read`; or the adapter is for another base model.
    """
    config, tensors = read(folder)
    vectors = tensors.pop(BANK).float()
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    logits: dict[str, dict[str, Tensor]] = {}  # of each linear: A, B, A_topk_indices ...
    head: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name, separator, part = key.removeprefix(PREFIX).partition(".vblora_logits_")
        if separator:
            logits.setdefault(name, {})[part] = tensor
        else:
            head[name.replace(".base_layer.", ".")] = tensor
    slim = any("A_topk_indices" in parts for parts in logits.values())
    suffixes = ("_topk_indices", "_topk_weights") if slim else ("",)
    wanted = {f"{factor}{suffix}" for factor in "AB" for suffix in suffixes}
    broken = next((name for name, parts in logits.items() if set(parts) != wanted), None)
    if broken or not logits:
        raise UsageError(f"the adapter in {folder} is incomplete: logits of {broken or 'any linear'}", "save it again")
    # (r, d1 / b) and (d2 / b, r)
    rows = {name: [parts[f"{factor}{suffixes[0]}"].shape[:2] for factor in "AB"] for name, parts in logits.items()}
    rank = next(iter(rows.values()))[0][0]
    topk = next(iter(logits.values()))["A_topk_indices"].shape[2] if slim else int(config.get("topk", 2))
    length = vectors.shape[1]
    sizes = {name: (a[1] * length, b[0] * length) for name, (a, b) in rows.items()}
    check_fit(folder, config, sizes, head, modules, parameters)
    # in the model's own order, so that the same adapter is the same tensors however it was written
    sizes = {name: sizes[name] for name in modules if name in sizes}

    def joined(suffix: str) -> Tensor:
        parts = [logits[name][f"{factor}{suffix}"] for name in sizes for factor in "AB"]
        return torch.cat([(part.transpose(0, 1) if i % 2 else part).flatten(0, 1) for i, part in enumerate(parts)])

    bank = VectorBank(
        sizes,
        Shape(rank, vectors.shape[0], length, topk),
        dropout=float(config.get("vblora_dropout") or 0),
        compute_dtype=dtype_of(model),
        device=modules[next(iter(sizes))].weight.device,
        selection=unpack(joined("_topk_indices"), joined("_topk_weights")) if slim else None,
    )
    with torch.no_grad():
        bank.vector_bank.copy_(vectors)
        if not slim:
            bank.logits.copy_(joined(""))
        for name, tensor in head.items():
            parameters[name].copy_(tensor)
    bank.head = frozenset(head)
    return bank


def check_fit(
    folder: Path, config: dict[str, Any], sizes: dict[str, tuple[int, int]], head: dict[str, Tensor],
    modules: dict[str, nn.Module], parameters: dict[str, Tensor],
) -> None:  # fmt: skip
    """Raises UsageError naming the first tensor of an adapter that this model has no place for."""
    hint = f"the adapter was made for {config.get('base_model_name_or_path') or 'another model'}: give it as --model"
    for name, size in sizes.items():
        if name not in modules:
            raise UsageError(f"the adapter in {folder} is for a linear {name} that this model has not", hint)
        if sizes_of(modules[name]) != size:
            shapes = [" x ".join(map(str, reversed(s))) for s in (size, sizes_of(modules[name]))]
            raise UsageError(
                f"the adapter in {folder} is for {name} of {shapes[0]}; this model's is {shapes[1]}", hint
            )
    for name, tensor in head.items():
        if name not in parameters:
            raise UsageError(f"the adapter in {folder} has weights of {name}, which this model has not", hint)
        if parameters[name].shape != tensor.shape:
            shapes = [" x ".join(map(str, s)) for s in (tensor.shape, parameters[name].shape)]
            raise UsageError(f"the adapter in {folder} has {name} of {shapes[0]}; this model's is {shapes[1]}", hint)
