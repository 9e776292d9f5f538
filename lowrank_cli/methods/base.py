"""The interface of a method: in what smaller space does a weight's training live?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lowrank_cli.errors import UsageError
from lowrank_cli.optim import state_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from lowrank_cli.config import RunConfig
    from lowrank_cli.parallel.replicas import Alone


@dataclass(frozen=True)
class Memory:
    """Bytes that training one matrix holds, by what they are for."""

    weights: int = 0
    gradients: int = 0
    states: int = 0
    activations: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.states + self.activations


class Method:
    """A training method. Every hook does nothing unless overridden; `full` overrides none.

    A method never imports torch at module level: its `Config` is read to build `lowrank --help`. It never imports
    `train` or `commands`: the loop calls the hooks below, in this order, and knows no method by name.
    """

    name: ClassVar[str]  # that of the file or folder
    title: ClassVar[str]  # as the paper writes it
    paper: ClassVar[str] = ""  # address
    summary: ClassVar[str]  # one line for --help
    acts_on: ClassVar[frozenset[str]] = frozenset()  # of "weights", "activations", "gradients"
    commands: ClassVar[frozenset[str]] = frozenset()  # of "pretrain", "finetune", "compress"
    Config: ClassVar[type]  # frozen dataclass of option(default, help): flags, YAML keys and docs come from it
    defaults: ClassVar[dict[str, Any]] = {}  # plain settings that differ with this method, such as lr
    command_defaults: ClassVar[dict[str, dict[str, Any]]] = {}  # command -> what differs from those there
    presets: ClassVar[dict[str, dict[str, Any]]] = {}  # model preset -> settings of this method
    refuses: ClassVar[dict[str, str]] = {}  # flag as it is typed, such as --per-layer -> why it does not go with this
    instead_of_full: ClassVar[frozenset[str]] = frozenset()  # commands whose budget search proposes this method
    trains_linears: ClassVar[bool] = True  # or what trains is no layer's weight
    adapter: ClassVar[bool] = False  # the base is frozen; what trains is saved apart from it, as PEFT's files
    command: str = ""  # the one that runs it, for what differs between them; `apply_methods` sets it

    def __init_subclass__(cls) -> None:
        cls.name = cls.__module__.removeprefix("lowrank_cli.methods.").partition(".")[0]

    def __init__(self, config: Any):
        self.config = config

    @classmethod
    def defaults_for(cls, command: str) -> dict[str, Any]:
        """Plain settings that differ with this method in a command."""
        return cls.defaults | cls.command_defaults.get(command, {})

    @classmethod
    def flag(cls, key: str) -> str:
        """Return the flag of one of the method's settings, as it is typed."""
        return f"--{cls.name}-{key.replace('_', '-')}"

    @property
    def is_adapter(self) -> bool:
        """Return whether these settings train an adapter on a frozen base."""
        return self.adapter

    def refuse(self, run: RunConfig) -> None:
        """Raise UsageError for a setting of the run that the class names in `refuses`."""
        settings = run.flat()
        for flag, why in self.refuses.items():
            name, _, value = flag.removeprefix("--").partition(" ")
            if str(settings.get(name.replace("-", "_"))) == (value or "True"):
                raise UsageError(f"{self.name} does not go with {flag}: {why}", f"leave out {flag}")

    def check(self, run: RunConfig) -> None:
        """Called when a configuration has been resolved: raises UsageError for settings that do not go together."""

    def refuse_unused(self, run: RunConfig, typed: frozenset[str]) -> None:
        """Raises UsageError for one of the settings that were typed as flags, if it would have no effect.

        A file may have them: it can serve two commands, and a run's own has every setting at the defaults of its day.
        """

    def wrap(self, model: nn.Module) -> None:
        """Change modules in place, before the optimizer is built."""

    def param_groups(self, model: nn.Module, groups: list[dict]) -> list[dict]:
        """Split and tag the optimizer's groups. A group's `params` are (name, parameter) pairs; `role` says what
        happens to them and `why`, where it helps, why nothing more does."""
        return groups

    def treated(self, model: nn.Module, groups: list[dict]) -> set[str]:
        """Return the names of the parameters that it acts on, as the plain model has them.

        Args:
            model: wrapped.
            groups: tagged by all methods of the run.
        """
        return {name for group in groups if group["role"] == self.name for name, _ in group["params"]}

    def distribute(self, model: nn.Module, replicas: Alone) -> None:
        """Called where several processes train the model together, each on its own batches."""

    def before_step(self, model: nn.Module) -> None:
        """Called once an update, when all its micro-batches have had their backward, before clipping and the step."""

    def after_step(self, model: nn.Module, step: int) -> dict[str, float]:
        """Called after every update (re-normalise, re-compose); returns metrics to log."""
        return {}

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """Tensors to save beside the weights and the optimizer's state."""
        return {}

    def load_state(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        """Put back what `state` returned."""

    def merge(self, model: nn.Module) -> None:
        """Turn the model into a plain Transformers model, in place."""

    def save_adapter(self, model: nn.Module, folder: Path, base: str) -> None:
        """Write adapter_config.json and adapter_model.safetensors, as PEFT loads them. Adapter methods only.

        Args:
            model: the model with the adapter in it.
            folder: an empty folder.
            base: the folder or the hub id of the base model.
        """
        raise NotImplementedError(f"{self.title} trains no adapter")

    def memory(
        self, shape: tuple[int, ...], dtype_bytes: int = 4, optimizer: str = "adamw", group: dict | None = None
    ) -> Memory:
        """Bytes of training one targeted weight of this shape with an update rule; `group` is its tagged group."""
        size = math.prod(shape) * dtype_bytes
        return Memory(weights=size, gradients=size, states=state_bytes(optimizer, shape))
