"""Choose the columns of a dataset by their names and, where names are shared, by their values."""

import re
from dataclasses import dataclass
from typing import Any

from .names import CONTEXTS, OPTION_COLUMNS, SYSTEM_COLUMNS, TOOL_COLUMNS
from .options import read_options
from .readers import Row
from .turns import read_tools

_MEDIA = re.compile(r"(image|images|img|picture|pictures|video|videos|audio|audios)(_?\d+)?")


@dataclass(frozen=True, kw_only=True)
class Companions:
    """The columns that belong to the prompt although they are not its column.

    - ``context``: text beside the question; ``context_first``: whether it comes before it.
    - ``options``: the options of a multiple-choice question.
    - ``system``: the text of the system message.
    - ``tools``: the tools that an assistant may call, as JSON schemas.
    - ``media``: images, video and sound, which the models cannot read.
    """

    context: str | None = None
    context_first: bool = False
    options: str | None = None
    system: str | None = None
    tools: str | None = None
    media: tuple[str, ...] = ()


def clean_names(row: Row) -> Row:
    """Return the row with column names without surrounding spaces.

    Raise ValueError, whose text continues "row 3 …", if two names are then equal.
    """
    if all(name == name.strip() for name in row):
        return row
    cleaned = {}
    for name, value in row.items():
        if name.strip() in cleaned:
            raise ValueError(f"has the column '{name.strip()}' twice, once with spaces around it")
        cleaned[name.strip()] = value
    return cleaned


def choose_column(row: Row, usual: tuple[str, ...]) -> str | None:
    """Return the first ``usual`` column that ``row`` has, in any case, or None."""
    lower = {name.lower(): name for name in reversed(row)}
    for column in usual:
        if column in row:
            return column
        first, dot, rest = column.partition(".")
        name = lower.get(first)
        if name is None:
            continue
        if not dot:
            return name
        if isinstance(row[name], dict) and rest in row[name]:
            return f"{name}.{rest}"
    return None


def reach(row: Any, column: str | None) -> Any:
    """Return the value of ``column`` or None; ``doc.question`` reads a nested record."""
    if column is None:
        return None
    if isinstance(row, dict) and column in row:
        return row[column]
    for key in column.split("."):
        if not isinstance(row, dict):
            return None
        row = row.get(key)
    return row


def find_companions(row: Row, prompt: str, template: str | None) -> Companions:
    """Return the columns that belong to the detected column ``prompt``.

    Columns that the prompt template names are left to it.
    """
    free = {name: value for name, value in row.items() if f"{{{name}}}" not in (template or "")}
    context, context_first = None, False
    if prompt.lower() in CONTEXTS:
        names, context_first = CONTEXTS[prompt.lower()]
        context = choose_column(free, names)
        if context is not None and not isinstance(free[context], str | None):
            context = None
    options = choose_column(free, OPTION_COLUMNS)
    if options is not None and read_options(free[options]) is None:
        options = None
    system = choose_column(free, SYSTEM_COLUMNS)
    if system is not None and not isinstance(free[system], str | None):
        system = None
    tools = choose_column(free, TOOL_COLUMNS)
    if tools is not None and read_tools(free[tools]) is None:
        tools = None
    return Companions(
        context=context,
        context_first=context_first,
        options=options,
        system=system,
        tools=tools,
        media=find_media(row),
    )


def find_media(row: Row) -> tuple[str, ...]:
    """Return the columns of images, video and sound."""
    names = []
    for name, value in row.items():
        is_file = isinstance(value, dict) and value.keys() == {"bytes", "path"}
        if is_file or _MEDIA.fullmatch(name.lower()):
            names.append(name)
    return tuple(names)
