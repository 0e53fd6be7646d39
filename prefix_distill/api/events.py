"""Pass the progress of ranks to the process that started them, through files of JSON lines."""

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

from ..display import Outline, Phase, Reporter, close_phase, open_phase
from .observers import Observer

OFTEN = 0.2  # seconds between two reports of what is done of a phase


class EventObserver:
    """Writes what a rank reports to ``folder``.

    It is the rank's observer and its reporter, and the listener of its phases.
    """

    shares_streams = True

    def __init__(self, folder: Path):
        rank = os.environ["RANK"]
        self.file = folder / f"events-{rank}.jsonl"
        self.first = rank == "0"
        self.told = 0.0

    # A listener of phases

    def began(self, phase: Phase) -> None:
        values = (phase.name, phase.total, phase.unit, phase.at_stop)
        self._write_once("began", id(phase), *values)

    def moved(self, phase: Phase) -> None:
        now = time.monotonic()
        if now - self.told >= OFTEN:
            self.told = now
            self._write_once("moved", id(phase), phase.done, phase.begun)

    def ended(self, phase: Phase) -> None:
        self._write_once("ended", id(phase))

    # An observer and a reporter

    def note(self, text: str) -> None:
        self._write_once("note", text)

    def detail(self, text: str) -> None:
        self._write_once("detail", text)

    def warn(self, text: str) -> None:
        self._write_once("warn", text)

    @contextlib.contextmanager
    def watch(self, outline: Outline, stop: Callable[[], None]) -> Iterator[Reporter]:
        self._write_once("watch", dataclasses.asdict(outline))
        yield self

    @contextlib.contextmanager
    def watch_other_rank(self) -> Iterator[Reporter]:
        yield self

    def warn_on_this_rank(self, text: str) -> None:
        self._write("warn_on_this_rank", text)

    def row(self, row: dict[str, Any], useful: float, full: float) -> None:
        self._write_once("row", row, useful, full)

    def evaluation(self, row: dict[str, Any]) -> None:
        self._write_once("evaluation", row)

    def tail(self, row: dict[str, Any]) -> None:
        self._write_once("tail", row)

    def _write_once(self, kind: str, *values: object) -> None:
        """Write what all ranks report, from rank 0."""
        if self.first:
            self._write(kind, *values)

    def _write(self, kind: str, *values: object) -> None:
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps([kind, *values]) + "\n")


class RemotePhases:
    """Opens in this process the phases of another one."""

    def __init__(self) -> None:
        self.open: dict[int, Phase] = {}

    def receive(self, kind: str, number: int, *values: Any) -> None:
        """Receive an event of a phase, which ``number`` identifies."""
        if kind == "began":
            name, total, unit, at_stop = values
            opened = Phase(name, total, unit, at_stop=at_stop)
            self.open[number] = open_phase(opened)
        elif kind == "moved":
            done, begun = values
            self.open[number].set(done, begun)
        else:
            close_phase(self.open.pop(number))

    def close(self) -> None:
        """Close all phases, because the other process has ended."""
        while self.open:
            _, opened = self.open.popitem()
            close_phase(opened)


class Relay:
    """Passes the events in ``folder`` on to an observer. Use as a context manager.

    ``stop()`` asks the ranks to save their state and stop.
    """

    def __init__(self, folder: Path, observer: Observer, stop: Callable[[], None]):
        self.folder = folder
        self.observer = observer
        self.stop = stop
        self.offsets: dict[Path, int] = {}
        self.watching = contextlib.ExitStack()
        self.reporter: Reporter | None = None
        self.phases = RemotePhases()
        self.watching.callback(self.phases.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.watching.__exit__(kind, error, trace)

    def pass_on(self) -> None:
        """Pass on all events that were written since the last call."""
        for file in sorted(self.folder.glob("events-*.jsonl")):
            with open(file, "rb") as events:
                events.seek(self.offsets.get(file, 0))
                # a line that is still being written waits for the next call
                complete = events.read().rpartition(b"\n")
            for line in complete[0].splitlines():
                self._dispatch(*json.loads(line))
            self.offsets[file] = self.offsets.get(file, 0) + len(complete[0] + complete[1])

    def _dispatch(self, kind: str, *values: object) -> None:
        if kind in ("began", "moved", "ended"):
            number, *rest = values
            self.phases.receive(kind, cast(int, number), *rest)
        elif kind == "watch":
            (outline,) = values
            watched = self.observer.watch(Outline(**cast(dict[str, Any], outline)), self.stop)
            self.reporter = self.watching.enter_context(watched)
        elif self.reporter is not None:
            getattr(self.reporter, kind)(*values)
        elif kind == "warn_on_this_rank":
            self.observer.warn(str(values[0]))
        else:
            getattr(self.observer, kind)(*values)
