"""Flags made from the configuration dataclasses, for the methods that were chosen."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from lowrank_cli import methods
from lowrank_cli.config import offered, preset_names, preset_summary
from lowrank_cli.errors import LowrankError, UsageError
from lowrank_cli.fields import base_type, coerce, key_of
from lowrank_cli.foreign import read_yaml
from lowrank_cli.run import RUNS
from lowrank_cli.settings import COMMANDS

METAVARS = {int: "INTEGER", float: "NUMBER", str: "TEXT"}
SWITCHES = "What a preset or a file switches on, --no-NAME switches off, such as --no-streaming."


class Command(TyperCommand):
    """A command that takes an option with a value once.

    Its help has no column for the --no- forms: at 80 characters it would cut every long name.
    """

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        refuse_repeated(args, self.single())
        return super().parse_args(ctx, args)

    def single(self) -> set[str]:
        """Return the names of the options that take one value."""
        options = [p for p in self.params if p.param_type_name == "option"]
        return {name for p in options if not (p.is_flag or p.multiple) for name in p.opts}

    def format_help(self, ctx, formatter) -> None:
        negatives = [(p, p.secondary_opts) for p in self.params]
        for p, _ in negatives:
            p.secondary_opts = []
        try:
            super().format_help(ctx, formatter)
        finally:
            for p, names in negatives:
                p.secondary_opts = names


def refuse_repeated(args: Sequence[str], names: Collection[str]) -> None:
    """Raise UsageError for an option that stands twice with different values: which one counts nobody sees.

    Args:
        args: the arguments of a command.
        names: the options that take one value.
    """
    found: dict[str, str] = {}
    rest = iter(args)
    for argument in rest:
        if argument == "--":
            return
        name, equals, value = argument.partition("=")
        if name not in names:
            continue
        if not equals and (value := next(rest, None)) is None:
            return
        if found.setdefault(name, value) != value:
            raise UsageError(f"{name} is given twice: {found[name]} and {value}", "keep one of them")


def peek(argv: Sequence[str], name: str) -> str | None:
    """The value of `--name VALUE` or `--name=VALUE` in the arguments, before they are parsed."""
    for i, argument in enumerate(argv):
        if argument == f"--{name}" and i + 1 < len(argv):
            return argv[i + 1]
        if argument.startswith(f"--{name}="):
            return argument.partition("=")[2]
    return None


def peek_methods(argv: Sequence[str], command: str) -> list[type[methods.Method]]:
    """The methods that a command line chooses, by flag, YAML file, preset or the run that it resumes.

    Mistakes are left for the command to report: here they choose nothing.
    """
    default = COMMANDS[command].method if command in COMMANDS else "full"
    if default is None:
        return []
    chosen = peek(argv, "method")
    if chosen is None:
        files = [peek(argv, "config"), *(preset_names().get(p) for p in [peek(argv, "preset")] if p)]
        resumed = peek(argv, "resume")
        if resumed and resumed != "never":
            folder = Path(resumed if resumed != "auto" else peek(argv, "out") or RUNS / "latest")
            files += [f / "config.yaml" for f in (folder, folder.parent, folder.parent.parent)]
        for file in filter(None, files):
            try:
                chosen = chosen or read_yaml(Path(file)).get("method")
            except LowrankError:
                continue
    try:
        return methods.compose(str(chosen or default), command)
    except LowrankError:
        return []


def register(
    app: typer.Typer,
    command: str,
    help: str,
    handler: Callable[[dict[str, Any], dict[str, dict[str, Any]], Any], None],
    argv: Sequence[str],
) -> None:
    """Add a command whose flags are the configuration's fields.

    Args:
        app: the application.
        command: the command's name.
        help: its first line in --help.
        handler: called with the flags that were typed, the chosen methods' own ones, and what concerns this call
            only.
        argv: the arguments, read ahead for the chosen methods.
    """
    spec = COMMANDS[command]
    chosen = peek_methods(argv, command)
    parameters = []
    if spec.method is not None:
        available = [n for n in methods.names() if command in methods.get(n).commands]
        parameters.append(
            parameter(
                "method", "method", str, f"{', '.join(available)}; join two with +", spec.method, "Method", "TEXT"
            )
        )
    for part in chosen:
        parameters += [
            of_field(part.Config, f, f"{part.title} (--method {part.name})", part.name) for f in fields(part.Config)
        ]
    overrides = spec.defaults | {key: value for part in chosen for key, value in part.defaults_for(command).items()}
    for cls in spec.sections.values():
        for f in offered(command, cls):
            if key_of(f) == spec.argument:
                parameters.insert(0, argument(f))
            else:
                parameters.append(of_field(cls, f, cls.__doc__, overrides=overrides))
    parameters += [of_field(spec.call, f, spec.call.__doc__, negatable=False) for f in fields(spec.call)]

    def call(**values: Any) -> None:
        plain = {f: values.pop(f) for f in [key_of(f) for c in spec.sections.values() for f in offered(command, c)]}
        if spec.argument:
            plain[spec.argument] = ",".join(plain[spec.argument] or []) or None
        own = {p.name: {key_of(f): values.pop(f"{p.name}_{key_of(f)}") for f in fields(p.Config)} for p in chosen}
        once = spec.call(
            **{
                f.name: coerce(spec.call, f, values[key_of(f)], f"--{key_of(f)}")
                for f in fields(spec.call)
                if values[key_of(f)] is not None
            }
        )
        if spec.method is not None:
            plain["method"] = values["method"]
        handler(plain, own, once)

    call.__signature__ = inspect.Signature(parameters)
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    call.__name__ = command.replace("-", "_")
    epilog = f"{SWITCHES}\n\n{listing(command)}" if spec.method is not None else SWITCHES
    app.command(command, cls=Command, help=help, epilog=epilog)(call)


def listing(command: str = "") -> str:
    """The methods and the presets with one line each, as Markdown; those of one command, or all."""
    available = [n for n in methods.names() if not command or command in methods.get(n).commands]
    presets = [
        p for p, file in preset_names().items() if not command or read_yaml(file).get("command", command) == command
    ]
    lines = ["Methods (--method):", "", *(f"- **{n}**: {methods.get(n).summary}" for n in available), ""]
    lines += ["Presets (--preset):", "", *(f"- **{p}**: {preset_summary(p)}" for p in presets)]
    return "\n".join(lines)


def argument(f) -> inspect.Parameter:
    """The positional argument of a command; it may be left out, and several are joined by commas."""
    info = typer.Argument(help=f.metadata["help"], metavar=f"[{key_of(f).upper()}]...", show_default=False)
    return inspect.Parameter(
        key_of(f), inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[list[str] | None, info]
    )


def of_field(
    cls, f, panel: str, prefix: str = "", overrides: dict[str, Any] | None = None, negatable: bool = True
) -> inspect.Parameter:
    """The flag of one configuration field; `overrides` are defaults that the chosen methods change."""
    name = f"{prefix}_{key_of(f)}" if prefix else key_of(f)
    kind = base_type(cls, f)
    choices = f.metadata["choices"]
    metavar = "CHOICE" if choices else ("COUNT" if f.metadata["count"] else METAVARS.get(kind))
    value = (overrides or {}).get(key_of(f), f.default)
    default = None if value is None or value is False or value == "" else str(value)
    short = f.metadata["flag"].partition("/")[2]
    help = f.metadata["help"]
    if choices:
        help = f"{help}; one of {', '.join(map(str, choices))}"
    if kind is bool and value is not False:
        help = f"{help}; --no-{name.replace('_', '-')} switches it off"
    return parameter(name, name, kind, help, default, panel, metavar, short, negatable=negatable)


def parameter(
    name: str,
    flag: str,
    kind: type,
    help: str,
    default: str | None,
    panel: str,
    metavar: str | None,
    short: str = "",
    negatable: bool = True,
) -> inspect.Parameter:
    """One parameter of a command's function; every value is parsed by fields.coerce, so that YAML and flags agree."""
    flag = "--" + flag.replace("_", "-")
    if kind is bool:
        decls, annotation = [f"{flag}/--no-{flag[2:]}" if negatable else flag], bool | None
    else:
        decls, annotation = [flag], str | None
    help = f"{help} [{default}]" if default else help
    info = typer.Option(
        *decls,
        *([short] if short else []),
        help=help,
        show_default=False,
        rich_help_panel=panel,
        metavar=None if kind is bool else metavar,
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[annotation, info]
    )
