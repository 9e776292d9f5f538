"""Checkpoints: written whole or not at all, made of tensors and numbers, enough to go on bit for bit."""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from lowrank_cli import foreign
from lowrank_cli.errors import LowrankError, UsageError
from lowrank_cli.misfortune import number_of, reason
from lowrank_cli.models.source import CUT
from lowrank_cli.parallel import sharded_checkpoint
from lowrank_cli.parallel.replicas import Alone
from lowrank_cli.parallel.sharded_checkpoint import load_optimizer, parameters_of
from lowrank_cli.parallel.sharding import whole_tensor
from lowrank_cli.run import write_json

MANIFEST = "manifest.json"
SETTINGS = "config.yaml"
TRAINABLE = "trainable.safetensors"
FINGERPRINT = "_lowrank_base"


@dataclass
class Progress:
    """Progress says where a run stands after a whole number of updates: everything but tensors, JSON-able."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    data: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, float] = field(default_factory=dict)
    start: dict[str, float] = field(default_factory=dict)  # the evaluation before the first update
    best: dict[str, float] = field(default_factory=dict)  # the best evaluation since, and its step
    worse: int = 0  # evaluations since then
    evaluated: int = -1  # the step of the last whole evaluation


def save(
    folder: Path,
    *,
    model: nn.Module,
    tokenizer,
    optimizer: Optimizer,
    method_states: dict[str, Tensor],
    progress: Progress,
    rng: dict[str, Any],
    settings: str,
    keep: int,
    adapter: bool = False,
    replicas: Alone,
) -> Path:
    """Write `folder/step-NNNNNN` and remove all but the newest `keep`; of an adapter, what trains and not the base.

    Everything goes to a temporary folder that is flushed to disk and then renamed: a kill at any moment leaves the
    previous checkpoint whole. If the weights are cut over processes all of them write; else rank 0 alone calls this.

    Raises:
        LowrankError: it could not be written (a full disk); what was there before is untouched.
    """
    final = folder / f"step-{progress.step:06d}"
    temporary = folder / f".step-{progress.step:06d}.{os.getpid()}"
    cut = replicas.sharded and not adapter
    try:
        if replicas.is_main:
            remove_leftovers(folder)
            temporary.mkdir(parents=True)
        tensors, numbers = optimizer_state(optimizer)
        if cut:
            # the folder is there when its name is known
            temporary = Path(replicas.told({"temporary": str(temporary)})["temporary"])
            sharded_checkpoint.write(temporary / CUT, model, optimizer, tensors, replicas)
            if not replicas.is_main:
                return final
            sharded_checkpoint.check_whole(temporary / CUT)
        else:
            if adapter:
                write_trainable(temporary, trainable(model), base_fingerprint(model))
            else:
                write_model(temporary, model, tokenizer, published=False)
            save_file(tensors, temporary / "optimizer.safetensors")
        save_file(method_states, temporary / "method.safetensors")
        save_file(rng["tensors"], temporary / "rng.safetensors")
        # the checkpoint alone is enough to go on
        (temporary / SETTINGS).write_text(settings, encoding="utf-8")
        write_json(
            temporary / "progress.json",
            {
                "step": progress.step,
                "tokens": progress.tokens,
                "seconds": progress.seconds,
                "data": progress.data,
                "evaluation": progress.evaluation,
                "start": progress.start,
                "best": progress.best,
                "worse": progress.worse,
                "evaluated": progress.evaluated,
                "python_rng": rng["python"],
                "optimizer_numbers": numbers,
                "kernels": [group.get("kernel", "torch") for group in optimizer.param_groups],
            },
        )
        files = sorted(p for p in temporary.rglob("*") if p.is_file())
        write_json(temporary / MANIFEST, {p.relative_to(temporary).as_posix(): stamp(p) for p in files})
        commit(temporary, final)
    except LowrankError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if not is_misfortune(error):
            raise
        whole = newest(folder, progress.step)
        raise LowrankError(
            f"could not write the checkpoint of step {progress.step} to {folder}: {reason(error)}",
            f"make room, then go on from {whole.name}: --resume {folder.parent}"
            if whole
            else "make room, or choose another place with --out; there was no earlier checkpoint",
        ) from None
    found = listing(folder)
    # a run that went on from an older checkpoint has left the later ones behind
    abandoned = [p for p in found if step_of(p) > progress.step]
    for old in abandoned + [p for p in found if p not in abandoned][:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def is_misfortune(error: Exception) -> bool:
    """Return whether an error of a writer is the disk's: each library has a class of its own for that."""
    return isinstance(error, (OSError, SafetensorError)) or number_of(error) is not None


