"""Exceptions that end a command; each message is one line: expected, got, what to do."""

import contextlib
import difflib
from collections.abc import Iterable, Iterator

CONTINUE = "continue with prefix-distill run --resume"
ABORTED = "aborted without saving; if the run has a checkpoint, --resume continues it"
INTERRUPTED = 130  # exit code after Ctrl-C: 128 + SIGINT
# what is true of another command that was aborted after it has begun to write
ABORTED_COMMANDS = {
    "compare": "aborted without saving; the same command continues the comparison",
    "demo": "aborted; start again with another --out",
    "probe": "aborted; its folder may be incomplete; start again with another --out",
    "report": "aborted; its folder may be incomplete; start again with another --out",
    "export": "aborted; remove its folder before you start it again",
}
NOTHING_WRITTEN = "aborted; nothing was written"


NEAR = 0.6  # least similarity of a name that an error suggests


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that ``name`` most likely misspells; None if none is near."""
    near = difflib.get_close_matches(name, known, 1, NEAR)
    return near[0] if near else None


def describe_abort(command: str, *, has_written: bool) -> str:
    """Return what is true of a command after it was aborted.

    ``has_written``: it has begun to write files, or that is not known.
    """
    if not has_written:
        return NOTHING_WRITTEN
    if command == "run":
        return ABORTED
    return ABORTED_COMMANDS.get(command, NOTHING_WRITTEN)


class _Explained(Exception):
    """An exception whose message says all that a user needs."""

    def _render_traceback_(self) -> list[str]:
        """Return what IPython and notebooks show in place of a traceback."""
        return [f"{type(self).__name__}: {self}"]


class UserError(_Explained):
    """Bad input. The command prints the message on one line and exits with code 2."""

    exit_code = 2


class PluginError(UserError):
    """A plugin's code failed, or returned something else than it should. Exit code 2."""


class GraderError(PluginError):
    """A user's grader failed, or returned something else than a score. Exit code 2."""


class PreflightError(UserError):
    """A check before the run failed: models, prompts and device are incompatible. Exit code 3.

    Each of them is valid by itself.
    """

    exit_code = 3


class Stopped(_Explained):
    """A run stopped with its files intact, at a non-finite loss for example. Exit code 1."""

    exit_code = 1


class MemoryShortage(Stopped):
    """The smallest piece of the work does not fit into a device's memory. Exit code 4."""

    exit_code = 4


class Interrupted(Stopped):
    """A signal stopped the run after it saved its state. Exit code: 128 + the signal's number."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.exit_code = 128 + number


@contextlib.contextmanager
def advising(advice: str) -> Iterator[None]:
    """Replace what the message of Interrupted advises, where another command goes on."""
    try:
        yield
    except Interrupted as interrupted:
        what = str(interrupted).partition(CONTINUE)[0]
        raise Interrupted(f"{what}{advice}", interrupted.exit_code - 128) from None


def ignore(text: str) -> None:
    """Report nothing."""


def one_line(error: BaseException, limit: int = 200) -> str:
    """Return the first ``limit`` characters of an exception's message, without line breaks."""
    return " ".join(str(error).split())[:limit]


def first_line(error: BaseException, limit: int = 200) -> str:
    """Return the first line of an exception's message, cut to ``limit`` characters."""
    lines = str(error).strip().splitlines()
    return lines[0][:limit] if lines else ""
