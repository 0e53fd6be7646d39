"""Choose the columns of a dataset by their names and, where names are shared, by their values."""

import re
from dataclasses import dataclass, replace
from datetime import date, time, timedelta
from decimal import Decimal
from types import NoneType
from typing import Any

from .names import (
    ANSWER_COLUMNS,
    CONTEXTS,
    OPTION_ANSWER_COLUMNS,
    OPTION_COLUMNS,
    RIGHT_OPTION_COLUMNS,
    SYSTEM_COLUMNS,
    TOOL_COLUMNS,
)
from .options import (
    find_option_columns,
    find_wrong_columns,
    gather_options,
    is_option,
    read_options,
)
from .presets import Preset
from .readers import Row
from .turns import SPEAKERS, read_tools

_PLAIN = (str, bytes, int, float, list, dict, date, time, timedelta, Decimal, NoneType)
_MEDIA = re.compile(r"(image|images|img|picture|pictures|video|videos|audio|audios)(_?\d+)?")


@dataclass(frozen=True, kw_only=True)
class Companions:
    """The columns that belong to the prompt although they are not its column.

    - ``context``: text beside the question; ``context_first``: whether it comes before it.
    - ``unread``: columns that belong to the question but cannot be read, and what they should be.
    - ``options``: the columns with the options of a multiple-choice question: one that lists all
      of them, or one for each option; ``wrong``: the columns of the wrong options, if the column
      of the answer holds the right one.
    - ``system``: the text of the system message.
    - ``tools``: the tools that an assistant may call, as JSON schemas.
    - ``media``: images, video and sound, which the models cannot read.
    """

    context: str | None = None
    context_first: bool = False
    unread: tuple[tuple[str, str], ...] = ()
    options: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()
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


def choose_filled(row: Row, usual: tuple[str, ...]) -> str | None:
    """Return the first ``usual`` column with a value; else the first one that ``row`` has."""
    filled = {name: value for name, value in row.items() if value not in (None, "", [])}
    return choose_column(filled, usual) or choose_column(row, usual)


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


def describe_single_message(row: Row, prompt: str) -> str | None:
    """Return what is wrong if each row is one message of a conversation, else None."""
    role = choose_column(row, ("role", "from"))
    if role is None or not isinstance(row[prompt], str) or str(row[role]).lower() not in SPEAKERS:
        return None
    return (
        f"each row is one message ('{prompt}' with '{role}' {str(row[role])[:20]!r}), expected "
        "whole conversations; join the messages of each one in a column 'messages'"
    )


def match_name(row: Row, name: str) -> str:
    """Return the column of that name in any case; the name itself if there is none."""
    return choose_column(row, (name,)) or name


def preset_companions(row: Row, preset: Preset | None) -> Companions:
    """Return the columns that a preset names, or media alone without preset."""
    companions = Companions(media=find_media(row))
    if preset is None:
        return companions
    options: tuple[str, ...] = ()
    if preset.options is not None:
        options = (match_name(row, preset.options),)
    wrong = tuple(match_name(row, name) for name in preset.wrong)
    return replace(companions, options=options, wrong=wrong)


def usual_answers(companions: Companions) -> tuple[str, ...]:
    """Return the usual names of the answer's column beside these columns."""
    if companions.wrong:
        return RIGHT_OPTION_COLUMNS
    if companions.options:
        return OPTION_ANSWER_COLUMNS
    return ANSWER_COLUMNS


def find_companions(row: Row, prompt: str, template: str | None) -> Companions:
    """Return the columns that belong to the detected column ``prompt``.

    Columns that the prompt template names are left to it.
    """
    free = {name: value for name, value in row.items() if f"{{{name}}}" not in (template or "")}
    context, context_first, unread = None, False, []
    if prompt.lower() in CONTEXTS:
        names, context_first = CONTEXTS[prompt.lower()]
        context = choose_column(free, names)
        if context is not None and free[context] is not None and text_of(free[context]) is None:
            unread.append((context, "text"))
            context = None
    wrong = find_wrong_columns(free)
    if choose_column(row, RIGHT_OPTION_COLUMNS) is None:
        wrong = ()
    options: tuple[str, ...] = ()
    if not wrong and isinstance(row.get(prompt), str):  # turns have the options in their texts
        options = _find_options(free)
        listed = choose_column(free, OPTION_COLUMNS)
        if listed is not None and not options and free[listed] not in (None, "", []):
            unread.append((listed, "a list of options"))
    system = choose_column(free, SYSTEM_COLUMNS)
    if system is not None and not isinstance(free[system], str | None):
        system = None
    tools = choose_column(free, TOOL_COLUMNS)
    if tools is not None and read_tools(free[tools]) is None:
        tools = None
    return Companions(
        context=context,
        context_first=context_first,
        unread=tuple(unread),
        options=options,
        wrong=wrong,
        system=system,
        tools=tools,
        media=find_media(row),
    )


def _find_options(row: Row) -> tuple[str, ...]:
    """Return the column that lists the options, or the columns of one option each."""
    listed = choose_column(row, OPTION_COLUMNS)
    if listed is not None and read_options(row[listed]) is not None:
        return (listed,)
    columns = find_option_columns(row)
    answer = choose_column(row, OPTION_ANSWER_COLUMNS)
    # other columns may have such names, as the sides a, b and c of a triangle
    if answer is None or not is_option(row[answer], gather_options(row, columns)):
        return ()
    return columns


def text_of(value: Any) -> str | None:
    """Return text, a number, or a list of texts as one text; None for anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return "\n\n".join(value)
    return None


def find_media(row: Row) -> tuple[str, ...]:
    """Return the columns of images, video and sound."""
    names = []
    for name, value in row.items():
        is_file = isinstance(value, dict) and value.keys() == {"bytes", "path"}
        is_decoded = not isinstance(value, _PLAIN)  # an image or a sound of the datasets library
        if is_file or is_decoded or _MEDIA.fullmatch(name.lower()):
            names.append(name)
    return tuple(names)
