"""Format ``--help``: one panel of options per topic, as wide as the terminal."""

import io
import os
import shutil
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import typer

from .. import config as configuration
from .. import display
from ..errors import UserError

PIPE_WIDTH = 100  # columns where stdout is not a terminal
BRACES = str.maketrans("", "", "{}")  # some versions of typer put them around arguments
ARGUMENTS = "Arguments"
GENERAL_OPTIONS = "General options"  # of the command, not of the config
HELP_ALL = "--help-all"
# command → its required arguments, for messages
EXAMPLES = {
    "compare": "arms.yaml",
    "export": "runs/first",
    "report": "runs/first runs/second",
    "show": "runs/first",
    "try": 'runs/first "What is 2 + 2?"',
}


class PanelCommand(typer.core.TyperCommand):
    """A command whose ``--help`` shows its main options in panels, and ``--help-all`` all."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if HELP_ALL in args:
            ctx.meta[HELP_ALL] = True
            args = ["--help"]
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            argument = getattr(error, "param", None)
            if not isinstance(argument, typer.core.TyperArgument):
                raise
            raise UserError(self.describe_missing(argument)) from None

    def describe_missing(self, argument: typer.core.TyperArgument) -> str:
        """Return that an argument was not given, and an example."""
        example = f"prefix-distill {self.name} {EXAMPLES[str(self.name)]}"
        return f"{self.name}: expected {argument.metavar}, got nothing; for example: {example}"

    def format_help(self, ctx: Any, formatter: Any) -> None:
        panels = panels_of(self, ctx)
        if configuration.MAIN in panels:
            panels[GENERAL_OPTIONS].append(Row(name=HELP_ALL, text="Show all options and exit."))
        hidden = 0
        if HELP_ALL not in ctx.meta:
            panels, hidden = shorten(panels)
        formatter.write(format_help(self, ctx, panels))
        if hidden:
            formatter.write(f"\n\n{hidden} more options: {ctx.command_path} {HELP_ALL}")


class PanelGroup(typer.core.TyperGroup):
    """A group whose ``--help`` shows its options and commands in panels."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        # click answers --help before it reads --plain
        for word in args:
            if not word.startswith("-"):
                break  # the command; what follows are its own options
            if word == "--plain":
                os.environ["PREFIX_DISTILL_PLAIN"] = "1"
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        commands = []
        for name in self.list_commands(ctx):
            commands.append(Row(name=name, text=_join(self.commands[name].help)))
        panels = panels_of(self, ctx) | {"Commands": commands}
        formatter.write(format_help(self, ctx, panels))


class PanelTyper(typer.Typer):
    """A Typer app whose commands are PanelCommands."""

    def command(self, name: str | None = None, **settings: Any) -> Callable[[Any], Any]:
        return super().command(name, cls=PanelCommand, **settings)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of a panel: name and value of an option, its help, and its default and limits."""

    name: str
    text: str
    facts: str = ""


def panels_of(command: Any, ctx: Any) -> dict[str, list[Row]]:
    """Return the rows of a command's arguments and options by topic, the main ones first."""
    panels: dict[str, list[Row]] = {ARGUMENTS: [], configuration.MAIN: [], GENERAL_OPTIONS: []}
    for parameter in command.get_params(ctx):
        if isinstance(parameter, typer.core.TyperArgument):
            topic = ARGUMENTS
            name = parameter.metavar or str(parameter.name).upper()
        else:
            topic = getattr(parameter, "rich_help_panel", None) or GENERAL_OPTIONS
            name = _name(parameter)
        row = Row(name=name, text=_join(parameter.help), facts=_facts(parameter))
        panels.setdefault(topic, []).append(row)
    return {topic: rows for topic, rows in panels.items() if rows}


def shorten(panels: dict[str, list[Row]]) -> tuple[dict[str, list[Row]], int]:
    """Return the panels that ``--help`` shows, and how many config options it leaves out."""
    if configuration.MAIN not in panels:
        return panels, 0
    shown, hidden = {}, 0
    for topic, rows in panels.items():
        if topic in (ARGUMENTS, configuration.MAIN, GENERAL_OPTIONS):
            shown[topic] = rows
        else:
            hidden += len(rows)
    return shown, hidden


def _join(text: str | None) -> str:
    """Return a text on one line."""
    return " ".join((text or "").split())


def _name(option: Any) -> str:
    """Return the flags of an option and the placeholder of its value."""
    flags = ", ".join([*option.opts, *option.secondary_opts])
    if option.is_flag:
        return flags
    return f"{flags} {option.metavar or 'TEXT'}"


def _facts(parameter: Any) -> str:
    """Return the limits and the default of a parameter in brackets, or an empty string."""
    facts = []
    path = parameter.name.replace("__", ".")
    if path in configuration.options():
        facts.append(configuration.describe_limits(configuration.options()[path].metadata))
    if parameter.required:
        facts.append("required")
    elif isinstance(parameter.show_default, str):
        facts.append(f"default: {parameter.show_default}")
    elif parameter.default:
        facts.append(f"default: {parameter.default}")
    text = "; ".join(filter(None, facts))
    if not text:
        return ""
    return f"[{text}]"


def format_help(command: Any, ctx: Any, panels: dict[str, list[Row]]) -> str:
    """Return the help of a command: usage, description, panels and epilog."""
    # COLUMNS if it is set, else the terminal's width
    width = shutil.get_terminal_size((PIPE_WIDTH, 24)).columns
    usage = command.get_usage(ctx).translate(BRACES)
    paragraphs = [usage, _join(command.help), _join(command.epilog)]
    usage, about, epilog = (_wrap(text, width) for text in paragraphs)
    if display.is_plain() or not _can_show_boxes():
        body = _format_lines(panels, width)
    else:
        body = _format_boxes(panels, width)
    return "\n\n".join(filter(None, [usage, about, body, epilog]))


def _wrap(text: str, width: int, indent: str = "") -> str:
    """Return a text in lines of at most ``width`` columns; flags are not broken at hyphens."""
    return textwrap.fill(
        text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )


def _can_show_boxes() -> bool:
    """Return whether the encoding of stdout has the lines of a box."""
    return (sys.stdout.encoding or "utf-8").lower().startswith("utf")


def _format_lines(panels: dict[str, list[Row]], width: int) -> str:
    """Return the panels without boxes and colors: a line per option, its help below it."""
    blocks = []
    for topic, rows in panels.items():
        lines = [f"{topic}:"]
        for row in rows:
            lines.append(f"  {row.name}")
            lines.append(_wrap(f"{row.text} {row.facts}", width, " " * 6))
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _format_boxes(panels: dict[str, list[Row]], width: int) -> str:
    """Return the panels as boxes; the help texts of all panels start in one column."""
    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    drawn = io.StringIO()
    console = Console(file=drawn, width=width, force_terminal=sys.stdout.isatty())
    longest = max(len(row.name) for rows in panels.values() for row in rows)
    for topic, rows in panels.items():
        table = Table.grid(padding=(0, 2), expand=True)
        table.add_column(width=min(longest, width // 3))
        table.add_column(ratio=1)
        for row in rows:
            text = Text.assemble(row.text, " " * bool(row.text), (row.facts, "dim"))
            table.add_row(Text(row.name, "bold cyan"), text)
        console.print(Panel(table, title=Text(topic, "bold"), title_align="left"))
    return drawn.getvalue().rstrip("\n")
