"""Test the disk space that a run folder is expected to take."""

import shutil

import pytest
from helpers import invoke, last_json

from prefix_distill.config import build
from prefix_distill.planning import disk as disk_space
from prefix_distill.planning.disk import estimate_disk

BEST = {"evaluate.every": 5}
NO_BEST = {"evaluate.every": 0, "evaluate.tail_every": 0}


@pytest.mark.parametrize(
    "settings, training, finished",
    [
        (NO_BEST, 36, 4 + 12),
        (BEST, 4 + 36, 4 + 4 + 12),
        (NO_BEST | {"checkpoint.keep": 3}, 48, 4 + 36),
        (BEST | {"checkpoint.dtype": "bfloat16"}, 2 + 36, 2 + 2 + 12),
    ],
)
def test_bytes_per_parameter_if_all_weights_train(settings, training, finished):
    disk = estimate_disk(build(settings), parameters=1000, trained=1000, base_bytes=4)
    assert disk == {"training": 1000 * training, "finished": 1000 * finished}


def test_an_adapter_is_small_until_it_is_merged():
    adapter = NO_BEST | {"adapter.rank": 8}
    disk = estimate_disk(build(adapter), parameters=1000, trained=10, base_bytes=2)
    assert disk == {"training": 360, "finished": 160}
    merged = build(adapter | {"adapter.merge": True})
    disk = estimate_disk(merged, parameters=1000, trained=10, base_bytes=2)
    assert disk == {"training": 240 + 2040, "finished": 120 + 2040}


def test_a_plan_says_what_the_run_folder_takes():
    code, out, err = invoke("plan", "--prompt-tokens", 20, "--prefixes", "full", "--steps", 2)
    assert code == 0, err
    document = last_json(out)
    assert document["disk"]["training"] > document["disk"]["finished"] > 0
    assert "run folder: up to" in err


def test_a_dry_run_says_flops_and_disk_on_the_screen(tmp_path):
    code, out, err = invoke("run", "--dry-run", "--steps", 2, "--out", tmp_path / "run")
    assert code == 0, err
    assert last_json(out)["disk"]["training"] > 0
    assert "  disk      up to " in err and "  FLOPs     " in err


@pytest.mark.parametrize("command", [["check"], ["run", "--dry-run"]])
def test_a_disk_with_too_little_space_is_a_warning(command, tmp_path, monkeypatch):
    monkeypatch.setattr(
        disk_space.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 8, 1)
    )
    code, out, err = invoke(*command, "--steps", 2, "--out", tmp_path / "run")
    assert code == 0, err
    assert any("free some space" in text for text in last_json(out)["warnings"])
    assert "free some space" in err
