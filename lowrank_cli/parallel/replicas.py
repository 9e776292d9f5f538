"""The processes that train one model together, each on its share of the batch, and what they tell each other.

Every process holds a replica: the same weights, bases and moments. They exchange sums of gradients, new bases and a
few numbers an update, in the same order on every process. `Alone` has the same interface for a run of one process, and
does nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# small tensors travel together in buffers of this size; it is what torch's DistributedDataParallel begins with
BUCKET_BYTES = 25 << 20


class LostRank(RuntimeError):
    """Another process did not answer: it died, it hangs, or the network is down."""


class Alone:
    """A run of one process."""

    rank, world_size, is_main = 0, 1, True
    sent_bytes = 0
    # whether a process holds only its share of the weights
    sharded = False

    def begin(self, update: int) -> None:
        """An update begins; counted from 1."""

    def numbers(self, *values: float) -> list[float]:
        """The sums of some numbers over all processes."""
        return list(values)

    def told(self, values: dict[str, float]) -> dict[str, float]:
        """Rank 0's values."""
        return values


class Replicas(Alone):
    """The processes of torch's default process group; what goes wrong in a collective is a `LostRank`.

    Random numbers of an update follow from the seed, the update and the rank alone (`begin`). So a resumed run draws
    what the unbroken one would have drawn, and no generator's state has to be kept for each rank.

    Args:
        seed: of the run.
        sharded: weights are cut over the processes: every one takes part in every forward pass.
    """

    def __init__(self, seed: int = 0, *, sharded: bool = False):
        import torch.distributed as dist

        self._dist, self.seed, self.update, self.sharded = dist, seed, 0, sharded
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.is_main = self.rank == 0
        self.sent_bytes = 0  # of tensors that this update has given to collectives

    def begin(self, update: int) -> None:
        """An update begins: dropout draws from a stream of its own on every rank."""
        self.update, self.sent_bytes = update, 0
        torch.manual_seed(self._mixed(update, self.rank))

    def _mixed(self, *what: object) -> int:
        text = " ".join(map(str, (self.seed, *what)))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1

    # ---- numbers, over the CPU's backend: nothing waits for a device

    def numbers(self, *values: float) -> list[float]:
        """The sums of some numbers over all processes, in float64."""
        tensor = torch.tensor(values, dtype=torch.float64)
        with _asking():
            self._dist.all_reduce(tensor)
        return tensor.tolist()

    def chosen(self, values: list[int]) -> list[int]:
        """Rank 0's numbers, as many on every rank."""
        tensor = torch.tensor(values, dtype=torch.int64)
        with _asking():
            self._dist.broadcast(tensor, 0)
        return tensor.tolist()

    def told(self, values: dict[str, float]) -> dict[str, float]:
        """Rank 0's values, by name."""
        kept = [values]
        with _asking():
            self._dist.broadcast_object_list(kept, 0, device=torch.device("cpu"))
        return kept[0]

    def first_difference(self, tensors: Iterable[Tensor]) -> int | None:
        """The place of the first tensor that is not the same, bit for bit, on every rank."""
        sums = torch.stack([_bits(t) for t in tensors]).cpu()
        extremes = torch.cat([sums, -sums])
        with _asking():
            self._dist.all_reduce(extremes, op=self._dist.ReduceOp.MAX)
        largest, smallest = extremes[: len(sums)], -extremes[len(sums) :]
        different = (largest != smallest).nonzero()
        return int(different[0]) if len(different) else None

    # ---- tensors

    def sum_(self, tensors: list[Tensor]) -> None:
        """Replaces each tensor by its sum over all processes: the same bits on each."""
        for bucket in buckets(tensors):
            flat = _flattened(bucket)
            self.sent_bytes += flat.nbytes
            with _asking():
                self._dist.all_reduce(flat)
            _unflatten(flat, bucket)

    def broadcast_(self, tensors: list[Tensor], source: int = 0) -> None:
        """Replaces each tensor by that of one rank."""
        for bucket in buckets(tensors):
            flat = _flattened(bucket)
            self.sent_bytes += flat.nbytes
            with _asking():
                self._dist.broadcast(flat, source)
            if self.rank != source:
                _unflatten(flat, bucket)

    def sum_to_(self, tensor: Tensor, target: int) -> None:
        """Replaces a contiguous tensor by its sum on one rank; on the others it is worth nothing afterwards."""
        self.sent_bytes += tensor.nbytes
        with _asking():
            self._dist.reduce(tensor, target)

    # ---- tensors that are cut over the processes, by rows

    def scattered_sum(self, tensor: Tensor) -> Tensor:
        """This rank's rows of a tensor's sum over all processes."""
        start, stop = rows_of(tensor.shape[0], self.rank, self.world_size)
        height = -(-tensor.shape[0] // self.world_size)
        whole = _padded(tensor.detach(), height * self.world_size)
        own = whole.new_empty(height, *whole.shape[1:])
        self.sent_bytes += whole.nbytes
        with _asking():
            _newest(self._dist, "reduce_scatter_single", "reduce_scatter_tensor")(own, whole)
        return own[: stop - start]

    def gathered(self, own: Tensor, size: int) -> Tensor:
        """A tensor of `size` rows from the rows that every rank holds; on every rank."""
        height = -(-size // self.world_size)
        own = _padded(own.detach(), height)
        whole = own.new_empty(height * self.world_size, *own.shape[1:])
        self.sent_bytes += own.nbytes
        with _asking():
            _newest(self._dist, "all_gather_single", "all_gather_into_tensor")(whole, own)
        return whole[:size]

    def gathered_at(self, own: Tensor, size: int, target: int) -> Tensor | None:
        """The same on one rank; None on the others."""
        height = -(-size // self.world_size)
        own = _padded(own.detach(), height)
        parts = [torch.empty_like(own) for _ in range(self.world_size)] if self.rank == target else None
        self.sent_bytes += own.nbytes
        with _asking():
            self._dist.gather(own, parts, target)
        return torch.cat(parts)[:size] if parts is not None else None


def rows_of(size: int, rank: int, world_size: int) -> tuple[int, int]:
    """The first row of a rank's share of so many, and the one after its last: those of torch.chunk and of FSDP2."""
    height = -(-size // world_size)
    return min(rank * height, size), min((rank + 1) * height, size)


def buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in groups of one dtype and device, of at most BUCKET_BYTES or one tensor; the same on every rank."""
    open_ones: dict[tuple, list[Tensor]] = {}
    for tensor in tensors:
        kind = (tensor.dtype, tensor.device)
        bucket = open_ones.setdefault(kind, [])
        if bucket and sum(t.nbytes for t in bucket) + tensor.nbytes > BUCKET_BYTES:
            yield bucket
            bucket = open_ones[kind] = []
        bucket.append(tensor)
    yield from open_ones.values()


def balanced(costs: list[float], world_size: int) -> list[int]:
    """Return the rank for each piece of work, so that none has much more than the others: the largest piece first,
    each to the rank that has the least."""
    loads, owners = [0.0] * world_size, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owners[i] = min(range(world_size), key=lambda rank: (loads[rank], rank))
        loads[owners[i]] += costs[i]
    return owners


def _newest(module: object, *names: str) -> Callable:
    """The first of some names that this version of torch has: the later ones are deprecated in the newest."""
    return next(getattr(module, name) for name in names if hasattr(module, name))


def _padded(tensor: Tensor, rows: int) -> Tensor:
    """A contiguous tensor with zeros below, if it has fewer rows."""
    if tensor.shape[0] == rows:
        return tensor.contiguous()
    result = tensor.new_zeros(rows, *tensor.shape[1:])
    result[: tensor.shape[0]] = tensor
    return result


def _flattened(bucket: list[Tensor]) -> Tensor:
    if len(bucket) == 1 and bucket[0].is_contiguous():
        # a large tensor is summed where it stands
        return bucket[0].detach()
    return torch.cat([t.detach().reshape(-1) for t in bucket])


def _unflatten(flat: Tensor, bucket: list[Tensor]) -> None:
    if flat.data_ptr() == bucket[0].data_ptr():
        return
    for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
        tensor.detach().copy_(part.view(tensor.shape))


def _bits(tensor: Tensor) -> Tensor:
    """The sum of a tensor's bit patterns as integers, which no order of summation changes."""
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().view(kind).sum(dtype=torch.int64)


@contextmanager
def _asking() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise LostRank(" ".join(str(error).split())[:300]) from None
