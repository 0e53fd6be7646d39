"""`prefix-distill …` and `python -m prefix_distill …`: Ctrl-C is answered from the start."""

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
        os.write(2, b"aborted\n")
        sys.exit(INTERRUPTED)
    finally:
        # While Python ends, Ctrl-C would print the traceback of some library.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def leave() -> None:
    """End the process before the command has begun."""
    os.write(2, f"{NOTHING_WRITTEN}\n".encode())
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()
