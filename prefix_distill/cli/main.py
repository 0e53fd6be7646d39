"""Run a command; turn errors into one line on stderr and an exit code."""

import io
import os
import sys
from typing import cast

import typer

from .. import plugins
from ..errors import AT_ONCE, Stopped, UserError
from . import info, model, run, study  # noqa: F401  importing them registers the commands
from .app import Commands, app, note, tell_failure
from .quiet import calm_threads, hide_deprecations


def main(alone: bool = True) -> None:
    """Run the command and exit; bad input ends with one line on stderr and exit code 2.

    With ``alone`` false this process is a rank: its launcher prints that line. No other function
    ends the process.
    """
    calm_threads(os.environ)
    hide_deprecations()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # a Windows code page or a C locale lacks some characters of ours
            stream.reconfigure(errors="replace")
    sys.exit(run_command(sys.argv[1:], alone))


def run_command(arguments: list[str], alone: bool) -> int | None:
    """Run a command and return its exit code; None means 0."""
    try:
        # get_group would leave shell completion out
        group = cast(Commands, typer.main.get_command(app))
        words, translated = translate_arguments(group, arguments)
        if translated and alone:
            note(f"understood: {'; '.join(translated)} (prefix-distill help migration)")
        code = group(words, prog_name="prefix-distill", standalone_mode=False)
        if code == 130:  # what typer makes of Ctrl-C
            raise KeyboardInterrupt
        return code
    except (UserError, Stopped) as error:
        return tell_failure(str(error), error.exit_code, alone)
    except KeyboardInterrupt:
        return tell_failure(AT_ONCE, 130, alone)
    except Exception as error:
        if _out_of_memory(error):
            message = (
                "out of memory; lower --generation-rows or --micro-batch-size, or use --dtype "
                "bfloat16"
            )
            return tell_failure(message, 4, alone)
        fault = plugins.find_fault(error)
        if fault is not None:
            return tell_failure(fault, UserError.exit_code, alone)
        # click's own complaints about flags have it; anything else is a bug
        if not hasattr(error, "format_message"):
            raise
        return tell_failure(error.format_message(), 2, alone)


def translate_arguments(
    group: typer.core.TyperGroup, arguments: list[str]
) -> tuple[list[str], list[str]]:
    """Return the arguments in our own flags, --plain first, and a note on each translated one."""
    name = next((word for word in arguments if not _is_flag(word)), "")
    if name not in group.commands:
        return arguments, []
    at = arguments.index(name)
    from .spellings import translate

    valued, switches = _flags_of(group, name)
    words, translated = translate(arguments[at + 1 :], valued, switches, _world_size())
    # --plain is an option of the program that may also follow the command
    before = arguments[:at]
    if words[:1] == ["--plain"]:
        before.append(words.pop(0))
    return [*before, name, *words], translated


def _is_flag(word: str) -> bool:
    return word.startswith("-")


def _flags_of(group: typer.core.TyperGroup, name: str) -> tuple[set[str], dict[str, str | None]]:
    """Return a command's flags that take a value, and its switches with their config key."""
    valued: set[str] = set()
    switches: dict[str, str | None] = {"--plain": None, "--help": None}
    for parameter in group.commands[name].params:
        flags = [flag for flag in parameter.opts if _is_flag(flag)]
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


def _out_of_memory(error: Exception) -> bool:
    if "torch" not in sys.modules:
        return False
    from ..engine.device import out_of_memory

    return out_of_memory(error)
