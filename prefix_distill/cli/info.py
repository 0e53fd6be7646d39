"""The commands env and help."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from ..display import tell
from ..errors import UserError
from .app import app

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable


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
        str | None, typer.Argument(metavar="[TOPIC]", help="Page to print. Omit it to list them.")
    ] = None,
) -> None:
    """Print a page of documentation in Markdown: recipes, methods, migration, machines or
    exit-codes."""
    import difflib

    pages = _find_pages()
    if topic is None:
        for name, page in pages.items():
            title = page.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
            print(f"prefix-distill help {name:12} {title}")
        return
    if topic not in pages:
        advice = f"choose from {', '.join(pages)}"
        near = difflib.get_close_matches(topic, pages, 1, 0.4)
        if near:
            advice = f"did you mean {near[0]}?"
        raise UserError(f"help {topic[:80]}: no such page; {advice}")
    print(pages[topic].read_text(encoding="utf-8"), end="")


def _find_pages() -> "dict[str, Traversable]":
    """Return the files of the pages by name, sorted."""
    from importlib.resources import files

    pages = {}
    for file in files("prefix_distill").joinpath("help").iterdir():
        if file.name.endswith(".md"):
            pages[file.name.removesuffix(".md")] = file
    return dict(sorted(pages.items()))
