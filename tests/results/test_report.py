"""Tests of `report`: means, paired intervals and costs to reach an accuracy from run folders.

The HTML page is self-contained.
"""

import csv
import io
import json
import math
import os
import re

import pytest
import yaml
from helpers import PROBLEMS, invoke, last_json, write_run
from rich.console import Console

from prefix_distill.api.documents import Comparison
from prefix_distill.errors import UserError
from prefix_distill.maths.intervals import interval
from prefix_distill.results import cells
from prefix_distill.results import summary as report
from prefix_distill.results.runs import by_arm, collect_runs
from prefix_distill.results.summary import Resampled
from prefix_distill.training.folder import RunFolder


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
    rows = {row["arm"]: row for row in report.summarize(collect_runs([arms]), "full")}
    short = rows["short"]
    assert (
        short["accuracy"] == pytest.approx(0.9)
        and short["answers"] == 2 * PROBLEMS
        and short["before"] == pytest.approx(0.2)
    )
    assert (short["flops_useful"], short["flops_executed"], short["seconds"]) == (3.0, 6.0, 9.0)
    # full reaches its final 80% at a cost of 20 and the short prefix at 1; they reach half of the
    # gain (50%) at 10 and 0.5
    assert short["cost_ratios"][1.0]["value"] == pytest.approx(20) and short["cost_ratios"][0.5][
        "value"
    ] == pytest.approx(20)
    assert short["difference"] == pytest.approx(0.1) and short["difference_low"] > 0
    own = rows["full"]["cost_ratios"][1.0]  # every resampled curve reaches its own final value
    assert [own[key] for key in ("value", "low", "high", "reached")] == pytest.approx([1] * 4)
    assert (
        rows["bad"]["cost_ratios"][1.0]["value"] is None
        and rows["bad"]["cost_ratios"][1.0]["reached"] == 0
    )
    assert "not reached" in cells.cells(rows["bad"])[-1]
    # beyond the longest truncating prefix (4 tokens): values 0.5 and 0.1
    assert short["kl_beyond"] == pytest.approx(0.3)
    assert (short["kl_tail_before"], short["kl_tail"]) == pytest.approx(
        (0.7, 0.3)
    )  # both beyond the arm's own last prefix


def test_intervals_cover_problems_and_seeds_and_pairing_narrows_differences(tmp_path):
    for seed, (low, high) in enumerate(
        [(0.3, 0.5), (0.7, 0.9), (0.5, 0.7)]
    ):  # seeds vary more than problems
        write_run(tmp_path / "a" / f"seed-{seed}", seed, [0.1, low], 1.0)
        write_run(tmp_path / "b" / f"seed-{seed}", seed, [0.1, high], 1.0)
    runs = collect_runs([tmp_path])
    rows = {row["arm"]: row for row in report.summarize(runs, "a")}
    assert rows["a"]["high"] - rows["a"]["low"] > 0.2  # the seeds have 0.3, 0.7 and 0.5
    assert rows["b"]["difference"] == pytest.approx(0.2, abs=1e-9)
    assert (
        rows["b"]["difference_high"] - rows["b"]["difference_low"] < 0.12
    )  # both arms share their bootstrap samples
    drawn = Resampled(by_arm(runs))
    assert drawn.paired and abs(drawn.problems.sum(1) - 1).max() < 1e-9
    # one seed gives the ordinary bootstrap interval of a share: ± 1.96 √(p(1−p)/n)
    one = Resampled({"a": by_arm(runs)["a"][:1]})
    low, high = report.interval(one.curve("a")[2][:, -1])
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(0.3 * 0.7 / PROBLEMS), rel=0.1)


def test_bootstrap_samples_equal_those_of_torch(arms):
    import torch

    from prefix_distill.maths.seeds import seed_of

    drawn = Resampled(by_arm(collect_runs([arms])))
    generator = torch.Generator().manual_seed(seed_of("report"))
    for shares, count in ((drawn.problems, 400), (drawn.seeds, 2)):
        for share in shares:
            items = torch.randint(count, (count,), generator=generator)
            assert (share == items.bincount(minlength=count).double().numpy() / count).all()


