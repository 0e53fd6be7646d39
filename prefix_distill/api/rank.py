"""The program that each rank of ``--gpus N`` runs; `launch` starts it."""

import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

from .. import config as configuration
from .. import signals
from ..errors import ABORTED, Stopped, UserError
from . import quiet
from .events import EventObserver
from .jobs import Job, perform
from .launch import JOB, LOOK, RESULT, SIGNAL, leave_message


def main() -> None:
    """Perform the job in the folder argv[1] and exit, or exit when the launcher argv[2] ends."""
    folder, launcher = Path(sys.argv[1]), int(sys.argv[2])
    (folder / f"{os.getpid()}.pid").touch()
    ended = threading.Event()
    threading.Thread(target=_watch, args=(folder / SIGNAL, launcher, ended), daemon=True).start()
    quiet.hide_deprecations()
    code = work(folder)
    ended.set()
    sys.exit(code)


def work(folder: Path) -> int:
    """Perform the job; leave the result or a message about the failure; return the exit code."""
    try:
        job: Job = json.loads((folder / JOB).read_text(encoding="utf-8"))
        config = configuration.build(job["values"])
        outcome = perform(job, config, EventObserver(folder))
    except (UserError, Stopped) as error:
        leave_message(str(error), error.exit_code)
        return error.exit_code
    except KeyboardInterrupt:
        leave_message(ABORTED, 130)
        return 130
    except Exception:
        traceback.print_exc()
        return 1
    if os.environ["RANK"] == "0":
        (folder / RESULT).write_text(json.dumps(outcome), encoding="utf-8")
    return 0


def _watch(asked: Path, launcher: int, ended: threading.Event) -> None:
    """Pass the launcher's signal on to this process; end it when the launcher has ended.

    After ``ended`` no signal is passed on: it would interrupt Python's own shutdown. That happens
    if another rank received the signal first and all ranks have stopped.
    """
    passed = False
    while True:
        time.sleep(LOOK)
        if os.getppid() != launcher:
            os._exit(1)
        if not passed and not ended.is_set() and asked.exists():
            passed = True
            signals.pass_on(signal.Signals(int(asked.read_text())))


if __name__ == "__main__":
    main()
