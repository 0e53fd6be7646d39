"""Compare expressions with math-verify, in a separate process that has a time limit.

This file is also that process: it runs outside the package and imports math-verify.
"""

import contextlib
import json
import re
import subprocess
import sys
import threading
from functools import lru_cache
from typing import Any

SECONDS = 5  # time limit of the first slow comparison; answers that take longer count as unequal
SECONDS_AFTERWARDS = 1  # time limit once a comparison was too slow
START = 120  # seconds that loading math-verify may take on a busy machine
# relative differences below which numbers count as equal
ROUNDED = 1e-6  # a decimal, and a number that no decimal equals, such as 1/3
WRITTEN = 1e-12  # two decimals
EXACT = 1e-30  # two numbers without a decimal point, such as roots
_lock = threading.Lock()
_worker: list[subprocess.Popen[bytes]] = []  # at most one, used by all threads
# (answer,) or (answer, reference) of comparisons that exceeded the time limit
_slow: set[tuple[str, ...]] = set()


def start() -> None:
    """Start the worker, so that a math-verify that cannot be loaded is found before any work."""
    with _lock:
        if not _worker:
            _start()


def terminates(denominator: int) -> bool:
    """Return whether fractions with this denominator are decimals with finitely many digits."""
    for prime in (2, 5):
        while denominator % prime == 0:
            denominator //= prime
    return denominator == 1


@lru_cache(maxsize=4096)
def are_equal(answer: str, wanted: str) -> bool:
    """Return whether math-verify finds both answers equal; False if it cannot parse one.

    math-verify runs in a separate process that enforces its own time limit. Its built-in limit uses
    SIGALRM, which needs the main thread, waits for C arithmetic and replaces the caller's alarm. A
    multiprocessing worker would import the caller's ``__main__``, often with torch, and would fail
    if that is unguarded.

    After the first timeout the limit is one second. An answer that was too slow to compare with a
    plain number is not compared again.
    """
    if (answer,) in _slow:
        return False
    with _lock:
        verdict = b""
        try:
            if _worker and _worker[0].poll() is not None:  # killed since its last answer
                _stop()
            if not _worker:
                _start()
            seconds = SECONDS
            if _slow:
                seconds = min(SECONDS, SECONDS_AFTERWARDS)
            verdict = _ask(_worker[0], json.dumps([answer, wanted, seconds]).encode() + b"\n")
        finally:
            if not verdict:  # timeout, kill or interrupt
                _stop()
        if not verdict:
            _remember_slow(answer, wanted)
        return verdict == b"True"


def _remember_slow(answer: str, wanted: str) -> None:
    if re.fullmatch(r"-?[\d./]+", wanted):
        _slow.add((answer,))
    else:
        _slow.add((answer, wanted))


def _start() -> None:
    # here, because the worker runs this file outside the package
    from ..errors import UserError
    from ..signals import STOP_SIGNALS

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
        _stop()
        raise UserError(
            "math-verify, which compares answers, could not be loaded: run pip install "
            "'math-verify[antlr4_13_2]', or grade with --answer-format exact or choice"
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
    from latex2sympy2_extended import latex2sympy2
    from math_verify import LatexExtractionConfig, grader, parse, verify

    # without this, the rest of an expression that cannot be read is ignored
    latex2sympy2._Latex2Sympy.create_parser = _read_to_the_end(
        latex2sympy2._Latex2Sympy.create_parser
    )
    grader.sympy_numeric_eq = _are_equal_numbers  # its own is absolute: all tiny numbers are equal
    verify(parse("$x+1$"), parse("$1+x$"))  # the first comparison loads the grammar
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
            # the other kinds of extraction look for a number anywhere in the text
            gold = parse(f"${wanted}$", [LatexExtractionConfig()])
            given = parse(f"${answer}$", [LatexExtractionConfig()])
            gold = list(map(_with_imaginary_unit, gold))
            given = list(map(_with_imaginary_unit, given))
            same = verify(gold, given, allow_set_relation_comp=True)
        except Exception:
            same = False
        faulthandler.cancel_dump_traceback_later()
        print(bool(same), flush=True)


def _read_to_the_end(create_parser: Any) -> Any:
    """Return a maker of parsers that raise ValueError unless they read the whole text."""

    def create(self: Any, text: str) -> Any:
        parser = create_parser(self, text)
        read = parser.math

        def math() -> Any:
            tree = read()
            token = parser.getCurrentToken()
            if token.type != token.EOF:
                raise ValueError(f"the text from '{token.text}' on is not read")
            return tree

        parser.math = math
        return parser

    return create


def _with_imaginary_unit(value: Any) -> Any:
    """Return an expression whose only symbol is i with the imaginary unit for it."""
    from sympy import Expr, I

    if not isinstance(value, Expr) or {str(name) for name in value.free_symbols} != {"i"}:
        return value
    return value.subs(dict.fromkeys(value.free_symbols, I))


def _are_equal_numbers(a: Any, b: Any, *_: int) -> bool:
    """Compare two sympy expressions as numbers; replaces ``sympy_numeric_eq`` of math-verify.

    Rational numbers are compared exactly, others by relative tolerance. The function that this one
    replaces takes absolute precisions too.
    """
    from sympy import Float, MatrixBase

    if isinstance(a, MatrixBase) and isinstance(b, MatrixBase):
        if a.shape != b.shape:
            return False
        return all(map(_are_equal_numbers, a.flat(), b.flat()))
    if isinstance(a, MatrixBase) or isinstance(b, MatrixBase):
        return False
    a, b = a.doit(), b.doit()
    if a.is_Rational and b.is_Rational:
        return bool(a == b)
    if not a.is_number or not b.is_number or a.is_infinite or b.is_infinite:
        return bool(a == b)
    tolerance = EXACT
    if a.has(Float) or b.has(Float):
        tolerance = _tolerance(a, b)
    a, b = a.evalf(40), b.evalf(40)
    largest = max(abs(a), abs(b))
    return bool(abs(a - b) <= tolerance * largest)


def _tolerance(a: Any, b: Any) -> float:
    """Return the relative tolerance for two sympy numbers of which one is a decimal."""
    for number in (a, b):
        is_decimal = number.is_Float or (number.is_Rational and terminates(int(number.q)))
        if not is_decimal:
            return ROUNDED
    return WRITTEN


if __name__ == "__main__":
    _serve()
