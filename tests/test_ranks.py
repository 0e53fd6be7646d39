"""Two and three gloo ranks are one: same rollouts, same rows, same decisions, same weights to 1e-5."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from conftest import invoke, last_json


def launch(ranks, pair, questions, out, *more):
    return start(ranks, out, "--student", pair[0], "--teacher", pair[1], "--dataset", questions, "--steps", "3", "--prefix", "12",
                 "--max-new-tokens", "32", "--batch-size", "5", "--samples", "2", "--micro-batch-size", "2", "--eval-samples", "4",
                 "--eval-every", "2", "--lr", "1e-4", "--reduction", "sequence", "--device", "cpu", *more)


def start(ranks, out, *flags):
    """`run` on so many ranks (one: in this process) → (document, metric rows)."""
    flags = ["run", *flags, "--out", str(out)]
    if ranks == 1:
        code, said, err = invoke(*flags)
    else:
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "prefix_distill.py",
                               *flags], capture_output=True, text=True, timeout=300)
        code, said, err = done.returncode, done.stdout, done.stderr
    assert code == 0, err[-2000:]
    return last_json(said), [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_ranks_change_nothing(pair, questions, tmp_path):
    alone, rows = launch(1, pair, questions, tmp_path / "1")
    one = load_file(tmp_path / "1/model/model.safetensors")
    document, others = launch(3, pair, questions, tmp_path / "3")  # two: below
    for row, other in zip(rows, others, strict=True):
        for key in row:
            if not key.startswith(("time/", "flops/executed")):
                assert other[key] == pytest.approx(row[key], rel=1e-5), key
    weights = load_file(tmp_path / "3/model/model.safetensors")
    for name in one:
        torch.testing.assert_close(weights[name], one[name], rtol=0, atol=1e-5)
    for key in ("accuracy_after", "tokens", "steps"):
        assert document[key] == alone[key], key
    assert document["kl_after"]["value"] == pytest.approx(alone["kl_after"]["value"], rel=1e-5)
    assert document["flops"]["useful"] == pytest.approx(alone["flops"]["useful"])


def test_ranks_change_no_decision_of_schedules_windows_and_off_policy_rows(pair, questions, tmp_path):
    """An adaptive prefix that grows, a window ranked by divergence, importance over the global batch, candidates scored in shards,
    the teacher's text in a share of the rows, tail probes."""
    more = ("--select", "soft-or", "--keep", "0.5", "--extrapolate", "effopd", "--extrapolate-score", "heldout-kl",
            "--extrapolate-problems", "5", "--position-weight", "moderate", "--steps", "12", "--prefix", "auto:6:3", "--window", "highest-kl:4", "--off-policy", "sft:0.3", "--eval-every", "0",
            "--tail-every", "5", "--tail-prompts", "3")
    (alone, rows), (both, others) = (launch(n, pair, questions, tmp_path / str(n), *more) for n in (1, 2))
    assert alone["prefix_decisions"] and len(alone["tail_probes"]) == 2
    for row, other in zip(rows, others, strict=True):
        for key in row:
            if not key.startswith(("time/", "flops/")):  # micro-batches, and so readings of a prompt, are cut per rank
                assert other[key] == pytest.approx(row[key], rel=1e-4), key
    assert [d["step"] for d in both["prefix_decisions"]] == [d["step"] for d in alone["prefix_decisions"]]
    assert [x["step"] for x in alone["extrapolations"]] == [1, 2, 4, 8] and any(x["k"] for x in alone["extrapolations"])
    for trigger, other in zip(alone["extrapolations"], both["extrapolations"], strict=True):
        assert other["k"] == trigger["k"] and other["scores"] == pytest.approx(trigger["scores"], rel=1e-4)
    for probe, other in zip(alone["tail_probes"], both["tail_probes"], strict=True):
        assert other == pytest.approx(probe, rel=1e-3)
    texts = [json.loads((tmp_path / str(n) / "teacher-text.json").read_text()) for n in (1, 2)]
    assert texts[0]["texts"] == texts[1]["texts"]
    assert texts[1]["ledger"]["useful"] == pytest.approx(texts[0]["ledger"]["useful"])


def test_ranks_teach_from_the_reading_that_selects(pair, tmp_path):
    """Where every rank's rollouts are one micro-batch, nothing but the heads runs twice, under DDP as alone."""
    file = tmp_path / "even.jsonl"
    file.write_text("".join(json.dumps({"question": f"{i}+{i}?", "answer": "1"}) + "\n" for i in range(10, 50)))
    more = ("--select", "overconfident", "--keep", "0.5", "--micro-batch-size", "10", "--steps", "2", "--prefix", "4")
    (alone, rows), (both, others) = (launch(n, pair, str(file), tmp_path / str(n), *more) for n in (1, 2))
    for row, other in zip(rows, others, strict=True):
        for key in row:
            if not key.startswith(("time/", "flops/executed")):
                assert other[key] == pytest.approx(row[key], rel=1e-5), key
    for phase in (alone["flops"]["by_phase"]["selection"], both["flops"]["by_phase"]["selection"]):
        assert phase["useful"] == phase["executed"] == 2 * 260 * (32 + 48) * 2 * 10 * 4  # 2 updates × 10 rollouts × 4 tokens
    one, two = (load_file(tmp_path / n / "model/model.safetensors") for n in "12")
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-5)
