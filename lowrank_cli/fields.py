"""One field of a configuration: a flag, a YAML key, a row of the docs, and how its value is read and checked."""

import operator
from dataclasses import field
from types import NoneType
from typing import Any, get_args, get_type_hints

from lowrank_cli.errors import UsageError

LIMITS = {
    "min": (operator.ge, "at least"),
    "above": (operator.gt, "larger than"),
    "max": (operator.le, "at most"),
    "below": (operator.lt, "smaller than"),
}


def option(
    default: Any,
    help: str,
    *,
    flag: str = "",
    choices: tuple = (),
    min: float | None = None,
    above: float | None = None,
    max: float | None = None,
    below: float | None = None,
    count: bool = False,
) -> Any:
    """A configuration field.

    Args:
        default: the value without a flag; None means "worked out from the rest", which the help text explains.
        help: one line, shown by ``--help`` and in the docs.
        flag: the name on the command line and in YAML, if not the field's own.
        choices: the allowed values.
        min: the smallest allowed value.
        above: the value must be larger than this.
        max: the largest allowed value.
        below: the value must be smaller than this.
        count: accept 100K, 1.5M, 2B.
    """
    limits = {"min": min, "above": above, "max": max, "below": below}
    return field(
        default=default, metadata={"help": help, "flag": flag, "choices": choices, "count": count, "limits": limits}
    )


def key_of(f) -> str:
    """The name of a field on the command line (with dashes) and in YAML (with underscores)."""
    return f.metadata["flag"].split("/")[0].replace("-", "_") or f.name


def base_type(cls, f) -> type:
    """The type of a field without its `| None`."""
    hint = get_type_hints(cls)[f.name]
    return next((t for t in get_args(hint) if t is not NoneType), hint)


def coerce(cls, f, value: Any, name: str) -> Any:
    """A value from a flag or YAML as the field's type, checked; raises UsageError with what is allowed."""
    if value is None:
        if f.default is None:
            return None
        raise UsageError(f"{name} is empty", f"give a value or leave {name} out; it is {f.default!r} then")
    kind, checks = base_type(cls, f), f.metadata
    try:
        if checks["count"]:
            value = parse_count(value)
        elif kind is bool:
            if not isinstance(value, bool):
                raise ValueError
        elif kind is int:
            # not by way of float: a seed may be too large for one
            if isinstance(value, bool) or (isinstance(value, float) and value != int(value)):
                raise ValueError
            value = int(value)
        elif kind is float:
            if isinstance(value, bool):
                raise ValueError
            value = float(value)
        else:
            # YAML reads an unquoted no as false and 2024-01-01 as a date
            if isinstance(value, bool) or not isinstance(value, (str, int, float)):
                raise ValueError
            value = str(value)
    except (TypeError, ValueError, OverflowError):
        wanted = {bool: "true or false", int: "a whole number", float: "a number"}.get(kind, "a text")
        raise UsageError(f"{name} is {value!r}", f"{name} takes {wanted}: {checks['help']}") from None
    if checks["choices"] and value not in checks["choices"]:
        raise UsageError(f"{name} is {value!r}", f"{name} takes one of: {', '.join(map(str, checks['choices']))}")
    finite = not isinstance(value, float) or abs(value) < float("inf")
    for limit, (holds, words) in LIMITS.items():
        bound = checks["limits"][limit]
        if bound is not None and not (finite and holds(value, bound)):
            raise UsageError(f"{name} is {value}", f"{name} must be {words} {bound}")
    return value


def parse_count(value: Any) -> int:
    """A whole number, with K, M, B or T for thousands to trillions: '1.5M' is 1,500,000."""
    text = str(value).strip().replace(",", "").replace("_", "").upper()
    scale = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}.get(text[-1:], 1)
    number = float(text[:-1] if scale > 1 else text) * scale
    if number != int(number):
        raise ValueError(value)
    return int(number)


def parse_bytes(text: str) -> int:
    """'24GB' in bytes, units of 1024; raises UsageError otherwise."""
    units = {"TB": 2**40, "GB": 2**30, "MB": 2**20, "KB": 2**10, "T": 2**40, "G": 2**30, "M": 2**20, "K": 2**10}
    upper = text.strip().upper().replace("IB", "B")
    unit = next((u for u in units if upper.endswith(u)), "")
    try:
        return int(float(upper[: len(upper) - len(unit)]) * units.get(unit, 1))
    except (ValueError, OverflowError):
        raise UsageError(f"--memory-budget is {text!r}", "write it as 24GB or 800MB") from None
