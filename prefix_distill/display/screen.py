"""The screen of a command: one live line on a terminal, plain lines elsewhere.

A thread draws it, so that it changes while the program computes, loads or waits for a network. The
live line is erased before anything else is written to stderr, and drawn again below it.
"""

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Collection
from typing import Any, Protocol, Self, TextIO

from rich.cells import cell_len

from .columns import Column, fit_columns
from .lines import is_plain, print_line
from .pace import Pace
from .phases import FINISH_UPDATE, Phase, forget_phases, list_phases, listening
from .texts import elapsed_text, percent_text, time_text
from .wakeup import Wakeup
from .wrapping import measure_terminal

TICK = 0.2  # seconds between two looks at the live line; it is drawn if its text has changed
LOG_TICK = 1.0
LONG = 5.0  # seconds after which a log names a phase
EVERY = 30.0  # seconds between two lines of a log about one phase
SOON = 0.3  # seconds in which most commands end after Ctrl-C
STOPPING = "stopping"
PREPARING = "preparing"  # what happens between two runs, unless a phase says otherwise
RUNS = "runs"  # the unit of a phase that trains several runs
# phases of every step, which a log does not name
OF_A_STEP = ("sampling", "selecting tokens", "training")


class Shown(Protocol):
    """A run in progress."""

    pace: Pace

    def columns(self, phases: list[Phase], /) -> list[Column]:
        """Return the columns of the live line, with the open phases."""


class Screen:
    """Shows the phases of the process, and the run in progress. Use as a context manager.

    ``run``: the run whose steps are shown; ``stop_signals``: the signals that are answered.
    Contexts may be nested; the outermost one counts.
    """

    def __init__(self, stop_signals: Collection[int] = (signal.SIGINT,)) -> None:
        self.stop_signals = stop_signals
        self.lock = threading.RLock()
        self.depth = 0
        self.run: Shown | None = None
        self.stream: TextIO = sys.stderr
        self.is_live = False
        self.is_partial = False  # the last line written by others has not ended
        self.drawn = ""
        self.signals = 0
        self.reported: dict[Phase, float] = {}  # phase → when a log named it last
        self.leaving = contextlib.ExitStack()
        self.wakeup: Wakeup | None = None

    def __enter__(self) -> Self:
        self.depth += 1
        if self.depth == 1:
            self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self.depth -= 1
        if self.depth == 0:
            self.leaving.close()

    def show(self, run: Shown) -> None:
        """Show a run from now on."""
        self.run = run

    def hide(self) -> None:
        """Show no run any more; a signal that has just stopped it is answered first."""
        if self.wakeup is not None:
            self.wakeup.answer_signals()
        self.run = None

    def _start(self) -> None:
        self.stream = sys.stderr
        self.drawn, self.is_partial, self.signals = "", False, 0
        self.is_live = self.stream.isatty() and not is_plain()
        tick = LOG_TICK
        if self.is_live:
            tick = TICK
            sys.stderr = Guarded(self)
            self.leaving.callback(self._restore_stderr)
        self.leaving.callback(self._erase)
        self.leaving.enter_context(listening(self))
        self.wakeup = Wakeup(self, tick)
        self.leaving.enter_context(self.wakeup)
        _screens.append(self)
        self.leaving.callback(_screens.remove, self)

    def _restore_stderr(self) -> None:
        if isinstance(sys.stderr, Guarded):
            sys.stderr = self.stream

    # A listener of phases

    def began(self, phase: Phase) -> None:
        """Show a phase at the next look."""

    def moved(self, phase: Phase) -> None:
        """Show what is done at the next look."""

    def ended(self, phase: Phase) -> None:
        """Tell the run how long a phase has lasted; answer a signal that has just ended it."""
        if phase.at_stop and self.wakeup is not None:
            self.wakeup.answer_signals()
        self.reported.pop(phase, None)
        if self.run is not None:
            self.run.pace.end_phase(phase.name, phase.seconds)

    # What the thread calls

    def look(self) -> None:
        """Draw the live line, or print what a log should hold by now."""
        with self.lock:
            if self.is_live:
                self._draw()
            else:
                self._report()

    def answer_signal(self, number: int) -> None:
        """Say at once what a stop signal does to the run in progress."""
        if number not in self.stop_signals:
            return
        self.signals += 1
        if self.signals == 1 and self.run is not None:
            print_line(f"{self._stop_text()}; press again to stop now")
        elif self.wakeup is not None and number == signal.SIGINT:
            self.wakeup.call_later(SOON, self.say_stopping)

    def say_stopping(self) -> None:
        """Say that the command ends, if it has not ended yet."""
        print_line(STOPPING)

    def _stop_text(self) -> str:
        for phase in reversed(list_phases()):
            if phase.at_stop:
                return phase.at_stop
        return FINISH_UPDATE

    # The live line

    def _draw(self) -> None:
        if self.is_partial:
            return
        text = self.compose(measure_terminal(self.stream) - 1)
        if text != self.drawn:
            self._write(f"{self._erasing}{text}")
            self.drawn = text

    def compose(self, width: int) -> str:
        """Return the live line in ``width`` cells; "" if nothing is in progress."""
        phases = list_phases()
        columns: list[Column] = []
        if self.run is not None:
            columns = self.run.columns(phases)
        elif phases:
            columns = describe_phases(phases)
        if not columns:
            return ""
        return fit_columns(columns, width)

    @property
    def _erasing(self) -> str:
        """Return what erases the live line. Consoles of Windows may not know escape sequences."""
        if os.name == "nt":
            return f"\r{' ' * cell_len(self.drawn)}\r"
        return "\r\x1b[K"

    def _erase(self) -> None:
        with self.lock:
            if self.drawn:
                self._write(self._erasing)
                self.drawn = ""

    def _write(self, text: str) -> None:
        try:
            self.stream.write(text)
            self.stream.flush()
        except (OSError, ValueError):  # the terminal has closed
            self.is_live = False

    def pass_on(self, text: str) -> int:
        """Write the text of others to stderr, above the live line."""
        with self.lock:
            if self.drawn:
                text = f"{self._erasing}{text}"
                self.drawn = ""
            written = self.stream.write(text)
            self.is_partial = not text.endswith("\n")
            return written

    # A log

    def _report(self) -> None:
        """Name a phase once it has lasted LONG, and what is done of it from time to time."""
        phases = list_phases()
        if not phases or phases[-1].name in OF_A_STEP:
            return
        newest = phases[-1]
        seconds = newest.seconds
        if newest not in self.reported:
            is_due = seconds >= LONG
        else:
            is_due = seconds - self.reported[newest] >= EVERY
        if is_due:
            for phase in phases:
                self.reported[phase] = phase.seconds
            print_line(f"{describe_work(newest)}, {time_or_left(newest)}")


