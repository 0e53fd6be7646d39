"""Lay out the closing summary of a command: a title, some facts, the warnings, the next commands.

print_summary(
    "run finished in 4 min",
    {"accuracy": "45.0 % → 89.5 % [84.5 %, 93.0 %]", "model": "runs/first/model"},
    warnings=["the tail is being hurt"],
    commands=["prefix-distill report runs/first --out runs/report"],
)
"""

import shutil
import sys
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.text import Text

from .lines import is_plain, print_line

WIDEST = 80  # cells of a summary, also on a wider terminal


def print_summary(
    title: str,
    facts: Mapping[str, str],
    warnings: Sequence[str] = (),
    commands: Sequence[str] = (),
) -> None:
    """Print a summary on stderr, within the width of the terminal and WIDEST cells.

    ``facts``: name → text, one line each unless it is too long; ``commands`` are never broken, so
    that they can be copied. Warnings are counted, and yellow on a terminal.
    """
    width = min(WIDEST, shutil.get_terminal_size((WIDEST, 0)).columns)
    has_colours = sys.stderr.isatty() and not is_plain()
    console = Console(stderr=True, width=width, force_terminal=has_colours)
    wide = max(map(len, facts), default=0) + 2
    with console.capture() as captured:
        console.print(Text(title, style="bold"))
        for name, text in facts.items():
            console.print(_hang(f"{name:<{wide}}", Text(text), width))
        if warnings:
            count = "1 warning" if len(warnings) == 1 else f"{len(warnings)} warnings"
            console.print(Text(f"{count}:", style="yellow"))
        for warning in warnings:
            console.print(_hang("  ", Text(warning, style="yellow"), width))
        for command in commands:
            console.print(Text(f"next: {command}"), soft_wrap=True)
    print_line(captured.get().removesuffix("\n"))


def _hang(start: str, text: Text, width: int) -> Text:
    """Return ``text`` after ``start``, with its further lines below its first one."""
    console = Console(width=width)
    lines = text.wrap(console, max(20, width - len(start)))
    hung = Text(start)
    for number, line in enumerate(lines):
        if number:
            hung.append("\n" + " " * len(start))
        line.rstrip()
        hung.append_text(line)
    return hung
