"""`--gpus N`: perform a job on N ranks of this machine, with torch's elastic launcher.

The progress, errors and signals of all ranks pass through this process. torchrun and `accelerate
launch` start ranks as well, on several machines too; then nothing here runs.
"""

import contextlib
import json
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import Runtime
from ..errors import (
    Interrupted,
    MemoryShortage,
    PreflightError,
    Stopped,
    UserError,
    describe_abort,
)
from ..signals import SignalCatcher, is_repeated
from .events import Relay
from .observers import Observer

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from .jobs import Job, Outcome

RANK = "from prefix_distill.api.rank import main; main()"  # the program of each rank
# files in the folder that the ranks share with this process
JOB, RESULT, SIGNAL = "job.json", "result.json", "signal"
LOOK = 0.2  # seconds between looks at the ranks, and of a rank at the file of signals
# seconds: torch's launcher kills the other ranks up to this long after a rank's error. A rank
# killed later ended for another reason.
SOON = 2
PATIENCE = 5  # seconds that killed ranks may take to end


def is_launched() -> bool:
    """Return whether a launcher (torchrun, accelerate, this one) started this process as a rank."""
    return "WORLD_SIZE" in os.environ


def is_first_rank() -> bool:
    """Return whether this process is the one that writes results: rank 0, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def needs_ranks(runtime: Runtime) -> bool:
    """Return whether a call has to start ranks. UserError: a rank has no device of its own."""
    if runtime.gpus is None or runtime.gpus == 1 or is_launched():
        return False
    _check_devices(runtime.gpus, runtime.device)
    return True


def _check_devices(count: int, device: str) -> None:
    import torch

    if device not in ("auto", "cpu", "cuda"):
        raise UserError(
            f"--gpus {count} with --device {device}: every rank needs its own GPU; use auto, "
            "cuda or cpu"
        )
    gpus = torch.cuda.device_count()
    if device != "cpu" and gpus < count:
        raise UserError(
            f"--gpus {count}: expected {count} visible GPUs, got {gpus}; lower it, or use --device "
            f"cpu for {count} processes on the CPU"
        )


def launch(count: int, job: "Job", observer: Observer) -> "Outcome":
    """Perform a job on ``count`` ranks and return the outcome of rank 0.

    The first stop signal (signals.py) asks the ranks to save and stop; a second one kills them.
    No rank outlives this process. When a rank fails, torch's launcher stops the others and the
    exception of that rank is raised here: UserError, Stopped or a class of them.
    """
    with (
        tempfile.TemporaryDirectory(prefix="prefix-distill-", ignore_cleanup_errors=True) as name,
        _environment(count),
    ):
        folder = Path(name)
        (folder / JOB).write_text(json.dumps(job), encoding="utf-8")
        signals = _Signals(folder)
        with (
            listen(count) as listener,
            Relay(folder, observer, signals.ask_to_stop) as relay,
        ):
            words = [str(folder), str(listener.getsockname()[1]), *_title(job)]
            ranks = _Ranks(count, folder, words, shares_streams=observer.shares_streams)
            with signals:
                while ranks.are_running() and not signals.have_killed_ranks():
                    relay.pass_on()
            relay.pass_on()
            if signals.second is not None:
                raise Interrupted(describe_abort(job["name"], has_written=True), signals.second)
            ranks.check(signals.first)
        outcome: Outcome = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    return outcome


def listen(count: int) -> socket.socket:
    """Return a socket of this process that ``count`` ranks connect to.

    Every system closes it when this process ends, however it ends. Then the ranks end as well.
    """
    return socket.create_server(("127.0.0.1", 0), backlog=count)


def _title(job: "Job") -> list[str]:
    """Return what names the job in a list of processes."""
    return [job["name"], str(job["values"]["checkpoint.out"])]


@contextlib.contextmanager
def _environment(count: int) -> Iterator[None]:
    """Set the environment that ranks inherit, and silence torch's launcher."""
    former = dict(os.environ)
    levels = {}
    for name in ("torch.distributed", "torchelastic-events-null"):
        logger = logging.getLogger(name)
        levels[logger] = logger.level
        logger.setLevel(logging.CRITICAL)  # the messages of the ranks are enough
    threads = max(1, (os.cpu_count() or 1) // count)
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
        for variable in os.environ.keys() - former.keys():  # torch's launcher sets some, too
            del os.environ[variable]
        os.environ.update(former)


class _Signals(SignalCatcher):
    """Passes the first signal to the ranks through a file, and kills them at the second.

    Outside the main thread no signal is caught; `ask` works there, too.
    """

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder
        self.first: int | None = None
        self.second: int | None = None
        self.killed_at = 0.0

    def receive(self, number: signal.Signals) -> None:
        """Pass the first signal on; at a second one, kill the ranks."""
        if self.first is None:
            self.ask(number)
            return
        if is_repeated(number):
            return
        self.second, self.killed_at = number, time.monotonic()
        for file in self.folder.glob("*.pid"):
            with contextlib.suppress(OSError):  # the rank has ended
                # Windows has no SIGKILL
                os.kill(int(file.stem), getattr(signal, "SIGKILL", signal.SIGTERM))

    def ask(self, number: int) -> None:
        """Ask the ranks to save and stop, as at the signal ``number``."""
        self.first = int(number)
        partial = self.folder / f"{SIGNAL}.partial"
        partial.write_text(str(self.first))
        os.replace(partial, self.folder / SIGNAL)

    def ask_to_stop(self) -> None:
        """Ask the ranks to save and stop, as Ctrl-C does."""
        self.ask(signal.SIGINT)

    def have_killed_ranks(self) -> bool:
        """Return whether the ranks were killed and had time to end."""
        return self.second is not None and time.monotonic() - self.killed_at > PATIENCE


class _Ranks:
    """The ranks of a job, run by torch's elastic launcher in a thread.

    In a thread torch's launcher leaves the signal handlers of this process alone. ``words``: the
    arguments of each rank.
    """

    def __init__(self, count: int, folder: Path, words: list[str], shares_streams: bool):
        self.count = count
        self.folder = folder
        self.words = words
        self.shares_streams = shares_streams
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        redirects = Std.NONE if self.shares_streams else Std.ALL
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=self.count,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            run_id="prefix-distill",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=str(self.folder), redirects=redirects),
        )
        start = elastic_launch(config, sys.executable)
        try:
            start("-c", RANK, *self.words)
        except BaseException as error:
            self.error = error

    def are_running(self) -> bool:
        """Wait for LOOK seconds and return whether the ranks are running."""
        self.thread.join(LOOK)
        return self.thread.is_alive()

    def check(self, asked: int | None) -> None:
        """Raise the failure of the ranks, if there is one. ``asked``: the signal passed to them."""
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

        if self.error is None:
            return
        if not isinstance(self.error, ChildFailedError):
            raise self.error
        code, message = self._find_cause(self.error, asked)
        raise _as_exception(code, message)

    def _find_cause(self, error: "ChildFailedError", asked: int | None) -> tuple[int, str]:
        """Return exit code and message of the rank that failed first: a killed one, or the first
        that left a message."""
        failures = sorted(error.failures.items())
        reports = []
        killed = []
        for rank, failure in failures:
            if "time" in (failure.error_file_data or {}):
                reports.append((failure.error_file_data["time"], rank, failure))
            elif failure.exitcode < 0 and -failure.exitcode not in (signal.SIGTERM, asked):
                killed.append((rank, failure))
        reports.sort()
        if killed and not (reports and reports[0][0] < killed[0][1].timestamp - SOON):
            rank, failure = killed[0]
            name = signal.Signals(-failure.exitcode).name
            return 1, (
                f"rank {rank} was killed by signal {-failure.exitcode} ({name}), and the other "
                "ranks were stopped; --resume continues from the newest checkpoint"
            )
        if reports:
            _, rank, failure = reports[0]
            messages = {failure.message for _, _, failure in reports}
            all_agree = len(messages) == 1 and len(reports) == len(failures) > 1
            message = failure.message
            if not (message.startswith("rank ") or rank == 0 or all_agree):
                message = f"rank {rank}: {message}"
            return failure.error_file_data["code"], message
        if asked is not None:
            return 128 + asked, "interrupted before training began; there was nothing to save"
        # torch's launcher stops the other ranks with SIGTERM, which is a negative exit code
        crashed = [(rank, failure) for rank, failure in failures if failure.exitcode > 0]
        rank, failure = (crashed or failures)[0]
        return 1, f"rank {rank} ended with exit code {failure.exitcode}; {self._last_line(rank)}"

    def _last_line(self, rank: int) -> str:
        """Return the last line that a rank wrote to stderr, or where it was shown."""
        if self.shares_streams:
            return "see above"
        for file in self.folder.glob(f"**/{rank}/stderr.log"):
            lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
            return next((line.strip() for line in reversed(lines) if line.strip()), "no message")
        return "no message"


def _as_exception(code: int, message: str) -> UserError | Stopped:
    """Return the exception that has this exit code."""
    if code >= 128:
        return Interrupted(message, code - 128)
    kinds: dict[int, type[UserError] | type[Stopped]] = {
        2: UserError,
        3: PreflightError,
        4: MemoryShortage,
    }
    return kinds.get(code, Stopped)(message)


def leave_message(message: str, code: int) -> None:
    """Tell torch's launcher, if it started this process, why this rank ends."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file is None:
        return
    now = time.time()
    document = {"message": message, "timestamp": int(now), "time": now, "code": code}
    Path(file).write_text(json.dumps(document))
