"""Pass the progress of ranks to the process that started them, through files of JSON lines."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ..display import Reporter
from .observers import Observer


class EventObserver:
    """Writes what a rank reports to ``folder``; it is the rank's observer and its reporter."""

    shares_streams = True

    def __init__(self, folder: Path):
        rank = os.environ["RANK"]
        self.file = folder / f"events-{rank}.jsonl"
        self.first = rank == "0"

    def note(self, text: str) -> None:
        self._write_once("note", text)

    def warn(self, text: str) -> None:
        self._write_once("warn", text)

    @contextlib.contextmanager
    def watch(self, steps: int, label: str, stop: Callable[[], None]) -> Iterator[Reporter]:
        self._write_once("watch", steps, label)
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
        if kind == "watch":
            steps, label = values
            watched = self.observer.watch(int(str(steps)), str(label), self.stop)
            self.reporter = self.watching.enter_context(watched)
        elif self.reporter is not None:
            getattr(self.reporter, kind)(*values)
        elif kind == "warn_on_this_rank":
            self.observer.warn(str(values[0]))
        else:
            getattr(self.observer, kind)(*values)
