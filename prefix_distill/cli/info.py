"""The commands env and help."""

import json
from typing import Annotated

import typer

from ..display import tell
from ..errors import UserError
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
        str | None, typer.Argument(metavar="[TOPIC]", help="A page; none: the list of them.")
    ] = None,
) -> None:
    """A page of documentation, in Markdown, on stdout: recipes, methods, migration, machines,
    exit-codes."""
    import difflib
    from importlib.resources import files

    pages = {
        file.name.removesuffix(".md"): file
        for file in files("prefix_distill").joinpath("help").iterdir()
        if file.name.endswith(".md")
    }
    if topic is None:
        for name in sorted(pages):
            print(
                f"prefix-distill help {name:12} "
                f"{pages[name].read_text(encoding='utf-8').splitlines()[0].lstrip('# ')}"
            )
        return
    if topic not in pages:
        near = difflib.get_close_matches(topic, pages, 1, 0.4)
        raise UserError(
            f"help {topic[:80]}: no such page; "
            + (f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(pages))}")
        )
    print(pages[topic].read_text(encoding="utf-8"), end="")
