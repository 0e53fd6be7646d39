"""Extract final answers from text and grade them. Training, eval and demo use this grader."""

import contextlib
import json
import re
import subprocess
import sys
import threading
from functools import lru_cache

LONGEST = 2000  # characters; longer answers are compared as text only
SECONDS = 5  # time limit of one comparison; answers that take longer count as unequal
START = 120  # seconds that loading math-verify may take on a busy machine
_lock = threading.Lock()
_worker: list[subprocess.Popen[bytes]] = []  # at most one, used by all threads
_BRACE = re.compile("[{}]")
_HASH = re.compile(r"####\s*([^\n]+)")
_LETTER = re.compile(r"(?:\\(?:text|textbf|mathrm|mathbf)\{)?\(?([A-Z])(?=$|[).:}])")
_CHOICE = re.compile(r"(?i:answer(?:\s+is)?)\s*:?[\s*]*\(?([A-Z])(?!\w)")
_NUMBER = re.compile(r"-?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:/\d+)?%?")


def extract_answer(text: str, answer_format: str = "auto") -> str | None:
    r"""Return the final answer of a response, or None if there is none.

    ``answer_format`` is one of:

    - ``boxed``: the content of the last \boxed{…}
    - ``hash``: the text after the last ``####``
    - ``last-number``: the last number
    - ``auto``: the first of these three that occurs
    - ``choice``: the letter in the last box, else after the last "answer is" or "Answer:"
    - ``exact``: the whole text without surrounding whitespace
    """
    if answer_format == "exact":
        return text.strip()
    boxed = _last_boxed(text)
    if answer_format == "choice":
        return _choice_letter(text, boxed)
    if answer_format in ("boxed", "auto") and boxed is not None:
        return boxed
    hashes = _HASH.findall(text)
    if answer_format in ("hash", "auto") and hashes:
        return hashes[-1].strip()
    numbers = _NUMBER.findall(text)
    if answer_format in ("last-number", "auto") and numbers:
        return numbers[-1].replace(",", "").replace("$", "").rstrip("%")
    return None


def _choice_letter(text: str, boxed: str | None) -> str | None:
    match = _LETTER.match(boxed or "")
    if match is not None:
        return match[1]
    letters = _CHOICE.findall(text)
    if not letters:
        return None
    return letters[-1]


def extract_reference(text: str) -> str:
    """Return the final answer of a reference: boxed, else after ``####``, else the whole text."""
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed
    hashes = _HASH.findall(text)
    if hashes:
        return hashes[-1].strip()
    return text.strip()


def is_correct(response: str, gold: str, answer_format: str = "auto") -> bool:
    """Return whether the final answers of a response and a reference are equal.

    They are equal as text, as whole numbers, or, by math-verify, as expressions. The formats
    ``exact`` and ``choice`` compare text only. Any text gets an answer, in any thread.
    """
    answer = extract_answer(response, answer_format)
    if answer is None:
        return False
    wanted = extract_reference(gold)
    if answer == wanted or answer_format in ("exact", "choice"):
        return answer == wanted
    if _is_whole_number(answer) and _is_whole_number(wanted):
        return answer.lstrip("0") == wanted.lstrip("0")
    return max(len(answer), len(wanted)) <= LONGEST and _equal(answer, wanted)


def _is_whole_number(text: str) -> bool:
    return text.isascii() and text.isdecimal()


def _last_boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for brace in _BRACE.finditer(text, start):
        if brace[0] == "{":
            depth += 1
        else:
            depth -= 1
        if depth == 0:
            return text[start + len("\\boxed{") : brace.start()].strip()
    return None


@lru_cache(maxsize=4096)
def _equal(answer: str, wanted: str) -> bool:
    """Return whether math-verify finds both answers equal; False if it cannot parse one.

    math-verify runs in a separate process that enforces its own time limit. Its built-in limit uses
    SIGALRM, which needs the main thread, waits for C arithmetic and replaces the caller's alarm. A
    multiprocessing worker would import the caller's ``__main__``, often with torch, and would fail
    if that is unguarded.
    """
    with _lock:
        verdict = b""
        try:
            if _worker and _worker[0].poll() is not None:  # killed since its last answer
                _stop()
            if not _worker:
                _start()
            verdict = _ask(_worker[0], json.dumps([answer, wanted, SECONDS]).encode() + b"\n")
        finally:
            if not verdict:  # timeout, kill or interrupt
                _stop()
        return verdict == b"True"


def _start() -> None:
    from ..signals import STOP_SIGNALS  # here: the worker runs this file outside the package

    worker = subprocess.Popen(
        [sys.executable, "-P", __file__, *STOP_SIGNALS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # shield the worker from Ctrl-C
        creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # the same on Windows
    )
    _worker.append(worker)
    if _ask(worker, b"") != b"ready":  # the worker's first line
        raise RuntimeError(
            "math-verify could not be loaded: run pip install 'math-verify[antlr4_13_2]'"
        )


def _ask(worker: subprocess.Popen[bytes], request: bytes) -> bytes:
    """Send ``request`` and return the worker's next line, stripped; empty if it has ended."""
    assert worker.stdin is not None and worker.stdout is not None  # ``_start`` opens both pipes
    with contextlib.suppress(OSError):  # the worker has ended, and ``readline`` returns nothing
        worker.stdin.write(request)
        worker.stdin.flush()
    return worker.stdout.readline().strip()


def _stop() -> None:
    while _worker:
        with _worker.pop() as worker:
            worker.kill()


def _serve() -> None:
    """Answer every line [answer, wanted, seconds] of stdin with True or False on stdout.

    The arguments are signals to ignore: batch systems send them to every process of a job, and an
    answer that is being compared would count as wrong. The worker ends with its stdin.
    """
    import faulthandler
    import logging
    import signal

    for name in sys.argv[1:]:
        if hasattr(signal, name):  # each system lacks some
            signal.signal(getattr(signal, name), signal.SIG_IGN)

    # faulthandler's timer needs no GIL, so it also stops arithmetic in C, on every system
    faulthandler.dump_traceback_later(START, exit=True)
    from math_verify import parse, verify

    faulthandler.cancel_dump_traceback_later()
    logging.disable()
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource  # absent on Windows

        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, resource.getrlimit(resource.RLIMIT_AS)[1]))
    print("ready", flush=True)
    for line in sys.stdin:
        answer, wanted, seconds = json.loads(line)
        faulthandler.dump_traceback_later(seconds, exit=True)
        try:
            same = verify(parse(f"${wanted}$"), parse(f"${answer}$"))
        except Exception:
            same = False
        faulthandler.cancel_dump_traceback_later()
        print(bool(same), flush=True)


if __name__ == "__main__":
    _serve()
