"""What trains in a run, before its first and after its last update, seen from inside the process that runs it."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch
from double import use_double
from safetensors.torch import load_file, save_file

from lowrank_cli import methods
from lowrank_cli.train import checkpoint, finish, loop

SEEN = torch.arange(5, 45).reshape(2, 20)
TOYS = Path(__file__).parent.parent / "contract" / "toys"


def register_toys(undo: ExitStack) -> None:
    """Register the methods of tests/contract/toys beside the product's own, until `undo` is closed."""
    methods.__path__.append(str(TOYS))
    forget()
    undo.callback(forget)
    undo.callback(methods.__path__.remove, str(TOYS))


def forget() -> None:
    """Have the registry look again."""
    methods.names.cache_clear()
    methods.get.cache_clear()


def watch(setattr, seen: dict) -> None:
    """Keep tensors that train, at the start and at the end, and the trained model's logits in `seen`."""
    original_fit, original_finish = loop.fit, finish.finish

    def fit(session, *args, **kwargs):
        seen["start"] = {name: t.detach().clone() for name, t in checkpoint.trainable(session.model).items()}
        return original_fit(session, *args, **kwargs)

    def finishing(session):
        seen["end"] = {name: t.detach().clone() for name, t in checkpoint.trainable(session.model).items()}
        with torch.no_grad():
            seen["logits"] = session.model.eval()(SEEN).logits.clone()
        return original_finish(session)

    setattr(loop, "fit", fit)
    setattr(finish, "finish", finishing)
    # a third of a tiny run's time
    setattr(finish, "samples", lambda session: False)


def setter(undo: ExitStack):
    """Return a setattr that `undo` takes back."""

    def set_(owner, name, value):
        undo.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, value)

    return set_


def in_worker(undo: ExitStack, rank: int, file: str = "end.safetensors") -> None:
    """Watch a run of several processes in float64; rank 0 leaves what trains, at both ends, in a file."""
    seen: dict = {}

    def write() -> None:
        if rank == 0 and "end" in seen:
            tensors = {f"{when} {name}": t for when in ("start", "end") for name, t in seen[when].items()}
            save_file({name: t.contiguous() for name, t in tensors.items()}, file)

    register_toys(undo)
    use_double(setter(undo))
    watch(setter(undo), seen)
    undo.callback(write)


def written(file: Path, when: str = "end") -> dict[str, torch.Tensor]:
    """Return what `in_worker` has left of one of the two ends."""
    return {name.partition(" ")[2]: t for name, t in load_file(file).items() if name.startswith(f"{when} ")}
