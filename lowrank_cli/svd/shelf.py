"""Tensors by key: in the host's memory up to a budget, then in files of a folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lowrank_cli import foreign


@dataclass
class Shelf:
    """A place for more tensors than memory has room for.

    Attributes:
        folder: for what does not fit; made when first needed, removed by whoever chose it.
        budget: bytes that may still be held in memory.
    """

    folder: Path
    budget: int
    held: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    devices: dict[str, torch.device] = field(default_factory=dict)

    def put(self, key: str, tensors: dict[str, Tensor]) -> None:
        """Keep some tensors under a key that is free."""
        self.devices[key] = next(iter(tensors.values())).device
        tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        size = sum(t.nbytes for t in tensors.values())
        if size <= self.budget:
            self.budget -= size
            self.held[key] = tensors
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, self._path(key))

    def get(self, key: str) -> dict[str, Tensor]:
        """The tensors of a key, on the device that they came from."""
        device = self.devices[key]
        if key in self.held:
            return {name: t.to(device) for name, t in self.held[key].items()}
        return foreign.read_tensors(self._path(key), device=str(device))

    def pop(self, key: str) -> dict[str, Tensor]:
        """The same, and the room is free again."""
        tensors = self.get(key)
        if key in self.held:
            self.budget += sum(t.nbytes for t in self.held.pop(key).values())
        else:
            # what was read stays valid: the file goes when nothing maps it any more
            self._path(key).unlink()
        del self.devices[key]
        return tensors

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"
