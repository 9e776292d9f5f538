"""Every option of every command with a value that it should not have, options given twice, lines that are none."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path

from entries import Entry, line
from materials import Materials

TWICE = 30
LONG = "x" * 5000
STRANGE = [
    "",
    " ",
    "[/b]",
    "[red]x",
    "\x1b[31mred\x1b[0m",
    "'",
    '"',
    "a b",
    "~",
    "~/x",
    "\u65e5\u672c",
    "\udcff",
    LONG,
]
TEXTS = [
    *STRANGE,
    "../..",
    "-",
    "--",
    "\u202eabc",
    "a\nb",
    "$(touch EXECUTED)",
    "%s%n",
    "{0}",
    "None",
    "/dev/null",
    ".",
]
NUMBERS = [
    *STRANGE,
    "-1",
    "0",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "1e-400",
    "0x10",
    "1,5",
    "1 000",
    "3\n",
    "\u0663",
    "9" * 5000,
]
VALUES = {
    int: [*NUMBERS, "1.5", "99999999999999999999999", "1_0"],
    float: [*NUMBERS, "1e-45", "-0.0", "1e308"],
    str: TEXTS,
    bool: ["=", "=true", "=3"],
}
# of as many processes as were asked for
MANY = "nproc"
ODD_LINES = [
    [], [""], ["--"], ["-"], ["pretrian"], ["PRETRAIN"], ["pretrain", "x"], ["pretrain", "-z"],
    ["pretrain", "--="], ["pretrain", "--lr"], ["pretrain", "--lr="], ["pretrain", "---lr", "1"], ["eval"],
    ["eval", ""], ["eval", "no_such_task"], ["eval", "[/b]"], ["eval", "\x1b[2J"], ["eval", "ppl,ppl"], ["eval", ","],
    ["eval", LONG], ["eval", "--compare"], ["eval", "--compare", "a", "b"], ["eval", "../ppl"], ["svd-dump", "x"],
    ["pretrain", "eval"], ["pretrain", "--method"], ["--method", "galore"], ["\udcff"], [LONG],
    ["pretrain", "--method", "galore+galore"], ["pretrain", "--method", "+"], ["pretrain", "--method", "a+b+c"],
    ["pretrain", "--preset", "[/b]"], ["pretrain", "--config", "/"], ["pretrain", "--config", "~"],
    ["compress", "--method", "galore"], ["finetune", "--task", "\x1b]0;x\x07"], ["pretrain", "\u65e5\u672c"],
]  # fmt: skip


def entries(made: Materials) -> Iterator[Entry]:
    """Yield an entry for every option of every command and method, then the others."""
    from lowrank_cli import methods, settings
    from lowrank_cli.config import offered
    from lowrank_cli.fields import base_type, key_of

    draw, single = random.Random(0), []
    for command, spec in settings.COMMANDS.items():
        own = [(f.name, spec.call, f, "") for f in fields(spec.call)]
        own += [(key_of(f), cls, f, "") for cls in spec.sections.values() for f in offered(command, cls)]
        for method in methods.names() if spec.method is not None else ():
            if command in methods.get(method).commands:
                own += [(f"{method}_{key_of(f)}", methods.get(method).Config, f, method)
                        for f in fields(methods.get(method).Config)]  # fmt: skip
        for key, cls, f, method in own:
            # what it shows is a traceback; what is typed without a flag is below
            if key == "debug" or key == spec.argument:
                continue
            kind, flag = base_type(cls, f), key.replace("_", "-")
            if f.metadata["flag"].partition("/")[2]:
                flag = f.metadata["flag"].partition("/")[0]
            values = VALUES[kind]
            if flag == MANY:
                values = [v for v in values if v.strip("0123456789_") != "" or v in ("", "0")]
            value = draw.choice(values)
            make = partial(switched if kind is bool else set_to, made, command, flag, value, method)
            yield Entry(f"options of {command}", f"--{flag} {ascii(value)[:40]}", make)
            if kind is not bool:
                single.append((command, flag, method))
    for command, flag, method in draw.sample(single, TWICE):
        make = partial(twice, made, command, flag, method)
        yield Entry("options given twice", f"{command} --{flag}", make, fails=True)
    for words in ODD_LINES:
        yield Entry("odd lines", ascii(" ".join(words))[:60], partial(odd, words), fails=words not in ([], ["eval"]))


def set_to(made: Materials, command: str, flag: str, value: str, method: str, folder: Path) -> list[str]:
    """Return a line with an option of that value."""
    return line(made, command, {flag: value}, method if flag != "method" else "")


def switched(made: Materials, command: str, flag: str, value: str, method: str, folder: Path) -> list[str]:
    """Return a line that gives a switch a value."""
    return [*line(made, command, method=method), f"--{flag}{value}"]


def twice(made: Materials, command: str, flag: str, method: str, folder: Path) -> list[str]:
    """Return a line with two values of an option."""
    return [*line(made, command, {flag: None}, method if flag != "method" else ""), f"--{flag}", "1", f"--{flag}=2"]


def odd(words: list[str], folder: Path) -> list[str]:
    """Return the line itself."""
    return words
