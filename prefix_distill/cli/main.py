"""Run a command; turn errors into one line on stderr and an exit code."""

import contextlib
import io
import os
import sys
from typing import TextIO, cast

import typer

from ..api.launch import is_launched
from ..api.quiet import hide_deprecations
from ..api.spelling_tables import PROGRAM_SWITCHES
from ..display import close_screens
from ..errors import INTERRUPTED, Stopped, UserError, describe_abort
from ..files import forget_writing, has_written
from ..signals import ImportGuard
from . import info, look, model, run, study  # noqa: F401  importing them registers the commands
from .app import Commands, app, note, report_failure
from .panels import HELP_ALL
from .quiet import calm_threads

COMPLETION = "_PREFIX_DISTILL_COMPLETE"  # a shell sets it to ask for completions


def main() -> None:
    """Run the command and exit; bad input ends with one line on stderr and exit code 2.

    No other function ends the process.
    """
    calm_threads(os.environ)
    hide_deprecations()
    open_missing_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # a Windows code page or a C locale lacks some of the characters
            stream.reconfigure(errors="replace")
    code: int | str | None = 0
    try:
        with ImportGuard(leave):
            code = run_command(sys.argv[1:])
    except SystemExit as end:
        code = end.code
    except OSError as error:
        # the failed write may have lost its text, so only a new one tells whether stdout is broken
        if flush(sys.stdout, "\n") is None:
            raise
        code = report_unwritable(error)
    sys.exit(close_streams(code or 0))


def leave() -> None:
    """End the process at once, with the line and the exit code of an aborted command."""
    close_screens()
    close_streams(report_abort(sys.argv[1:]))
    os._exit(INTERRUPTED)


def report_abort(arguments: list[str]) -> int:
    """Report that a command was aborted, and return its exit code."""
    is_written = has_written() or is_launched()  # another rank may have written
    message = describe_abort(name_command(arguments), has_written=is_written)
    return report_failure(message, INTERRUPTED)


def report_unwritable(error: OSError) -> int:
    """Report that stdout cannot be written, unless its reader has gone; return the exit code."""
    if isinstance(error, BrokenPipeError):
        return 1
    message = f"stdout: cannot be written ({error.strerror}); free space or name another file"
    return report_failure(message, 1)


def open_missing_streams() -> None:
    """Open stdin, stdout and stderr on the null device where the caller closed them.

    Otherwise the next opened file would get their number, and libraries would write into it.
    """
    descriptor = 0
    while descriptor <= 2:
        descriptor = os.open(os.devnull, os.O_RDWR)
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))


def close_streams(code: int | str) -> int | str:
    """Flush stdout and stderr; return the exit code, 1 if stdout cannot be written."""
    failure = flush(sys.stdout)
    if failure is not None and not code:
        code = report_unwritable(failure)
    for stream in (sys.stdout, sys.__stderr__):
        if stream is not None and flush(stream) is not None:
            # what is left in the buffer must not fail again when Python ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return code


def flush(stream: TextIO, text: str = "") -> OSError | None:
    """Write ``text`` to a stream and flush it; return the error if it cannot be written."""
    try:
        stream.write(text)
        stream.flush()
    except OSError as error:
        return error
    return None


def run_command(arguments: list[str]) -> int | None:
    """Run a command and return its exit code; None means 0."""
    forget_writing()
    try:
        # get_group would leave shell completion out
        group = cast(Commands, typer.main.get_command(app))
        if not set(arguments) - set(PROGRAM_SWITCHES) and COMPLETION not in os.environ:
            with contextlib.redirect_stdout(sys.stderr):
                group(["--help"], prog_name="prefix-distill", standalone_mode=False)
            return 2
        words, translated = translate_arguments(group, arguments)
        if translated:
            note(f"translated: {'; '.join(translated)} (see prefix-distill help migration)")
        code = group(words, prog_name="prefix-distill", standalone_mode=False)
        if code == INTERRUPTED:  # typer's exit code after Ctrl-C
            raise KeyboardInterrupt
        return code
    except (UserError, Stopped) as error:
        return report_failure(str(error), error.exit_code)
    except KeyboardInterrupt:
        return report_abort(arguments)
    except Exception as error:
        # only click's errors about flags have this method; anything else is a bug
        if not hasattr(error, "format_message"):
            raise
        return report_failure(error.format_message(), 2)


def name_command(arguments: list[str]) -> str:
    """Return the first argument that is not a flag, "" without one."""
    return next((word for word in arguments if not _is_flag(word)), "")


def translate_arguments(
    group: typer.core.TyperGroup, arguments: list[str]
) -> tuple[list[str], list[str]]:
    """Return the arguments in our own flags, those of the program first, and a note on each
    translated one."""
    name = name_command(arguments)
    if name not in group.commands:
        return arguments, []
    at = arguments.index(name)
    from ..api.spellings import translate

    valued, switches = _flags_of(group, name)
    words, translated = translate(
        arguments[at + 1 :], valued=valued, switches=switches, world=_world_size()
    )
    before = arguments[:at]
    while words[:1] and words[0] in PROGRAM_SWITCHES:
        before.append(words.pop(0))
    return [*before, name, *words], translated


def _is_flag(word: str) -> bool:
    return word.startswith("-")


def _flags_of(group: typer.core.TyperGroup, name: str) -> tuple[set[str], dict[str, str | None]]:
    """Return a command's flags that take a value, and its switches with their config key."""
    valued: set[str] = set()
    switches: dict[str, str | None] = {"--help": None, HELP_ALL: None}
    switches.update(dict.fromkeys(PROGRAM_SWITCHES))
    for parameter in group.commands[name].params:
        every = (*parameter.opts, *parameter.secondary_opts)
        flags = [flag for flag in every if _is_flag(flag)]
        if not getattr(parameter, "is_flag", False):
            valued.update(flags)
            continue
        key = None
        if parameter.name and "__" in parameter.name:
            key = parameter.name.replace("__", ".")
        switches.update(dict.fromkeys(flags, key))
    return valued, switches


def _world_size() -> int:
    """Return the number of ranks that a launcher has started, or 1."""
    ranks = os.environ.get("WORLD_SIZE", "1")
    if not ranks.isdecimal():
        return 1
    return int(ranks)
