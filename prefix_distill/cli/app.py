"""The Typer app, and what all commands share: progress on the terminal, results, errors."""

import json
import os
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from .. import __version__, display
from ..api.launch import is_first_rank, leave_message
from ..api.spelling_tables import PROGRAM_SWITCHES
from ..display import Summary, print_line, print_text, render_summary
from ..errors import UserError, nearest
from ..signals import find_stop_signals
from .panels import PanelGroup, PanelTyper

if TYPE_CHECKING:
    from rich.table import Table

    from ..api.result import Result

COMMANDS = (
    *("run", "check", "plan", "eval", "demo", "probe", "compare", "report", "export"),
    *("show", "try", "env", "help"),
)
LONGEST = 1000  # characters of an error message
JSON = "PREFIX_DISTILL_JSON"


class Commands(PanelGroup):
    """The commands, listed by ``--help`` in the order of COMMANDS."""

    def list_commands(self, ctx: object) -> list[str]:
        return sorted(self.commands, key=COMMANDS.index)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that ``args`` begin with. UserError: there is none."""
        if args[0] not in self.commands and not ctx.resilient_parsing:
            raise UserError(_describe_unknown(args[0], self.commands))
        return super().resolve_command(ctx, args)


def _describe_unknown(word: str, commands: Iterable[str]) -> str:
    """Return that a word is no command, and the nearest command or option of the program."""
    names = {name: name for name in commands}
    for flag in ("--version", "--help", *PROGRAM_SWITCHES):
        names.setdefault(flag.lstrip("-"), flag)
    near = nearest(word, names)
    if near is not None:
        return f"{word}: no such command; did you mean {names[near]}?"
    return f"{word}: no such command; prefix-distill --help lists them"


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


def print_version(asked: bool) -> None:
    """Print the version and end the command, if asked."""
    if asked:
        print(f"prefix-distill {__version__}")
        raise typer.Exit


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
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose",
            "-v",
            help="Print every automatic choice, what became of each column of a dataset, and its "
            "first row (also: PREFIX_DISTILL_VERBOSE=1).",
        ),
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Print the JSON document of the result as the last line of stdout (also: "
            "PREFIX_DISTILL_JSON=1). Where stdout is not a terminal, every command prints it but "
            "show, try and env, which print text.",
        ),
    ] = False,
) -> None:
    if plain:
        os.environ["PREFIX_DISTILL_PLAIN"] = "1"
    if verbose:
        os.environ["PREFIX_DISTILL_VERBOSE"] = "1"
    if as_json:
        os.environ[JSON] = "1"
    if display.is_plain() or not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' own bars


class Terminal(display.Terminal):
    """An observer that shows progress on stderr, from the first rank."""

    shares_streams = True

    def __init__(self) -> None:
        super().__init__(is_first_rank(), find_stop_signals())

    def note(self, text: str) -> None:
        """Print a progress note."""
        note(text)


def note(text: str) -> None:
    """Print a line on stderr, from the first rank."""
    if is_first_rank():
        print_line(text)


def show(result: "Result", width: int) -> None:
    """Show the tables of a result, from the first rank; see `show_tables`."""
    if is_first_rank():
        show_tables(*result.tables(), width=width)


def show_tables(*tables: "Table", width: int | None = None) -> None:
    """Show tables where a summary is shown; ``width``: columns where that is not a terminal."""
    stream = _choose_screen()
    _write(stream, display.render_tables(*tables, stream=stream, width=width))


def finish(document: dict, summary: Summary | None = None) -> None:
    """Show the summary, and print the JSON document on stdout, from the first rank.

    A terminal gets the document only with --json.
    """
    if not is_first_rank():
        return
    if summary is not None:
        stream = _choose_screen()
        _write(stream, render_summary(summary, stream))
    if is_json_wanted() or not sys.stdout.isatty():
        print(json.dumps(document))


def finish_text(document: dict) -> None:
    """End a command whose product is text: print the JSON document only with --json."""
    if is_json_wanted():
        print(json.dumps(document))


def choose_text_stream() -> TextIO:
    """Return where a command writes the text that is its product: stdout, with --json stderr."""
    if is_json_wanted():
        return sys.stderr
    return sys.stdout


def is_json_wanted() -> bool:
    """Return whether --json was given."""
    return bool(os.environ.get(JSON))


def _choose_screen() -> TextIO:
    """Return where tables and summaries are shown: stdout if it is a terminal, else stderr."""
    if sys.stdout.isatty():
        return sys.stdout
    return sys.stderr


def _write(stream: TextIO, text: str) -> None:
    if stream is sys.stderr:
        print_text(text)
    else:
        print(text, file=stream)


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
