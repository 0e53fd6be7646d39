"""Print lines on stderr, and render tables: as boxes, or as lines with --plain."""

import os
import sys
from typing import TYPE_CHECKING, TextIO

from .wrapping import fit_text

if TYPE_CHECKING:
    from rich.table import Table


def print_line(text: str) -> None:
    """Print a line on stderr; on a terminal it breaks between words."""
    print_text(fit_text(text, sys.stderr))


def print_text(text: str) -> None:
    """Print text on stderr as it is; do nothing if stderr is closed."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        # Python flushes stderr again at exit, and the text in its buffer must not fail then.
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  stays open until the process ends


def is_plain() -> bool:
    """Return whether to print plain lines: no bars, boxes or colors.

    Screen readers and log files need them.
    """
    for name in ("PREFIX_DISTILL_PLAIN", "NO_COLOR"):
        if os.environ.get(name):
            return True
    return os.environ.get("TERM") == "dumb"


def is_rich(stream: TextIO) -> bool:
    """Return whether a stream gets colors and boxes: a terminal, or any stream with FORCE_COLOR."""
    return not is_plain() and (stream.isatty() or bool(os.environ.get("FORCE_COLOR")))


def is_verbose() -> bool:
    """Return whether notes are printed in full."""
    return bool(os.environ.get("PREFIX_DISTILL_VERBOSE"))


def render_tables(*tables: "Table", stream: TextIO, width: int | None = None) -> str:
    """Return rich tables as text for ``stream``, without a newline at the end.

    If ``is_plain()``, a line with the first cell of each row, then a line "column: value" for every
    other cell. ``width``: columns, where ``stream`` is not a terminal.
    """
    if is_plain():
        lines = []
        for table in tables:
            lines += _tell_table(table)
        return "\n".join(lines)
    from rich.console import Console

    if stream.isatty():
        width = None
    console = Console(file=stream, width=width)
    with console.capture() as text:
        console.print(*tables)
    return text.get().removesuffix("\n")


def _tell_table(table: "Table") -> list[str]:
    lines = []
    if table.title:
        lines.append(f"{table.title}")
    names = [str(column.header) for column in table.columns]
    for first, *cells in zip(*(column.cells for column in table.columns), strict=True):
        if names[0]:
            lines.append(f"{names[0]}: {first}")
        else:
            lines.append(f"{first}")
        for name, cell in zip(names[1:], cells, strict=True):
            lines.append(f"  {name}: {cell or '–'}")
    if table.caption:
        lines += str(table.caption).split("\n")
    return lines
