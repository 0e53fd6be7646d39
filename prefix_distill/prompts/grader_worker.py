"""Run a user's grader: the process that ``own_grader`` starts. It runs outside the package.

It reads lines of JSON from stdin and answers each with one on stdout. The first line is {file,
source, function, seconds}, the others are {row, response}. An answer has ``ready``, ``score`` or
``error``.
"""

import faulthandler
import json
import os
import signal
import sys
import traceback
import types
from typing import Any, TextIO

MARGIN = 30.0  # seconds


def _open_channel() -> tuple[TextIO, TextIO]:
    """Return (requests, answers), and leave neither to the grader.

    What the grader prints goes to stderr, and what it reads from stdin is empty.
    """
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    return requests, answers


def _describe(error: BaseException, file: str) -> str:
    """Return an error in one line, with the last line of the user's file that it passes."""
    line = None
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename == file:
            line = frame.lineno
    if isinstance(error, SyntaxError) and error.filename == file:
        line = error.lineno
    message = " ".join(str(error).split())[:300]
    text = f"{type(error).__name__}: {message}"
    if line is None:
        return text
    return f"line {line}: {text}"


def _load(job: dict[str, Any]) -> Any:
    """Execute the user's text as a module; return its function. ValueError: it has none."""
    file = job["file"]
    sys.path.insert(0, os.path.dirname(file))
    module = types.ModuleType("prefix_distill_grader")
    module.__file__ = file
    sys.modules[module.__name__] = module  # dataclasses look their module up
    exec(compile(job["source"], file, "exec"), module.__dict__)
    function = getattr(module, job["function"], None)
    if not callable(function):
        names = [name for name, value in vars(module).items() if callable(value)]
        raise ValueError(
            f"it has no function {job['function']}; it has {', '.join(names) or 'none'}"
        )
    return function


def _check_score(value: Any) -> float:
    """Return a grader's result as a number. ValueError: it is none, or not from 0 to 1."""
    if isinstance(value, str | bytes) or value is None:
        raise ValueError(f"returned {value!r:.60}; expected a number from 0 to 1")
    try:
        score = float(value)
    except (TypeError, ValueError):
        raise ValueError(
            f"returned {type(value).__name__}; expected a number from 0 to 1"
        ) from None
    if not 0 <= score <= 1:  # also NaN
        raise ValueError(f"returned {score:g}; expected a number from 0 to 1")
    return score


def _answer(function: Any, request: dict[str, Any], file: str) -> dict[str, Any]:
    try:
        value = function(request["row"], request["response"])
    except BaseException as error:  # a grader may also exit
        return {"error": _describe(error, file)}
    try:
        return {"score": _check_score(value)}
    except ValueError as error:
        return {"error": str(error)}


def serve() -> None:
    """Grade until stdin ends. The arguments are signals to ignore, which are meant for the run."""
    for name in sys.argv[1:]:
        if hasattr(signal, name):  # each system lacks some
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    requests, answers = _open_channel()

    def reply(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    job = json.loads(requests.readline())
    try:
        function = _load(job)
    except BaseException as error:  # a module may also exit
        reply({"error": _describe(error, job["file"])})
        return
    reply({"ready": True})
    for line in requests:
        # The caller kills this process before, unless it was killed itself.
        faulthandler.dump_traceback_later(job["seconds"] + MARGIN, exit=True)
        answer = _answer(function, json.loads(line), job["file"])
        faulthandler.cancel_dump_traceback_later()
        reply(answer)


if __name__ == "__main__":
    serve()
