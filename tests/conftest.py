"""Fixtures that every folder of tests uses, and the order in which tests run."""

import json
import os

# before torch: two busy processes must not spin at barriers
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from helpers import PLUGINS, save_tiny

from prefix_distill.plugins import load_plugins

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # and in the processes that tests start


def pytest_collection_modifyitems(items):
    """The longest tests first, so that two workers end together."""
    longest = (
        "test_commands_run_in_order",
        "test_four_updates",
        "test_two_ranks_are_one",
        "test_two_kills",
        "test_a_comparison_goes_on",
        "test_gpus_starts_three_ranks",
    )
    items.sort(key=lambda item: not item.name.startswith(longest))


@pytest.fixture
def registered():
    """Register what the modules in tests/plugins register, for one test."""
    load_plugins(",".join(map(str, sorted(PLUGINS.glob("*.py")))))
    yield
    load_plugins(None)


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """(student, teacher): paths of two tiny Llamas of different size with one tokenizer."""
    root = tmp_path_factory.mktemp("pair")
    return save_tiny(root / "student", seed=1), save_tiny(
        root / "teacher", seed=2, width=48, layers=3
    )


@pytest.fixture(scope="session")
def questions(tmp_path_factory):
    """A small JSONL dataset of sums with answers; prompts of different lengths."""
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
