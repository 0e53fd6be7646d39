"""Exceptions that end a command; each message is one line: expected, got, what to do."""

ABORTED = "aborted without saving; --resume continues a run from its last checkpoint"


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


def ignore(text: str) -> None:
    """Report nothing."""


def one_line(error: BaseException, limit: int = 200) -> str:
    """Return the first ``limit`` characters of an exception's message, without line breaks."""
    return " ".join(str(error).split())[:limit]


def first_line(error: BaseException, limit: int = 200) -> str:
    """Return the first line of an exception's message, cut to ``limit`` characters."""
    lines = str(error).strip().splitlines()
    return lines[0][:limit] if lines else ""
