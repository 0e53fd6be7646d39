"""Test that Ctrl-C ends every command with one line and 130, also while libraries load."""

import os
import signal
import subprocess
import sys

import pytest
from helpers import flags, invoke

from prefix_distill.signals import ImportGuard
from prefix_distill.training import session

if os.name != "nt":
    from terminals import watch_program

pytestmark = pytest.mark.skipif(os.name == "nt", reason="sends SIGINT to one process")

# A library that is interrupted while it loads. Like torch, which asks for numpy while it loads, it
# drops the exception.
INTERRUPTED = """
import os, signal, time
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
except BaseException:
    pass
raise ImportError("cannot load module more than once per process")
"""
NOTHING = "aborted; nothing was written"


@pytest.mark.parametrize(
    ("library", "command"),
    [
        ("typer", ("--help",)),  # the first library that loads
        ("yaml", ("run",)),
        ("transformers", ("check",)),
        ("transformers", ("run",)),
        ("numpy", ("demo",)),
        ("torch", ("env",)),
        ("datasets", ("export", "run", "--out", "exported")),
    ],
)
def test_ctrl_c_while_a_library_loads_ends_with_one_line(tmp_path, library, command):
    (tmp_path / f"{library}.py").write_text(INTERRUPTED)
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", ""), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "prefix_distill", *command],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    lines = [
        line for line in done.stderr.splitlines() if not line.startswith("loading libraries, ")
    ]
    assert (done.returncode, lines, done.stdout) == (130, [NOTHING], "")
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".py"] in (
        [],
        ["__pycache__"],
    )


def test_ctrl_c_while_libraries_load_leaves_nothing_of_the_live_line():
    seen = watch_program(["check"], 80, press=r"loading libraries")
    assert seen.code == 130 and seen.last[-1] == NOTHING
    assert set(seen.last[:-1]) <= {"stopping"}


def test_a_command_in_the_background_of_a_shell_stays_deaf_to_ctrl_c():
    """Such a process ignores SIGINT from its start, and so do its children."""
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with ImportGuard(pytest.fail):
            os.kill(os.getpid(), signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, former)


def test_a_guard_inside_another_one_restores_it():
    former = signal.getsignal(signal.SIGINT)
    with ImportGuard(pytest.fail):
        outer = signal.getsignal(signal.SIGINT)
        with ImportGuard(pytest.fail), pytest.raises(KeyboardInterrupt):
            assert signal.getsignal(signal.SIGINT) != outer
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == outer
    assert signal.getsignal(signal.SIGINT) == former


@pytest.mark.parametrize("has_begun", [False, True])
def test_a_run_advises_to_resume_only_after_it_has_begun_to_write(
    pair, questions, tmp_path, monkeypatch, has_begun
):
    def interrupt(*arguments, **named):
        raise KeyboardInterrupt

    where = (session, "step_optimizer")
    if not has_begun:
        from prefix_distill.planning import checks

        where = (checks, "examine")
    monkeypatch.setattr(*where, interrupt)
    code, out, err = invoke(*flags(pair, questions, tmp_path / "run"))
    assert code == 130 and out == ""
    last = err.splitlines()[-1]
    if has_begun:
        assert last.startswith("aborted without saving; ") and "--resume" in last
    else:
        assert last == NOTHING and not (tmp_path / "run").exists()
