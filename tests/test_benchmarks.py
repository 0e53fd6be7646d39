"""Test that every benchmark runs with --quick and does not change the recorded results."""

import subprocess
import sys

import pytest
from helpers import BENCHMARKS, PROGRAMS, ROOT, last_json, prepared

RESULTS = BENCHMARKS / "results"
COMMANDS = [
    *([name] for name in PROGRAMS),
    ["prefix", "--arms", "plugins"],
    ["prefix", "--arms", "cross"],
]
GRIDS = {  # arms file → arms that --quick keeps
    "prefix": {"full", "sft", "5%", "10%", "auto"},
    "plugins": {"full", "full soft-or 0.5", "slow", "slow effopd", "student uniform token"},
    "cross": {"strict", "simct", "sft"},
}
TABLES = {  # program → key of the table in its JSON document
    "cards": "pairs",
    "collapse": "runs",
    "cross_tokenizer": "modes",
    "decoding": "table",
    "divergence": "table",
    "gold": "arms",
    "graders": "table",
    "limit": "share_of_limit",
    "models": "classes",
    "plan": "runs",
    "prefix": "summary",
    "ranks": "table",
    "rollout": "table",
    "scaling": "table",
    "selection": "table",
    "shared_prompts": "table",
    "soak": "resumed_from",
    "update_vs_trl": "cases",
    "working_copy": "table",
}
# These programs share a work folder, because loading the GGUF file takes most of the time.
WORK = {
    "decoding": "smollm2",
    "limit": "smollm2",
    "rollout": "smollm2",
    "scaling": "smollm2",
    "shared_prompts": "smollm2",
    "update_vs_trl": ".",
}


def test_a_watched_run_reports_every_update(pair, questions, monkeypatch):
    """`update_vs_trl.py` and `gold.py` measure the time of our steps with `watched`."""
    import update_vs_trl

    watch, phases = update_vs_trl.watched(
        prepared(pair, questions, train__steps=2), lambda row: row["rollout/taught_tokens"]
    )
    assert len(watch.tokens) == len(phases) == 2
    assert all(tokens > 0 for tokens in watch.tokens)
    assert all(row["student_update"] > 0 for row in phases)


def test_a_missing_package_is_named_in_one_line():
    """`test_quick_runs_print_their_table` skips a program that exits with this message."""
    code = "import measure; measure.require('no_such', 'pip install it')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=BENCHMARKS, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == "the package no_such is not installed: pip install it\n"


@pytest.mark.long
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_quick_runs_print_their_table(command, tmp_path_factory):
    """The last line is a JSON document with the table, and no recorded result changes."""
    name, *flags = command
    if name in WORK:
        flags += ["--work", str(tmp_path_factory.getbasetemp() / "pair" / WORK[name])]
    before = recorded()
    done = subprocess.run(
        [sys.executable, f"tests/benchmarks/{name}.py", "--quick", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert recorded() == before
    last = (done.stderr.splitlines() or [""])[-1]
    if done.returncode == 2 and "is not installed" in last:
        pytest.skip(last)
    assert done.returncode == 0, done.stderr
    document = last_json(done.stdout)
    if name in TABLES:
        assert document[TABLES[name]]
    if name == "prefix":
        assert_has_its_arms(document)


def recorded() -> dict[str, bytes]:
    """Return file name → content of the recorded results."""
    return {file.name: file.read_bytes() for file in RESULTS.iterdir()}


def assert_has_its_arms(document: dict) -> None:
    """Check that every arm of --quick has a row and that the claims were evaluated."""
    grid = document["arms_file"]
    assert {row["arm"] for row in document["summary"]} == {"untrained", *GRIDS[grid]}
    assert len(document["claims"]) >= 2
    if grid == "plugins":
        assert document["extrapolations"]["slow effopd"]["k"]
