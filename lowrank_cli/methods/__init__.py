"""The methods. The folder is the registry: a method is one file here, or a folder with `method.py` if it has layers of
its own, with one subclass of `Method` in it."""

from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from lowrank_cli.errors import UsageError, unknown
from lowrank_cli.methods.base import Method

ORDER = ("weights", "activations", "gradients")


@cache
def names() -> tuple[str, ...]:
    """Return the name of every method, which is that of its file or folder."""
    return tuple(sorted(module.name for module in iter_modules(__path__) if module.name != "base"))


def check_name(name: str) -> str:
    """The name itself; raises UsageError with the nearest one if there is no such method."""
    if name not in names():
        raise unknown("method", name, names())
    return name


@cache
def get(name: str) -> type[Method]:
    """Return the class of a method; raises UsageError for an unknown name. Does not import torch."""
    module = import_module(f"lowrank_cli.methods.{check_name(name)}")
    if hasattr(module, "__path__"):
        module = import_module(f"{module.__name__}.method")
    (cls,) = (
        c
        for c in vars(module).values()
        if isinstance(c, type) and issubclass(c, Method) and c.__module__ == module.__name__
    )
    return cls


def compose(text: str, command: str = "") -> list[type[Method]]:
    """The methods of `a+b`, in the order weights, activations, gradients.

    Raises:
        UsageError: an unknown method, one that the command does not have, one named twice, or two that act on the
            same thing.
    """
    parts = [get(name.strip()) for name in text.split("+")]
    for part in parts:
        if command and command not in part.commands:
            fitting = [n for n in names() if command in get(n).commands]
            raise UsageError(f"{part.title} is not a method of `lowrank {command}`", f"methods: {', '.join(fitting)}")
    for i, a in enumerate(parts):
        for b in parts[i + 1 :]:
            if a is b:
                raise UsageError(f"{a.name} is named twice in {text}", f"name it once: --method {a.name}")
            shared = a.acts_on & b.acts_on
            if shared or not a.acts_on or not b.acts_on:
                why = f"both act on the {' and '.join(sorted(shared))}" if shared else "one of them changes nothing"
                pairs = [
                    f"{a.name}+{n}"
                    for n in names()
                    if n != a.name and get(n).acts_on and a.acts_on and not get(n).acts_on & a.acts_on
                ]
                hint = f"{a.name} goes with: {', '.join(pairs)}" if pairs else f"take --method {a.name} alone"
                raise UsageError(f"{a.name} and {b.name} do not combine: {why}", hint)
    return sorted(parts, key=lambda p: min((ORDER.index(x) for x in p.acts_on), default=0))
