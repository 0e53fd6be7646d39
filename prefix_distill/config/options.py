"""Declare options: default, flag, help, limits and allowed values."""

import typing
from dataclasses import field
from typing import Literal, TypeVar

NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
T = TypeVar("T")


def option(default: T, flag: str, help: str, shown: str | None = None, **limits: float) -> T:
    """Declare a config field: its flag, help text (with the unit), shown default and limits.

    ``low`` and ``high`` are inclusive limits; ``above`` is an exclusive lower limit. A ``Literal``
    type lists the allowed values of an option.
    """
    return field(default=default, metadata={"flag": flag, "help": help, "shown": shown, **limits})


def choices(kind: object) -> tuple[str, ...]:
    """Return the values of a ``Literal`` type; an empty tuple for any other type."""
    return typing.get_args(kind) if typing.get_origin(kind) is Literal else ()


def value_type(kind: object) -> type:
    """Return the type of an option's values, without None: int, float, str or bool."""
    if choices(kind):
        return str
    if isinstance(kind, type):
        return kind
    declared: type = typing.get_args(kind)[0]
    return declared
