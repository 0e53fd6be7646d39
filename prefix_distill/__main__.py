"""`prefix-distill …` and `python -m prefix_distill …`: Ctrl-C is answered from the start."""

import contextlib
import os
import signal
import sys

from .errors import INTERRUPTED, NOTHING_WRITTEN
from .signals import ImportGuard


def main() -> None:
    """Run the command and exit."""
    try:
        with ImportGuard(leave):
            from .cli.main import main as run

            run()
    except KeyboardInterrupt:  # while a command ends
        say("aborted")
        sys.exit(INTERRUPTED)
    finally:
        # While Python ends, Ctrl-C would print the traceback of some library.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def leave() -> None:
    """End the process before the command has begun."""
    say(NOTHING_WRITTEN)
    os._exit(INTERRUPTED)


def say(text: str) -> None:
    """Write a line on stderr, which Python may not have opened."""
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())


if __name__ == "__main__":
    main()
