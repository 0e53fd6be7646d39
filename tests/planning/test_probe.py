"""Test the probe on pairs for which it is known whether a prefix suffices."""

import json
import math
from pathlib import Path

import pytest
from helpers import invoke, last_json, prepared, trained
from matplotlib import pyplot

from prefix_distill.engine import scoring
from prefix_distill.planning import probe
from prefix_distill.planning.probe import Curves
from prefix_distill.results import plots


def curve(*points):
    return [
        {"tokens": n, "value": right / 10, "right": [1.0] * right + [0.0] * (10 - right)}
        for n, right in points
    ]


def test_recommendations_by_hand():
    held = {5: 0.4, 10: 0.85, 60: 0.9}

    def recommend(*points):
        return probe.recommend(Curves(student=curve(*points), teacher=curve((0, 10))), held, 100)

    assert recommend((0, 2), (5, 5), (10, 9), (60, 10))[0] == 10
    prefix, reason = recommend((0, 2), (5, 3), (50, 6))
    assert prefix == "full"
    assert (
        reason.startswith("no prefix suffices")
        and "only 50% of the gap between the accuracies" in reason
    )
    prefix, reason = recommend((0, 10), (5, 10))
    assert prefix is None and "did not beat the student" in reason
    assert probe.recommend(None, held, 100)[0] == 10
    assert probe.recommend(None, {10: 0.2, 50: 0.5}, 100)[0] == "full"
    # a prefix longer than half of the answer is not recommended
    assert probe.recommend(None, {10: 0.2, 60: 0.9}, 100)[0] == "full"


def test_shares_and_bins_by_hand():
    kl = [[3.0, 1.0], [4.0, 0.0]]
    assert probe._share_of_kl(kl, probe._shorten(kl, 0.5)) == pytest.approx(7 / 8)
    bins = probe._bin_positions([[1.0, 2.0, 3.0], [3.0]], [[0.1, 0.2, 0.3], [0.3]])
    assert [(b["from"], b["tokens"], b["kl"]) for b in bins] == [
        (0, 2, 2.0),
        (1, 1, 2.0),
        (2, 1, 3.0),
    ]


@pytest.mark.long
@pytest.mark.parametrize("task, problems", [("shared", 60), ("tied", 40)])
def test_full_rollouts_are_recommended_where_no_prefix_suffices(tmp_path, task, problems):
    """Probe two tasks on which no prefix suffices.

    test_readme.py probes `choice`, on which a prefix suffices.
    """
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
    assert found["recommended_prefix"] == "full" and found["reason"] in " ".join(err.split())
    assert "no prefix suffices" in found["reason"] and found["expected_saving"] == pytest.approx(1)
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
    assert (
        decayed[0]["value"] > 0.9 > 0.5 > lifted[0]["value"]
    )  # at 0 tokens, each model answers alone
    assert {"student_decode", "teacher_decode", "scoring"} <= found["flops"]["by_phase"].keys()


def test_without_reference_answers_the_divergence_decides(pair, questions, tmp_path):
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
    # two random networks differ at every position
    assert found["recommended_prefix"] == "full" and "accuracy was not" in found["reason"]
    assert set(found["teacher_prefix_curve"]) == {None} or found["teacher_prefix_curve"] == [None]


def test_the_legend_of_the_picture_covers_no_curve(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(plots, "_save", lambda figure, file: saved.append(figure))
    points = [{"tokens": n, "value": 0.5, "low": 0.0, "high": 1.0} for n in (0, 10, 500)]
    bins = [{"from": n, "to": n + 9, "kl": 0.1, "entropy": 1.0} for n in (0, 10, 20)]
    share = {"tokens": 0.25, "divergence": 0.25}
    names = [f"{a} entropy, {b} divergence" for a in ("high", "low") for b in ("high", "low")]
    document = {
        "by_position": bins,
        "teacher_prefix_curve": points,
        "teacher_decay_curve": points,
        "quadrants": {"borders": (1.0, 1.0), "quadrants": dict.fromkeys(names, share)},
        "recommended_prefix": 64,
    }
    plots.draw_probe(document, tmp_path / "probe.png")
    [figure] = saved
    figure.tight_layout()
    figure.canvas.draw()
    [axes] = [axes for axes in figure.axes if axes.get_legend() is not None]
    legend, inside = axes.get_legend().get_window_extent(), axes.get_window_extent()
    assert legend.y0 >= inside.y1 and legend.x1 <= figure.bbox.x1
    assert legend.y1 <= figure._suptitle.get_window_extent().y0
    pyplot.close(figure)


@pytest.mark.parametrize("mixture", [False, True])
def test_a_probe_uses_at_most_the_prompts_of_the_data(pair, questions, tmp_path, mixture):
    """Request more prompts than the data has; one row is held out."""
    rows = Path(questions).read_text().splitlines(keepends=True)
    datasets = []
    for name, part in (("a", rows[:6]), ("b", rows[6:9])):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(part))
        datasets.append(str(path))
    dataset, available = datasets[0], 5
    if mixture:
        dataset, available = ",".join(datasets), 8
    given = ["--student", pair[0], "--teacher", pair[1], "--dataset", dataset]
    given += ["--max-new-tokens", "4", "--problems", "9" * 15, "--out", tmp_path / "out"]
    code, out, err = invoke("probe", *given)
    assert code == 0, err
    assert last_json(out)["prompts"] == available
    note = f"--problems {'9' * 15}: the data has {available} training prompts; all are probed"
    assert note in " ".join(err.split())


@pytest.mark.parametrize("flag, value", [("--plugin", "skew_kl.py"), ("--check-ranks-every", "5")])
def test_probe_has_no_option_without_effect(flag, value, tmp_path):
    """A probe measures the reverse KL and takes no step."""
    code, _, err = invoke("probe", "--out", tmp_path / "probe", flag, value)
    assert code == 2 and f"{flag}: no such option of this command" in err.splitlines()[-1]


def test_a_probe_and_evaluations_keep_to_the_head_memory(pair, questions, tmp_path, monkeypatch):
    """--head-memory-mb 1 holds wherever logits are computed."""
    run, seen = prepared(pair, questions, runtime__head_memory_mb=1, train__steps=1), []
    plain = scoring.fused.statistics

    def statistics(terms, *rest, **named):
        seen.append(terms.memory_bytes)
        return plain(terms, *rest, **named)

    monkeypatch.setattr(scoring.fused, "statistics", statistics)
    probe.probe(run)
    probed = len(seen)
    trained(run, tmp_path / "run")
    assert probed and len(seen) > probed and set(seen) == {1 << 20}
