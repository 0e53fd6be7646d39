"""`--gpus N`: N ranks of the same command on this machine by torch's elastic launcher, with one
voice for errors and signals.

torchrun and `accelerate launch` start ranks as well, on several machines too; then nothing here
runs.
"""

import contextlib
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

from ..display import tell
from ..errors import AT_ONCE, UserError

RANK = "from prefix_distill.cli.rank import rank; rank()"  # what every rank's Python runs
LOOK = 0.2  # seconds between a rank's looks at its launcher
# seconds: a rank that was killed later than another one complained was killed by torch's launcher,
# which waits 30 s
SOON = 2


def launched() -> bool:
    """Has a launcher (torchrun, accelerate, this one) started this process as a rank?"""
    return "WORLD_SIZE" in os.environ


def check(count: int, device: str) -> None:
    """UserError unless ``count`` ranks have a device each."""
    import torch

    if device not in ("auto", "cpu", "cuda"):
        raise UserError(
            f"--gpus {count} with --device {device}: every rank needs a GPU of its own; use auto, "
            "cuda or cpu"
        )
    gpus = torch.cuda.device_count()
    if device != "cpu" and gpus < count:
        raise UserError(
            f"--gpus {count}: {gpus} GPUs are visible here; lower it, or use --device cpu for "
            f"{count} processes on the CPU"
        )


def launch(count: int, arguments: list[str]) -> tuple[int, str | None]:
    """Runs ``prefix-distill ARGUMENTS`` on ``count`` ranks → (exit code, what went wrong, on one
    line, or None).

    Ctrl-C and SIGTERM are passed on once, as a wish to save and stop; a second one ends all ranks
    at once. A rank never outlives this process. When a rank fails, torch's launcher stops the
    others.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed").setLevel(
        logging.CRITICAL
    )  # the ranks' own words are enough
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")])
    )
    outcome: list = []
    with tempfile.TemporaryDirectory(prefix="prefix-distill-") as scratch:
        wish = Path(scratch) / "signal"
        config = LaunchConfig(
            1,
            1,
            count,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            run_id="prefix-distill",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=scratch),
        )

        def work() -> (
            None
        ):  # in a thread, where torch's launcher leaves this process's signal handlers alone
            try:
                elastic_launch(config, sys.executable)(
                    "-c", RANK, str(wish), str(os.getpid()), *arguments
                )
            except BaseException as error:
                outcome.append(error)

        def pass_on(number, frame) -> None:
            if not wish.exists():
                half = wish.with_suffix(".partial")
                half.write_text(str(int(number)))
                os.replace(half, wish)
                return
            for file in wish.parent.glob("*.pid"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(
                        int(file.stem), getattr(signal, "SIGKILL", signal.SIGTERM)
                    )  # Windows has one way
            shutil.rmtree(scratch, ignore_errors=True)
            tell(AT_ONCE)
            os._exit(128 + number)

        numbers = [
            getattr(signal, name)
            for name in ("SIGINT", "SIGTERM", "SIGHUP")
            if hasattr(signal, name)
        ]
        former = {
            n: signal.signal(n, pass_on)
            for n in numbers
            if signal.getsignal(n) is not signal.SIG_IGN
        }
        try:
            thread = threading.Thread(target=work, daemon=True)
            thread.start()
            while thread.is_alive():
                thread.join(LOOK)
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)
        return _outcome(
            outcome[0] if outcome else None, int(wish.read_text()) if wish.exists() else None
        )


def _outcome(error: BaseException | None, asked: int | None) -> tuple[int, str | None]:
    """The exit code and message of the rank that failed by itself: one that was killed, or the
    first that has something to say. ``asked``: the signal that was passed on."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if error is None:
        return 0, None
    if not isinstance(error, ChildFailedError):
        raise error
    failures = sorted(error.failures.items())
    spoken = sorted(
        (f.error_file_data["time"], rank, f)
        for rank, f in failures
        if "time" in (f.error_file_data or {})
    )
    killed = [(rank, f) for rank, f in failures if f.exitcode < 0 and -f.exitcode != signal.SIGTERM]
    if killed and not (spoken and spoken[0][0] < killed[0][1].timestamp - SOON):
        rank, failure = killed[0]
        return 1, (
            f"rank {rank} was ended by signal {-failure.exitcode} "
            f"({signal.Signals(-failure.exitcode).name}); the others were stopped, --resume goes "
            "on from the newest checkpoint"
        )
    if not spoken:
        if asked is not None:
            return 128 + asked, "interrupted before training began; there was nothing to save"
        rank, failure = failures[0]
        return 1, f"rank {rank} ended with exit code {failure.exitcode}; see above"
    _, rank, failure = spoken[0]
    everywhere = (
        len({f.message for _, _, f in spoken}) == 1 and len(spoken) == len(error.failures) > 1
    )
    named = failure.message.startswith("rank ") or rank == 0 or everywhere
    return failure.error_file_data[
        "code"
    ], failure.message if named else f"rank {rank}: {failure.message}"


def leave_word(message: str, code: int) -> None:
    """Tells the launcher, if there is one that listens (torch's), why this rank ends."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        Path(file).write_text(
            json.dumps(
                {
                    "message": message,
                    "timestamp": int(time.time()),
                    "time": time.time(),
                    "code": code,
                }
            )
        )
