"""Declare options: default, flag, help, limits and allowed values."""

import typing
from collections.abc import Mapping
from dataclasses import Field, field
from typing import Any, Literal, TypeVar

NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
LIMITS = {"low": "at least", "above": "above", "high": "at most", "below": "below"}
# the shown default of an option that has none: a run chooses its value; users may write it, too
AUTO: Literal["auto"] = "auto"
T = TypeVar("T")


def option(default: T, flag: str, help: str, shown: str | None = None, **limits: float) -> T:
    """Declare a config field: its flag, help text (with the unit), shown default and limits.

    ``low`` and ``high`` are inclusive limits; ``above`` and ``below`` are exclusive ones. A
    ``Literal`` type lists the allowed values of an option.
    """
    return field(
        default=default,
        metadata={"flag": flag, "help": help, "shown": shown, "main": False, **limits},
    )


def main_option(default: T, flag: str, help: str, shown: str | None = None, **limits: float) -> T:
    """Declare an option that ``--help`` shows first, among the ones that most users set."""
    return field(
        default=default,
        metadata={"flag": flag, "help": help, "shown": shown, "main": True, **limits},
    )


def choices(kind: object) -> tuple[str, ...]:
    """Return the values of a ``Literal`` type; an empty tuple for any other type."""
    if typing.get_origin(kind) is not Literal:
        return ()
    return typing.get_args(kind)


def value_type(kind: object) -> type:
    """Return the type of an option's values, without None: int, float, str or bool."""
    if choices(kind):
        return str
    if isinstance(kind, type):
        return kind
    declared: type = typing.get_args(kind)[0]
    return declared


def is_automatic(declared: Field[Any]) -> bool:
    """Return whether ``auto`` stands for the option's default None: its value is then chosen."""
    return declared.default is None and declared.metadata["shown"] == AUTO


def describe_type(declared: Field[Any]) -> str:
    """Return what an option's value must be, in words: "a whole number", "a number or auto"."""
    name = NAMES[value_type(declared.type)]
    if is_automatic(declared):
        return f"{name} or {AUTO}"
    return name


def describe_limits(metadata: Mapping[str, Any]) -> str:
    """Return the limits of an option in words, such as "above 0 and at most 1"."""
    return " and ".join(f"{LIMITS[name]} {metadata[name]}" for name in LIMITS if name in metadata)


def describe_default(declared: Field[Any]) -> str:
    """Return the default of an option in words, as ``--help`` shows it."""
    shown: str | None = declared.metadata["shown"]
    if shown is not None:
        return shown
    if declared.default is None:
        return "none"
    if declared.default is False:
        return "off"
    return str(declared.default)
