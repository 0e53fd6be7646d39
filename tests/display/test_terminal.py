"""Run commands in a real terminal, and see what a person sees; and what a log gets.

The files screens/COMMAND-COLUMNS.txt hold how live lines begin that must appear, with every number
as 0.
"""

import os
import re
import subprocess
import sys

import pytest
from helpers import TESTS

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
if os.name != "nt":
    from terminals import Seen, shape, watch_code, watch_program

SCREENS = TESTS / "screens"
# On an idle machine the screen changes every second. A loaded one gets more time.
MOST_PAUSE = 2.0 + 6.0
MOST_LATENCY = 0.5 + 2.5
RUN = [
    *("run", "--device", "cpu", "--dtype", "float32", "--steps", 40, "--batch-size", 2),
    *("--samples", 1, "--prefix", 8, "--problems", 24, "--kl-prompts", 2),
    *("--check-samples", 2, "--eval-every", 20, "--generation-rows", 4, "--lr", 1e-3),
]
CHECK = ["check", *RUN[1:]]
EVAL = ["eval", "--device", "cpu", "--dtype", "float32", "--limit", 24, "--generation-rows", 4]
LONG_EVALUATION = ["--problems", 3000, "--generation-rows", 8]


def wanted(name: str, columns: int) -> list[str]:
    return (SCREENS / f"{name}-{columns}.txt").read_text(encoding="utf-8").splitlines()


def check_screens(seen: Seen, name: str, columns: int) -> None:
    """Check what every command shows: its live line, no gap, and nothing left of the line."""
    assert seen.code == 0, seen.last
    live = [line for line in seen.bottom_lines() if " · " in line]
    assert max(map(len, live)) < columns
    shapes = {shape(line) for line in live}
    for begin in wanted(name, columns):
        assert any(line.startswith(begin) for line in shapes), (begin, sorted(shapes))
    assert seen.changes[0][0] < MOST_PAUSE
    assert seen.longest_pause() < MOST_PAUSE, [t for t, _ in seen.changes]
    assert not [line for line in seen.last if re.search(r"left$| · \d+ s$", line)]
    assert seen.document


@pytest.mark.parametrize(
    "columns", [80, *(pytest.param(n, marks=pytest.mark.long) for n in (40, 120))]
)
def test_the_demo_shows_which_run_trains_and_the_time_left_in_all(tmp_path, columns):
    seen = watch_program(["demo", "--out", tmp_path / "demo"], columns)
    check_screens(seen, "demo", columns)
    if columns > 40:
        took = [line for line in seen.last if "took" in line]
        assert re.search(r"^prefix arm: 30/30 · train reverse KL \S+ · acc \S+% · took", took[0])


@pytest.mark.parametrize(
    "columns", [100, *(pytest.param(n, marks=pytest.mark.long) for n in (40, 80))]
)
def test_a_run_shows_steps_and_time_left(tmp_path, columns):
    seen = watch_program([*RUN, "--out", tmp_path / "run"], columns)
    check_screens(seen, "run", columns)
    if columns > 40:
        assert "step 40 · accuracy" in seen.text
        summary = r"40 steps, .* of training and evaluation .* next prefix-distill show"
        assert re.search(summary, seen.text)


def test_a_check_shows_which_check_runs(tmp_path):
    seen = watch_program(CHECK, 120)
    check_screens(seen, "check", 120)


@pytest.mark.parametrize(
    "columns", [40, *(pytest.param(n, marks=pytest.mark.long) for n in (80, 120))]
)
def test_an_evaluation_shows_its_answers(tmp_path, columns):
    seen = watch_program([*EVAL, "--out", tmp_path / "answers.jsonl"], columns)
    check_screens(seen, "eval", columns)


# ── Ctrl-C


def test_ctrl_c_is_answered_at_once_and_cuts_an_evaluation_off(tmp_path):
    arguments = [*RUN, *LONG_EVALUATION, "--out", tmp_path / "run"]
    seen = watch_program(arguments, 100, press=r"^0/40 · evaluating .*[1-9]\d?%")
    assert seen.code == 130 and seen.out == "" and seen.pressed is not None
    answered = seen.first_time("press again to stop now") - seen.pressed
    assert 0 <= answered < MOST_LATENCY and seen.ended - seen.pressed < 15
    assert "leaving this evaluation unfinished; no step was trained; press again" in seen.text
    assert re.search(r"interrupted \(SIGINT\) before the first step, so training starts", seen.text)
    assert not (tmp_path / "run/before.json").exists()


def test_ctrl_c_during_training_finishes_the_update(tmp_path):
    arguments = [*RUN, "--steps", 100000, "--eval-every", 0, "--out", tmp_path / "run"]
    seen = watch_program(arguments, 100, press=r"^[1-9]\d*/100000 · train reverse KL")
    assert seen.code == 130 and seen.pressed is not None
    assert seen.first_time("press again to stop now") - seen.pressed < MOST_LATENCY
    assert re.search(r"finishing this \w+, then saving; press again|this save; press", seen.text)
    assert re.search(r"interrupted \(SIGINT\) after step \d+; the state is saved", seen.text)


