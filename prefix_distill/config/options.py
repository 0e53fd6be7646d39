"""How an option is declared: its default, flag, help and limits, and what its type allows."""

import typing
from dataclasses import field
from typing import Literal, TypeVar

NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
T = TypeVar("T")


def option(default: T, flag: str, help: str, shown: str | None = None, **limits: float) -> T:
    """Declare a config field: its flag, its help (with the unit), its default in words, its limits.

    ``low`` and ``high`` are the smallest and the largest number; every number exceeds ``above``.
    A ``Literal`` type lists the only values of an option.
    """
    return field(default=default, metadata={"flag": flag, "help": help, "shown": shown, **limits})


def choices(kind: object) -> tuple[str, ...]:
    """Return the values that the type of an option lists; empty when it is no ``Literal``."""
    return typing.get_args(kind) if typing.get_origin(kind) is Literal else ()


def value_type(kind: object) -> type:
    """Return int, float, str or bool: the type of an option, without None."""
    if choices(kind):
        return str
    if isinstance(kind, type):
        return kind
    declared: type = typing.get_args(kind)[0]
    return declared
