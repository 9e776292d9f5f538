"""The settings that make a run smaller, from the one that costs the user least to the one that costs most."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from lowrank_cli import methods
from lowrank_cli.config import RunConfig, resolve

Settings = dict[str, Any]
# the flags and the changed settings of each step of a knob, smaller and smaller runs
Steps = list[tuple[str, Settings]]

SHORTEST = 64


@dataclass(frozen=True)
class Knob:
    """A change of settings that takes less memory.

    Attributes:
        cost: what it costs, in a few words.
        steps: how far it can be turned in a run, given the run and its flat settings.
        tries: the ends that a search tries, the better guess first: turned all the way, or not at all. One where a
            step never takes more memory, both where it may, or where it needs a package.
        first: it decides what other knobs there are, so it is turned before them.
    """

    cost: str
    steps: Callable[[RunConfig, Settings], Steps]
    tries: tuple[bool, ...] = (True,)
    first: bool = False


def configured(command: str, settings: Settings) -> RunConfig:
    """The configuration of flat settings, checked like flags."""
    parts = str(settings["method"]).split("+")
    own = {key: value for key, value in settings.items() if key in methods.names()}
    given = {k: v for k, v in settings.items() if k not in own and k != "command"}
    return resolve(command, given, {name: _typed(name, value) for name, value in own.items() if name in parts})


def _typed(name: str, settings: Settings) -> Settings:
    """Those of a method's settings that somebody may have typed; a method may refuse flags, even at their default."""
    kind = methods.get(name)
    defaults = {f.name: f.default for f in fields(kind.Config)}
    chosen = {key for preset in kind.presets.values() for key in preset}
    return {key: value for key, value in settings.items() if key in chosen or value != defaults.get(key)}


def _switch(key: str) -> Callable[[RunConfig, Settings], Steps]:
    def steps(config: RunConfig, settings: Settings) -> Steps:
        return [] if settings[key] else [(f"--{key.replace('_', '-')}", settings | {key: True})]

    return steps


def _per_layer(config: RunConfig, settings: Settings) -> Steps:
    # clipping waits for the last gradient
    return [] if settings["grad_clipping"] else _switch("per_layer")(config, settings)


def _in_backward(config: RunConfig, settings: Settings) -> Steps:
    # where it is left open, it is on wherever it helps; clipping would take the norm of something else
    own = [n for n, part in config.methods.items() if getattr(part, "in_backward", None) is False]
    if not own or settings["grad_clipping"]:
        return []
    name = own[0]
    return [(f"--{name}-in-backward", settings | {name: settings[name] | {"in_backward": True}})]


def _batch(config: RunConfig, settings: Settings) -> Steps:
    batch, processes = settings["batch_size"], settings["nproc"]
    total = settings["total_batch_size"] or batch * processes
    smaller = [size for size in range(batch - 1, 0, -1) if batch % size == 0 and total % (size * processes) == 0]
    return [
        (f"--batch-size {size} --total-batch-size {total}", settings | {"batch_size": size, "total_batch_size": total})
        for size in smaller
    ]


def _eight_bit(config: RunConfig, settings: Settings) -> Steps:
    if settings["optimizer"] != "adamw":
        return []
    return [("--optimizer adamw8bit", settings | {"optimizer": "adamw8bit"})]


def _half_precision(config: RunConfig, settings: Settings) -> Steps:
    return [] if settings["dtype"] == "bfloat16" else [("--dtype bfloat16", settings | {"dtype": "bfloat16"})]


def _quantize(config: RunConfig, settings: Settings) -> Steps:
    adapter = any(methods.get(name)(part).is_adapter for name, part in config.methods.items())
    if settings.get("quantize", "") is not None or not adapter or settings["parallel"] == "fsdp":
        return []
    return [("--quantize nf4", settings | {"quantize": "nf4"})]


def _low_rank(config: RunConfig, settings: Settings) -> Steps:
    if config.method != "full":
        return []
    fitting = [name for name in methods.names() if config.command in methods.get(name).instead_of_full]
    return [(f"--method {name}", settings | {"method": name}) for name in fitting]


def _compressed_activations(config: RunConfig, settings: Settings) -> Steps:
    if any("activations" in methods.get(name).acts_on for name in config.methods):
        return []
    fitting = [n for n in methods.names() if methods.get(n).acts_on == {"activations"}]
    chosen = [n if config.method == "full" else f"{config.method}+{n}" for n in fitting]
    return [(f"--method {name}", settings | {"method": name}) for name in chosen]


def _rank(config: RunConfig, settings: Settings) -> Steps:
    name = next((n for n, part in config.methods.items() if getattr(part, "rank", None)), None)
    if name is None or config.methods[name].rank < 2:
        return []
    own = config.flat()[name]
    rank = own["rank"] // 2
    return [(f"--{name}-rank {rank}", settings | {name: own | {"rank": rank}})]


def _length(config: RunConfig, settings: Settings) -> Steps:
    length = settings["max_length"] // 2
    return [] if length < SHORTEST else [(f"--max-length {length}", settings | {"max_length": length})]


# the same updates, up to rounding
SAME = (
    Knob("nothing: the same updates", _per_layer, tries=(True, False)),
    Knob("nothing: the same updates", _in_backward, tries=(True, False)),
    # gradients that are accumulated take memory of their own
    Knob("some time; the same updates", _batch, tries=(False, True)),
    Knob("a third more time; the same updates", _switch("activation_checkpointing")),
)
# another run
OTHER = (
    # on a CPU its kernel works on whole tensors in float32
    Knob("moments in 8 bits", _eight_bit, tries=(True, False)),
    Knob("weights and arithmetic in 16 bits", _half_precision),
    Knob("the frozen base in 4 bits", _quantize, tries=(True, False)),
    Knob("another method", _low_rank, tries=(True, False), first=True),
    Knob("gradients from compressed activations", _compressed_activations, tries=(False, True), first=True),
    Knob("half the rank", _rank),
    Knob("shorter sequences", _length),
)
KNOBS = SAME + OTHER
