"""Receive the progress of a call: notes, warnings, and the reports of a training run."""

import contextlib
import logging
import reprlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from .. import display
from ..display import Outline, Reporter, accuracy_text
from ..errors import Interrupted, UserError

OnStep = Callable[[dict[str, Any]], object]
log = logging.getLogger("prefix_distill")
# without a handler, Python would print warnings to stderr
log.addHandler(logging.NullHandler())


class Observer(display.Observer, Protocol):
    """An observer that may watch ranks in other processes."""

    @property
    def shares_streams(self) -> bool:
        """Return whether started ranks write to the stdout and stderr of this process."""


class LogObserver:
    """Sends notes and warnings to the logger "prefix_distill", and metrics rows to ``on_step``.

    If ``on_step`` raises or exits, the run saves its state and stops after the current step; then
    the exception is raised. UserError: ``on_step`` is not callable.
    """

    shares_streams = False

    def __init__(self, on_step: OnStep | None = None):
        if on_step is not None and not callable(on_step):
            raise UserError(
                f"on_step: expected a function of a metrics row, got {reprlib.repr(on_step)}; "
                "pass a function or omit it"
            )
        self.on_step = on_step

    def note(self, text: str) -> None:
        log.info(text)

    detail = note

    def warn(self, text: str) -> None:
        log.warning(text)

    @contextlib.contextmanager
    def watch(self, outline: Outline, stop: Callable[[], None]) -> Iterator[Reporter]:
        if self.on_step is None:
            yield _LogReporter()
            return
        reporter = _StepReporter(self.on_step, outline.label.removesuffix(":"), stop)
        try:
            yield reporter
        except Interrupted as interrupted:
            if reporter.failure is None:
                raise
            reporter.failure.add_note(str(interrupted))
        if reporter.failure is not None:
            raise reporter.failure

    @contextlib.contextmanager
    def watch_other_rank(self) -> Iterator[Reporter]:
        yield _LogReporter()


class _LogReporter:
    """Sends notes, warnings and evaluations to the logger."""

    def note(self, text: str) -> None:
        log.info(text)

    detail = note

    def warn(self, text: str) -> None:
        log.warning(text)

    warn_on_this_rank = warn

    def row(self, row: dict[str, Any], useful: float, full: float) -> None:
        """Log nothing: there is a row for every step."""

    def evaluation(self, row: dict[str, Any]) -> None:
        log.info(f"after step {row['step']}: accuracy {accuracy_text(row['accuracy'])}")

    def tail(self, row: dict[str, Any]) -> None:
        log.info(f"tail probe after step {row['step']}: {row['finish_rate']:.0%} finished")


class _StepReporter(_LogReporter):
    """Passes metrics rows to ``on_step``.

    ``failure``: what ``on_step`` raised; it is not called again after that.
    """

    def __init__(self, on_step: OnStep, label: str, stop: Callable[[], None]):
        self.on_step = on_step
        self.label = label
        self.stop = stop
        self.failure: BaseException | None = None

    def row(self, row: dict[str, Any], useful: float, full: float) -> None:
        if self.failure is not None:
            return
        labelled = {"run": self.label, **row} if self.label else dict(row)
        try:
            self.on_step(labelled)
        except BaseException as error:  # sys.exit and Ctrl-C save the state, too
            self.failure = error
            self.stop()
