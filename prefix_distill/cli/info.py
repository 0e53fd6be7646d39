"""The commands env and help."""

import json
from typing import Annotated

import typer

from ..display import tell
from ..errors import UserError
from .app import app


@app.command("env")
def environment() -> None:
    """Show versions, devices, dtypes and threads for a bug report. Host name, user, paths and
    secrets are left out."""
    from ..engine import device

    document = device.environment()
    for name, value in document.items():
        entries = [value]
        if isinstance(value, list) and value and isinstance(value[0], dict):
            entries = value
        for entry in entries:
            tell(f"{name}: {_describe(entry)}")
    print(json.dumps(document))


def _describe(entry: object) -> str:
    """Return a value of the environment on one line; a dict as "key value, key value"."""
    if not isinstance(entry, dict):
        return str(entry)
    return ", ".join(f"{key} {value}" for key, value in entry.items() if value is not None)


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
