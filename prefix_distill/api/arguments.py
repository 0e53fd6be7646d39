"""Check the types of the functions' arguments, before anything is read or written."""

import numbers
import os
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from .. import config as configuration
from ..config.access import SECTIONS
from ..config.options import NAMES
from ..errors import UserError

T = TypeVar("T")


def plain_value(value: object) -> object:
    """Return a path as text and another package's number as Python's; others unchanged."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, bool) or type(value) in (int, float):
        return value
    if isinstance(value, numbers.Integral):  # numpy.int64
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    return value


def read_path(name: str, value: object) -> str:
    """Return a path as text. UserError: it is empty, or neither text nor a path."""
    text = value
    if isinstance(value, os.PathLike):
        text = os.fspath(value)
    if not isinstance(text, str):
        raise _wrong(name, "a path", value, advice="pass text or a pathlib.Path")
    if not text.strip():
        raise _wrong(name, "the name of a file or folder", value, advice="name one")
    return text


def read_folder(name: str, value: object) -> Path:
    """Return a folder's path. UserError: it is empty, or neither text nor a path."""
    return Path(read_path(name, value))


def read_folders(name: str, values: object) -> list[Path]:
    """Return the paths in a list. UserError: it is no list, is empty, or holds something else."""
    if isinstance(values, str | bytes | os.PathLike) or not isinstance(values, Iterable):
        raise _wrong(
            name, "a list of folders", values, advice="put them in a list, as in ['runs/first']"
        )
    folders = [read_folder(name, value) for value in values]
    if not folders:
        raise _wrong(name, "at least one folder", [], advice="name the folders of finished runs")
    return folders


def read_value(name: str, value: object, kind: type[T]) -> T:
    """Return an int, float, bool or str, with other packages' numbers as Python's.

    UserError: the value has another type.
    """
    plain = plain_value(value)
    if kind is float and type(plain) is int:
        plain = float(plain)
    if type(plain) is not kind:
        expected = NAMES[kind]
        raise _wrong(name, expected, value, advice=f"pass {expected}")
    return plain


def read_prefixes(value: object) -> str | None:
    """Return prefixes as text with commas. UserError: they are neither text nor a list."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bytes) or not isinstance(value, Iterable):
        raise _wrong(
            "prefixes", "a list of prefixes", value, advice="pass a list, as in [64, '25%']"
        )
    return ",".join(map(str, value))


def read_config(value: object) -> configuration.Config | None:
    """Return a config. UserError: it or one of its sections is something else."""
    if value is None:
        return None
    advice = "build one with Config.from_options or Config.from_yaml"
    if not isinstance(value, configuration.Config):
        raise _wrong("config", "a Config", value, advice=advice)
    for name, kind in SECTIONS.items():
        section = getattr(value, name)
        if not isinstance(section, kind):
            raise _wrong(f"config.{name}", kind.__name__, section, advice=advice)
    return value


def _wrong(name: str, expected: str, value: object, advice: str) -> UserError:
    return UserError(f"{name}: expected {expected}, got {reprlib.repr(value)}; {advice}")