class Guarded(io.TextIOBase):
    """stderr while a live line is drawn: other writers erase it first."""

    def __init__(self, screen: Screen):
        self.screen = screen

    def write(self, text: str) -> int:
        return self.screen.pass_on(text)

    def flush(self) -> None:
        self.screen.stream.flush()

    def isatty(self) -> bool:
        return self.screen.stream.isatty()

    def fileno(self) -> int:
        return self.screen.stream.fileno()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.screen.stream, name)


def describe_work(phase: Phase) -> str:
    """Return a phase and what is done of it: "evaluating 64/200 answers (40%)"."""
    if phase.total is None:
        return phase.name
    text = f"{phase.name} {phase.done}/{phase.total} {phase.unit}".rstrip()
    if phase.share is None:
        return text
    return f"{text} ({percent_text(phase.share)})"


def describe_count(phase: Phase) -> str:
    """Return a phase and what is done of it in short: "evaluating 64/200", "evaluating 40%".

    Long answers end late, so their number stays 0 for a while, and the share moves.
    """
    if phase.total is None:
        return phase.name
    if phase.share is not None:
        return f"{phase.name} {percent_text(phase.share)}"
    return f"{phase.name} {phase.done}/{phase.total}"


def time_or_left(phase: Phase) -> str:
    """Return the time that a phase still takes, or how long it has lasted."""
    left = phase.seconds_left
    if left is None:
        return elapsed_text(phase.seconds)
    return f"{time_text(left)} left"


def describe_phases(phases: list[Phase]) -> list[Column]:
    """Return the columns for open phases, without a run: what, how much of it, how long."""
    columns = []
    newest = phases[-1]
    counted = [phase for phase in phases[:-1] if phase.total is not None]
    if counted:
        columns.append(Column(texts=(describe_number(counted[-1]),), rank=2))
    if newest.unit == RUNS:
        columns.append(Column(texts=(describe_number(newest),), rank=0))
        columns.append(Column(texts=(PREPARING,), rank=2))
    else:
        columns.append(Column(texts=(describe_work(newest), describe_count(newest)), rank=0))
    left = newest.seconds_left
    if left is not None:
        columns.append(Column(texts=(f"{time_text(left)} left",), rank=1))
    columns.append(Column(texts=(elapsed_text(newest.seconds),), rank=1))
    return columns


def describe_number(phase: Phase) -> str:
    """Return which unit of a phase is in progress: "run 3 of 6"."""
    number = min(phase.done + 1, phase.total or 1)
    return f"{phase.unit.removesuffix('s')} {number} of {phase.total}"


_screens: list[Screen] = []


def close_screens() -> None:
    """Erase the live line and draw none any more, before the process ends."""
    for screen in list(_screens):
        screen.leaving.close()


def _forget_screens() -> None:
    """Leave the terminal to the parent, in a process that is a copy of it."""
    for screen in _screens:
        screen.lock = threading.RLock()
        screen.is_live = False
        screen.drawn = ""
        if isinstance(sys.stderr, Guarded):
            sys.stderr = screen.stream
    _screens.clear()
    forget_phases()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_screens)
