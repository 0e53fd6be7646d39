"""The ways a command ends early; each message is one line: expected, got, what to do."""

AT_ONCE = "interrupted at once; a run can go on from its newest checkpoint with --resume"


class UserError(Exception):
    """Bad input. The command prints the message on one line and exits with code 2."""

    exit_code = 2


class PreflightError(UserError):
    """Models, prompts or device do not go together, by a check before the run. Exit code 3."""

    exit_code = 3


class Stopped(Exception):
    """A run that had to stop in good order (non-finite numbers, for example). Exit code 1."""

    exit_code = 1


class MemoryShortage(Stopped):
    """A device has not enough memory for the smallest piece of the work. Exit code 4."""

    exit_code = 4


class Interrupted(Stopped):
    """A run that was asked to stop and has saved its state. Exit code: 128 and the signal's
    number, as a shell has it."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.exit_code = 128 + number


def one_line(error: BaseException, limit: int = 200) -> str:
    """Return the first ``limit`` characters of an exception's message, without line breaks."""
    return " ".join(str(error).split())[:limit]


def first_line(error: BaseException, limit: int = 200) -> str:
    """Return the first line of an exception's message, cut to ``limit`` characters."""
    lines = str(error).strip().splitlines()
    return lines[0][:limit] if lines else ""
