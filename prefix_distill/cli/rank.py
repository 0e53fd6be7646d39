"""The program that each rank of ``--gpus N`` runs."""

import os
import sys
import threading
import time
from pathlib import Path

from .launch import LOOK


def rank() -> None:
    """One rank of ``launch``: passes its launcher's signal on to itself, and ends when the
    launcher has gone."""
    from .main import main

    wish, launcher = Path(sys.argv.pop(1)), int(sys.argv.pop(1))
    wish.with_name(f"{os.getpid()}.pid").touch()

    def watch() -> None:
        passed = False
        while True:
            time.sleep(LOOK)
            if os.getppid() != launcher:
                os._exit(1)
            if not passed and wish.exists():
                passed = True
                os.kill(os.getpid(), int(wish.read_text()))

    threading.Thread(target=watch, daemon=True).start()
    main(alone=False)
