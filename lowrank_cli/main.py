"""The `lowrank` command: its subcommands, and the one place where errors become messages and exit codes."""

from __future__ import annotations

import sys
import traceback
from difflib import get_close_matches
from importlib import import_module

import typer

from lowrank_cli import __version__, console, methods, settings
from lowrank_cli.errors import FAILED, INTERRUPTED, USAGE, UsageError
from lowrank_cli.misfortune import explained
from lowrank_cli.options import listing, peek_methods

COMMANDS = tuple(settings.COMMANDS)

HELP = "Train and compress language models in a fraction of the memory."


def build(argv: list[str]) -> typer.Typer:
    """The application for these arguments: only the subcommand that they name has its flags built."""
    app = typer.Typer(
        help=HELP,
        epilog=listing(),
        add_completion=False,
        rich_markup_mode="markdown",
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()
    def top(
        version: bool = typer.Option(
            False, "--version", help="Print the version and stop.", callback=print_version, is_eager=True
        ),
    ) -> None:
        """Train and compress language models in a fraction of the memory."""

    for name in COMMANDS:
        module = import_module(f"lowrank_cli.commands.{name.replace('-', '_')}")
        module.register(app, argv if name in argv else [])
    return app


def print_version(wanted: bool) -> None:
    """--version."""
    if wanted:
        console.output(f"lowrank {__version__}")
        raise typer.Exit


def run(argv: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    argv = sys.argv[1:] if argv is None else argv
    sys.exit(main(argv))


def main(argv: list[str]) -> int:
    """Run the command line; returns the exit code."""
    debug = "--debug" in argv
    with console.streams() as stdout:
        code = run_command(argv, debug)
        stdout.flush()
    # of `lowrank --help | head` nobody wants to hear
    if stdout.error and not {"-h", "--help"} & set(argv or ["--help"]):
        console.error(f"the result could not be printed: {stdout.error}", "its files are written all the same")
    return code or (FAILED if stdout.error else 0)


def run_command(argv: list[str], debug: bool) -> int:
    """Run the command line; errors become messages and exit codes."""
    try:
        for word in argv:
            check_text(word)
        command = typer.main.get_command(build(argv))
        result = command.main(args=argv or ["--help"], prog_name="lowrank", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except KeyboardInterrupt:
        report("interrupted", "", debug)
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001 the boundary: whatever it is, the user gets a line and an exit code
        if known := explained(error):
            report(known.message, known.hint, debug)
            return known.exit_code
        if hasattr(error, "format_message"):
            report(*usage_message(error, argv), debug)
            return USAGE
        report(
            f"{type(error).__name__}: {' '.join(str(error).split())[:500] or 'no message'}",
            "this is a bug; --debug shows the traceback" if not debug else "",
            debug,
        )
        return FAILED


def check_text(word: str) -> None:
    """Raise UsageError for an argument that is no UTF-8, which no file of a run could name."""
    try:
        word.encode()
    except UnicodeEncodeError:
        raise UsageError(f"the argument {word!r} is no UTF-8 text", "rename the file, or type it in UTF-8") from None


def report(message: str, hint: str, debug: bool) -> None:
    """Print an error; with --debug its traceback too."""
    console.error(message, hint)
    if debug:
        console.stderr.print(console.visible(traceback.format_exc()))


def usage_message(error, argv: list[str]) -> tuple[str, str]:
    """Return what is wrong with the command line, and a hint: the nearest option, or how to list the options."""
    option = getattr(error, "option_name", None)
    command = next((a for a in argv if a in COMMANDS), "")
    options = f"lowrank {command} --help lists the options" if command else "lowrank --help lists the commands"
    if option is None:
        return error.format_message().rstrip("."), options
    option = str(option).partition("=")[0]
    if not hasattr(error, "possibilities"):
        # the option is there, but not so: --method at the end of the line, or --offline=3
        return f"{option} {'needs a' if 'requires' in error.format_message() else 'takes no'} value", options
    chosen = {method.name for method in peek_methods(argv, command)}
    for name in set(methods.names()) - chosen:
        if option.startswith(f"--{name}-"):
            return f"{option} is an option of {name}, which was not chosen", f"add --method {name}"
    # without the dashes, which make any two short names alike
    near = get_close_matches(option.lstrip("-"), [p.lstrip("-") for p in error.possibilities or []], n=1)
    return f"no option {option}", f"did you mean --{near[0]}?" if near else options
