"""Catch the signals that ask a program to stop: by the user, the system or a batch system."""

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

# Batch systems warn a job before its time ends: slurm and PBS with SIGUSR1, Grid Engine and
# submitit with SIGUSR2, a limit on CPU time with SIGXCPU. Ctrl-Break is Windows' SIGTERM. No system
# has all of them.
STOP_SIGNALS = (
    "SIGINT",
    "SIGTERM",
    "SIGHUP",
    "SIGUSR1",
    "SIGUSR2",
    "SIGXCPU",
    "SIGBREAK",
)


def find_stop_signals() -> list[signal.Signals]:
    """Return the signals of STOP_SIGNALS that this system has."""
    return [signal.Signals[name] for name in STOP_SIGNALS if name in signal.Signals.__members__]


class SignalCatcher:
    """Calls ``receive`` at a stop signal, from ``with`` until ``release``.

    A signal that was ignored before (nohup) stays ignored. Python allows signal handlers in the
    main thread alone; elsewhere nothing is caught.
    """

    def __init__(self) -> None:
        self.former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self.former = {}
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in find_stop_signals():
            if signal.getsignal(number) is not signal.SIG_IGN:
                self.former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self, *, keep: signal.Signals | None = None) -> None:
        """Restore the former handlers, except that of ``keep``."""
        for number, handler in self.former.items():
            if number != keep:
                # None: the former handler was not set by Python and cannot be set again
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.receive(signal.Signals(number))

    def receive(self, number: signal.Signals) -> None:
        """Handle one signal; subclasses define it."""
        raise NotImplementedError


IMPORT = "<frozen importlib._bootstrap>"  # the file of the functions that import a module


def is_importing(frame: FrameType | None) -> bool:
    """Return whether a module is being imported by a frame or by what has called it."""
    while frame is not None:
        if frame.f_code.co_filename == IMPORT:
            return True
        frame = frame.f_back
    return False


class ImportGuard:
    """Calls ``end`` at Ctrl-C while a module is imported; otherwise Ctrl-C has its usual effect.

    ``end`` must end the process. A KeyboardInterrupt during an import leaves half of a module
    behind, which cannot be imported again, and torch drops it. Outside the main thread, and where
    a caller has set a handler or ignores SIGINT, nothing changes.
    """

    def __init__(self, end: Callable[[], object]):
        self.end = end
        self.former: Any = None

    def __enter__(self) -> Self:
        former = signal.getsignal(signal.SIGINT)
        is_usual = former is signal.default_int_handler
        is_guard = isinstance(getattr(former, "__self__", None), ImportGuard)
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and (is_usual or is_guard):
            self.former = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self.former is not None:
            signal.signal(signal.SIGINT, self.former)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if is_importing(frame):
            self.end()
        raise KeyboardInterrupt


def is_repeated(number: int) -> bool:
    """Return whether the system repeats a signal: SIGXCPU comes every second of CPU time."""
    return number == getattr(signal, "SIGXCPU", None)


class Interrupt(SignalCatcher):
    """Turns the first stop signal into a request, stored in ``received``.

    A second signal has its usual effect, except that a repeated SIGXCPU changes nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.received: signal.Signals | None = None

    def __enter__(self) -> Self:
        super().__enter__()
        _requests.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        if self.received is None:
            _requests.remove(self)

    def ask(self, number: signal.Signals = signal.SIGINT) -> None:
        """Request a stop without a signal, as ``number`` would; a further request has no effect."""
        if self.received is None:
            self.received = number

    def receive(self, number: signal.Signals) -> None:
        """Store the first signal, and restore the former handlers for a second one."""
        self.received = number
        keep = None
        if is_repeated(number):
            keep = number
        self.release(keep=keep)


# Of this process, the newest last. One that was received stays, so that the launcher's copy of the
# signal, which may arrive later, has no effect.
_requests: list[Interrupt] = []


def pass_on(number: signal.Signals) -> None:
    """Give this process a signal that its launcher received.

    Batch systems send a signal to every process of a job. A process that also received it directly
    must not count it twice, so it becomes a request. Before the run the signal has its usual
    effect on the main thread. ``os.kill`` would end a process on Windows at any signal.
    """
    if _requests:
        _requests[-1].ask(number)
        return
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, number)
    else:
        signal.raise_signal(number)
