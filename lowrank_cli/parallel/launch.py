"""Several processes that train one model: where this one stands, how they meet, and how they end together.

torchrun starts them, or `lowrank ... --nproc N` does it with torchrun's own launcher. What they then exchange while
they train is in `parallel/replicas.py` and `optim/exchange.py`. Here is what goes round it, over torch's
key-value store: do all have the same settings, who is missing, who failed first and why.

Nothing here imports torch before there is a second process.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowrank_cli import console
from lowrank_cli.errors import FAILED, INTERRUPTED, LowrankError, UsageError
from lowrank_cli.misfortune import reason
from lowrank_cli.parallel.place import Place
from lowrank_cli.run import RunDir

if TYPE_CHECKING:
    from lowrank_cli.parallel.replicas import Replicas

# for all processes to start and read their settings; the collectives later wait for --rank-timeout
JOIN_TIMEOUT_S = 300
# a process that fails has this long to say why before the others report it as lost
LAST_WORDS_S = 3.0
# what the errors of collectives have in them
BACKENDS = ("gloo", "NCCL", "ProcessGroup", "Connection closed by peer")


def reach(place: Place, timeout_s: float) -> None:
    """Wait until rank 0 listens; PyTorch's own attempts print frames of C++ and keep to no timeout.

    Raises:
        LowrankError: it does not within the timeout.
    """
    end = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((place.host, place.port), timeout=min(5.0, timeout_s)).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise unreachable(place, f"{reason(error)} for {timeout_s:g} s") from None
        time.sleep(0.1)


def unreachable(place: Place, why: str) -> LowrankError:
    """Return the error of a process that finds no rank 0."""
    return LowrankError(
        f"rank {place.rank} cannot reach rank 0 at {place.host}:{place.port}: {why}",
        "check that it was started, and MASTER_ADDR and MASTER_PORT",
    )


class World:
    """The processes of a run, from when they meet to their end. From now on only rank 0 prints; what ends a run is
    said through `ending`.

    Args:
        place: of this process.
        timeout_s: for the others to start.
    Raises:
        LowrankError: rank 0 cannot be reached.
    """

    def __init__(self, place: Place, timeout_s: float = JOIN_TIMEOUT_S):
        import torch.distributed as dist

        self.place, self.join_timeout_s = place, min(float(JOIN_TIMEOUT_S), timeout_s)
        self.replicas: Replicas | None = None
        self.run: RunDir | None = None
        # torchrun's agent keeps the store itself, so that it outlives every rank
        agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        if place.rank or agents:
            # nobody else can say that there is no rank 0
            reach(place, self.join_timeout_s)
        self.set_level(console.NORMAL)
        try:
            store = dist.TCPStore(
                place.host,
                place.port,
                is_master=place.rank == 0 and not agents,
                timeout=timedelta(seconds=self.join_timeout_s),
                wait_for_workers=False,
                multi_tenant=True,
            )
        except RuntimeError as error:
            raise unreachable(place, _short(error)) from None
        # torchrun starts failed workers again at its user's wish: what the first ones have left is not for them
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.store = dist.PrefixStore(f"lowrank/{attempt}", store)

    def set_level(self, level: int) -> None:
        """Set the console's level on rank 0; the other ranks print nothing and keep no log."""
        console.set_level(level if self.place.rank == 0 else console.SILENT)
        if self.place.rank:
            console.log_to(Path(os.devnull))

    # ---- meeting

    def join(
        self, settings: dict[str, Any], device: str, seed: int, timeout_s: float, *, sharded: bool = False
    ) -> Replicas:
        """Wait for all processes, check that all want the same, and make the process group.

        Args:
            settings: JSON-able; has to be the same everywhere.
            device: of this process.
            seed: of the run.
            timeout_s: for a process that does not answer while training.
            sharded: whether the weights are cut over the processes.
        Raises:
            LowrankError: a process is missing.
            UsageError: one has other settings.
        """
        self.join_timeout_s = min(self.join_timeout_s, timeout_s)
        self.agree("settings", settings)
        import torch
        import torch.distributed as dist

        from lowrank_cli.parallel.replicas import Replicas

        gpu = device.startswith("cuda")
        if gpu:
            torch.cuda.set_device(device)
        dist.init_process_group(
            # small numbers go over the CPU, so that nothing waits for a GPU
            "cpu:gloo,cuda:nccl" if gpu else "gloo",
            store=dist.PrefixStore("group", self.store),
            rank=self.place.rank,
            world_size=self.place.world_size,
            timeout=timedelta(seconds=timeout_s),
        )
        self.replicas = Replicas(seed, sharded=sharded)
        return self.replicas

    def agree(self, what: str, mine: dict[str, Any]) -> None:
        """Raises UsageError that lists what a rank has otherwise than rank 0."""
        own = json.loads(json.dumps(mine, default=str))
        self.store.set(f"{what}/{self.place.rank}", json.dumps(own))
        keys = [f"{what}/{rank}" for rank in range(self.place.world_size)]
        self._wait(keys, self.join_timeout_s)
        first, *others = (json.loads(self.store.get(key)) for key in keys)
        for rank, other in enumerate(others, 1):
            differing = [
                f"{key}: {first.get(key)} -> {other.get(key)}"
                for key in sorted(first | other)
                if first.get(key) != other.get(key)
            ]
            if differing:
                raise UsageError(
                    f"rank {rank} has other {what} than rank 0: {'; '.join(differing)}",
                    "start all processes with the same command, files and versions",
                )

    def _wait(self, keys: list[str], timeout_s: float | None) -> None:
        """Until the keys are there; not longer than a failure of another rank, or the timeout."""
        end = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._has(keys):
            self._check_failed()
            if end is not None and time.monotonic() > end:
                missing = [key.rpartition("/")[2] for key in keys if not self._has([key])]
                ranks = f"rank {missing[0]}" if len(missing) == 1 else f"ranks {', '.join(missing)}"
                raise LowrankError(
                    f"{ranks} of {self.place.world_size} did not join within {timeout_s:g} s",
                    "look at what those processes printed, and whether all were started",
                )
            time.sleep(0.02)

    def _has(self, keys: list[str]) -> bool:
        """Return whether the store has the keys; raises LowrankError if rank 0, which keeps it, has ended."""
        try:
            return self.store.check(keys)
        except RuntimeError:
            raise LowrankError("rank 0 has ended before the others", "look at what it printed") from None

    @contextmanager
    def first_on_node(self, what: str) -> Iterator[None]:
        """Inside, the first process of a machine is ahead of the others: they find in the cache what it made."""
        key = f"{what}/node{self.place.node}"
        if self.place.local_rank:
            self._wait([key], None)
        yield
        if not self.place.local_rank:
            self.store.set(key, "done")

    def share_folder(self, make: Any) -> RunDir:
        """The run folder, which rank 0 makes or opens."""
        if self.place.rank == 0:
            self.run = make()
            self.store.set("folder", str(self.run.path))
        else:
            self._wait(["folder"], None)
            self.run = FollowedRun(Path(self.store.get("folder").decode()))
        return self.run

    # ---- ending

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """A lost process becomes a LowrankError with the rank, the step and the reason."""
        from lowrank_cli.parallel.replicas import LostRank

        try:
            yield
        except RuntimeError as error:
            if not (isinstance(error, LostRank) or self._is_of_fsdp(error)):
                raise
            raise self._explained(error) from None

    def _is_of_fsdp(self, error: RuntimeError) -> bool:
        """Return whether an error is of one of FSDP2's own collectives, which raise what their backend says."""
        text = str(error)
        return self.replicas is not None and self.replicas.sharded and any(word in text for word in BACKENDS)

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Whatever ends the run is said by one process: by rank 0 if it fails as well, else by the one that knows."""
        from lowrank_cli.parallel.replicas import LostRank

        try:
            yield
        except BaseException as error:
            ignore_signals()
            lost = isinstance(error, LostRank) or (isinstance(error, RuntimeError) and self._is_of_fsdp(error))
            told = self._explained(error) if lost else error
            console.set_level(console.QUIET if self._claims(told) else console.SILENT)
            raise told from error
        finally:
            self._leave()

    def _explained(self, error: Exception) -> LowrankError:
        """Return the error to end with after a lost process: what a rank has told, or which ranks do not answer."""
        ignore_signals()
        end = time.monotonic() + LAST_WORDS_S
        place, step = self.place, self.replicas.update if self.replicas else 0
        seen: set[int] = {place.rank}
        try:
            self.store.set(f"alive/{place.rank}", "")
            while time.monotonic() < end:
                self._check_failed()
                seen = {rank for rank in range(place.world_size) if self.store.check([f"alive/{rank}"])}
                time.sleep(0.05)
        except LowrankError as known:
            return known
        except RuntimeError:
            seen = set(range(1, place.world_size))
        lost = sorted(set(range(place.world_size)) - seen)
        who = f"rank {', '.join(map(str, lost))} does not answer" if lost else "the ranks have lost each other"
        return LowrankError(f"{who} at step {step}: {_short(error)}", self._way_on())

    def _way_on(self) -> str:
        return f"go on with the last checkpoint: --resume {self.run.path}" if self.run else "start it again"

    def _check_failed(self) -> None:
        """Raises what another rank has failed with."""
        if self._has(["failed"]):
            known = json.loads(self.store.get("failed"))
            error = LowrankError(f"rank {known['rank']}: {known['message']}", known["hint"])
            error.exit_code = known["exit_code"]
            raise error

    def _claims(self, error: BaseException) -> bool:
        """Tell the other processes how the run ended, and return whether this one is the first to do so."""
        rank = self.place.rank
        if rank:
            self._listen(LAST_WORDS_S / 2)
        known = {
            "rank": rank,
            "message": error.message
            if isinstance(error, LowrankError)
            else f"{type(error).__name__}: {_short(error)}",
            "hint": getattr(error, "hint", ""),
            "exit_code": getattr(error, "exit_code", INTERRUPTED if isinstance(error, KeyboardInterrupt) else FAILED),
        }
        try:
            return json.loads(self.store.compare_set("failed", "", json.dumps(known)))["rank"] == rank
        except RuntimeError:
            # the store went with rank 0: the lowest of the others speaks
            return rank <= 1

    def _listen(self, seconds: float) -> None:
        """Until another rank has told how the run ended: an error of all is rank 0's to tell."""
        end = time.monotonic() + seconds
        try:
            while time.monotonic() < end and not self.store.check(["failed"]):
                time.sleep(0.02)
        except RuntimeError:
            return

    def _leave(self) -> None:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()


