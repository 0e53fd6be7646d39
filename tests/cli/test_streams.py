"""Commands exit cleanly if stdout or stderr is full, closed or not read."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import invoke

pytestmark = pytest.mark.skipif(os.name == "nt", reason="uses a POSIX shell")


def shell(line: str) -> subprocess.CompletedProcess:
    """Run a line of sh; $P is the program."""
    program = f"{sys.executable} -m prefix_distill"
    return subprocess.run(
        ["sh", "-c", line],
        capture_output=True,
        text=True,
        env=os.environ | {"P": program},
        timeout=120,
    )


def test_no_arguments_show_the_help():
    code, out, err = invoke()
    assert code == 2 and out == "" and err == invoke("--help")[1]
    assert not err.startswith("error") and "Usage: prefix-distill" in err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("words", ["help", "help devices", "--help"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_stdout_is_reported_in_one_line(words, unbuffered):
    done = shell(f"PYTHONUNBUFFERED={unbuffered} $P {words} > /dev/full")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "error: stdout: cannot be written (No space left on device); free space or name another "
        "file"
    ]


@pytest.mark.parametrize(
    "line, code, lines",
    [
        ("$P help nope > /dev/full", 2, 1),
        ("$P help nope 2> /dev/full", 2, 0),
        ("$P help > /dev/full 2> /dev/full", 1, 0),
        ("$P help nope 2>&-", 2, 0),
        ("$P help >&-", 0, 0),
        ("$P help <&- >&- 2>&-", 0, 0),
        ("{ $P help devices; echo $? >&2; } | true", 0, 1),
    ],
)
def test_streams_that_are_full_closed_or_unread(line, code, lines):
    if "/dev/full" in line and not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    done = shell(line)
    assert done.returncode == code and done.stdout == ""
    assert len(done.stderr.splitlines()) == lines, done.stderr
    assert "Traceback" not in done.stderr


def test_a_closed_stderr_does_not_mix_with_stdout():
    done = shell("$P help 2>&-")
    assert done.returncode == 0 and done.stdout == shell("$P help").stdout


def test_output_piped_to_head_is_complete():
    done = shell("$P help | head -1")
    assert done.returncode == 0 and done.stdout.startswith("prefix-distill help ")
    assert done.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    "redirection, code",
    [("> /dev/full 2> /dev/full", 1), ("> /dev/full", 1), ("2>&1 | head -1", 0)],
)
def test_a_run_with_full_or_unread_streams_is_saved(tmp_path, redirection, code):
    """The progress goes to stderr, the result document to stdout."""
    flags = (
        "--steps 1 --batch-size 1 --samples 1 --prefix 2 --max-new-tokens 4 --problems 1 "
        "--kl-prompts 1 --check-samples 0 --device cpu"
    )
    done = shell(f"$P run {flags} --out {tmp_path / 'run'} {redirection}")
    assert done.returncode == code and "Traceback" not in done.stderr
    if redirection == "> /dev/full":
        assert done.stderr.splitlines()[-1].startswith("error: stdout: cannot be written (No space")
    assert (tmp_path / "run/model/config.json").is_file()
    assert '"result"' in (tmp_path / "run/run.json").read_text()
