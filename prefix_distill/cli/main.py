"""Run a command; turn errors into one line on stderr and an exit code."""

import io
import os
import sys

import typer

from ..errors import AT_ONCE, Stopped, UserError
from . import info, model, run, study  # noqa: F401  (importing them registers the commands)
from .app import app, fail, note
from .quiet import calm_threads, hide_deprecations


def _understood(group, arguments: list[str], say: bool) -> list[str]:
    """The arguments in our own flags, --plain first; what was in another tool's is said."""
    name = next((word for word in arguments if not word.startswith("-")), None)
    if name not in group.commands:
        return arguments
    at = arguments.index(name) + 1
    valued, switches = set(), {"--plain": None, "--help": None}
    for parameter in group.commands[name].params:
        for flag in parameter.opts:
            if flag.startswith("--") and getattr(parameter, "is_flag", False):
                switches[flag] = (
                    parameter.name.replace("__", ".") if "__" in parameter.name else None
                )
            elif flag.startswith("--"):
                valued.add(flag)
    from .spellings import translate

    ranks = os.environ.get("WORLD_SIZE", "1")
    made, said = translate(arguments[at:], valued, switches, int(ranks) if ranks.isdecimal() else 1)
    if said and say:
        note(f"understood: {'; '.join(said)} (prefix-distill help migration)")
    plain = made[:1] == ["--plain"]  # an option of the program, taken behind its command, too
    return [*arguments[: at - 1], *made[:plain], name, *made[plain:]]


def main(alone: bool = True) -> None:
    """Runs the command; bad input ends with one line on stderr and exit code 2. Not ``alone``:
    the launcher speaks for its ranks."""
    calm_threads(os.environ)
    hide_deprecations()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(
            stream, io.TextIOWrapper
        ):  # a Windows code page or a C locale lacks some characters of ours
            stream.reconfigure(errors="replace")
    try:
        command = typer.main.get_command(app)
        code = command(
            _understood(command, sys.argv[1:], alone),
            prog_name="prefix-distill",
            standalone_mode=False,
        )
        if code == 130:  # what typer makes of Ctrl-C
            raise KeyboardInterrupt
        sys.exit(code)
    except (UserError, Stopped) as error:
        fail(str(error), error.exit_code, alone)
    except KeyboardInterrupt:
        fail(AT_ONCE, 130, alone)
    except Exception as error:
        if _out_of_memory(error):
            fail(
                "out of memory; lower --generation-rows or --micro-batch-size, or use --dtype "
                "bfloat16",
                4,
                alone,
            )
        if not hasattr(
            error, "format_message"
        ):  # click's own complaints about flags have it; anything else is a bug
            raise
        fail(error.format_message(), 2, alone)


def _out_of_memory(error: Exception) -> bool:
    if "torch" not in sys.modules:
        return False
    from ..engine.device import out_of_memory

    return out_of_memory(error)
