"""The two ways a command ends early; each message is one line: expected, got, what to do."""


class UserError(Exception):
    """Bad input. The command prints the message on one line and exits with code 2."""

    exit_code = 2


class Stopped(Exception):
    """A run that had to stop in good order (non-finite numbers, for example). Exit code 1."""

    exit_code = 1
