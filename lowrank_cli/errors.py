"""Errors that a user can act on: what happened, why, and what to type instead. Exit codes of the command line."""

from difflib import get_close_matches

FAILED = 1  # failed at run time
USAGE = 2  # usage or configuration
PREFLIGHT = 3  # does not fit, or a preflight check failed
MISSING = 4  # an optional dependency, data or a model is not there
INTERRUPTED = 130  # Ctrl-C or SIGTERM


class LowrankError(Exception):
    """A mistake or a misfortune with a way out.

    Args:
        message: what happened and why, one sentence.
        hint: what to type or do instead, one sentence.
    """

    exit_code = FAILED

    def __init__(self, message: str, hint: str = ""):
        super().__init__(message)
        self.message, self.hint = message, hint


class UsageError(LowrankError):
    """A flag, a configuration key or an input file that cannot be used as given."""

    exit_code = USAGE


class PreflightError(LowrankError):
    """The run would not fit, or a check before it failed."""

    exit_code = PREFLIGHT


class MissingError(LowrankError):
    """A dependency, data set or model that is not there; the hint gets it."""

    exit_code = MISSING


class Interrupted(LowrankError):
    """The user or the system asked the run to stop; a checkpoint was saved unless the message says otherwise."""

    exit_code = INTERRUPTED


def unknown(kind: str, name: str, known, flag: str = "") -> UsageError:
    """The error for a name that is not in a table: the nearest name and the whole list."""
    known = sorted(known)
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    did_you_mean = f"did you mean '{close[0]}'? " if close else ""
    plural = f"{kind}s" if not kind.endswith("y") else f"{kind[:-1]}ies"
    return UsageError(
        f"unknown {kind} '{name}'" + (f" in {flag}" if flag else ""), f"{did_you_mean}{plural}: {', '.join(known)}"
    )
