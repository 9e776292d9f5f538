"""Track what a piece of code holds in memory, by its storages on the meta device, which have sizes but no bytes.

Every op that runs under a Tracker is seen once, after autograd: its new storages count from then until the last
tensor on them dies. So nothing here models what autograd saves, what a method frees or when a gradient exists: the
code that runs does all of this itself. What a storage was for is often known only later, so events are kept and added
up at the end.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank_cli.memory.shapes import result_of
from lowrank_cli.memory.stand_ins import WORKSPACE, workspace

WEIGHTS, GRADIENTS, MOMENTS, BASES = "weights", "gradients", "optimizer moments", "bases"
ACTIVATIONS, LOSS, REFRESH, TEMPORARY = "activations", "logits and loss", "refresh workspace", "temporaries"
LABELS = (WEIGHTS, GRADIENTS, MOMENTS, BASES, ACTIVATIONS, LOSS, REFRESH, TEMPORARY)
# torch's CUDA allocator hands out multiples of this
CUDA_BLOCK = 512
_aten = torch.ops.aten
# ops that give back their first argument, whose shapes need no checking: it is what takes the time
IN_PLACE = frozenset(
    getattr(_aten, f"{name}_")
    for name in (
        "add",
        "addcdiv",
        "addcmul",
        "addmm",
        "clamp",
        "copy",
        "div",
        "exp",
        "lerp",
        "mul",
        "sqrt",
        "sub",
        "zero",
    )
)
# libraries of ops that change their arguments in place
KERNELS = ("bitsandbytes", "lowrank")


@dataclass(frozen=True)
class Peak:
    """The most that was held between two marks.

    Attributes:
        at: the name of the mark before it.
        bytes_by_label: what was held then, bytes by label.
    """

    at: tuple
    bytes_by_label: dict[str, float]

    @property
    def total(self) -> float:
        """Their sum, in bytes."""
        return sum(self.bytes_by_label.values())


class Tracker(TorchDispatchMode):
    """Follows every storage that ops allocate while it is active; a value that an op would read is taken to be 1.

    Args:
        block: bytes that an allocation is rounded up to.
        on_cuda: the device that is meant, whose kernels differ in the workspace that they take.
    """

    def __init__(self, *, block: int = 1, on_cuda: bool = False):
        super().__init__()
        self.block, self.on_cuda, self.phase = block, on_cuda, TEMPORARY
        self._padding: set[int] = set()  # masks of padding, and what is made from them
        self._live: dict[int, tuple[int, weakref.ref]] = {}
        self._sizes: list[int] = []
        self._labels: list[str] = []
        self._events: list[int] = []  # a storage's number when it comes, its complement when it goes
        self._marks: list[tuple[int, tuple]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is _aten._local_scalar_dense.default and args[0].device.type == "meta":
            if args[0].dtype == torch.bool:
                # a batch that has a mask has padding: not all of it is set
                return self._see(args[0], self.phase) not in self._padding
            return 1.0 if args[0].is_floating_point() else 1
        if func is _aten.nonzero.default and args[0].device.type == "meta":
            # every token is a target: the most that there can be
            result = args[0].new_empty(args[0].numel(), args[0].dim(), dtype=torch.int64)
            self._see(result, self.phase)
            return result
        packet = func._overloadpacket
        if packet in IN_PLACE:
            return args[0]
        # what changes its arguments in place may have no meta kernel
        skipped = func.namespace in KERNELS and not func._schema.returns
        result = None if skipped else result_of(func, args, kwargs or {})
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and tensor.device.type == "meta":
                number = self._see(tensor, self.phase)
                if self._padding and tensor.dim() <= 2 and self._is_of_padding(args):
                    self._padding.add(number)
        if (skipped or packet in WORKSPACE) and (extra := workspace(packet, args, on_cuda=self.on_cuda)):
            self._spike(extra)
        return result

    @contextmanager
    def during(self, label: str) -> Iterator[None]:
        """Give this label to what is allocated in here."""
        before, self.phase = self.phase, label
        try:
            yield
        finally:
            self.phase = before

    def label(self, tensor: Tensor | None, label: str) -> None:
        """Say what a tensor's storage is for, from its beginning; one that is not known yet counts from now on."""
        if isinstance(tensor, Tensor) and tensor.device.type == "meta":
            self._labels[self._see(tensor, label)] = label

    def pad(self, mask: Tensor | None) -> None:
        """Say that a tensor is the mask of a batch's padding, which is not set everywhere."""
        if mask is not None:
            self._padding.add(self._see(mask, self.phase))

    def mark(self, *name: object) -> None:
        """Begin a new part; a name may come several times."""
        self._marks.append((len(self._events), name))

    def peaks(self) -> list[Peak]:
        """The peak of every part, in order."""
        held = dict.fromkeys(LABELS, 0)
        total, found = 0, []
        ends = [start for start, _ in self._marks[1:]] + [len(self._events)]
        position = 0
        for (start, name), end in zip(self._marks, ends, strict=True):
            for event in self._events[position:start]:
                total += self._apply(held, event)
            most, best = total, dict(held)
            for event in self._events[start:end]:
                total += self._apply(held, event)
                if total > most:
                    most, best = total, dict(held)
            position = end
            found.append(Peak(name, best))
        return found

    def _is_of_padding(self, args: tuple) -> bool:
        """Return whether an op reads a mask of padding, or a copy, a sum or an all-set flag made of one."""
        return bool(args) and isinstance(args[0], Tensor) and self._see(args[0], self.phase) in self._padding

    def _apply(self, held: dict[str, int], event: int) -> int:
        number = event if event >= 0 else ~event
        change = self._sizes[number] if event >= 0 else -self._sizes[number]
        held[self._labels[number]] += change
        return change

    def _see(self, tensor: Tensor, label: str) -> int:
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._live.get(key)
        if known is not None and known[1]() is not None:
            return known[0]
        number = self._count(storage.nbytes(), label)
        self._live[key] = number, weakref.ref(storage, lambda _, key=key, number=number: self._gone(key, number))
        self._events.append(number)
        return number

    def _gone(self, key: int, number: int) -> None:
        if key in self._live and self._live[key][0] == number:
            del self._live[key]
        self._events.append(~number)

    def _spike(self, size: int) -> None:
        number = self._count(size, self.phase if self.phase == REFRESH else TEMPORARY)
        self._events += [number, ~number]

    def _count(self, size: int, label: str) -> int:
        self._sizes.append(-(-size // self.block) * self.block)
        self._labels.append(label)
        return len(self._sizes) - 1
