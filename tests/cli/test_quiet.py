"""Commands hide the deprecation warnings of their libraries."""

import importlib.util
import os
import subprocess
import sys

import pytest
from helpers import command

SMALL = ("--prefix", 4, "--batch-size", 2, "--problems", 2, "--kl-prompts", 2)
LIBRARY = """
import sys, warnings
from prefix_distill.cli.main import main

sys.argv = ["prefix-distill", "help", "exit-codes"]
try:
    main()
finally:
    warnings.warn_explicit("an old name", {category}, "library.py", 1)
"""
METHOD = ("--gradient-checkpointing",)
if importlib.util.find_spec("peft") is not None:
    METHOD += ("--lora", 2)  # peft uses old names of transformers


@pytest.fixture(scope="module")
def given(pair, questions):
    """Return the options that name both models and the dataset."""
    return "--student", pair[0], "--teacher", pair[1], "--dataset", questions


def run_quietly(*arguments, **environment) -> None:
    """Run a command; assert that it succeeds without ``Warning`` on stderr."""
    done = command(*arguments, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr


def test_run_export_and_eval_are_quiet(given, questions, tmp_path):
    run, exported = tmp_path / "run", tmp_path / "exported"
    run_quietly("run", *given, *SMALL, *METHOD, "--steps", 1, "--out", run)
    run_quietly("export", run, "--out", exported)
    scores = ("--problems", 2, "--max-new-tokens", 8, "--out", tmp_path / "eval.jsonl")
    run_quietly("eval", "--model", exported, "--dataset", questions, *scores)


def test_plan_and_check_are_quiet(given):
    run_quietly("plan", *given, *SMALL, *METHOD)
    run_quietly("check", *given, *SMALL, *METHOD)


def test_probe_is_quiet(given, tmp_path):
    lengths = ("--problems", 2, "--max-new-tokens", 20)
    run_quietly("probe", *given, *lengths, "--out", tmp_path / "probe")


def test_run_calls_no_deprecated_name(given, tmp_path):
    """With this PYTHONWARNINGS, Python raises at the first warning and the command hides none."""
    options = (*SMALL, "--gradient-checkpointing", "--steps", 1, "--out", tmp_path / "run")
    run_quietly("run", *given, *options, PYTHONWARNINGS="error::FutureWarning")


def warn_after_command(category: str, *flags: str) -> subprocess.CompletedProcess:
    """Run a command in a Python with ``flags``, then warn as a library in the same process."""
    return subprocess.run(
        [sys.executable, *flags, "-c", LIBRARY.format(category=category)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"},
    )


@pytest.mark.parametrize("category", ["FutureWarning", "DeprecationWarning"])
def test_a_deprecation_is_hidden_unless_a_python_option_shows_it(category):
    assert category not in warn_after_command(category).stderr
    assert f"library.py:1: {category}: an old name" in warn_after_command(category, "-Wd").stderr
    raised = warn_after_command(category, "-W", f"error::{category}")
    assert raised.returncode == 1 and f"{category}: an old name" in raised.stderr


def test_other_warnings_are_shown():
    assert "UserWarning: an old name" in warn_after_command("UserWarning").stderr
