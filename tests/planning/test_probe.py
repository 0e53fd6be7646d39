"""The probe tells a wrong start from a missing skill, on networks where the answer is known."""

import json
import math
from pathlib import Path

import pytest
from helpers import invoke, last_json

from prefix_distill.planning import probe


def curve(*points):
    return [
        {"tokens": n, "value": right / 10, "right": [1.0] * right + [0.0] * (10 - right)}
        for n, right in points
    ]


def test_recommendations_by_hand():
    teacher = curve((0, 10))[0]
    held = {5: 0.4, 10: 0.85, 60: 0.9}
    assert probe.recommend(curve((0, 2), (5, 5), (10, 9), (60, 10)), teacher, held, 100)[0] == 10
    prefix, reason = probe.recommend(curve((0, 2), (5, 3), (50, 6)), teacher, held, 100)
    assert (
        prefix == "full"
        and reason.startswith("a prefix will not do")
        and "50% of the gap" in reason
    )
    prefix, reason = probe.recommend(curve((0, 10), (5, 10)), teacher, held, 100)
    assert prefix is None and "not better" in reason
    assert probe.recommend(None, None, held, 100)[0] == 10
    assert probe.recommend(None, None, {10: 0.2, 50: 0.5}, 100)[0] == "full"
    assert (
        probe.recommend(None, None, {10: 0.2, 60: 0.9}, 100)[0] == "full"
    )  # more than half of the answer is no prefix


def test_shares_and_bins_by_hand():
    assert probe._share([[3.0, 1.0], [4.0, 0.0]], 0.5) == pytest.approx(7 / 8)
    facts = [
        {"divergence": [1.0, 2.0, 3.0], "entropy": [0.1, 0.2, 0.3]},
        {"divergence": [3.0], "entropy": [0.3]},
    ]
    bins = probe._bins(facts)
    assert [(b["from"], b["tokens"], b["kl"]) for b in bins] == [
        (0, 2, 2.0),
        (1, 1, 2.0),
        (2, 1, 3.0),
    ]


@pytest.mark.long
@pytest.mark.parametrize("task, problems", [("shared", 60), ("tied", 40)])
def test_it_knows_where_prefixes_do_not_do(tmp_path, task, problems):
    """Where they do: the README's own `probe` on `choice`, in test_readme.py."""
    code, out, err = invoke(
        "probe",
        "--student",
        f"lab:{task}/student",
        "--teacher",
        f"lab:{task}/teacher",
        "--dataset",
        f"lab:{task}",
        "--problems",
        problems,
        "--out",
        tmp_path / "probe",
    )
    assert code == 0, err
    found = last_json(out)
    assert found["recommended_prefix"] == "full" and found["reason"] in err
    assert "a prefix will not do" in found["reason"] and found["expected_saving"] == pytest.approx(
        1
    )
    assert json.loads((tmp_path / "probe/probe.json").read_text()) == found
    assert (tmp_path / "probe/probe.png").stat().st_size > 5000
    corners = found["quadrants"]["quadrants"].values()
    assert [
        math.fsum(c[key] for c in corners) for key in ("tokens", "divergence")
    ] == pytest.approx([1, 1])
    assert "low entropy, high divergence" in err
    total = math.fsum(b["kl"] * b["tokens"] for b in found["by_position"])
    tokens = sum(b["tokens"] for b in found["by_position"])
    assert total / tokens == pytest.approx(
        found["kl"]["value"], rel=1e-6
    ) and tokens == pytest.approx(problems * found["student_tokens"])
    lifted, decayed = found["teacher_prefix_curve"], found["teacher_decay_curve"]
    assert [row["tokens"] for row in lifted] == [row["tokens"] for row in decayed] and lifted[0][
        "tokens"
    ] == 0
    assert decayed[0]["value"] > 0.9 > 0.5 > lifted[0]["value"]  # what each model does alone
    assert {"student_decode", "teacher_decode", "scoring"} <= found["flops"]["by_phase"].keys()


def test_without_answers_it_goes_by_the_divergence(pair, questions, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "".join(
            json.dumps({"question": json.loads(line)["question"]}) + "\n"
            for line in Path(questions).read_text().splitlines()
        )
    )
    code, out, err = invoke(
        "probe",
        "--student",
        pair[0],
        "--teacher",
        pair[1],
        "--dataset",
        prompts,
        "--max-new-tokens",
        "20",
        "--problems",
        "8",
        "--out",
        tmp_path / "out",
    )
    assert code == 0, err
    found = last_json(out)
    assert (
        found["recommended_prefix"] == "full" and "no reference answers" in found["reason"]
    )  # two random networks differ everywhere
    assert set(found["teacher_prefix_curve"]) == {None} or found["teacher_prefix_curve"] == [None]