def test_ctrl_c_during_eval_does_not_advise_to_resume(tmp_path):
    file = tmp_path / "answers.jsonl"
    seen = watch_program(
        [*EVAL, "--limit", 3000, "--out", file], 100, press=r"^evaluating .*[1-9]\d?%"
    )
    assert seen.code == 130 and seen.pressed is not None and seen.ended - seen.pressed < 15
    assert seen.last[-1] == "aborted; nothing was written" and "resume" not in seen.text
    assert not file.exists()


STUCK = """
import hashlib
from prefix_distill.display import Terminal, phase
with Terminal(), phase("computing"):
    hashlib.pbkdf2_hmac("sha256", b"", b"", 20_000_000)  # no signal handler runs during this
"""


def test_ctrl_c_is_answered_while_the_main_thread_cannot():
    seen = watch_code(STUCK, 80, press=r"computing · 1 s")
    assert seen.pressed is not None
    answered = seen.first_time("stopping") - seen.pressed
    assert answered < MOST_LATENCY < seen.ended


OTHER_SIGNAL = """
import os, signal, time
from prefix_distill.display import Terminal, phase
signal.signal(signal.SIGALRM, lambda *_: None)
with Terminal(), phase("working"):
    for _ in range(10):
        os.kill(os.getpid(), signal.SIGALRM)
        time.sleep(0.1)
"""


def test_a_signal_that_stops_nothing_is_not_answered():
    seen = watch_code(OTHER_SIGNAL, 80)
    assert seen.code == 0 and seen.last == []


# ── the live line and other writers

OTHERS = """
import sys, time, warnings
from prefix_distill.display import Terminal, phase, print_line
with Terminal(), phase("working", 3, "parts") as p:
    for i in range(3):
        time.sleep(0.3)
        print_line(f"note {i}")
        sys.stderr.write("a line in ")
        time.sleep(0.3)
        sys.stderr.write("two parts\\n")
        p.advance()
    warnings.warn("careful")
print("document")
"""


def test_what_others_write_stands_above_the_live_line():
    seen = watch_code(OTHERS, 80)
    assert seen.code == 0 and seen.out == "document\n"
    expected = []
    for i in range(3):
        expected += [f"note {i}", "a line in two parts"]
    assert seen.last[:6] == expected and "UserWarning: careful" in seen.last[6]
    assert any(re.search(r"^working \d/3 parts · ", line) for line in seen.bottom_lines())
    assert not any("working" in line for line in seen.last)


FORKED = """
import os, sys, time
from prefix_distill.display import Terminal, phase
with Terminal() as terminal, phase("working"):
    time.sleep(0.5)
    with terminal.screen.lock:  # as if the thread were writing
        child = os.fork()
    if child == 0:
        sys.stderr.write("from the child\\n")
        with phase("of the child"):
            time.sleep(0.5)
        os._exit(0)
    _, status = os.waitpid(child, 0)
print(status)
"""


def test_a_forked_process_leaves_the_terminal_to_its_parent():
    seen = watch_code(FORKED, 80)
    assert seen.code == 0 and seen.out == "0\n"
    assert not any("of the child" in line for line in seen.bottom_lines())


FAILING = """
import time
from prefix_distill.display import Terminal, phase
with Terminal(), phase("working"):
    time.sleep(0.6)
    raise RuntimeError("broken")
"""


def test_an_exception_leaves_nothing_of_the_live_line():
    seen = watch_code(FAILING, 80)
    assert seen.code == 1 and seen.last[-1] == "RuntimeError: broken"
    assert not any(line.startswith("working") for line in seen.last)


IDLE = """
import time
from prefix_distill.display import Terminal, phase
with Terminal(), phase("working", 100, "parts") as p:
    time.sleep(0.5)
    begun = time.process_time()
    for _ in range(40):
        time.sleep(0.1)
        p.advance()
    print(time.process_time() - begun)
"""


def test_the_live_line_takes_about_one_percent_of_a_core():
    seen = watch_code(IDLE, 80)
    assert float(seen.out) < 4 * 0.01 * 3  # a loaded machine counts more


# ── a log

LOGGED = """
import time
from prefix_distill.display import Terminal, phase, screen
screen.LONG, screen.EVERY, screen.LOG_TICK = 0.3, 0.5, 0.05
with Terminal():
    with phase("short"):
        time.sleep(0.1)
    with phase("preparing"), phase("evaluating", 20, "answers") as p:
        for _ in range(20):
            time.sleep(0.1)
            p.advance()
    with phase("sampling"):
        time.sleep(0.6)
"""


@pytest.mark.parametrize("plain", ["", "1"])
def test_a_log_names_long_phases_and_what_is_done_from_time_to_time(plain):
    done = subprocess.run(
        [sys.executable, "-c", LOGGED],
        capture_output=True,
        text=True,
        env=os.environ | {"PREFIX_DISTILL_PLAIN": plain},
    )
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert 2 <= len(lines) <= 6 and "\r" not in done.stderr and "\x1b" not in done.stderr
    for line in lines:
        assert re.fullmatch(r"evaluating \d+/20 answers, \d+ s left", line), lines
