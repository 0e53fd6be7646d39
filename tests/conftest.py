"""Fixtures for all test folders, and the order in which tests run."""

import json
import os

# Set before torch is imported: waiting OpenMP threads of parallel test processes must not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from helpers import PLUGINS, save_tiny

from prefix_distill.plugins import load_plugins

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start


def pytest_collection_modifyitems(items):
    """Run the longest tests first, so that both workers finish at about the same time."""
    longest = (
        "test_four_updates_lower",
        "test_commands_run_in_order",
        "test_four_updates",
        "test_two_ranks_equal_one_process",
        "test_a_comparison_goes_on",
        "test_gpus_starts_three_ranks",
    )
    items.sort(key=lambda item: not item.name.startswith(longest))


@pytest.fixture
def registered():
    """Load all plugins in tests/plugins for one test."""
    load_plugins(",".join(map(str, sorted(PLUGINS.glob("*.py")))))
    yield
    load_plugins(None)


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """Return the paths of a tiny student and a larger tiny teacher, Llamas with one tokenizer."""
    root = tmp_path_factory.mktemp("pair")
    return save_tiny(root / "student", seed=1), save_tiny(
        root / "teacher", seed=2, width=48, layers=3
    )


@pytest.fixture(scope="session")
def questions(tmp_path_factory):
    """Return the path of a JSONL file with 40 sums and answers; prompt lengths differ."""
    file = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [
        {
            "question": f"{'what is ' if i % 3 == 0 else ''}{i}+{i * i}?",
            "answer": f"#### {i + i * i}",
        }
        for i in range(40)
    ]
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(file)
