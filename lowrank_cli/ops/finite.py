"""Search of tensors for values that are not finite."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from lowrank_cli.errors import UsageError


@torch.no_grad()
def first_non_finite(named_tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return the name of the first tensor that holds NaN or infinity, "" if all values are finite.

    The largest magnitude of a tensor is NaN or infinite exactly if one of its values is: one fused pass for each
    device and dtype, no copy of a tensor, one synchronisation.

    Args:
        named_tensors: (name, tensor) of any shape; of sharded ones, the local parts. Left out are integers, 8-bit
            floats (which have no norm in PyTorch), empty tensors and those on the meta device.
    """
    groups: dict[tuple[torch.device, torch.dtype], list[tuple[int, Tensor]]] = {}
    names = []
    for name, tensor in named_tensors:
        if tensor.is_floating_point() and tensor.itemsize > 1 and tensor.numel() and not tensor.is_meta:
            groups.setdefault((tensor.device, tensor.dtype), []).append((len(names), tensor.detach()))
            names.append(name)
    if not names:
        return ""
    places = [place for group in groups.values() for place, _ in group]
    finite = [
        torch.stack(torch._foreach_norm([t for _, t in group], math.inf)).isfinite() for group in groups.values()
    ]
    flags = torch.cat([part.to(finite[0].device) for part in finite]).tolist()
    broken = [place for place, is_finite in zip(places, flags, strict=True) if not is_finite]
    return names[min(broken)] if broken else ""


def refuse_non_finite(model: str, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raise UsageError if a model that was given holds a value that is not finite.

    Args:
        model: what it is called.
        named_tensors: its weights.
    """
    if name := first_non_finite(named_tensors):
        raise UsageError(f"{model} is broken: {name} holds a value that is not finite", "load a sound copy of it")
