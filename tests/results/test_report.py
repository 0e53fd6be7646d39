"""From run folders to tables: means, paired intervals, costs to reach an accuracy; and a page
that carries everything in it."""

import csv
import json
import math
import re

import pytest
from helpers import PROBLEMS, invoke, last_json, write_run

from prefix_distill.errors import UserError
from prefix_distill.results import summary as report
from prefix_distill.results.runs import by_arm, collect
from prefix_distill.results.summary import Resampled


@pytest.fixture
def arms(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / "full" / f"seed-{seed}", seed, [0.2, 0.5, 0.8, 0.8], 10.0, prefix=10)
        write_run(tmp_path / "short" / f"seed-{seed}", seed, [0.2, 0.8, 0.9, 0.9], 1.0)
        write_run(tmp_path / "bad" / f"seed-{seed}", seed, [0.2, 0.3, 0.2, 0.1], 1.0)
    return tmp_path


def test_first_cost_by_hand():
    assert report.first_cost([0, 10, 20], [0.2, 0.5, 0.8], 0.65) == pytest.approx(15)
    assert report.first_cost([0, 10], [0.1, 0.1 + 0.2], 0.3 + 4e-17) == pytest.approx(10)
    assert report.first_cost([0, 10, 20], [0.2, 0.9, 0.8], 0.55) == pytest.approx(5)
    assert report.first_cost([0, 10, 20], [0.2, 0.5, 0.8], 0.1) == 0
    assert report.first_cost([0, 10, 20], [0.2, 0.5, 0.8], 0.81) == math.inf


def test_summary_by_hand(arms):
    rows = {row["arm"]: row for row in report.summary(collect([arms]), "full")}
    short = rows["short"]
    assert (
        short["accuracy"] == pytest.approx(0.9)
        and short["answers"] == 2 * PROBLEMS
        and short["before"] == pytest.approx(0.2)
    )
    assert (short["flops_useful"], short["flops_executed"], short["seconds"]) == (3.0, 6.0, 9.0)
    # full reaches its final 80 % at 20, the short prefix reaches 80 % at 1; half of the gain (50 %)
    # at 10 and 0.5
    assert short["cost_ratios"][1.0]["value"] == pytest.approx(20) and short["cost_ratios"][0.5][
        "value"
    ] == pytest.approx(20)
    assert short["difference"] == pytest.approx(0.1) and short["difference_low"] > 0
    own = rows["full"]["cost_ratios"][1.0]  # every draw of a curve reaches its own end
    assert [own[key] for key in ("value", "low", "high", "reached")] == pytest.approx([1] * 4)
    assert (
        rows["bad"]["cost_ratios"][1.0]["value"] is None
        and rows["bad"]["cost_ratios"][1.0]["reached"] == 0
    )
    assert "not reached" in report.cells(rows["bad"])[-1]
    # beyond the longest prefix of an arm that truncates (4): tokens 0.5 and 0.1
    assert short["kl_beyond"] == pytest.approx(0.3)
    assert (short["kl_tail_before"], short["kl_tail"]) == pytest.approx(
        (0.7, 0.3)
    )  # both beyond its own last prefix


def test_intervals_cover_problems_and_seeds_and_pairing_narrows_differences(tmp_path):
    for seed, (low, high) in enumerate(
        [(0.3, 0.5), (0.7, 0.9), (0.5, 0.7)]
    ):  # the seed matters more than the problems
        write_run(tmp_path / "a" / f"seed-{seed}", seed, [0.1, low], 1.0)
        write_run(tmp_path / "b" / f"seed-{seed}", seed, [0.1, high], 1.0)
    runs = collect([tmp_path])
    rows = {row["arm"]: row for row in report.summary(runs, "a")}
    assert rows["a"]["high"] - rows["a"]["low"] > 0.2  # three seeds 0.3, 0.7, 0.5
    assert rows["b"]["difference"] == pytest.approx(0.2, abs=1e-9)
    assert (
        rows["b"]["difference_high"] - rows["b"]["difference_low"] < 0.12
    )  # the same draws on both sides
    drawn = Resampled(by_arm(runs))
    assert drawn.paired and abs(drawn.problems.sum(1) - 1).max() < 1e-9
    # with one seed it is the ordinary bootstrap of a share: ± 1.96 √(p(1−p)/n)
    one = Resampled({"a": by_arm(runs)["a"][:1]})
    low, high = report.interval(one.curve("a")[2][:, -1])
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(0.3 * 0.7 / PROBLEMS), rel=0.1)


