"""A thread that looks at regular times, and at once when the process receives a signal.

Python runs a signal handler in the main thread, after the operation in progress: a matrix product
or an answer of the network may take seconds. The system's own handler writes the signal to a
socket at once, and this thread reads it there.
"""

import contextlib
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Protocol, Self


class Watcher(Protocol):
    """What the thread calls."""

    def look(self) -> None:
        """Look at what has changed."""

    def answer_signal(self, number: int) -> None:
        """Answer a signal that the process has received."""


class Wakeup:
    """Calls a watcher every ``tick`` seconds, and at signals. Use as a context manager.

    Signals are only seen if it begins in the main thread.
    """

    def __init__(self, watcher: Watcher, tick: float):
        self.watcher = watcher
        self.tick = tick
        self.ended = threading.Event()
        self.lock = threading.RLock()
        self.later: list[tuple[float, Callable[[], None]]] = []
        self.reader, self.writer = socket.socketpair()
        self.former: int | None = None
        self.thread = threading.Thread(target=self._run, name="display", daemon=True)

    def __enter__(self) -> Self:
        self.reader.setblocking(False)
        self.writer.setblocking(False)
        if threading.current_thread() is threading.main_thread():
            self.former = signal.set_wakeup_fd(self.writer.fileno(), warn_on_full_buffer=False)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.former is not None:
            signal.set_wakeup_fd(self.former)
        self.ended.set()
        with contextlib.suppress(OSError):
            self.writer.send(b"\0")
        self.thread.join(1)
        self.reader.close()
        self.writer.close()

    def answer_signals(self) -> None:
        """Answer the signals that were received by now."""
        with self.lock, contextlib.suppress(BlockingIOError):
            for number in self.reader.recv(64).replace(b"\0", b""):
                self.watcher.answer_signal(number)

    def call_later(self, seconds: float, function: Callable[[], None]) -> None:
        """Call a function in the thread after some seconds, unless the thread ends before."""
        self.later.append((time.monotonic() + seconds, function))

    def _run(self) -> None:
        while not self.ended.is_set():
            # The program goes on, whatever happens to its display.
            with contextlib.suppress(Exception):
                self._turn()

    def _turn(self) -> None:
        ready, _, _ = select.select([self.reader], [], [], self.tick)
        if self.ended.is_set():
            return
        if ready:
            self.answer_signals()
        now = time.monotonic()
        due = [entry for entry in self.later if entry[0] <= now]
        for entry in due:
            self.later.remove(entry)
            entry[1]()
        self.watcher.look()
