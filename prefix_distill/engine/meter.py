"""Meter: the seconds and the FLOPs of a piece of work."""

import contextlib

from ..maths.flops import Ledger
from .device import Clock


class Meter:
    """A clock and a ledger.

    The clock sums seconds by phase, the ledger sums FLOPs by phase.
    """

    def __init__(self, clock: Clock, ledger: Ledger | None = None):
        self.clock = clock
        self.ledger = Ledger() if ledger is None else ledger

    def phase(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Add the seconds of the ``with`` block to phase ``name``."""
        return self.clock.phase(name)

    def attempt(self) -> "Meter":
        """Return a meter with the same clock and an empty ledger, for work that may fail."""
        return Meter(self.clock)

    def accept(self, attempt: "Meter") -> None:
        """Count the FLOPs of an attempt that succeeded as useful."""
        self.ledger.merge(attempt.ledger)

    def reject(self, attempt: "Meter") -> None:
        """Count the FLOPs of an attempt that ran out of memory as executed, not as useful."""
        self.ledger.waste(attempt.ledger)
