"""Receive the progress of runs: the protocols, and the observer that shows it on stderr."""

import contextlib
import signal
from collections.abc import Callable, Collection, Iterator
from types import TracebackType
from typing import Protocol, Self

from .lines import is_verbose, print_line
from .pace import Outline
from .screen import Screen
from .training import Display


class Reporter(Protocol):
    """Receives the progress of a training run; every rank calls its reporter at the same points.

    The parameters are positional-only, so that an implementation may rename or combine them.
    """

    def note(self, text: str, /) -> None:
        """Show a progress note."""

    def detail(self, text: str, /) -> None:
        """Show a note for developers: with --verbose, or in a log."""

    def warn(self, text: str, /) -> None:
        """Show a warning that every rank reports."""

    def warn_on_this_rank(self, text: str, /) -> None:
        """Show a warning that only this rank reports."""

    def row(self, row: dict, useful: float, full: float, /) -> None:
        """Show one step: its metrics row and the useful FLOPs so far.

        ``full``: the useful FLOPs that as many steps with full rollouts would take.
        """

    def evaluation(self, row: dict, /) -> None:
        """Show one evaluation: its row in ``Progress.evaluations``."""

    def tail(self, row: dict, /) -> None:
        """Show one tail probe: its row in ``Progress.tail_probes``."""


class Observer(Protocol):
    """Receives the progress of a call that may train several runs.

    The parameters are positional-only, so that an implementation may rename them.
    """

    def note(self, text: str, /) -> None:
        """Receive a progress note."""

    def detail(self, text: str, /) -> None:
        """Receive a note for developers."""

    def warn(self, text: str, /) -> None:
        """Receive a warning."""

    def watch(
        self, outline: Outline, stop: Callable[[], None], /
    ) -> contextlib.AbstractContextManager[Reporter]:
        """Return the reporter of rank 0 for the run that ``outline`` describes.

        ``stop()`` asks the run to save its state and stop after the current step.
        """

    def watch_other_rank(self) -> contextlib.AbstractContextManager[Reporter]:
        """Return the reporter of any rank but rank 0."""


class Terminal:
    """An observer that shows progress on stderr.

    As a context manager it shows the phases of the process, whether a run trains or not, unless
    ``is_shown`` is False. ``stop_signals``: the signals that are answered on stderr.
    """

    def __init__(
        self, is_shown: bool = True, stop_signals: Collection[int] = (signal.SIGINT,)
    ) -> None:
        self.screen = Screen(stop_signals)
        self.is_shown = is_shown

    def __enter__(self) -> Self:
        if self.is_shown:
            self.screen.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.is_shown:
            self.screen.__exit__(kind, error, trace)

    def note(self, text: str) -> None:
        """Print a progress note."""
        print_line(text)

    def detail(self, text: str) -> None:
        """Print a note for developers, with --verbose."""
        if is_verbose():
            self.note(text)

    def warn(self, text: str) -> None:
        """Print a warning."""
        self.note(f"warning: {text}")

    @contextlib.contextmanager
    def watch(self, outline: Outline, stop: Callable[[], None]) -> Iterator[Reporter]:
        """Show the progress of a run; Ctrl-C stops it, so ``stop`` is not needed."""
        with Display(outline, self.screen) as shown:
            yield shown

    @contextlib.contextmanager
    def watch_other_rank(self) -> Iterator[Reporter]:
        """Show this rank's own warnings."""
        yield RankWarnings()


class RankWarnings:
    """Shows nothing but the warnings that only this rank reports: a ``Reporter``."""

    def warn_on_this_rank(self, text: str) -> None:
        """Print a warning."""
        print_line(f"warning: {text}")

    def note(self, text: str) -> None:
        """Show nothing: rank 0 shows it."""

    def detail(self, text: str) -> None:
        """Show nothing: rank 0 shows it."""

    def warn(self, text: str) -> None:
        """Show nothing: rank 0 shows it."""

    def row(self, row: dict, useful: float, full: float) -> None:
        """Show nothing: rank 0 shows it."""

    def evaluation(self, row: dict) -> None:
        """Show nothing: rank 0 shows it."""

    def tail(self, row: dict) -> None:
        """Show nothing: rank 0 shows it."""
