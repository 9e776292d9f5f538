"""--memory-budget: what would make a run fit, in the order of what it costs, each with the estimate that it gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lowrank_cli import console, methods
from lowrank_cli.config import RunConfig, resolve
from lowrank_cli.errors import PreflightError, UsageError

Settings = dict[str, Any]


@dataclass(frozen=True)
class Knob:
    """A change of settings that takes less memory.

    Attributes:
        cost: what it costs, in a few words.
        change: the flags, and the changed settings; None where there is nothing to change.
    """

    cost: str
    change: Callable[[RunConfig, Settings], tuple[str, Settings] | None]


def check(total: int, budget: int, config: RunConfig, reestimate: Callable[[RunConfig], int]) -> None:
    """Compare an estimate with the budget.

    Args:
        total: the estimate, in bytes.
        budget: bytes that the run may take.
        config: of the run.
        reestimate: the estimate of another configuration.
    Raises:
        PreflightError: it is over the budget; with the settings that would make it fit.
    """
    if total <= budget:
        return
    rows, flags, now, left = [], {}, (config, total), list(KNOBS)
    for knob in KNOBS:
        alone = turned(knob, config, reestimate)
        if alone is None or alone[2] >= total:
            continue
        together = ""
        if now[1] > budget:
            step = alone if now[0] is config else turned(knob, now[0], reestimate)
            if step is not None and step[2] < now[1]:
                flags[step[0].partition(" ")[0]], now = step[0], step[1:]
                left.remove(knob)
            together = console.human_bytes(now[1])
        rows.append([alone[0], console.human_bytes(alone[2]), together, knob.cost])
    for knob in left:
        # what was no help alone may be one now
        step = turned(knob, now[0], reestimate) if now[1] > budget else None
        if step is not None and step[2] < now[1]:
            flags[step[0].partition(" ")[0]], now = step[0], step[1:]
            rows.append([step[0], "", console.human_bytes(now[1]), knob.cost])
    console.table(
        "What would help, the cheapest first",
        ["flag", "alone", "with those above", "what it costs"],
        rows,
        right=(1, 2),
    )
    over = f"the estimate of {console.human_bytes(total)} is over the budget of {console.human_bytes(budget)}"
    size, typed = console.human_bytes(now[1]), " ".join(flags.values())
    if now[1] <= budget:
        raise PreflightError(over, f"it is {size} with: {typed}")
    raise PreflightError(
        over, f"take a smaller --model; it is {size} even with: {typed}" if typed else "a smaller --model"
    )


def turned(knob: Knob, config: RunConfig, reestimate: Callable[[RunConfig], int]) -> tuple[str, RunConfig, int] | None:
    """The flags of a knob, the configuration with it and its estimate; None where it is not to be had."""
    changed = knob.change(config, config.flat())
    if changed is None:
        return None
    flag, settings = changed
    try:
        new = configured(config.command, settings)
    except UsageError:
        # the method does not go with it
        return None
    return flag, new, reestimate(new)


def configured(command: str, settings: Settings) -> RunConfig:
    """The configuration of flat settings, checked like flags."""
    parts = str(settings["method"]).split("+")
    own = {key: value for key, value in settings.items() if key in methods.names()}
    given = {k: v for k, v in settings.items() if k not in own and k != "command"}
    return resolve(command, given, {name: value for name, value in own.items() if name in parts})


def _switch(key: str) -> Callable[[RunConfig, Settings], tuple[str, Settings] | None]:
    def change(config: RunConfig, settings: Settings):
        return None if settings[key] else (f"--{key.replace('_', '-')}", settings | {key: True})

    return change


def _in_backward(config: RunConfig, settings: Settings):
    name = next((n for n, own in config.methods.items() if hasattr(own, "in_backward")), None)
    if name is None or settings[name]["in_backward"]:
        return None
    return f"--{name}-in-backward", settings | {name: settings[name] | {"in_backward": True}}


def _batch(divisor: int) -> Callable[[RunConfig, Settings], tuple[str, Settings] | None]:
    def change(config: RunConfig, settings: Settings):
        batch, total = settings["batch_size"], settings["total_batch_size"] or settings["batch_size"]
        smaller = batch // divisor if divisor else 1
        if smaller < 1 or smaller >= batch or batch % smaller:
            return None
        flag = f"--batch-size {smaller} --total-batch-size {total}"
        return flag, settings | {"batch_size": smaller, "total_batch_size": total}

    return change


def _eight_bit(config: RunConfig, settings: Settings):
    if settings["optimizer"] != "adamw":
        return None
    return "--optimizer adamw8bit", settings | {"optimizer": "adamw8bit"}


def _half_precision(config: RunConfig, settings: Settings):
    return None if settings["dtype"] == "bfloat16" else ("--dtype bfloat16", settings | {"dtype": "bfloat16"})


def _quantize(config: RunConfig, settings: Settings):
    if "quantize" not in settings or settings["quantize"]:
        return None
    return "--quantize nf4", settings | {"quantize": "nf4"}


def _low_rank(config: RunConfig, settings: Settings):
    if config.method != "full":
        return None
    method = "lora" if config.command == "finetune" else "galore"
    return f"--method {method}", settings | {"method": method}


def _compressed_activations(config: RunConfig, settings: Settings):
    if "velora" in config.methods:
        return None
    method = "velora" if config.method == "full" else f"{config.method}+velora"
    return f"--method {method}", settings | {"method": method}


def _rank(config: RunConfig, settings: Settings):
    name = next((n for n, own in config.methods.items() if getattr(own, "rank", None)), None)
    if name is None or settings[name]["rank"] < 2:
        return None
    rank = settings[name]["rank"] // 2
    return f"--{name}-rank {rank}", settings | {name: settings[name] | {"rank": rank}}


def _length(config: RunConfig, settings: Settings):
    length = settings["max_length"] // 2
    return None if length < 64 else (f"--max-length {length}", settings | {"max_length": length})


KNOBS = (
    Knob("nothing: the same updates", _switch("per_layer")),
    Knob("nothing: the same updates", _in_backward),
    Knob("some time; the same updates", _batch(2)),
    Knob("more time; the same updates", _batch(0)),
    Knob("a third more time; the same updates", _switch("activation_checkpointing")),
    Knob("moments in 8 bits", _eight_bit),
    Knob("weights and arithmetic in 16 bits", _half_precision),
    Knob("the frozen base in 4 bits", _quantize),
    Knob("another method", _low_rank),
    Knob("gradients from compressed activations", _compressed_activations),
    Knob("half the rank", _rank),
    Knob("shorter sequences", _length),
)
