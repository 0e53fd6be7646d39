"""The pages of `prefix-distill help TOPIC`: Markdown files in the package's folder help/."""

import difflib
import sys
from typing import TYPE_CHECKING

from .. import display
from ..errors import UserError
from .app import COMMANDS

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable


def find_pages() -> "dict[str, Traversable]":
    """Return topic → file, sorted by topic."""
    from importlib.resources import files

    pages = {}
    for file in files("prefix_distill").joinpath("help").iterdir():
        if file.name.endswith(".md"):
            pages[file.name.removesuffix(".md")] = file
    return dict(sorted(pages.items()))


def list_topics() -> str:
    """Return one line for each topic: the command and the page's title."""
    lines = []
    for topic, page in find_pages().items():
        title = page.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        lines.append(f"prefix-distill help {topic:13} {title}")
    return "\n".join(lines)


def read_page(topic: str) -> str:
    """Return the Markdown text of a page.

    Raises UserError with the nearest topic if there is no such page.
    """
    pages = find_pages()
    if topic in pages:
        return pages[topic].read_text(encoding="utf-8")
    advice = f"choose from {', '.join(pages)}"
    near = difflib.get_close_matches(topic, [*pages, *COMMANDS], 1, 0.4)
    if near:
        advice = f"did you mean {near[0]}?"
    raise UserError(f"help {topic[:80]}: no such page; {advice}")


def print_page(topic: str) -> None:
    """Print a page to stdout: rendered on a terminal, as Markdown in a pipe or in plain mode."""
    text = read_page(topic)
    if display.is_plain() or not sys.stdout.isatty():
        print(text, end="")
        return
    from rich.console import Console
    from rich.markdown import Markdown

    Console().print(Markdown(text))
