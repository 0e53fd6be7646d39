"""Run the program in a pseudo-terminal and keep what a person sees there."""

import fcntl
import itertools
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from dataclasses import dataclass, field

import pyte
from helpers import ROOT

ROWS = 60
TALL = 300  # holds all that several commands write


@dataclass(kw_only=True)
class Seen:
    """What a person saw: (seconds, lines of the screen) at every change.

    ``pressed``: when Ctrl-C was pressed, in seconds since the start; ``ended``: when the program
    ended; ``code``: its exit code; ``out``: its stdout, which is no terminal.
    """

    changes: list[tuple[float, list[str]]] = field(default_factory=list)
    pressed: float | None = None
    ended: float = 0.0
    code: int = 0
    out: str = ""

    @property
    def last(self) -> list[str]:
        """Return the lines of the last screen."""
        return self.changes[-1][1]

    @property
    def text(self) -> str:
        """Return the last screen as one line, without the breaks of the terminal."""
        return " ".join(" ".join(self.last).split())

    @property
    def document(self) -> dict:
        return json.loads(self.out.strip().splitlines()[-1])

    def bottom_lines(self) -> list[str]:
        """Return the last line of every screen."""
        return [lines[-1] for _, lines in self.changes if lines]

    def longest_pause(self, start: float = 1.0) -> float:
        """Return the longest time without a change of the screen, from ``start`` to the end."""
        times = [start, *(t for t, _ in self.changes if t > start), self.ended]
        return max(b - a for a, b in itertools.pairwise(times))

    def first_time(self, pattern: str) -> float:
        """Return when a screen showed ``pattern`` for the first time."""
        for seconds, lines in self.changes:
            if re.search(pattern, " ".join(lines)):
                return seconds
        raise AssertionError(f"{pattern} was never on the screen; the last: {self.last}")


def shape(line: str) -> str:
    """Return a line with every number as 0, so that runs of other machines compare equal."""
    return re.sub(r"\d+(?:[.,]\d+)*(?:e[+-]\d+)?", "0", line)


def watch(
    command: list[str],
    columns: int,
    press: str | None = None,
    limit: float = 150,
    stdout: bool = False,
) -> Seen:
    """Run a command with stderr on a terminal of ``columns``, and return what was seen.

    ``press``: Ctrl-C is pressed once the bottom line matches this pattern; ``stdout``: stdout is on
    the terminal, too, which then has TALL rows.
    """
    rows = TALL if stdout else ROWS
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    unwanted = ("NO_COLOR", "PREFIX_DISTILL_PLAIN", "COLUMNS", "LINES")
    environment = {name: v for name, v in os.environ.items() if name not in unwanted}
    environment |= {"TERM": "xterm", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    out = theirs if stdout else subprocess.PIPE
    process = subprocess.Popen(command, stderr=theirs, stdin=theirs, stdout=out, env=environment)
    os.close(theirs)
    screen = pyte.Screen(columns, rows)
    stream = pyte.ByteStream(screen)
    seen = Seen()
    started = time.monotonic()
    while time.monotonic() - started < limit:
        ready, _, _ = select.select([ours], [], [], 0.05)
        if ready:
            try:
                stream.feed(os.read(ours, 1 << 16))
            except OSError:  # the program has closed its terminal
                break
            _note_change(seen, screen, time.monotonic() - started)
        bottom = seen.bottom_lines()[-1:]
        if press is not None and seen.pressed is None and bottom and re.search(press, bottom[0]):
            process.send_signal(signal.SIGINT)
            seen.pressed = time.monotonic() - started
        if not ready and process.poll() is not None:
            break
    if process.stdout is not None:
        with process.stdout:
            seen.out = process.stdout.read().decode()
    seen.code = process.wait(30)
    seen.ended = time.monotonic() - started
    os.close(ours)
    return seen


def _note_change(seen: Seen, screen: pyte.Screen, seconds: float) -> None:
    lines = [line.rstrip() for line in screen.display]
    while lines and not lines[-1]:
        lines.pop()
    if not seen.changes or seen.changes[-1][1] != lines:
        seen.changes.append((seconds, lines))


def watch_program(arguments: list, columns: int, press: str | None = None) -> Seen:
    """Run ``prefix-distill`` in a terminal of ``columns``; see `watch`."""
    command = [sys.executable, "-m", "prefix_distill", *map(str, arguments)]
    return watch(command, columns, press)


COMMANDS = """
from prefix_distill.api.quiet import hide_deprecations
from prefix_distill.cli.main import run_command
hide_deprecations()
for words in {words}:
    print("ended with", run_command(words), flush=True)
"""


def watch_commands(commands: list[list], columns: int) -> list[list[str]]:
    """Run commands in one process whose stdout and stderr are on a terminal of ``columns``.

    Return the lines of each. All have to end with exit code 0.
    """
    words = [list(map(str, command)) for command in commands]
    code = COMMANDS.format(words=words)
    seen = watch([sys.executable, "-c", code], columns, limit=400, stdout=True)
    assert seen.code == 0, seen.last
    ends = [i for i, line in enumerate(seen.last) if line == "ended with None"]
    assert len(ends) == len(commands), seen.last
    starts = [0, *(end + 1 for end in ends)]
    return [seen.last[start:end] for start, end in zip(starts, ends, strict=False)]


def watch_code(code: str, columns: int, press: str | None = None) -> Seen:
    """Run Python code in a terminal of ``columns``; see `watch`."""
    return watch([sys.executable, "-c", code], columns, press)
