"""The commands show and try: look at texts of a run, and ask its models a question."""

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..api.arguments import read_folder
from ..display import fit_text, is_rich
from ..errors import UserError
from ..training.text_lines import visible
from .app import app, choose_text_stream, finish_text, note
from .options import read_number

if TYPE_CHECKING:
    from ..api.looking import View

Run = Annotated[str, typer.Argument(metavar="RUN", help="Run folder.")]
# switches of `show`
SWITCHES: dict[str, Any] = {
    "wrong": typer.Option("--wrong", help="Show only problems whose newest answer is wrong."),
    "kl": typer.Option(
        "--kl",
        help="Show held-out rollouts of the untrained student, each token colored by its reverse "
        "KL.",
    ),
    "live": typer.Option(
        "--live", help="Follow a running folder: print evaluations and rollouts as they come."
    ),
}


def with_switches(command: Callable[..., None]) -> Callable[..., None]:
    """Add SWITCHES to a command, which gets them as keyword arguments."""
    parameters = list(inspect.signature(command).parameters.values())
    parameters.pop()  # the keywords
    for name, option in SWITCHES.items():
        parameters.append(
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=False,
                annotation=Annotated[bool, option],
            )
        )
    command.__dict__["__signature__"] = inspect.Signature(parameters)
    return command


@app.command()
@with_switches
def show(
    run: Run,
    step: Annotated[
        int | None,
        typer.Option(
            parser=read_number("--step", int, 40),
            metavar="INT",
            help="Show the evaluation after this step, beside the first and the last one.",
            show_default="up to two others",
        ),
    ] = None,
    limit: Annotated[
        int,
        typer.Option(
            parser=read_number("--limit", int, 3),
            metavar="INT",
            help="Problems to show; 0 shows all.",
            show_default="3",
        ),
    ] = 3,
    **switches: bool,
) -> None:
    """Show the answers of a run: before, at evaluations and after training.

    A mark shows where the prefix ended. It loads no model.
    """
    from ..api import looking

    folder = read_folder("RUN", run)
    wrong, kl, live = switches["wrong"], switches["kl"], switches["live"]
    choice = looking.Choice(step=step, wrong=wrong, limit=max(0, limit), kl=kl)
    if live:
        stream = choose_text_stream()
        for line in looking.follow(folder, choice):
            print(fit_text(line, stream), file=stream, flush=True)
    view = looking.look(folder, choice)
    if not live:
        print_view(view)
    finish_text(view.to_dict())


def print_view(view: "View") -> None:
    """Print texts: side by side and in color on a terminal, as plain lines elsewhere."""
    stream = choose_text_stream()
    if is_rich(stream):
        from rich.console import Console

        console = Console(file=stream, highlight=False)
        for renderable in view.renderables(console.width):
            console.print(renderable)
    else:
        for line in view.lines():
            print(line, file=stream)
    print(fit_text(view.remark(), stream), file=stream)


@app.command("try")
def try_command(
    run: Run,
    questions: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="QUESTION",
            help="Questions; without one they are read from stdin, a question per line.",
        ),
    ] = None,
) -> None:
    """Ask the untrained student, the trained student and the teacher of a run the same question.

    Each model is loaded, answers with the templates and the sampling settings of the run's
    evaluations, and is freed.
    """
    folder = read_folder("RUN", run)
    if questions:
        finish_text(answer(folder, questions))
        return
    if sys.stdin.isatty():
        converse(folder)
        return
    lines = [line.strip() for line in sys.stdin]
    asked = [line for line in lines if line]
    if not asked:
        raise UserError('try: expected a question, got none; add one: try RUN "What is 2 + 2?"')
    finish_text(answer(folder, asked))


def converse(folder: Path) -> None:
    """Answer one question of the terminal after another, until an empty line."""
    while True:
        note("question (an empty line ends):")
        question = sys.stdin.readline().strip()
        if not question:
            return
        answer(folder, [question])


def answer(folder: Path, questions: list[str]) -> dict:
    """Print the answers while they are sampled, and return the document.

    UserError: a model could not answer; the answers of the others are printed first.
    """
    from ..api import asking

    document, failure = asking.ask(folder, questions, say)
    if failure is not None:
        raise failure
    return document


def say(text: str) -> None:
    """Print a piece of text at once."""
    print(visible(text), end="", file=choose_text_stream(), flush=True)
