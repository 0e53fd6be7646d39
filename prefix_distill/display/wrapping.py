"""Break text between words, so that it fits a terminal."""

import os
from typing import TextIO

from rich.cells import cell_len

INDENT = "  "
USUAL = 80  # columns of a terminal that does not tell them
NARROWEST = 20  # cells of text that a margin leaves


def measure_terminal(stream: TextIO) -> int:
    """Return the columns of the terminal that ``stream`` writes to."""
    try:
        columns = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):  # no terminal, or the stream is closed
        return USUAL
    return columns or USUAL


def fit_text(text: str, stream: TextIO) -> str:
    """Return text whose lines fit ``stream`` if it is a terminal; elsewhere the text itself.

    What continues a line is indented more deeply than the line.
    """
    if not stream.isatty():
        return text
    width = measure_terminal(stream)
    lines: list[str] = []
    for line in text.split("\n"):
        words = line.lstrip(" ")
        start = line[: len(line) - len(words)]
        lines += wrap_words(words, width, start=start, margin=len(start) + len(INDENT))
    return "\n".join(lines)


def wrap_words(text: str, width: int, *, start: str, margin: int) -> list[str]:
    """Return ``start`` and the text as lines of at most ``width`` cells, but for long words.

    A line breaks only at a space; no word is cut, so that paths and flags can be copied.
    ``margin``: cells to the left of the second line and those after it.
    """
    width = max(width, margin + NARROWEST)
    lines = [start]
    is_empty = True  # the newest line has no word yet
    for word in text.split(" "):
        if is_empty:
            lines[-1] += word
        elif cell_len(lines[-1]) + 1 + cell_len(word) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(" " * margin + word)
        is_empty = False
    return lines
