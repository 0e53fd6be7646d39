"""Text → final answer → right or wrong. One grader for run, eval and demo."""

import json
import re
import subprocess
import sys
import threading
from functools import lru_cache

LONGEST = 2000  # characters of an answer that is compared as an expression
SECONDS = 5  # a comparison may take; what takes longer is unequal
START = 120  # seconds that loading math-verify may take on a busy machine
_lock = threading.Lock()
_worker: list[subprocess.Popen[bytes]] = []  # at most one, shared by all threads
_BRACE = re.compile("[{}]")
_HASH = re.compile(r"####\s*([^\n]+)")
_LETTER = re.compile(r"(?:\\(?:text|textbf|mathrm|mathbf)\{)?\(?([A-Z])(?=$|[).:}])")
_CHOICE = re.compile(r"(?i:answer(?:\s+is)?)\s*:?[\s*]*\(?([A-Z])(?!\w)")
_NUMBER = re.compile(r"-?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:/\d+)?%?")


def extract(text: str, form: str = "auto") -> str | None:
    r"""The final answer in a response, or None.

    ``boxed``: content of the last \boxed{…}; ``hash``: what follows the last ``####``;
    ``last-number``: the last number; ``choice``: the letter in that box, else behind the last
    "answer is" or "Answer:"; ``exact``: the whole text, stripped; ``auto``: boxed, else hash, else
    last number.
    """
    if form == "exact":
        return text.strip()
    if form == "choice":
        choices = list(_CHOICE.finditer(text))
        last = choices[-1] if choices else None
        letter = _LETTER.match(_last_boxed(text) or "") or last
        return letter[1] if letter else None
    if form in ("boxed", "auto") and (answer := _last_boxed(text)) is not None:
        return answer
    if form in ("hash", "auto") and (hashes := _HASH.findall(text)):
        return hashes[-1].strip()
    if form in ("last-number", "auto") and (numbers := _NUMBER.findall(text)):
        return numbers[-1].replace(",", "").replace("$", "").rstrip("%")
    return None


def reference(text: str) -> str:
    """The final answer in a reference: boxed, else after ``####``, else the text itself (it may
    be words)."""
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed
    found = _HASH.findall(text)
    return (found[-1] if found else text).strip()


def correct(response: str, gold: str, form: str = "auto") -> bool:
    """Does the response's final answer equal the reference's? Text equality, else math-verify's
    symbolic equality, which ends after SECONDS and takes nothing longer than LONGEST. Any text is
    answered, in any thread."""
    answer = extract(response, form)
    if answer is None:
        return False
    wanted = reference(gold)
    if answer == wanted or form in ("exact", "choice"):
        return answer == wanted
    if answer.isdecimal() and wanted.isdecimal() and answer.isascii() and wanted.isascii():
        return answer.lstrip("0") == wanted.lstrip("0")
    return max(len(answer), len(wanted)) <= LONGEST and _equal(answer, wanted)


def _last_boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0 or text.find("}", start) < 0:
        return None
    depth = 0
    for brace in _BRACE.finditer(text, start):
        depth += 1 if brace[0] == "{" else -1
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
            if _worker and _worker[0].poll() is not None:  # it was killed after its last answer
                _stop()
            if not _worker:
                _start()
            verdict = _ask(_worker[0], json.dumps([answer, wanted, SECONDS]).encode() + b"\n")
        finally:
            if not verdict:  # timed out, killed or interrupted
                _stop()
        return verdict == b"True"


def _start() -> None:
    worker = subprocess.Popen(
        [sys.executable, "-P", __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # shield the worker from Ctrl-C
        creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # the same on Windows
    )
    _worker.append(worker)
    if _ask(worker, b"") != b"ready":  # the worker sends this first
        raise RuntimeError(
            "math-verify could not be loaded: pip install 'math-verify[antlr4_13_2]'"
        )


def _ask(worker: subprocess.Popen[bytes], request: bytes) -> bytes:
    """Send ``request`` and return the worker's next line, stripped; empty if it has ended."""
    assert worker.stdin is not None and worker.stdout is not None  # ``_start`` opens both pipes
    worker.stdin.write(request)
    worker.stdin.flush()
    return worker.stdout.readline().strip()


def _stop() -> None:
    while _worker:
        with _worker.pop() as worker:
            worker.kill()


def _serve() -> None:
    """Read lines [answer, wanted, seconds] and write True or False for each."""
    import contextlib
    import faulthandler
    import logging

    # faulthandler's timer thread needs no GIL, so it also stops C arithmetic, on any system
    faulthandler.dump_traceback_later(START, exit=True)
    from math_verify import parse, verify

    faulthandler.cancel_dump_traceback_later()
    logging.disable()
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource  # not on Windows

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
