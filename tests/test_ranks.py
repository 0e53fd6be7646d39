"""Two and three gloo ranks are one: same rollouts, same rows, same weights to 1e-5."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from conftest import last_json


def launch(ranks, pair, questions, out):
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else [
        sys.executable]
    done = subprocess.run(
        [*start, "prefix_distill.py", "run", "--student", pair[0], "--teacher", pair[1], "--dataset", questions, "--steps", "3",
         "--prefix", "12", "--max-new-tokens", "32", "--batch-size", "5", "--samples", "2", "--micro-batch-size", "2",
         "--eval-samples", "4", "--eval-every", "2", "--lr", "1e-4", "--reduction", "sequence", "--device", "cpu",
         "--out", str(out)],
        capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return last_json(done.stdout), [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_ranks_change_nothing(pair, questions, tmp_path):
    alone, rows = launch(1, pair, questions, tmp_path / "1")
    one = load_file(tmp_path / "1/model/model.safetensors")
    for ranks in (2, 3):
        document, others = launch(ranks, pair, questions, tmp_path / str(ranks))
        for row, other in zip(rows, others, strict=True):
            for key in row:
                if not key.startswith(("time/", "flops/executed")):
                    assert other[key] == pytest.approx(row[key], rel=1e-5), key
        weights = load_file(tmp_path / str(ranks) / "model/model.safetensors")
        for name in one:
            torch.testing.assert_close(weights[name], one[name], rtol=0, atol=1e-5)
        for key in ("accuracy_after", "tokens", "steps"):
            assert document[key] == alone[key], key
        assert document["kl_after"]["value"] == pytest.approx(alone["kl_after"]["value"], rel=1e-5)
        assert document["flops"]["useful"] == pytest.approx(alone["flops"]["useful"])