class FollowedRun(RunDir):
    """The run folder as the ranks see it that do not write it."""

    def start(self, **entries: Any) -> None:
        """Rank 0 does it."""

    def update(self, **changes: Any) -> None:
        """Rank 0 does it."""

    def finish(self, status: str, **entries: Any) -> None:
        """Rank 0 does it."""


def ignore_signals() -> None:
    """From here to the end: torchrun ends all processes as soon as one has ended, also while they say why."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def launch(nproc: int, argv: list[str]) -> None:
    """Run `lowrank ARGV` in `nproc` processes of this machine, with torchrun's launcher; returns when all are done.

    Raises:
        LowrankError: one of them failed; its exit code is that of the process. What happened has been printed.
    """
    import logging
    import uuid

    # a checkpoint at the first Ctrl-C may take longer than the 30 s that the launcher gives
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # the processes speak for themselves
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(settings, sys.executable)("-m", "lowrank_cli", *argv)
    except ChildFailedError as error:
        raise _ended(error.failures) from None
    except SignalException:
        raise _silent(INTERRUPTED) from None


def _ended(failures: dict[int, Any]) -> LowrankError:
    """The error of a launcher whose processes have ended; what killed one is known to it alone."""
    codes = [failure.exitcode for failure in failures.values()]
    for rank, failure in failures.items():
        if failure.exitcode == -signal.SIGKILL:
            console.warn(f"rank {rank} was killed by SIGKILL; the system does that when memory runs out")
        elif failure.exitcode < 0 and failure.exitcode not in (-signal.SIGTERM, -signal.SIGINT):
            console.warn(f"rank {rank} was ended by {signal.Signals(-failure.exitcode).name}")
    return _silent(INTERRUPTED if INTERRUPTED in codes else next((c for c in codes if c > 0), FAILED))


def _silent(exit_code: int) -> LowrankError:
    console.set_level(console.SILENT)
    error = LowrankError("")
    error.exit_code = exit_code
    return error


def _short(error: BaseException) -> str:
    """The first line of what a library said, without its trace."""
    return " ".join(str(error).partition("\n")[0].split())[:200] or type(error).__name__
