"""The program that each rank of ``--gpus N`` runs; `launch` starts it."""

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path

from .. import config as configuration
from .. import signals
from ..display import listening
from ..errors import INTERRUPTED, NOTHING_WRITTEN, Stopped, UserError, describe_abort
from . import quiet
from .events import EventObserver
from .jobs import Job, perform
from .launch import JOB, LOOK, RESULT, SIGNAL, leave_message


def main() -> None:
    """Perform the job in the folder argv[1], or end with the launcher that listens at argv[2]."""
    folder, port = Path(sys.argv[1]), int(sys.argv[2])
    (folder / f"{os.getpid()}.pid").touch()
    ended = threading.Event()
    threading.Thread(target=end_with_launcher, args=(port,), daemon=True).start()
    threading.Thread(target=_pass_signal_on, args=(folder / SIGNAL, ended), daemon=True).start()
    quiet.hide_deprecations()
    with signals.ImportGuard(leave):
        code = work(folder)
    ended.set()
    sys.exit(code)


def leave() -> None:
    """End this rank, which was interrupted while it loads libraries."""
    leave_message(NOTHING_WRITTEN, INTERRUPTED)
    os._exit(INTERRUPTED)


def work(folder: Path) -> int:
    """Perform the job; leave the result or a message about the failure; return the exit code."""
    job: Job = json.loads((folder / JOB).read_text(encoding="utf-8"))
    try:
        config = configuration.build(job["values"])
        observer = EventObserver(folder)
        with listening(observer):
            outcome = perform(job, config, observer)
    except (UserError, Stopped) as error:
        leave_message(str(error), error.exit_code)
        return error.exit_code
    except KeyboardInterrupt:
        leave_message(describe_abort(job["name"], has_written=True), INTERRUPTED)
        return INTERRUPTED
    except Exception:
        traceback.print_exc()
        return 1
    if os.environ["RANK"] == "0":
        (folder / RESULT).write_text(json.dumps(outcome), encoding="utf-8")
    return 0


def end_with_launcher(port: int) -> None:
    """End this process when the launcher's socket closes.

    The process id of a parent that has ended is no sign on Windows, where it does not change.
    """
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)) as connection:
        connection.recv(1)  # returns or fails when the launcher has ended; nothing is ever sent
    os._exit(1)


def _pass_signal_on(asked: Path, ended: threading.Event) -> None:
    """Pass the launcher's signal on to this process, once.

    After ``ended`` no signal is passed on: it would interrupt Python's own shutdown. That happens
    if another rank received the signal first and all ranks have stopped.
    """
    while not ended.is_set():
        time.sleep(LOOK)
        if not ended.is_set() and asked.exists():
            signals.pass_on(signal.Signals(int(asked.read_text())))
            return


if __name__ == "__main__":
    main()
