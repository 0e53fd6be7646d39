"""Print lines and tables on stderr, as boxes on a terminal or as plain lines elsewhere."""

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def print_line(text: str) -> None:
    """Print a line on stderr; do nothing if stderr is closed."""
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


def is_verbose() -> bool:
    """Return whether notes are printed in full."""
    return bool(os.environ.get("PREFIX_DISTILL_VERBOSE"))


def print_tables(*tables: "Table", width: int | None = None) -> None:
    """Print rich tables on stderr.

    If ``is_plain()``, print a line with the first cell of each row, then a line "column: value" for
    every other cell.
    """
    if not is_plain():
        from rich.console import Console

        console = Console(stderr=True, width=width)
        with console.capture() as text:
            console.print(*tables)
        print_line(text.get().removesuffix("\n"))
        return
    for table in tables:
        _tell_table(table)


def _tell_table(table: "Table") -> None:
    if table.title:
        print_line(f"{table.title}")
    names = [str(column.header) for column in table.columns]
    for first, *cells in zip(*(column.cells for column in table.columns), strict=True):
        if names[0]:
            print_line(f"{names[0]}: {first}")
        else:
            print_line(f"{first}")
        for name, cell in zip(names[1:], cells, strict=True):
            print_line(f"  {name}: {cell or '–'}")