def stamp(path: Path) -> dict[str, Any]:
    """Return what the manifest keeps of a file: its size and checksum."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def write_model(folder: Path, model: nn.Module, tokenizer, *, published: bool = True) -> None:
    """Write the weights, the configuration and the tokenizer, in the form that from_pretrained loads.

    Args:
        folder: to write into.
        model: a language model, a classifier or an adapter's base.
        tokenizer: its tokenizer.
        published: under the names that the model's publishers gave its tensors, and not those of its code: experts
            are one tensor each there.
    """
    # training runs without a key-value cache; whoever loads the model wants one to generate
    model.config.use_cache = True
    model.save_pretrained(folder, max_shard_size="1000GB", save_original_format=published)
    model.config.use_cache = False
    tokenizer.save_pretrained(folder)


def trainable(model: nn.Module, *, keeping: bool = True) -> dict[str, Tensor]:
    """The parameters that train, by name; if they are cut over processes, put together: all have to ask, and those
    that are not `keeping` get nothing."""
    found = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            tensor = whole_tensor(p).contiguous()
            if keeping:
                found[name] = tensor
    return found


def write_trainable(folder: Path, tensors: dict[str, Tensor], base: str) -> None:
    """The parameters that train, and a fingerprint of those that do not."""
    save_file(tensors, folder / TRAINABLE, metadata={"base": base})


def load_trainable(folder: Path, model: nn.Module) -> None:
    """The inverse of `write_trainable`.

    Raises:
        RuntimeError: other parameters train in this model, or its frozen weights are others.
    """
    with foreign.open_tensors(folder / TRAINABLE) as file:
        base = (file.metadata() or {}).get("base")
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if found.keys() != own.keys():
        other = sorted(found.keys() ^ own.keys())[0]
        raise RuntimeError(f"{other} is trained in one of them only")
    if base != base_fingerprint(model):
        raise RuntimeError("the base model's weights are not those that the run began with")
    with torch.no_grad():
        for name, tensor in found.items():
            own[name].copy_(tensor)


def save_best(
    folder: Path, tensors: dict[str, Tensor], base: str, method_states: dict[str, Tensor], step: int
) -> None:
    """Keep what trains as it is now, in place of what was kept before; a kill leaves one of them whole."""
    best_step(folder)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    for leftover in folder.parent.glob(f".{folder.name}.*"):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        write_trainable(temporary, tensors, base)
        write_json(temporary / "step.json", {"step": step})
        save_file(method_states, temporary / "method.safetensors")
        commit(temporary, folder)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if not is_misfortune(error):
            raise
        raise LowrankError(
            f"could not keep the best weights in {folder}: {reason(error)}", "make room, or choose another --out"
        ) from None


def best_step(folder: Path) -> int | None:
    """The step whose weights are kept, after putting back what a killed process had moved aside; None without."""
    aside = folder.with_name(f".old-{folder.name}")
    if not folder.exists() and aside.exists():
        os.replace(aside, folder)
    file = folder / "step.json"
    return foreign.entry(foreign.read_json(file), "step", int, file) if file.is_file() else None


def load_best(folder: Path, model: nn.Module) -> dict[str, Tensor]:
    """Put the best weights back; returns the methods' own tensors of that moment."""
    load_trainable(folder, model)
    return foreign.read_tensors(folder / "method.safetensors")


