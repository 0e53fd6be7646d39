"""Cut long work off when the run is asked to stop, on all ranks together.

A rank leaves the work at once, but not the collective that follows it: there all ranks learn that
one of them was cut off, and leave together.
"""

import contextlib
import signal
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TypeVar

from ..errors import GraderError
from ..signals import Interrupt
from .ranks import Place

T = TypeVar("T")

_interrupt: ContextVar[Interrupt | None] = ContextVar("interrupt", default=None)


class CutOff(Exception):
    """Work was left unfinished, because a signal asked the run to stop."""

    def __init__(self, number: signal.Signals):
        # an exception that ranks exchange is made again from its arguments
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def cutting_off(interrupt: Interrupt) -> Iterator[None]:
    """Let ``interrupt`` cut off what is done in the ``with`` block."""
    token = _interrupt.set(interrupt)
    try:
        yield
    finally:
        _interrupt.reset(token)


def look() -> None:
    """Raise CutOff if the work in progress may be cut off and was asked to stop."""
    interrupt = _interrupt.get()
    if interrupt is not None and interrupt.received is not None:
        raise CutOff(interrupt.received)


def gather_results(place: Place, work: Callable[[], T]) -> list[T]:
    """Do this rank's ``work`` and return the results of all ranks, in their order.

    CutOff or GraderError, on all ranks: the work of one of them was cut off, or its grader failed.
    """
    results: list[T] = []
    ended: CutOff | GraderError | None = None
    try:
        results.append(work())
    except (CutOff, GraderError) as error:
        ended = error
    gathered: list[T] = []
    first = None
    for other_end, other_results in place.gather((ended, results)):
        first = first or other_end  # the same on every rank
        gathered += other_results
    if first is not None:
        raise first
    return gathered
