"""The benchmarks: each starts, answers with --quick, and leaves the recorded results alone."""

import sys
from pathlib import Path

import pytest

from test_train import prepared

BENCHMARKS = Path(__file__).parent / "benchmarks"


def test_a_watched_run_reports_every_update(pair, questions, monkeypatch):
    """`update_vs_trl.py` and `gold.py` time our updates with it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import update_vs_trl

    watch, phases = update_vs_trl.watched(
        prepared(pair, questions, train__steps=2), lambda row: row["rollout/taught_tokens"]
    )
    assert len(watch.tokens) == len(phases) == 2
    assert all(tokens > 0 for tokens in watch.tokens)
    assert all(row["student_update"] > 0 for row in phases)
