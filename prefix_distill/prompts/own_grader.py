"""A user's own grader, ``--grader FILE.py:FUNCTION``, in a process that has a time limit."""

import contextlib
import hashlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import GraderError, UserError
from ..files import describe_special
from ..signals import STOP_SIGNALS

WORKER = Path(__file__).with_name("grader_worker.py")
START = 120.0  # seconds that importing the user's file may take


@dataclass(frozen=True, kw_only=True)
class Grade:
    """The score of an answer, from 0 to 1. ``timed_out``: the grader had not answered in time."""

    score: float
    timed_out: bool = False


class OwnGrader:
    """Grades answers with a user's function of (row, response).

    The function runs in a process of its own, which is started when it is needed. An answer that
    takes longer than ``seconds`` scores 0, and its process is ended with all that it started.
    """

    def __init__(self, name: str, seconds: float):
        self.name = name
        self.seconds = seconds
        self.file, self.function = _locate(name)
        self.source = _read(name, self.file)
        self._worker: _Worker | None = None
        self._lock = threading.Lock()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.source).hexdigest()

    def start(self) -> None:
        """Start the process. GraderError: the file cannot be imported or lacks the function."""
        with self._lock:
            self._start()

    def _start(self) -> "_Worker":
        if self._worker is None:
            worker = _Worker()
            job = {
                "file": str(self.file),
                "source": self.source.decode(errors="replace"),
                "function": self.function,
                "seconds": self.seconds,
            }
            answer = worker.ask(job, START)
            if answer is None or "error" in answer:
                worker.end()
                raise GraderError(f"grader {self.name}: {_explain(answer)}")
            self._worker = worker
            weakref.finalize(self, worker.end)
        return self._worker

    def grade(self, row: Mapping[str, Any], response: str, number: int) -> Grade:
        """Return the grade of a response to a row, whose ``number`` an error names.

        GraderError: the function raised, ended its process, or returned no number from 0 to 1.
        """
        with self._lock:
            worker = self._start()
            answered = False
            try:
                answer = worker.ask({"row": row, "response": response}, self.seconds)
                answered = answer is not None and "score" in answer
            finally:
                if not answered:  # also at an interrupt
                    worker.end()
                    self._worker = None
        if answer is None:
            return Grade(score=0.0, timed_out=True)
        if "error" in answer:
            raise GraderError(
                f"grader {self.name}: problem {number}: {answer['error']}; correct the function"
            )
        return Grade(score=answer["score"])


def _explain(answer: dict[str, Any] | None) -> str:
    if answer is None:
        return f"it was not imported within {START:.0f} s; import less in it"
    return f"{answer['error']}; correct the file"


def _locate(name: str) -> tuple[Path, str]:
    """Return file and function of FILE.py:FUNCTION, or of an importable MODULE:FUNCTION."""
    place, _, function = name.rpartition(":")
    if not place or not function.isidentifier():
        raise UserError(
            f"--grader {name[:80]}: expected FILE.py:FUNCTION, got no function; write "
            "my_grader.py:score"
        )
    if place.endswith(".py") or os.path.isfile(place):
        return Path(os.path.expanduser(place)).absolute(), function
    from importlib.util import find_spec

    try:
        spec = find_spec(place)
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise UserError(
            f"--grader {name[:80]}: expected a .py file or an installed module before the colon; "
            "check the path"
        )
    return Path(spec.origin), function


def _read(name: str, file: Path) -> bytes:
    special = describe_special(file)
    if special is not None:
        raise UserError(f"--grader {name}: expected a .py file, got {special}; name a file")
    try:
        return file.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--grader {name}: cannot be read ({reason}); check the path") from None


class _Worker:
    """The process, and a thread that waits for its answers, as a pipe has no time limit."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", WORKER, *STOP_SIGNALS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # shields it from Ctrl-C, and makes a group that can be ended
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # the same on Windows
        )
        self.answers: queue.Queue[bytes] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None  # opened above
        with contextlib.suppress(ValueError):  # closed by ``end``
            for line in self.process.stdout:
                self.answers.put(line)
        self.answers.put(b"")

    def ask(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any] | None:
        """Return the answer to a request; None if there is none within ``seconds``."""
        assert self.process.stdin is not None  # opened above
        with contextlib.suppress(OSError):  # the process has ended, and the answer is empty
            self.process.stdin.write(json.dumps(request, default=str).encode() + b"\n")
            self.process.stdin.flush()
        try:
            line = self.answers.get(timeout=seconds)
        except queue.Empty:
            return None
        if not line:
            code = self.process.wait()
            return {"error": f"the function ended its process (exit code {code})"}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def end(self) -> None:
        """Kill the process and what it has started."""
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()
