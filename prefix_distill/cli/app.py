"""The Typer app, and what all commands share: progress on the terminal, results, errors."""

import json
import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from .. import display
from ..api.launch import is_first_rank, leave_message
from ..display import print_line
from .panels import PanelGroup, PanelTyper

if TYPE_CHECKING:
    from ..api.result import Result

COMMANDS = (
    *("run", "check", "plan", "eval", "demo", "probe", "compare", "report", "export"),
    *("show", "try", "env", "help"),
)
LONGEST = 1000  # characters of an error message


class Commands(PanelGroup):
    """The commands, listed by ``--help`` in the order of COMMANDS."""

    def list_commands(self, ctx: object) -> list[str]:
        return sorted(self.commands, key=COMMANDS.index)


app = PanelTyper(
    cls=Commands,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Distill a large language model into a small one, on-policy, from prefixes of the "
    "student's own answers.",
    epilog="Exit codes: 0 success, 1 stopped with its files intact, 2 invalid input, 3 failed "
    "check before the run, 4 out of memory, 130 interrupted (prefix-distill help exit-codes). "
    "List of help pages: prefix-distill help.",
)


@app.callback()
def program(
    plain: Annotated[
        bool,
        typer.Option(
            "--plain",
            help="Print no bars, boxes or colors, and tables as lines, for screen readers and logs "
            "(also: PREFIX_DISTILL_PLAIN=1, NO_COLOR=1, TERM=dumb).",
        ),
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose",
            "-v",
            help="Print what became of each column of a dataset, and its first row (also: "
            "PREFIX_DISTILL_VERBOSE=1).",
        ),
    ] = False,
) -> None:
    if plain:
        os.environ["PREFIX_DISTILL_PLAIN"] = "1"
    if verbose:
        os.environ["PREFIX_DISTILL_VERBOSE"] = "1"
    if display.is_plain() or not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' own bars


class Terminal(display.Terminal):
    """An observer that shows progress on stderr, from the first rank."""

    shares_streams = True

    def note(self, text: str) -> None:
        """Print a progress note."""
        note(text)


def note(text: str) -> None:
    """Print a line on stderr, from the first rank."""
    if is_first_rank():
        print_line(text)


def show(result: "Result", width: int) -> None:
    """Show the tables of a result on stderr; ``width``: characters where stderr is no terminal."""
    if is_first_rank():
        display.print_tables(*result.tables(), width=None if sys.stderr.isatty() else width)


def finish(document: dict) -> None:
    """Print the JSON document of the command on stdout, from the first rank."""
    if is_first_rank():
        print(json.dumps(document))


def report_failure(message: str, code: int) -> int:
    """Print why the command failed, on one line, and return its exit code."""
    message = " ".join(message.split())
    if len(message) > LONGEST:
        message = f"{message[:600]} … {message[-300:]}"
    rank = os.environ.get("RANK", "0")
    if rank != "0" and not message.startswith("rank "):
        message = f"rank {rank}: {message}"
    print_line(message if code >= 128 else f"error: {message}")
    leave_message(message, code)
    return code
