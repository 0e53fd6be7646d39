"""The last screen of a command: what came out, in a few labeled lines."""

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TextIO

from .lines import is_rich
from .wrapping import INDENT, measure_terminal, wrap_words

NARROW = 100  # cells; a summary is not wider, because long lines are hard to read
UNBROKEN = "\u00a0"  # a space at which no line is broken; it is shown as an ordinary one
BOLD, YELLOW, RESET = "\x1b[1m", "\x1b[33m", "\x1b[0m"


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A title, labeled lines, warnings, and the next command.

    ``rows``: label → text; empty ones are left out. ``command`` is quoted for a shell, and a long
    one is continued on the next line as a shell reads it, so that it can be copied.
    """

    title: str
    rows: dict[str, str]
    command: str = ""
    warnings: tuple[str, ...] = field(default=())


def render_summary(summary: Summary, stream: TextIO) -> str:
    """Return a summary as text for ``stream``: with colors and its width if it is a terminal."""
    width = NARROW
    if stream.isatty():
        width = min(NARROW, measure_terminal(stream))
    in_color = is_rich(stream)
    return "\n".join(lay_out(summary, width, in_color=in_color))


def lay_out(summary: Summary, width: int, *, in_color: bool) -> list[str]:
    """Return the lines of a summary, of at most ``width`` cells but for long words."""
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
        first, *others = _break_command(summary.command, width - margin)
        lines.append(f"{INDENT}next".ljust(margin) + first)
        lines += [" " * margin + line for line in others]
    return lines


def _break_command(command: str, width: int) -> list[str]:
    """Return a command as lines of at most ``width`` cells; a line begins with an option.

    Windows has no sign for it that all its shells read, so there it stays one line.
    """
    if len(command) <= width or os.name == "nt":
        return [command]
    parts: list[list[str]] = [[]]
    for word in shlex.split(command):
        if word.startswith("--"):
            parts.append([])
        parts[-1].append(word)
    lines = [shlex.join(parts[0])]
    for part in parts[1:]:
        text = shlex.join(part)
        if len(f"{lines[-1]} {text} \\") <= width:
            lines[-1] += f" {text}"
        else:
            lines[-1] += " \\"
            lines.append(f"{INDENT}{text}")
    return lines


def flags_text(words: Sequence[str]) -> str:
    """Return flags and their values as text whose lines break only before a flag."""
    text = ""
    for word in words:
        text += f" {word}" if word.startswith("--") else f"{UNBROKEN}{word}"
    return text.strip()


def _wrap(text: str, width: int, *, start: str, margin: int) -> list[str]:
    lines = wrap_words(text.replace("\n", " "), width, start=start, margin=margin)
    return [line.replace(UNBROKEN, " ") for line in lines]


def _paint(text: str, color: str, in_color: bool) -> str:
    if in_color:
        return f"{color}{text}{RESET}"
    return text
