"""The pages and files of `prefix-distill help TOPIC`, in the package's folder help/.

A page is Markdown. A file is printed as it is, to be stored: a notebook, or the settings of a
published method.
"""

import json
import sys
from typing import TYPE_CHECKING

from .. import display
from ..errors import UserError, nearest
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


def find_files() -> "dict[str, Traversable]":
    """Return topic → file of the files to be stored: notebook, and recipe:ARXIV-ID."""
    from importlib.resources import files

    found = {}
    for file in files("prefix_distill").joinpath("help").iterdir():
        name, _, suffix = file.name.rpartition(".")
        if suffix == "ipynb":
            found[name] = file
        elif suffix == "yaml":
            found[name.replace("-", ":", 1)] = file
    return dict(sorted(found.items()))


def list_topics() -> str:
    """Return one line for each topic: the command and the title of its page or file."""
    titles = {}
    for topic, page in find_pages().items():
        titles[topic] = page.read_text(encoding="utf-8").splitlines()[0]
    for topic, file in find_files().items():
        titles[topic] = _read_title(file)
    width = max(map(len, titles))
    lines = []
    for topic, title in titles.items():
        lines.append(f"prefix-distill help {topic:{width}} {title.lstrip('# ')}")
    return "\n".join(lines)


def _read_title(file: "Traversable") -> str:
    text = file.read_text(encoding="utf-8")
    if file.name.endswith(".ipynb"):
        title: str = json.loads(text)["cells"][0]["source"][0]
        return title.strip()
    return text.splitlines()[0]


def read_page(topic: str) -> str:
    """Return the text of a page or file.

    Raises UserError with the nearest topic if there is none.
    """
    pages = find_pages() | find_files()
    if topic in pages:
        return pages[topic].read_text(encoding="utf-8")
    advice = f"choose from {', '.join(pages)}"
    near = nearest(topic, [*pages, *COMMANDS])
    if near is not None:
        advice = f"did you mean {near}?"
    raise UserError(f"help {topic[:80]}: no such page; {advice}")


def print_page(topic: str) -> None:
    """Print a page: rendered on a terminal or with FORCE_COLOR, else as Markdown.

    A file is printed as it is.
    """
    text = read_page(topic)
    if topic in find_files() or not display.is_rich(sys.stdout):
        print(text, end="")
        return
    from rich.console import Console
    from rich.markdown import Markdown

    Console().print(Markdown(text))
