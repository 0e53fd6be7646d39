"""Phases: what a program is doing, told from any layer to whoever listens.

A layer writes ``with phase("evaluating", total=200, unit="answers") as p: … p.advance(8)``. As in
logging, no object is handed down: the listener of the process receives the phases. Without a
listener nothing happens. An exception in a listener does not reach the program.
"""

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Protocol

# what a run does at Ctrl-C, unless a phase says otherwise
FINISH_UPDATE = "finishing this update, then saving"


class Phase:
    """A piece of work that takes time.

    ``done`` of ``total`` units are done; ``total`` is None if it is not known. ``at_stop``: what a
    run does at Ctrl-C during this phase. ``ranks``: as many ranks share the work evenly, so that
    ``advance`` counts for all of them.
    """

    def __init__(
        self, name: str, total: int | None = None, unit: str = "", at_stop: str = "", ranks: int = 1
    ):
        self.name = name
        self.total = total
        self.unit = unit
        self.at_stop = at_stop
        self.ranks = ranks
        self.done = 0
        self.begun = 0.0  # units that are begun, in parts
        self.tells_parts = False  # whether it ever told what is begun
        self.skipped = 0  # units that took no time
        self.started = self.moved = time.monotonic()
        self.is_heard = False

    def advance(self, count: int = 1) -> None:
        """Count units as done."""
        self.set(self.done + count * self.ranks)

    def skip(self, count: int = 1) -> None:
        """Count units as done that took no time, for example in an earlier process."""
        self.skipped += count
        self.set(self.done + count)

    def set(self, done: int, begun: float = 0.0) -> None:
        """Set the number of units that are done, and the parts of those that are begun."""
        if self.total is not None:
            done = min(done, self.total)
        self.done = done
        self.begun = begun * self.ranks
        self.tells_parts = self.tells_parts or begun > 0
        self.moved = time.monotonic()
        if self.is_heard:
            _tell("moved", self)

    @property
    def seconds(self) -> float:
        """Return the seconds since the phase began."""
        return time.monotonic() - self.started

    @property
    def share(self) -> float | None:
        """Return the share of the work that is done; None unless it tells what is begun."""
        if not self.total or not self.tells_parts:
            return None
        return min(1.0, (self.done + self.begun) / self.total)

    @property
    def seconds_left(self) -> float | None:
        """Return the seconds that the rest takes at the speed so far; None if that is not known."""
        worked = self.done + self.begun - self.skipped
        if self.total is None or worked <= 0:
            return None
        rest = max(0.0, self.total - self.done - self.begun)
        expected = (self.moved - self.started) / worked * rest
        return max(0.0, expected - (time.monotonic() - self.moved))


class Listener(Protocol):
    """Receives the phases of the process."""

    def began(self, phase: Phase, /) -> None:
        """Receive a phase that has begun, inside those that are open."""

    def moved(self, phase: Phase, /) -> None:
        """Receive a phase of which more is done."""

    def ended(self, phase: Phase, /) -> None:
        """Receive a phase that has ended."""


_listener: Listener | None = None
_open: list[Phase] = []
_newest = Phase("")  # the phase that has ended last
_lock = threading.RLock()


@contextlib.contextmanager
def listening(listener: Listener | None) -> Iterator[None]:
    """Send the phases of this process to ``listener`` during the ``with`` block."""
    global _listener
    former, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = former


def _tell(event: str, phase: Phase) -> None:
    listener = _listener
    if listener is None:
        return
    with contextlib.suppress(Exception):
        getattr(listener, event)(phase)


@contextlib.contextmanager
def phase(
    name: str, total: int | None = None, unit: str = "", at_stop: str = "", ranks: int = 1
) -> Iterator[Phase]:
    """Open a phase for the ``with`` block, or for a function as its decorator; see `Phase`."""
    opened = open_phase(Phase(name, total=total, unit=unit, at_stop=at_stop, ranks=ranks))
    try:
        yield opened
    finally:
        close_phase(opened)


def open_phase(opened: Phase) -> Phase:
    """Open a phase until ``close_phase``; one that has just ended is continued."""
    if _listener is not None:
        with _lock:
            if opened.total is None and opened.name == _newest.name:
                opened.started = _newest.started
            _open.append(opened)
        opened.is_heard = True
        _tell("began", opened)
    return opened


def close_phase(opened: Phase) -> None:
    """Close a phase; it is still open when its end is told."""
    global _newest
    if not opened.is_heard:
        return
    _tell("ended", opened)
    opened.is_heard = False
    with _lock:
        if opened in _open:
            _open.remove(opened)
        _newest = opened


def find_phase(unit: str) -> Phase:
    """Return the innermost open phase if it counts ``unit``; else a new one that no one sees."""
    with _lock:
        if _open and _open[-1].unit == unit:
            return _open[-1]
    return Phase("", unit=unit)


def list_phases() -> list[Phase]:
    """Return the open phases, the innermost last."""
    with _lock:
        return list(_open)


def forget_phases() -> None:
    """Close all phases without a word, in a process that is a copy of another."""
    global _listener
    _listener = None
    _open.clear()