def base_fingerprint(model: nn.Module) -> str:
    """A hash of the frozen parameters: names, shapes and some elements of each. One that was made before they were
    cut over processes stays."""
    if FINGERPRINT in vars(model):
        return vars(model)[FINGERPRINT]
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        if not p.requires_grad:
            flat = p.detach().reshape(-1)
            some = flat[:: max(1, flat.numel() // 64)].to("cpu", torch.float32)
            digest.update(f"{name} {tuple(p.shape)}".encode() + some.numpy().tobytes())
    return digest.hexdigest()


def commit(temporary: Path, final: Path) -> None:
    """Flush a folder's files to disk and give it its name."""
    mask = os.umask(0o077)
    os.umask(mask)
    for path in (*temporary.rglob("*"), temporary):
        # safetensors makes files that the user alone may read
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    if final.exists():
        # the same step again, after a resume: the old one steps aside until the new one has its name
        aside = final.with_name(f".old-{final.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(final, aside)
        os.replace(temporary, final)
        shutil.rmtree(aside, ignore_errors=True)
    else:
        os.replace(temporary, final)
    descriptor = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left half-written; put back what it had moved aside."""
    for old in folder.glob(".old-step-*"):
        final = folder / old.name.removeprefix(".old-")
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(old, final)
    for temporary in folder.glob(".step-*"):
        shutil.rmtree(temporary, ignore_errors=True)


def listing(folder: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if re.fullmatch(r"step-\d+", p.name) and p.is_dir()), key=step_of)


def step_of(path: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(path.name.removeprefix("step-"))


def newest(folder: Path, until: int | None = None) -> Path | None:
    """The newest finished checkpoint, if there is one; with `until`, of this step or before."""
    if folder.is_dir():
        for old in folder.glob(".old-step-*"):
            if not (folder / old.name.removeprefix(".old-")).exists():
                os.replace(old, folder / old.name.removeprefix(".old-"))
    found = [p for p in listing(folder) if until is None or step_of(p) <= until]
    return found[-1] if found else None


def verify(path: Path) -> None:
    """Check that every file of a checkpoint is as it was written; raises UsageError naming the first that is not."""
    if not (path / MANIFEST).is_file():
        raise UsageError(f"{path} is no whole checkpoint: {MANIFEST} is missing", _others(path))
    for name, written in foreign.read_json(path / MANIFEST, hint=_others(path)).items():
        file = foreign.inside(path, name, path / MANIFEST)
        # checkpoints of before had sizes alone
        written = written if isinstance(written, dict) else {"bytes": written}
        if not file.is_file():
            what = "is missing"
        elif file.stat().st_size != written.get("bytes"):
            what = f"has {file.stat().st_size:,} bytes of {written.get('bytes'):,}"
        elif "sha256" in written and stamp(file)["sha256"] != written["sha256"]:
            what = "has changed since it was written (its checksum is another one)"
        else:
            continue
        raise UsageError(f"the checkpoint {path} is damaged: {name} {what}", _others(path))


def _others(path: Path) -> str:
    others = [p for p in listing(path.parent) if p != path]
    return f"an older one is there: --resume {others[-1]}" if others else "start again without --resume"


def load(path: Path, *, model: nn.Module, optimizer: Optimizer, replicas: Alone) -> tuple[Progress, dict[str, Tensor]]:
    """Put a checkpoint's weights, optimizer state and random states back.

    Returns:
        The progress, and the methods' own tensors.
    Raises:
        UsageError: a file is damaged, or the checkpoint is of another model.
    """
    verify(path)
    entries = foreign.read_json(path / "progress.json", hint=_others(path))
    try:
        load_tensors(path, model, optimizer, replicas)
    except (RuntimeError, SafetensorError) as error:
        raise UsageError(
            f"the checkpoint {path} does not fit this model: {reason(error)}",
            "resume with the configuration of the run: --resume RUN_FOLDER and nothing else",
        ) from None
    try:
        load_numbers(optimizer, entries["optimizer_numbers"])
        restore_rng(foreign.read_tensors(path / "rng.safetensors"), entries["python_rng"])
        progress = progress_of(entries, step_of(path))
        kernels = entries.get("kernels")
        if not (kernels is None or (isinstance(kernels, list) and all(isinstance(name, str) for name in kernels))):
            raise TypeError(f"kernels is {kernels!r}")
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, OverflowError) as error:
        raise UsageError(
            f"the checkpoint {path} is damaged: progress.json or rng.safetensors: {reason(error)}", _others(path)
        ) from None
    if hasattr(optimizer, "take_kernels"):
        optimizer.take_kernels(kernels)
    return progress, foreign.read_tensors(path / "method.safetensors")


def progress_of(entries: dict[str, Any], step: int) -> Progress:
    """Return the progress that the JSON of a step's checkpoint says; raises ValueError or TypeError if it is none."""
    found = Progress()
    if entries.get("step") != step:
        raise ValueError(f"step is {entries.get('step')!r}")
    for f in fields(Progress):
        own, value = getattr(found, f.name), entries.get(f.name, getattr(found, f.name))
        numbers = isinstance(own, (int, float)) and isinstance(value, (int, float)) and not isinstance(value, bool)
        if not numbers and type(value) is not type(own):
            raise TypeError(f"{f.name} is {value!r}")
        setattr(found, f.name, value)
    return found


def optimizer_state(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, dict[str, float]]]:
    """The state of an optimizer by parameter name: tensors as `name|key`, numbers apart."""
    tensors, numbers = {}, {}
    for group in optimizer.param_groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            for key, value in optimizer.state.get(p, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"{name}|{key}"] = value.detach().contiguous()
                else:
                    numbers.setdefault(name, {})[key] = value
    return tensors, numbers


def load_tensors(path: Path, model: nn.Module, optimizer: Optimizer, replicas: Alone) -> None:
    """Weights and the optimizer's tensors, whether they were saved whole or cut, for a model that is whole or cut.

    Raises:
        RuntimeError: they are of another model.
    """
    if (path / CUT).is_dir():
        sharded_checkpoint.load(path / CUT, model, optimizer, replicas)
        return
    tensors = foreign.read_tensors(path / "optimizer.safetensors")
    if (path / TRAINABLE).is_file():
        load_trainable(path, model)
    elif replicas.sharded:
        weights = foreign.read_tensors(path / "model.safetensors")
        sharded_checkpoint.load_plain(weights, tensors, model, optimizer, replicas)
        return
    else:
        load_model(model, path / "model.safetensors")
    load_optimizer(optimizer, tensors)


def load_numbers(optimizer: Optimizer, numbers: dict[str, dict[str, float]]) -> None:
    """The numbers of `optimizer_state`."""
    by_name = parameters_of(optimizer)
    for name, entries in numbers.items():
        optimizer.state[by_name[name]].update(entries)


def rng_state() -> dict[str, Any]:
    """The state of every random generator, as tensors and JSON."""
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda:{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return {"tensors": tensors, "python": random.getstate()}


def restore_rng(tensors: dict[str, Tensor], python: list) -> None:
    """The inverse of `rng_state`."""
    torch.set_rng_state(tensors["torch"])
    for key, state in tensors.items():
        if key.startswith("cuda:") and int(key[5:]) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, int(key[5:]))
    version, internal, gauss = python
    random.setstate((version, tuple(internal), gauss))