def test_arms_with_different_numbers_of_evaluations_are_compared(tmp_path):
    write_run(tmp_path / "a", 0, [0.2, 0.5, 0.8], 1.0)
    write_run(tmp_path / "b", 0, [0.2, 0.9], 1.0)
    rows = {row["arm"]: row for row in report.summarize(collect_runs([tmp_path]), "a")}
    assert rows["b"]["difference"] == pytest.approx(0.1)
    assert rows["b"]["cost_ratios"][1.0]["value"] == pytest.approx(2 / (0.6 / 0.7))


def test_arms_on_different_problems_are_not_compared(tmp_path):
    write_run(tmp_path / "a", 0, [0.1, 0.5], 1.0)
    other = write_run(tmp_path / "b", 0, [0.1, 0.5], 1.0)
    (other / "scores.jsonl").write_text(
        "".join(json.dumps({"step": 5 * i, "right": [1.0, 0.0]}) + "\n" for i in range(2))
    )
    runs = collect_runs([tmp_path])
    a, b = report.summarize(runs, "a")
    # each interval is that of one run alone: of 400 problems, and of two
    assert a["low"] == pytest.approx(0.45, abs=0.01) and a["high"] == pytest.approx(0.55, abs=0.01)
    assert (b["low"], b["high"]) == (0.0, 1.0)
    assert a["cost_ratios"] and b["cost_ratios"] == {} and "difference" not in b
    [warning] = report.describe_differing(runs, "a")
    assert "arms b: the held-out problems differ from those of arm a (2 problems" in warning
    code, out, err = invoke("report", tmp_path, "--out", tmp_path / "out", "--reference", "a")
    assert code == 0 and warning in " ".join(err.split())
    assert last_json(out)["warnings"] == [warning]


def test_problems_are_told_apart_by_their_references(tmp_path):
    for name, references in (("a", "12"), ("b", "12"), ("c", "13")):
        folder = write_run(tmp_path / name, 0, [0.1, 0.5], 1.0)
        lines = []
        for i, reference in enumerate(references):
            row = {"problem": i, "prompt": f"{name} {i}", "reference": reference, "responses": []}
            lines.append(json.dumps(row) + "\n")
        (folder / "examples-before.jsonl").write_text("".join(lines))
    runs = collect_runs([tmp_path])
    assert "difference" in report.summarize(runs, "a")[1]
    [warning] = report.describe_differing(runs, "a")
    assert warning.startswith("arms c: the held-out problems differ")


def test_seeds_that_differ_are_named(arms):
    write_run(arms / "one" / "seed-0", 0, [0.2, 0.5], 1.0)
    runs = collect_runs([arms])
    [warning] = report.describe_differing(runs, "full")
    assert "arms one: the held-out seeds differ" in warning
    [one] = [row for row in report.summarize(runs, "full") if row["arm"] == "one"]
    assert one["low"] < 0.5 < one["high"]


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_equal_answers_have_wilsons_interval_in_report_and_run(tmp_path, share):
    """Of n equal answers the far end of Wilson's interval is z² / (n + z²) away."""
    write_run(tmp_path / "run", 0, [0.5, share], 1.0)
    [row] = report.summarize(collect_runs([tmp_path]), "run")
    edge = 1.96**2 / (PROBLEMS + 1.96**2)
    expected = (0.0, edge) if share == 0 else (1 - edge, 1.0)
    assert (row["low"], row["high"]) == pytest.approx(expected, abs=1e-12)
    alone = interval([share] * PROBLEMS)
    assert (row["low"], row["high"]) == (alone["low"], alone["high"])
    assert (row["difference_low"], row["difference_high"]) == pytest.approx((-edge, edge))


def test_equal_shares_of_several_answers_have_wilsons_interval():
    """Both ends x solve (share - x)² = z² x (1 - x) / n."""
    for share, n in ((0.5, 8), (0.25, 40), (0.0, 12)):
        found = interval([share] * n)
        assert found["low"] < found["high"]
        for end in (found["low"], found["high"]):
            assert (share - end) ** 2 == pytest.approx(1.96**2 * end * (1 - end) / n, abs=1e-12)
    assert interval([0.0] * 12, lowest=-1)["low"] == -interval([0.0] * 12)["high"]


