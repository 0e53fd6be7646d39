"""The commands env and help."""

import json
from typing import Annotated

import typer

from ..display import phase, print_line
from . import pages
from .app import Terminal, app


@app.command("env")
def environment() -> None:
    """Show versions, devices, dtypes and threads for a bug report, without host name, user, paths
    and secrets."""
    with Terminal(), phase("loading libraries"):
        from ..engine import device

        document = device.describe_environment()
    for name, value in document.items():
        entries = [value]
        if isinstance(value, list) and value and isinstance(value[0], dict):
            entries = value
        for entry in entries:
            print_line(f"{name}: {_describe(entry)}")
    print(json.dumps(document))


def _describe(entry: object) -> str:
    """Return a value of the environment on one line; a dict as "key value, key value"."""
    if not isinstance(entry, dict):
        return str(entry)
    return ", ".join(f"{key} {value}" for key, value in entry.items() if value is not None)


@app.command("help")
def help_command(
    topic: Annotated[str | None, typer.Argument(metavar="TOPIC", help="Page to print.")] = None,
) -> None:
    """Print a help page; without TOPIC, list the pages."""
    if topic is None:
        print(pages.list_topics())
    else:
        pages.print_page(topic)
