"""How a projected optimizer's state is loaded: every tensor in its own dtype, and nothing that does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lowrank_cli.optim.projection import project, sides, unfold


class Loading:
    """Mixed into a ProjectedOptimizer in front of torch's."""

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's, but every tensor keeps its own dtype: torch casts state to the parameter's, and float32 moments
        of a bfloat16 weight would come back rounded.

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
        try:
            super().load_state_dict(state_dict)
        finally:
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

    def _loaded(self, state_dict: dict) -> Iterator[tuple[Tensor, dict[str, Any], dict]]:
        """Every parameter with the state and the group that a state dict has for it."""
        params = (p for group in self.param_groups for p in group["params"])
        numbered = ((i, group) for group in state_dict["param_groups"] for i in group["params"])
        for p, (i, group) in zip(params, numbered, strict=False):
            yield p, state_dict["state"].get(i, {}), group

    def _check_loaded(self, state_dict: dict) -> None:
        for p, state, group in self._loaded(state_dict):
            if "step" not in state or self.layouts[p].is_cut or "num_groups" in group:
                continue
            shape = p.shape
            if "rank" in group:
                bases = {side: state.get(f"basis_{side}") for side in sides(p.shape, group["proj_type"])}
                for side, basis in bases.items():
                    height = unfold(p, side)[0].shape[1 if side == "right" else 0]
                    if basis is None or basis.dim() != 2 or basis.shape[0] != height:
                        there = "no basis" if basis is None else f"a basis {tuple(basis.shape)}"
                        raise ValueError(
                            f"the state of {self.names[p]} has {there}, and the weight is {tuple(p.shape)}"
                        )
                shape = project(torch.empty(p.shape, device="meta"), {k: b.to("meta") for k, b in bases.items()}).shape
            fresh: dict[str, Any] = {}
            self._init_state(fresh, torch.empty(shape, dtype=p.dtype, device="meta"), self.defaults | group)
            for key, own in fresh.items():
                there = state.get(key)
                if not isinstance(there, Tensor) or there.shape != own.shape or there.dtype != own.dtype:
                    what = f"{there.dtype} {tuple(there.shape)}" if isinstance(there, Tensor) else "nothing"
                    raise ValueError(
                        f"the state of {self.names[p]} has {what} as {key}, and {type(self).__name__} keeps "
                        f"{own.dtype} {tuple(own.shape)} for it"
                    )