def test_the_table_on_the_screen_fits_80_columns(arms):
    write_run(
        arms / "a-long-name-of-an-arm-that-does-not-fit-in-a-cell" / "seed-0",
        0,
        [0.2, 0.9965],
        1.2e18,
        seconds=4e4,
    )
    rows = report.summarize(collect_runs([arms]), None)
    table = Comparison.read(
        {"out": "o", "page": "p", "runs": 1, "reference": None, "arms": rows, "warnings": []}
    ).tables()[0]
    assert len(table.columns) == 5
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table)
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in "".join(lines)
    assert any("99.8 [99.0, 100.0]" in line and "11.1 h" in line for line in lines)


UNFINISHED = {"step": 0, "prefix": 4, "answers": [], "kl": []}


def make_unfinished(folder, evaluations):
    """Write a run and cut it off after some evaluations."""
    write_run(folder, 0, [0.2, 0.5, 0.8], 10.0)
    document = json.loads((folder / "run.json").read_text())
    rows = document.pop("result")["evaluations"][:evaluations]
    (folder / "run.json").write_text(json.dumps(document))
    (folder / "after.json").unlink()
    (folder / "samples.jsonl").write_text(
        "".join(json.dumps({**UNFINISHED, "step": r["step"], "evaluation": r}) + "\n" for r in rows)
    )


def test_an_interrupted_run_is_reported_and_marked(tmp_path):
    make_unfinished(tmp_path / "cut", 2)
    code, out, err = invoke("report", tmp_path / "cut", "--out", tmp_path / "out")
    assert code == 0, err
    [row] = last_json(out)["arms"]
    assert (row["state"], row["updates"], row["accuracy"]) == ("interrupted", 5, 0.5)
    assert "interrupted" in err and f"  page      {tmp_path / 'out' / 'report.html'}\n" in err
    assert "  next      prefix-distill run --resume " in err
    assert last_json(out)["page"] == str(tmp_path / "out" / "report.html")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "is interrupted: its numbers end after step 5" in page
    with RunFolder(tmp_path / "cut").lock():
        _, out, _ = invoke("report", tmp_path / "cut", "--out", tmp_path / "out")
    assert last_json(out)["arms"][0]["state"] == "running"


def test_unfinished_runs_beside_finished_ones_are_left_out_and_named(tmp_path):
    write_run(tmp_path / "runs" / "done", 0, [0.2, 0.5], 10.0)
    make_unfinished(tmp_path / "runs" / "cut", 2)
    code, out, err = invoke("report", tmp_path / "runs", "--out", tmp_path / "out")
    assert code == 0, err
    assert [row["arm"] for row in last_json(out)["arms"]] == ["done"]
    assert f"left out, because they have not finished: {tmp_path / 'runs' / 'cut'};" in " ".join(
        err.split()
    )


