"""Names that select a formula: the built-in ones and those that a user's module registers."""

import contextlib
import re
import traceback
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Generic, TypeVar

from ..errors import UserError

BUILT_IN = "prefix-distill"
PROGRAM = "this program"  # a script that registers without --plugin
NAME = re.compile(r"[a-z][a-z0-9-]{0,39}")

T = TypeVar("T")
_source: ContextVar[str] = ContextVar("source", default=PROGRAM)


@contextlib.contextmanager
def registering(source: str) -> Iterator[None]:
    """Attribute all registrations inside the context to ``source``."""
    token = _source.set(source)
    try:
        yield
    finally:
        _source.reset(token)


class Registry(Generic[T]):
    """Entries by name, and the source of each.

    ``what``: the entries' kind in words; ``reserved``: names that no entry may take.
    """

    def __init__(self, what: str, reserved: tuple[str, ...] = ()) -> None:
        self.what, self.reserved = what, reserved
        self._entries: dict[str, T] = {}
        self._sources: dict[str, str] = {}

    def add(self, name: str, entry: T) -> None:
        """Register ``entry`` under ``name``. UserError: the name is invalid or taken."""
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise UserError(
                f"{self.what} {name!r}: expected a name of at most 40 lower-case letters, digits "
                "and '-' that starts with a letter; rename it"
            )
        source = _source.get()
        taken = self._sources.get(name)
        if name in self.reserved:
            taken = BUILT_IN
        # a notebook may run the same cell again
        if taken is not None and not taken == source == PROGRAM:
            raise UserError(
                f"{self.what} '{name}': {taken} registers this name already; choose another name"
            )
        self._entries[name] = entry
        self._sources[name] = source

    def find(self, name: str) -> T | None:
        """Return the entry of ``name``; None if there is none."""
        return self._entries.get(name)

    def source(self, name: str) -> str:
        """Return who registered ``name``."""
        return self._sources[name]

    def entries_of(self, source: str) -> dict[str, T]:
        """Return the entries that ``source`` registered, by name."""
        entries = {}
        for name, entry in self._entries.items():
            if self._sources[name] == source:
                entries[name] = entry
        return entries

    def drop(self, source: str) -> None:
        """Forget everything that ``source`` registered."""
        for name in self.entries_of(source):
            del self._entries[name], self._sources[name]

    def names(self) -> tuple[str, ...]:
        """Return the names of all entries that are not built in."""
        return tuple(name for name, source in self._sources.items() if source != BUILT_IN)


def describe_error(error: BaseException, source: str) -> str:
    """Return ``SOURCE, line N: TYPE: message`` in one line, for an error in the file ``source``.

    N is the last line of the file that the traceback passes; left out if it passes none.
    """
    line = None
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename == source:
            line = frame.lineno
    if isinstance(error, SyntaxError) and error.filename == source:
        line = error.lineno
    where = source
    if line is not None:
        where = f"{source}, line {line}"
    message = " ".join(str(error).split())[:300]
    if isinstance(error, UserError):
        return f"{where}: {message}"
    return f"{where}: {type(error).__name__}: {message}"
