"""The Typer app, and what all commands share: notes, results, ranks and error messages."""

import json
import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from .. import display
from ..config import Config
from ..display import tell
from .panels import PanelGroup, PanelTyper

if TYPE_CHECKING:
    from ..training.run import Run

COMMANDS = (
    *("run", "check", "plan", "eval", "demo", "probe", "compare", "report", "export"),
    *("env", "help"),
)


class Commands(PanelGroup):
    """The commands, listed by ``--help`` in the order of COMMANDS."""

    def list_commands(self, ctx: object) -> list[str]:
        return sorted(self.commands, key=COMMANDS.index)


app = PanelTyper(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Distil a large reasoning model into a small one, on-policy, from prefixes of the "
    "student's own answers.",
    epilog="Exit codes: 0 done, 1 stopped in good order, 2 bad input, 3 a check before the run, 4 "
    "out of memory, 130 interrupted (prefix-distill help exit-codes). More pages: "
    "prefix-distill help.",
)


@app.callback()
def program(
    plain: Annotated[
        bool,
        typer.Option(
            "--plain",
            help="No bars, boxes or colours, tables as lines: for screen readers and logs (also: "
            "PREFIX_DISTILL_PLAIN=1, NO_COLOR=1, TERM=dumb).",
        ),
    ] = False,
) -> None:
    if plain:
        os.environ["PREFIX_DISTILL_PLAIN"] = "1"  # ranks hear of it, too
    if display.plain() or not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' own bars


def say(prepared: "Run", text: str) -> None:
    if prepared.place.first:
        note(text)


def note(text: str) -> None:
    """A line on stderr, from the first rank."""
    if os.environ.get("RANK", "0") == "0":
        tell(text)


def finish(prepared: "Run", document: dict) -> None:
    if prepared.place.first:
        print(json.dumps(document))


def start_ranks(config: Config) -> None:
    """Run the command on --gpus ranks and exit; return if one rank is enough or this is a rank.

    UserError: a rank has no device. RanksFailed: a rank failed.
    """
    from . import launch

    runtime = config.runtime
    if runtime.gpus is None or runtime.gpus == 1 or launch.launched():
        return
    launch.check(runtime.gpus, runtime.device)
    launch.launch(runtime.gpus, sys.argv[1:])
    raise typer.Exit


def tell_failure(message: str, code: int, alone: bool) -> int:
    """Print why the command failed, on one line, and return its exit code.

    With ``alone`` false this process is a rank: its launcher prints the line.
    """
    message = " ".join(message.split())
    if len(message) > 1000:
        message = f"{message[:600]} … {message[-300:]}"
    rank = os.environ.get("RANK", "0")
    if not message.startswith("rank ") and rank != "0" and alone:
        message = f"rank {rank}: {message}"
    if alone:
        tell(message if code >= 128 else f"error: {message}")
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from .launch import leave_word

        leave_word(message, code)
    return code
