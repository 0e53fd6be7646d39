"""The last screen of a command: what came out, in a few labeled lines."""

import shutil
import textwrap
from dataclasses import dataclass, field
from typing import TextIO

from .lines import is_plain

NARROW = 100  # cells; a summary is not wider, because long lines are hard to read
INDENT = "  "
BOLD, YELLOW, RESET = "\x1b[1m", "\x1b[33m", "\x1b[0m"


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A title, labeled lines, warnings, and the next command.

    ``rows``: label → text; empty ones are left out. ``command`` is not broken into lines, so that
    it can be copied.
    """

    title: str
    rows: dict[str, str]
    command: str = ""
    warnings: tuple[str, ...] = field(default=())


def render_summary(summary: Summary, stream: TextIO) -> str:
    """Return a summary as text for ``stream``: with colors and its width if it is a terminal."""
    width = NARROW
    if stream.isatty():
        width = min(NARROW, shutil.get_terminal_size().columns)
    in_color = stream.isatty() and not is_plain()
    return "\n".join(lay_out(summary, width, in_color=in_color))


def lay_out(summary: Summary, width: int, *, in_color: bool) -> list[str]:
    """Return the lines of a summary, of at most ``width`` cells but for the command."""
    rows = {label: text for label, text in summary.rows.items() if text}
    margin = len(INDENT) + max(map(len, [*rows, "warnings"])) + 2
    lines = []
    for line in _wrap(summary.title, width, start="", margin=len(INDENT)):
        lines.append(_paint(line, BOLD, in_color))
    for label, text in rows.items():
        start = f"{INDENT}{label}".ljust(margin)
        lines += _wrap(text, width, start=start, margin=margin)
    if summary.warnings:
        start = f"{INDENT}warnings".ljust(margin)
        lines.append(_paint(f"{start}{len(summary.warnings)}", YELLOW, in_color))
    for text in summary.warnings:
        for line in _wrap(text, width, start=f"{INDENT}- ", margin=len(INDENT) + 2):
            lines.append(_paint(line, YELLOW, in_color))
    if summary.command:
        lines.append(f"{INDENT}next".ljust(margin) + summary.command)
    return lines


def _wrap(text: str, width: int, *, start: str, margin: int) -> list[str]:
    return textwrap.wrap(
        text,
        width=max(width, margin + 20),
        initial_indent=start,
        subsequent_indent=" " * margin,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _paint(text: str, color: str, in_color: bool) -> str:
    if in_color:
        return f"{color}{text}{RESET}"
    return text
