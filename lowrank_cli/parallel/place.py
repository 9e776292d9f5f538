"""Find out which of several processes this one is, and settle what follows from their number."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lowrank_cli import console
from lowrank_cli.errors import MissingError, UsageError

if TYPE_CHECKING:
    from lowrank_cli.config import RunConfig


@dataclass(frozen=True)
class Place:
    """A Place says which of the processes this one is, by torchrun's environment."""

    rank: int
    world_size: int
    local_rank: int
    node: int
    host: str
    port: int

    @staticmethod
    def here() -> Place | None:
        """Return the place that the environment says; None in a run of one process.

        Raises:
            UsageError: a variable of it is no number, or the rank is none of the processes.
        """
        env = os.environ

        def number(name: str, otherwise: int) -> int:
            value = env.get(name) or str(otherwise)
            if not value.isdecimal():
                raise UsageError(
                    f"{name} is {value!r} in the environment, and torchrun sets it to a number",
                    f"start the processes with torchrun or --nproc, or unset {name}",
                )
            return int(value)

        world_size = number("WORLD_SIZE", 1)
        if world_size < 2 or not all(env.get(k) for k in ("RANK", "MASTER_ADDR", "MASTER_PORT")):
            return None
        # a store whose keeper is gone is told in a sentence, without frames of C++
        env.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        rank = number("RANK", 0)
        if rank >= world_size:
            raise UsageError(
                f"RANK is {rank} in the environment, and WORLD_SIZE {world_size}", "ranks are counted from 0"
            )
        return Place(
            rank=rank,
            world_size=world_size,
            local_rank=number("LOCAL_RANK", rank),
            node=number("GROUP_RANK", 0),
            host=env["MASTER_ADDR"],
            port=number("MASTER_PORT", 0),
        )

    def device(self, wanted: str) -> str:
        """The device of this process: its own GPU, or the CPU for all.

        Raises:
            UsageError: one GPU is named for several processes, or this machine has too few.
            MissingError: this torch cannot communicate between GPUs.
        """
        import torch

        if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
            return "cpu"
        if wanted not in ("auto", "cuda"):
            raise UsageError(
                f"--device {wanted} is one device for {self.world_size} processes", "take --device cuda, cpu or auto"
            )
        count = torch.cuda.device_count()
        if self.local_rank >= count:
            raise UsageError(
                f"process {self.local_rank} of this machine has no GPU of its own: there are {count}",
                f"start {count} processes, or take --device cpu" if count else "take --device cpu",
            )
        if not torch.distributed.is_nccl_available():
            raise MissingError(
                "this torch has no NCCL, which several GPUs communicate with",
                "install a CUDA build of torch for Linux, or take --device cpu",
            )
        return f"cuda:{self.local_rank}"


def settled(config: RunConfig, place: Place | None, *, resuming: bool) -> RunConfig:
    """The configuration with what follows from the number of processes: the total batch, so that a resume with another
    number keeps it; and when resuming a batch that divides it.

    Raises:
        UsageError: nothing divides it.
    """
    world_size = place.world_size if place else 1
    train = config.train
    if train.parallel == "fsdp" and max(world_size, train.nproc) == 1:
        console.note("--parallel fsdp: one process holds the whole model; --nproc N shares it out")
    total = train.total_batch_size
    if total is None and world_size > 1:
        # a run that is resumed and had no total batch was one process
        total = train.batch_size * (1 if resuming else world_size)
    batch = train.batch_size
    if resuming and total is not None and total % (batch * world_size):
        if total % world_size:
            raise UsageError(
                f"the run's total batch of {total} sequences cannot be shared by {world_size} processes",
                f"resume with {_near(total, world_size)} processes",
            )
        share = total // world_size
        batch = max(b for b in range(1, min(batch, share) + 1) if share % b == 0)
        console.note(f"batches of {batch} sequences on {world_size} processes: {total} in an update, as the run began")
    return replace(config, train=replace(train, total_batch_size=total, batch_size=batch))


def _near(total: int, world_size: int) -> str:
    fitting = [n for n in range(1, total + 1) if total % n == 0]
    below, above = [n for n in fitting if n < world_size][-1:], [n for n in fitting if n > world_size][:1]
    return " or ".join(map(str, below + above))