def test_draws_are_those_of_torch(arms):
    import torch

    from prefix_distill.maths.seeds import seed_of

    drawn = Resampled(by_arm(collect([arms])))
    generator = torch.Generator().manual_seed(seed_of("report"))
    for shares, count in ((drawn.problems, 400), (drawn.seeds, 2)):
        for share in shares:
            items = torch.randint(count, (count,), generator=generator)
            assert (share == items.bincount(minlength=count).double().numpy() / count).all()


def test_arms_on_other_problems_are_not_compared(tmp_path):
    write_run(tmp_path / "a", 0, [0.1, 0.5], 1.0)
    other = write_run(tmp_path / "b", 0, [0.1, 0.5], 1.0)
    (other / "scores.jsonl").write_text(
        "".join(json.dumps({"step": 5 * i, "right": [1.0, 0.0]}) + "\n" for i in range(2))
    )
    rows = report.summary(collect([tmp_path]), "a")
    assert all(
        (row["low"], row["high"]) == (0.0, 1.0) and row["cost_ratios"] == {} for row in rows
    )  # each run's own interval


def test_equal_names_in_two_folders_stay_apart(arms, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, accuracy in ((one, 0.4), (two, 0.6)):
        write_run(folder / "a" / "seed-0", 0, [0.1, accuracy], 1.0)
    rows = {row["arm"]: row["accuracy"] for row in report.summary(collect([one, two]), None)}
    assert rows == {"one/a": pytest.approx(0.4), "two/a": pytest.approx(0.6)}
    assert {run.arm for run in collect([one])} == {"a"}


def test_a_run_that_started_from_another_has_cost_that_one_too(arms):
    write_run(
        arms / "warmed" / "seed-0",
        0,
        [0.8, 0.9],
        1.0,
        student=str(arms / "full" / "seed-0" / "model"),
    )
    warmed = next(run for run in collect([arms]) if run.arm == "warmed")
    assert warmed.cost(warmed.evaluations[-1]) == (31.0, 62.0, 12.0)
    # a comparison says so itself, also where its folder has been moved and the student's path leads
    # nowhere
    (arms / "arms.json").write_text(
        json.dumps({"arms": {"full": {}, "warmed": {}}, "seeds": [0], "start": {"warmed": "full"}})
    )
    moved = arms.rename(arms.with_name("moved"))
    assert [run.cost(run.evaluations[-1])[0] for run in collect([moved])] == [30.0, 31.0]


def test_page_is_self_contained_and_escaped(arms, tmp_path):
    evil = "<script>alert(1)</script>"
    write_run(arms / evil.replace("/", "") / "seed-0", 0, [0.1, 0.2, 0.3, 0.3], 1.0)
    code, out, err = invoke("report", arms, "--out", tmp_path / "out", "--title", "a & <b>")
    assert code == 0, err
    page = (tmp_path / "out" / "report.html").read_text()
    assert (
        "<script" not in page
        and "&lt;script&gt;alert(1)&lt;script&gt;" in page
        and "<title>a &amp; &lt;b&gt;</title>" in page
    )
    assert not re.search(r"https?://|src=\"(?!data:)|href=", page)
    assert page.count("data:image/png;base64,") == 4
    assert (
        "<td>full</td><td>25% / 25% → 25% / 57%</td><td>25% / 0% → 25% / 0%</td><td>25% / 75% → "
        "25% / 43%</td>" in page
    )
    assert "<td>8</td><td>2</td><td>0.25 → 0.5 → 0.75 → 0.75</td><td>3 GFLOP</td>" in page
    with open(tmp_path / "out" / "report.csv") as handle:
        rows = list(csv.DictReader(handle))
    assert len(rows) == 4 * 7 and {row["arm"] for row in rows} >= {"full", "short", "bad"}
    assert last_json(out)["runs"] == 7
    assert (tmp_path / "out" / "report.md").read_text().startswith("| arm |") and (
        tmp_path / "out" / "report.png"
    ).stat().st_size > 5000


def test_wrong_folders_and_references_are_named(arms, tmp_path):
    with pytest.raises(UserError, match="no finished run"):
        collect([tmp_path / "nowhere"])
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "run.json").write_text('{"seed": 0}')
    with pytest.raises(UserError, match="no finished run"):
        collect([unfinished])
    code, _, err = invoke("report", arms, "--out", tmp_path / "out", "--reference", "fulll")
    assert (
        code == 2
        and "no such arm; there are bad, full, short" in err
        and len(err.splitlines()) == 1
    )
