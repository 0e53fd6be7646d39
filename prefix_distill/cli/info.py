"""The commands env and help."""

import sys
from typing import Annotated, cast

import typer

from ..display import fit_text, phase
from . import pages
from .app import COMMANDS, Terminal, app, choose_text_stream, finish_text
from .completion import complete_from


@app.command("env")
def environment() -> None:
    """Show versions, devices, dtypes and threads for a bug report, without host name, user, paths
    and secrets."""
    with Terminal(), phase("loading libraries"):
        from ..engine import device

        document = device.describe_environment()
    stream = choose_text_stream()
    for name, value in document.items():
        entries = [value]
        if isinstance(value, list) and value and isinstance(value[0], dict):
            entries = value
        for entry in entries:
            print(fit_text(f"{name}: {_describe(entry)}", stream), file=stream)
    finish_text(document)


def _describe(entry: object) -> str:
    """Return a value of the environment on one line; a dict as "key value, key value"."""
    if not isinstance(entry, dict):
        return str(entry)
    return ", ".join(f"{key} {value}" for key, value in entry.items() if value is not None)


def _complete_topic(incomplete: str) -> list[str]:
    return complete_from([*COMMANDS, *pages.find_pages()])(incomplete)


@app.command("help")
def help_command(
    context: typer.Context,
    topic: Annotated[
        str | None,
        typer.Argument(
            metavar="TOPIC",
            help="Page to print, or command whose --help is printed.",
            autocompletion=_complete_topic,
        ),
    ] = None,
) -> None:
    """Print a help page, or the help of a command; without TOPIC, list the pages."""
    group = cast(typer.core.TyperGroup, context.find_root().command)
    if topic is None:
        print(fit_text(pages.list_topics(), sys.stdout))
    elif topic in group.commands:
        group([topic, "--help"], prog_name="prefix-distill", standalone_mode=False)
    else:
        pages.print_page(topic)
