"""A model whose weights are cut over processes with PyTorch's FSDP2, and one put together again.

The layers of the model are the units: a process has the weights of a layer whole while the layer runs, forward and
backward, and those of the rest (embedding, head, last norm) throughout both. Parameters that are not to be cut, such
as those of an adapter, stay whole on every process.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MethodType

import torch
from torch import Tensor, nn

from lowrank_cli.models.forward import chunked_loss, takes_chunked_path
from lowrank_cli.models.layers import layers_of
from lowrank_cli.parallel.replicas import Replicas
from lowrank_cli.parallel.shards import part_of


def shard(model: nn.Module, replicas: Replicas, device: torch.device, whole: set[Tensor]) -> dict[str, nn.Parameter]:
    """Cut a model's weights over the processes, in place; gradients are sums over them from then on.

    Args:
        model: the same on every process; it may stand on the CPU, and moves to the device layer by layer.
        replicas: the processes.
        device: of this process.
        whole: parameters that are not cut.
    Returns:
        This process's rows of the parameters that are, by name, as an optimizer takes them: they share the memory.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (replicas.world_size,))
    # gradients of 16 bits are summed in 32
    narrow = any(p.is_floating_point() and p.element_size() < 4 for p in model.parameters())
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32) if narrow else MixedPrecisionPolicy()
    # asked of the model as it is: FSDP2 gives it another class
    chunked = takes_chunked_path(model)
    for p in whole:
        p.data = p.data.to(device)
    for module in (*layers_of(model), model):
        fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=whole)
        # every process divides by the targets of the whole update already
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    if chunked:
        _call_as_forward(model)
    cut = {name: p for name, p in model.named_parameters() if is_cut(p)}
    return {name: part_of(p, p.detach().to_local(), replicas) for name, p in cut.items()}


def _call_as_forward(model: nn.Module) -> None:
    """The loss without logits uses the head's weight by itself: to FSDP2 it is the call of the whole model."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    model.loss_in_chunks = MethodType(chunked_loss, model)
    register_fsdp_forward_method(model, "loss_in_chunks")


def is_cut(tensor: Tensor) -> bool:
    """Return whether a tensor of a model is sharded over processes."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def whole_tensor(tensor: Tensor) -> Tensor:
    """A tensor of a model, put together on the CPU if it is cut: every process has to ask."""
    return tensor.detach().full_tensor().cpu() if is_cut(tensor) else tensor.detach()


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this process's shard of a tensor, or all of one that is not sharded."""
    return tensor.detach().to_local() if is_cut(tensor) else tensor.detach()


def reshard(model: nn.Module) -> None:
    """Free what an evaluation has put together: without a backward pass FSDP2 leaves embedding and head whole."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def reunite(model: nn.Module, replicas: Replicas) -> None:
    """The inverse of `shard`, in place: on rank 0 the model is a plain one again, on the CPU. All have to call it;
    to the others the model is worth nothing afterwards."""
    from torch.distributed.fsdp import FSDPModule

    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    reshard(model)
    made: dict[Tensor, nn.Parameter] = {}
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if p not in made:
                # one at a time, and no longer on the other ranks than it takes
                tensor = whole_tensor(p)
                made[p] = nn.Parameter(tensor.cpu(), requires_grad=p.requires_grad) if replicas.is_main else p
            setattr(module, name, made[p])
    if not replicas.is_main:
        return
    for unit in units:
        state = unit._get_fsdp_state()
        state._pre_forward_hook_handle.remove()
        state._post_forward_hook_handle.remove()
        unit.__class__ = type(unit).__bases__[-1]
    for module in model.modules():
        # marks by which transformers would have all processes generate together
        for mark in ("_is_fsdp_managed_module", "_fsdp_use_orig_params", "loss_in_chunks"):
            vars(module).pop(mark, None)
    model.cpu()


def load_whole(model: nn.Module, tensors: Mapping[str, Tensor], replicas: Replicas) -> None:
    """Copy whole tensors into a model that may be cut: each process takes its own rows.

    Raises:
        RuntimeError: a tensor is missing, or has another shape.
    """
    from lowrank_cli.parallel.shards import own_rows

    with torch.no_grad():
        for name, p in model.named_parameters():
            if name not in tensors:
                raise RuntimeError(f"it has no {name}")
            if tensors[name].shape != p.shape:
                raise RuntimeError(f"{name} is {tuple(tensors[name].shape)} there and {tuple(p.shape)} here")
            own = own_rows(tensors[name], replicas) if is_cut(p) else tensors[name]
            local_tensor(p).copy_(own)
