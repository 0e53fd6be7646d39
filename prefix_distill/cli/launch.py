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
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from ..display import tell
from ..errors import AT_ONCE, Stopped, UserError

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


class RanksFailed(Stopped):
    """A rank failed. The message and the exit code are that rank's."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.exit_code = code


def launch(count: int, arguments: list[str]) -> None:
    """Run ``prefix-distill ARGUMENTS`` on ``count`` ranks; raise RanksFailed if one of them fails.

    The first Ctrl-C or SIGTERM asks the ranks to save and stop; a second one kills them. No rank
    outlives this process. When a rank fails, torch's launcher stops the others.
    """
    # the ranks' own words are enough
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")])
    )
    with tempfile.TemporaryDirectory(prefix="prefix-distill-") as scratch:
        wish = Path(scratch) / "signal"
        with _signals_passed_on(wish):
            error = _run_ranks(count, wish, arguments)
        asked = int(wish.read_text()) if wish.exists() else None
        code, message = _outcome(error, asked)
    if message is not None:
        raise RanksFailed(message, code)


def _run_ranks(count: int, wish: Path, arguments: list[str]) -> BaseException | None:
    """Run the ranks with torch's launcher; return the exception it raised, or None."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id="prefix-distill",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=str(wish.parent)),
    )
    start = elastic_launch(config, sys.executable)
    errors: list[BaseException] = []

    def work() -> None:
        try:
            start("-c", RANK, str(wish), str(os.getpid()), *arguments)
        except BaseException as error:
            errors.append(error)

    # in a thread, where torch's launcher leaves this process's signal handlers alone
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(LOOK)
    return errors[0] if errors else None


@contextlib.contextmanager
def _signals_passed_on(wish: Path) -> Iterator[None]:
    """Write the first signal to the file ``wish`` for the ranks; kill the ranks at the second."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        if not wish.exists():
            half = wish.with_suffix(".partial")
            half.write_text(str(int(number)))
            os.replace(half, wish)
            return
        for file in wish.parent.glob("*.pid"):
            with contextlib.suppress(ProcessLookupError):
                # Windows has one way
                os.kill(int(file.stem), getattr(signal, "SIGKILL", signal.SIGTERM))
        shutil.rmtree(wish.parent, ignore_errors=True)
        tell(AT_ONCE)
        os._exit(128 + number)

    numbers = [
        getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
    ]
    former = {
        n: signal.signal(n, pass_on) for n in numbers if signal.getsignal(n) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


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
    message = failure.message
    if not (message.startswith("rank ") or rank == 0 or everywhere):
        message = f"rank {rank}: {message}"
    return failure.error_file_data["code"], message


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
