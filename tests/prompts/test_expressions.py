"""Tests of the process that compares expressions: time limits, and math-verify that fails."""

import subprocess
import sys
import time

import pytest

from prefix_distill.prompts import expressions
from prefix_distill.prompts.answers import is_correct


@pytest.fixture
def fresh(monkeypatch):
    monkeypatch.setattr(expressions, "_slow", set())


def test_a_slow_answer_is_compared_once_and_lowers_the_time_limit(fresh, monkeypatch):
    monkeypatch.setattr(expressions, "SECONDS", 2)
    assert not is_correct(r"\boxed{3^{3^{3^3}}}", "27")
    expressions.start()
    start = time.monotonic()
    assert not is_correct(r"\boxed{ 3^{3^{3^3}} }", "28")  # no comparison
    assert time.monotonic() - start < 0.5
    limits = []
    monkeypatch.setattr(expressions, "_ask", lambda worker, request: limits.append(request))
    assert not is_correct(r"\boxed{y+1}", "z+2")
    assert limits[-1].rstrip().endswith(b"1]")


def test_a_broken_math_verify_is_named_in_one_line(tmp_path):
    package = tmp_path / "antlr4"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('another version')")
    program = (
        "from prefix_distill.errors import UserError\n"
        "from prefix_distill.prompts import expressions\n"
        "try:\n"
        "    expressions.start()\n"
        "except UserError as error:\n"
        "    print(error)\n"
    )
    path = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    environment = {"PYTHONPATH": f"{tmp_path}:{':'.join(sys.path)}"}
    done = subprocess.run(
        [sys.executable, "-c", path + program], env=environment, capture_output=True, text=True
    )
    assert "math-verify" in done.stdout and len(done.stdout.splitlines()) == 1, done.stderr
