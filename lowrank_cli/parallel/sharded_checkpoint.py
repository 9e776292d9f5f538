"""Checkpoints of weights that are cut over processes: torch.distributed.checkpoint, every process writes its own rows.

A tensor is saved as the whole one that its parts are of, so that any number of processes can go on from it, one
included. Only 8-bit moments of whose blocks some lie on two processes are saved part by part: they go on with the same
number of processes.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_cli import foreign
from lowrank_cli.errors import LowrankError, UsageError
from lowrank_cli.parallel.replicas import Alone, Replicas, rows_of
from lowrank_cli.parallel.sharding import is_cut, load_whole
from lowrank_cli.parallel.shards import layout, own_rows

MODEL, OPTIMIZER = "model.", "optimizer."
METADATA = ".metadata"
# elements of a block of 8-bit moments, and the end of the name of its scales
BLOCK, SCALE = 256, "_scale"
# what the list of tensors is made of, by module
_PARTS = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))),
    "collections": ("OrderedDict",),
    "pathlib": ("PosixPath",),
    "pathlib._local": ("PosixPath",),
}  # fmt: skip
CLASSES = frozenset((module, name) for module, names in _PARTS.items() for name in names)


def write(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], replicas: Replicas
) -> None:
    """Write what a run trains; every process calls it.

    Args:
        folder: on a file system that all processes see.
        model: cut by `parallel.sharding.shard`.
        optimizer: of this process's parts.
        tensors: its state, `name|key`.
        replicas: the processes.
    Raises:
        LowrankError: it could not be written, whichever process it was.
    """
    import torch.distributed.checkpoint as dcp

    state: dict[str, Any] = {MODEL + name: p.detach() for name, p in model.named_parameters()}
    mesh, parameters = next(p for p in model.parameters() if is_cut(p)).device_mesh, parameters_of(optimizer)
    cut = {key: t for key, t in tensors.items() if t.dim() and layout(parameters[_parameter(key)]).is_cut}
    heights = dict(zip(cut, map(int, replicas.numbers(*(t.shape[0] for t in cut.values()))), strict=True))
    for key, tensor in tensors.items():
        if key not in cut:
            state[OPTIMIZER + key] = tensor
        elif _blocks_are_whole(key, {k: (heights[k], *t.shape[1:]) for k, t in cut.items()}, replicas.world_size):
            state[OPTIMIZER + key] = _as_whole(tensor, heights[key], mesh)
        else:
            state[_part_key(key, replicas)] = tensor
    try:
        dcp.save(state, checkpoint_id=folder)
    except dcp.CheckpointException as error:
        rank, (failure, _) = next(iter(error.failures.items()))
        # the system's own reason is for the caller to tell, with what to do
        if isinstance(failure, OSError):
            raise failure from None
        raise LowrankError(
            f"rank {rank} could not write its part of the checkpoint: {failure}", "look at the folder of --out"
        ) from None


def metadata(folder: Path) -> Any:
    """Return what a folder of torch.distributed.checkpoint holds, without executing anything.

    PyTorch writes it as a pickle and reads it as one, which runs whatever a file asks for: here only the classes that
    it consists of are admitted, and the files that it names lie in the folder.

    Raises:
        UsageError: it asks for something else, or is damaged.
    """
    path = folder / METADATA
    with foreign.reading(path, "the list of a checkpoint's tensors", foreign.AGAIN), path.open("rb") as file:
        found = foreign.Unpickler(file, CLASSES, path).load()
        if type(found).__name__ != "Metadata":
            raise ValueError(f"it is {type(found).__name__}")
        for entry in found.storage_data.values():
            foreign.inside(folder, entry.relative_path, path)
    return found


def reader(folder: Path) -> Any:
    """Return PyTorch's reader of a folder, which gets the list of tensors from `metadata`."""
    import torch.distributed.checkpoint as dcp

    class Reader(dcp.FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            found = metadata(folder)
            if found.storage_meta is None:
                found.storage_meta = dcp.metadata.StorageMeta()
            found.storage_meta.load_id = self.load_id
            return found

    return Reader(folder)


def check_whole(folder: Path) -> None:
    """Raises LowrankError if a file of a process is not in the folder: it was written to a disk of its own."""
    stored = metadata(folder).storage_data.values()
    missing = sorted({entry.relative_path for entry in stored if not (folder / entry.relative_path).is_file()})
    if missing:
        raise LowrankError(
            f"{missing[0]} of the checkpoint is not in {folder}: the process that wrote it sees another folder there",
            "put --out on a file system that all machines share",
        )


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, replicas: Alone) -> None:
    """The inverse of `write`, on any number of processes, with a model that is cut or whole.

    Raises:
        RuntimeError: the checkpoint is of another model.
        UsageError: 8-bit moments cannot be divided as they would have to be.
    """
    import torch.distributed.checkpoint as dcp

    saved = metadata(folder).state_dict_metadata
    shapes = {key: entry.size for key, entry in saved.items()}
    parameters = parameters_of(optimizer)
    state: dict[str, Any] = {}
    for name, p in model.named_parameters():
        if shapes.get(MODEL + name) != p.shape:
            raise RuntimeError(f"{name} is {_size(shapes.get(MODEL + name))} there and {_size(p.shape)} here")
        state[MODEL + name] = p.detach()
    mesh = next((p.device_mesh for p in model.parameters() if is_cut(p)), None)
    ours: dict[str, Tensor] = {}
    for key, entry in saved.items():
        wanted = _wanted(key, replicas)
        if wanted is None:
            continue
        p, dtype = parameters.get(_parameter(wanted)), entry.properties.dtype
        if p is None:
            raise RuntimeError(f"{_parameter(wanted)} is trained in one of them only")
        if key.startswith(OPTIMIZER) and entry.size and layout(p).is_cut:
            _check_blocks(wanted, shapes, replicas.world_size)
            start, stop = rows_of(entry.size[0], replicas.rank, replicas.world_size)
            ours[wanted] = torch.empty(stop - start, *entry.size[1:], dtype=dtype, device=p.device)
            state[key] = _as_whole(ours[wanted], entry.size[0], mesh)
        else:
            state[key] = ours[wanted] = torch.empty(entry.size, dtype=dtype, device=p.device)
    try:
        dcp.load(state, storage_reader=reader(folder), no_dist=mesh is None)
    except dcp.CheckpointException as error:
        failure, _ = next(iter(error.failures.values()))
        raise RuntimeError(f"{type(failure).__name__}: {failure}") from None
    load_optimizer(optimizer, ours)


