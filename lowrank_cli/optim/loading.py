"""Load a projected optimizer's state: every tensor in its own dtype, and nothing that does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lowrank_cli.optim import kernels


class Loading:
    """The optimizer's `state_dict` and `load_state_dict`: in front of torch's."""

    loading = False

    def load_state_dict(self, state_dict: dict) -> None:
        """Load a state as torch's optimizers do, but leave every tensor in its own dtype: torch casts state to the
        parameter's, and float32 moments of a bfloat16 weight would come back rounded.

        Raises:
            ValueError: the state is of another optimizer, or of weights of another size; nothing has changed then.
        """
        found: list[dict] = []

        def look(_, loaded: dict) -> None:
            # after everybody else's hooks: what they return is what is loaded
            self._check_loaded(loaded)
            found.append(loaded)

        before = [dict(group) for group in self.param_groups]
        handle = self.register_load_state_dict_pre_hook(look)
        self.loading = True
        try:
            super().load_state_dict(state_dict)
        finally:
            self.loading = False
            handle.remove()
        for group, own in zip(self.param_groups, before, strict=True):
            # groups of torch's own AdamW have fewer keys
            for key, value in own.items():
                group.setdefault(key, value)
        for p, state, _ in self._loaded(found[0]):
            for key, value in state.items():
                if isinstance(value, Tensor):
                    own = self.state[p]
                    # torch's own optimizers count steps in a tensor
                    own[key] = int(value) if key == "step" else value.detach().to(p.device, copy=True)
        self._index()
        for group, own in zip(self.param_groups, before, strict=True):
            if "kernel" in own:
                group["kernel"] = own["kernel"]
        kernels.take(self, [group.get("kernel", "torch") for group in found[0]["param_groups"]])
        for space in self.spaces.values():
            space.clear()

    def state_dict(self) -> dict:
        """Return the state as torch's optimizers do, without the classes of the spaces: a checkpoint is data."""
        found = super().state_dict()
        for group in found["param_groups"]:
            group.pop("space", None)
        return found

    def _loaded(self, state_dict: dict) -> Iterator[tuple[Tensor, dict[str, Any], dict]]:
        """Every parameter with the state and the group that a state dict has for it."""
        params = (p for group in self.param_groups for p in group["params"])
        numbered = ((i, group) for group in state_dict["param_groups"] for i in group["params"])
        for p, (i, group) in zip(params, numbered, strict=False):
            yield p, state_dict["state"].get(i, {}), group

    def _check_loaded(self, state_dict: dict) -> None:
        for p, state, group in self._loaded(state_dict):
            space = self.spaces[p]
            if "step" not in state or space.layout.is_cut:
                continue
            own_group = self.defaults | {k: v for k, v in space.group.items() if k != "params"} | group
            shape = space.check_loaded(state, own_group)
            if shape is None:
                continue
            fresh: dict[str, Any] = {}
            self.rule.init(fresh, torch.empty(shape, dtype=p.dtype, device="meta"), own_group)
            foreign = next((k for k in state if k != "step" and k not in fresh and not space.keeps(k)), None)
            if foreign is not None:
                raise ValueError(
                    f"the state of {space.name} has {foreign}, which this group of {type(self).__name__} does not "
                    "keep: it is of another optimizer, or of another method's group"
                )
            for key, own in fresh.items():
                there = state.get(key)
                if not isinstance(there, Tensor) or there.shape != own.shape or there.dtype != own.dtype:
                    what = f"{there.dtype} {tuple(there.shape)}" if isinstance(there, Tensor) else "nothing"
                    raise ValueError(
                        f"the state of {space.name} has {what} as {key}, and {type(self).__name__} keeps "
                        f"{own.dtype} {tuple(own.shape)} for it"
                    )