def test_equal_arm_names_in_two_folders_stay_separate(arms, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, accuracy in ((one, 0.4), (two, 0.6)):
        write_run(folder / "a" / "seed-0", 0, [0.1, accuracy], 1.0)
    rows = {row["arm"]: row["accuracy"] for row in report.summarize(collect_runs([one, two]), None)}
    assert rows == {"one/a": pytest.approx(0.4), "two/a": pytest.approx(0.6)}
    assert {run.arm for run in collect_runs([one])} == {"a"}


def test_the_cost_of_a_run_includes_the_run_it_started_from(arms):
    write_run(
        arms / "warmed" / "seed-0",
        0,
        [0.8, 0.9],
        1.0,
        student=str(arms / "full" / "seed-0" / "model"),
    )
    warmed = next(run for run in collect_runs([arms]) if run.arm == "warmed")
    assert warmed.cost(warmed.evaluations[-1]) == (31.0, 62.0, 12.0)
    # arms.json of a comparison also names the start, so a moved folder with a stale student path
    # still counts it
    (arms / "arms.json").write_text(
        json.dumps({"arms": {"full": {}, "warmed": {}}, "seeds": [0], "start": {"warmed": "full"}})
    )
    moved = arms.rename(arms.with_name("moved"))
    assert [run.cost(run.evaluations[-1])[0] for run in collect_runs([moved])] == [30.0, 31.0]


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


def change(file, path: str, value: object = None) -> None:
    """Replace the value at ``path`` in a JSON file, or in line 2 of JSON lines; "-" removes it."""
    lines = file.read_text().splitlines()
    at = 1 if file.suffix == ".jsonl" else 0
    tree = json.loads(lines[at])
    *parents, last = [int(key) if key.isdecimal() else key for key in path.split(".")]
    node = tree
    for key in parents:
        node = node[key]
    if value == "-":
        del node[last]
    else:
        node[last] = value
    lines[at] = json.dumps(tree)
    file.write_text("\n".join(lines) + "\n")


WRONG_VALUES = [
    ("run.json", "result", [], "result: expected an object, got []"),
    ("run.json", "result", "5", "result: expected an object, got '5'"),
    ("run.json", "seed", "0", "seed: expected a whole number, got '0'"),
    ("run.json", "seed", "-", "run.json: expected the key 'seed', got the keys "),
    ("run.json", "result.prefix", "full", "result.prefix: expected a whole number, got 'full'"),
    ("run.json", "result.prefix", 1 << 70, "result.prefix: expected a whole number, got 118"),
    ("run.json", "result.full_rollout_cost", None, "expected a finite number, got null"),
    ("run.json", "result.evaluations", {}, "result.evaluations: expected a list, got {}"),
    ("run.json", "result.evaluations", [], "expected ascending steps from 0, got []"),
    ("run.json", "result.evaluations.1", None, "evaluations[1]: expected an object, got null"),
    ("run.json", "result.evaluations.1", [1], "evaluations[1]: expected an object, got [1]"),
    ("run.json", "result.evaluations.1.step", 0, "expected ascending steps from 0, got [0, 0,"),
    ("run.json", "result.evaluations.1.step", True, "[1].step: expected a whole number, got True"),
    ("run.json", "result.evaluations.1.step", 7, "a row with scores for each of the steps [0, 7"),
    ("run.json", "result.evaluations.1.accuracy", "-", "[1]: expected the key 'accuracy', got"),
    ("run.json", "result.evaluations.1.accuracy", None, "a row with scores for each of the steps"),
    ("run.json", "result.evaluations.1.accuracy", 0.5, "accuracy: expected an object, got 0.5"),
    (
        "run.json",
        "result.evaluations.1.accuracy.low",
        "0",
        "low: expected a finite number, got '0'",
    ),
    ("run.json", "result.evaluations.1.accuracy.n", 2.5, "n: expected a whole number, got 2.5"),
    ("run.json", "result.evaluations.0.kl", 1.5, "[0].kl: expected an object, got 1.5"),
    ("run.json", "result.evaluations.0.kl.value", math.nan, "expected a finite number, got nan"),
    ("run.json", "result.evaluations.3.kl_tail", [], "kl_tail: expected a finite number, got []"),
    ("run.json", "result.evaluations.3.seconds", "9", "seconds: expected a finite number, got '9'"),
    (
        "run.json",
        "result.evaluations.3.flops_useful",
        10**400,
        "expected a finite number, got 1000",
    ),
    ("run.json", "result.evaluations.3.quadrants", [], "quadrants: expected an object, got []"),
    ("run.json", "result.evaluations.3.quadrants.quadrants", {}, "expected the quadrants high"),
    ("run.json", "result.prefix_decisions", [3], "prefix_decisions[0]: expected an object, got 3"),
    ("run.json", "result.warnings", ["text"], "result.warnings[0]: expected an object, got 'text'"),
    ("run.json", "result.extrapolations.0.scores", ["x"], "scores[0]: expected a number, got 'x'"),
    ("run.json", "result.extrapolations.0.k", "-", "extrapolations[0]: expected the key 'k', got"),
    ("scores.jsonl", "step", "5", "scores.jsonl line 2: step: expected a whole number, got '5'"),
    ("scores.jsonl", "step", 6, "expected a row with scores for each of the steps [0, 5, 10, 15]"),
    ("scores.jsonl", "right", None, "scores.jsonl line 2: right: expected a list, got null"),
    ("scores.jsonl", "right", [], "scores.jsonl: expected a row with scores for each of the steps"),
    ("scores.jsonl", "right.3", "1", "line 2: right[3]: expected a finite number, got '1'"),
    ("before.json", "kl_by_token", "-", "before.json: expected the key 'kl_by_token'"),
    ("after.json", "kl_by_token", None, "after.json: kl_by_token: expected a list, got null"),
    ("after.json", "kl_by_token.0", 3, "after.json: kl_by_token[0]: expected a list, got 3"),
    ("after.json", "kl_by_token.1.1", "2", "kl_by_token[1][1]: expected a finite number, got '2'"),
    ("also-b.json", "accuracy", [], "also-b.json: accuracy: expected an object, got []"),
    ("also-b.json", "accuracy.value", "0.5", "accuracy.value: expected a finite number, got '0.5'"),
]


def report_one_line(folder) -> str:
    """Report a damaged folder, and return the only line that it prints."""
    code, out, err = invoke("report", folder, "--out", folder.parent / "out")
    assert code == 2 and not out and len(err.splitlines()) == 1, err
    return err


def test_an_object_without_a_key_is_described_by_its_keys(tmp_path):
    """The message names the first keys, not the values, which can fill a page."""
    run = write_run(tmp_path / "run", 0, [0.2, 0.5], 10.0)
    document = {"ranks": 1, **json.loads((run / "run.json").read_text())}
    del document["seed"]
    (run / "run.json").write_text(json.dumps(document))
    first = ", ".join([*document][:4])
    ending = f"run.json: expected the key 'seed', got the keys {first}"
    err = report_one_line(run)
    assert ending in err and "evaluations" not in err and "document" not in err
    (run / "run.json").write_text('{"result": {}}')
    assert "run.json: expected the key 'seed', got the keys result;" in report_one_line(run)
    (run / "before.json").write_text("{}")
    (run / "run.json").write_text(json.dumps(document | {"seed": 0}))
    assert "before.json: expected the key 'kl_by_token', got no keys;" in report_one_line(run)


@pytest.mark.parametrize("name, path, value, message", WRONG_VALUES)
def test_a_value_of_a_wrong_type_is_named(tmp_path, name, path, value, message):
    run = write_run(tmp_path / "run", 0, [0.2, 0.5, 0.8, 0.8], 10.0)
    (run / "also-b.json").write_text('{"accuracy": {"value": 0.5}}')
    change(run / name, path, value)
    err = report_one_line(run)
    assert str(run) in err and message in err, err
    assert err.endswith("restore the file, or omit this run\n")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("run.json", '["result"]', "run.json: expected an object, got ['result']"),
        ("run.json", "{", "run.json: expected JSON, got '{' (Expecting property name"),
        ("run.json", "[" * 100_000, "run.json: expected JSON, got '[[[[[[[[[[["),
        ("run.json", b"\xff\xfe", "run.json: expected UTF-8 text, got other bytes"),
        ("scores.jsonl", '{"step": 0, "right": [1.0]}\n{"step": 5, "ri', "line 2: expected JSON"),
        ("scores.jsonl", '{"step": 0, "right": [1.0]}\nnull\n', "2: expected an object"),
        ("scores.jsonl", "\n", "scores.jsonl line 1: expected JSON, got ''"),
        ("scores.jsonl", None, "scores.jsonl: cannot be read (Is a directory)"),
        ("before.json", None, "before.json: cannot be read (Is a directory)"),
        ("after.json", "null", "after.json: expected an object, got null"),
        ("after.json", '"kl_by_token"', "expected an object, got 'kl_by_token'"),
        ("also-b.json", "[]", "also-b.json: expected an object, got []"),
        ("config.yaml", "[]", "config.yaml: expected sections"),
        ("config.yaml", "a: {b: 1}\na: {c: 2}\n", "config.yaml: not valid YAML (the key 'a'"),
        ("config.yaml", "models: 5\n", "config.yaml: models: expected an object, got 5"),
        ("config.yaml", "models: {}\n", "config.yaml: models: expected the key 'student'"),
        ("config.yaml", "1: {}\n", "config.yaml: expected text as keys, got 1"),
        ("config.yaml", "x: !!python/name:os.system\n", "config.yaml: not valid YAML"),
        ("config.yaml", None, "config.yaml: cannot be read (Is a directory); check the path"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content, message):
    run = write_run(tmp_path / "run", 0, [0.2, 0.5, 0.8, 0.8], 10.0)
    (run / name).unlink(missing_ok=True)
    if content is None:
        (run / name).mkdir()
    elif isinstance(content, bytes):
        (run / name).write_bytes(content)
    else:
        (run / name).write_text(content)
    err = report_one_line(run)
    assert message in err, err


@pytest.mark.parametrize("missing", ["config.yaml", "before.json", "after.json"])
def test_a_missing_file_is_named(tmp_path, missing):
    run = write_run(tmp_path / "run", 0, [0.2, 0.5], 10.0)
    (run / missing).unlink()
    assert f"{run / missing}: " in invoke("report", run, "--out", tmp_path / "out")[2]


@pytest.mark.parametrize(
    "content, message",
    [
        ("[]", "arms.json: expected an object, got []"),
        ('{"arms": ["full"], "seeds": [0], "start": {}}', "arms: expected an object, got ['full']"),
        ('{"arms": {"full": {}}, "seeds": ["0"], "start": {}}', "seeds[0]: expected a whole"),
        (
            '{"arms": {"full": {}}, "seeds": [0], "start": {"a": 3}}',
            "start.a: expected text, got 3",
        ),
        ('{"arms": {"full": {}}, "seeds": [0]}', "expected the key 'start'"),
    ],
)
def test_a_damaged_list_of_arms_is_named(arms, content, message):
    (arms / "arms.json").write_text(content)
    assert message in report_one_line(arms)


@pytest.mark.parametrize("name", ["a" * 300, "😀" * 400, "a\0b", "nowhere"])
def test_a_folder_that_cannot_exist_is_named(tmp_path, name):
    code, out, err = invoke("report", name, "--out", tmp_path / "out")
    assert code == 2 and not out and len(err.splitlines()) == 1
    assert "no such folder; name a run folder, or one that contains runs" in err


@pytest.mark.parametrize("student", ["😀" * 400, "a" * 5000, "a\0b", "\ud800", "~nobody/x"])
def test_any_name_of_a_student_can_be_reported(tmp_path, student):
    run = write_run(tmp_path / "run", 0, [0.2, 0.5], 10.0)
    tree = yaml.safe_load((run / "config.yaml").read_text())
    tree["models"]["student"] = student
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    assert invoke("report", run, "--out", tmp_path / "out")[0] == 0


@pytest.mark.parametrize("arm", ["$\\bad$", "a$b", "_hidden", "a|b", "😀", os.fsdecode(b"\xff")])
def test_any_name_of_an_arm_can_be_reported(tmp_path, arm):
    write_run(tmp_path / "runs" / arm, 0, [0.2, 0.5], 10.0)
    code, out, err = invoke("report", tmp_path / "runs", "--out", tmp_path / "out", "--title", arm)
    assert code == 0, err
    assert last_json(out)["arms"][0]["arm"] == arm.encode(errors="replace").decode()


def test_a_data_set_without_answers_has_no_accuracy(arms):
    for file, value in (("full/seed-0", None), ("full/seed-1", None), ("short/seed-0", 0.5)):
        accuracy = None if value is None else {"value": value}
        (arms / file / "also-b.json").write_text(json.dumps({"accuracy": accuracy}))
    code, out, err = invoke("report", arms, "--out", arms.parent / "out")
    assert code == 0, err
    assert [row["also"] for row in last_json(out)["arms"]] == [{}, {"b": None}, {"b": None}]


def test_runs_of_an_arm_are_compared_at_their_common_evaluation_steps(
    tmp_path,
):
    write_run(tmp_path / "a" / "seed-0", 0, [0.2, 0.5, 0.6], 10.0)
    write_run(tmp_path / "a" / "seed-1", 1, [0.4, 0.8, 0.7], 10.0)
    run = tmp_path / "a" / "seed-1"
    change(run / "run.json", "result.evaluations.1.step", 10)
    change(run / "run.json", "result.evaluations.2.step", 20)
    lines = [json.loads(line) for line in (run / "scores.jsonl").read_text().splitlines()]
    for line in lines:
        line["step"] *= 2
    (run / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, _, err = invoke("report", tmp_path, "--out", tmp_path / "out", "--reference", "a")
    assert code == 0, err
    curve = Resampled(by_arm(collect_runs([tmp_path]))).curve("a")
    assert curve.steps == [0, 10]
    assert curve.accuracy.tolist() == pytest.approx([0.3, 0.7])
    assert curve.flops.tolist() == pytest.approx([0, 15])


def test_wrong_folders_and_references_are_named(arms, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        collect_runs([tmp_path / "nowhere"])
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "run.json").write_text('{"seed": 0}')
    with pytest.raises(UserError, match="no finished run"):
        collect_runs([unfinished])
    code, _, err = invoke("report", arms, "--out", tmp_path / "out", "--reference", "fulll")
    assert (
        code == 2
        and "expected one of the arms bad, full, short" in err
        and len(err.splitlines()) == 1
    )