def load_plain(
    weights: dict[str, Tensor], tensors: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer,
    replicas: Replicas,
) -> None:  # fmt: skip
    """Go on, cut, from what was saved whole.

    Args:
        weights: of the whole model.
        tensors: of the whole optimizer, `name|key`.
        model: cut by `parallel.sharding.shard`.
        optimizer: of the parts.
        replicas: the processes.
    Raises:
        RuntimeError: the checkpoint is of another model.
        UsageError: 8-bit moments cannot be divided as they would have to be.
    """
    load_whole(model, weights, replicas)
    parameters, ours = parameters_of(optimizer), {}
    shapes = {OPTIMIZER + key: t.shape for key, t in tensors.items()}
    for key, tensor in tensors.items():
        if tensor.dim() and layout(parameters[_parameter(key)]).is_cut:
            _check_blocks(key, shapes, replicas.world_size)
            ours[key] = own_rows(tensor, replicas).clone()
        else:
            ours[key] = tensor
    load_optimizer(optimizer, ours)


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put tensors of an optimizer's state back, `name|key`; every one keeps its dtype.

    Raises:
        RuntimeError: they are of parameters that this optimizer has not.
    """
    by_name = parameters_of(optimizer)
    for key, tensor in tensors.items():
        p = by_name.get(_parameter(key))
        if p is None:
            raise RuntimeError(f"{_parameter(key)} is trained in one of them only")
        optimizer.state[p][key.rpartition("|")[2]] = tensor.to(p.device)


def parameters_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's parameters by name."""
    return {n: p for g in optimizer.param_groups for n, p in zip(g["param_names"], g["params"], strict=True)}


def _parameter(key: str) -> str:
    return key.rpartition("|")[0]


def _as_whole(part: Tensor, height: int, mesh: Any) -> Tensor:
    """A process's rows as the part of a tensor of so many."""
    from torch.distributed.tensor import DTensor, Shard

    shape = torch.Size((height, *part.shape[1:]))
    stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return DTensor.from_local(part.contiguous(), mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def _blocks_are_whole(key: str, shapes: dict[str, tuple[int, ...]], world_size: int) -> bool:
    """Return whether no block of 8-bit moments would lie on two processes; any other tensor has no blocks."""
    moment = key.removesuffix(SCALE)
    if f"{moment}{SCALE}" not in shapes or world_size == 1:
        return True
    rows, *columns = shapes[moment]
    return -(-rows // world_size) * math.prod(columns) % BLOCK == 0


def _check_blocks(key: str, shapes: dict[str, tuple[int, ...]], world_size: int) -> None:
    if _blocks_are_whole(OPTIMIZER + key, shapes, world_size):
        return
    fitting = [n for n in range(1, 65) if _blocks_are_whole(OPTIMIZER + key, shapes, n)]
    raise UsageError(
        f"the 8-bit moments of {_parameter(key)} would be rounded anew on {world_size} processes: a block of {BLOCK} "
        "would lie on two of them",
        f"go on with {' or '.join(map(str, fitting[:6]))}",
    )


def _part_key(key: str, replicas: Replicas) -> str:
    return f"part {replicas.rank} of {replicas.world_size}: {key}"


def _wanted(key: str, replicas: Alone) -> str | None:
    """The optimizer's `name|key` of an entry that this process takes; None for the model's and for others' parts."""
    if key.startswith("part "):
        place, _, name = key.removeprefix("part ").partition(": ")
        rank, _, world_size = place.partition(" of ")
        if int(world_size) != replicas.world_size:
            raise UsageError(
                f"the 8-bit moments of {_parameter(name)} were saved by {world_size} processes, and their blocks "
                "cannot be divided otherwise",
                f"go on with {world_size} processes",
            )
        return name if int(rank) == replicas.rank else None
    return key.removeprefix(OPTIMIZER) if key.startswith(OPTIMIZER) else None


def _size(shape: tuple[int, ...] | None) -> str:
    return " x ".join(map(str, shape)) if shape else "not"
