"""The commands env and help."""

import json
from typing import Annotated

import typer

from ..display import tell
from . import pages
from .app import app


@app.command("env")
def environment() -> None:
    """Versions, devices, precisions and threads, for a bug report. No host name, no user, no
    path, no secret."""
    from ..engine import device

    document = device.environment()
    for name, value in document.items():
        for line in (
            value if isinstance(value, list) and value and isinstance(value[0], dict) else [value]
        ):
            tell(
                f"{name}: "
                + (
                    ", ".join(f"{k} {v}" for k, v in line.items() if v is not None)
                    if isinstance(line, dict)
                    else str(line)
                )
            )
    print(json.dumps(document))


@app.command("help")
def help_command(
    topic: Annotated[
        str | None, typer.Argument(metavar="[TOPIC]", help="Page to print. Omit it to list them.")
    ] = None,
) -> None:
    """Print a page: data, devices, adapters, reliability, methods, tokenizers, speed, recipes,
    migration or exit-codes."""
    if topic is None:
        print(pages.list_topics())
    else:
        pages.print_page(topic)
