"""Test what a command shows last: a summary on a terminal, a JSON document elsewhere."""

import dataclasses
import io
import json
import os
import subprocess
import sys

import pytest
from helpers import flags, invoke, last_json
from rich.console import Console

from prefix_distill.api.finished import load
from prefix_distill.api.summaries import summarize
from prefix_distill.cli import app
from prefix_distill.display import Summary, lay_out
from prefix_distill.results import demo
from prefix_distill.training.teacher_score import gap_closed

LONG = "a text of many words that does not fit into one line of a narrow terminal " * 2
SUMMARY = Summary(
    title="runs/first: 100 steps in 4 min",
    rows={"accuracy": "29.0% → 89.5%", "empty": "", "answers": LONG},
    command="prefix-distill eval --model runs/first/model --dataset a-dataset-with-a-long-name",
    warnings=("first warning", LONG),
)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("width", [40, 80, 100, 120])
def test_a_summary_fits_the_terminal(width):
    lines = lay_out(SUMMARY, width, in_color=False)
    start = next(i for i, line in enumerate(lines) if line.startswith("  next"))
    command = "\n".join(lines[start:]).removeprefix("  next")
    lines = lines[:start]
    if os.name != "nt":
        words = subprocess.run(
            ["sh", "-c", f"set -- {command}; echo $*"], capture_output=True, text=True
        )
        assert words.stdout.strip() == SUMMARY.command
        assert width < 80 or max(map(len, command.splitlines())) <= width
    assert max(map(len, lines)) <= width
    assert lines[:2] == ["runs/first: 100 steps in 4 min", "  accuracy  29.0% → 89.5%"]
    text = " ".join(" ".join(lines).split())
    assert text.count(" ".join(LONG.split())) == 2
    assert "empty" not in text and "warnings  2" in "\n".join(lines)
    colored = lay_out(SUMMARY, width, in_color=True)
    yellow = [line for line in colored if line.startswith("\x1b[33m")]
    assert len(yellow) >= 3 and "first warning" in "".join(yellow)


@pytest.mark.parametrize(
    ("stdout", "as_json", "has_document"),
    [(io.StringIO, "", True), (Terminal, "", False), (Terminal, "1", True)],
)
def test_a_terminal_gets_the_document_only_on_request(monkeypatch, stdout, as_json, has_document):
    out, err = stdout(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setenv("PREFIX_DISTILL_JSON", as_json)
    app.finish({"steps": 100}, SUMMARY)
    lines = out.getvalue().splitlines()
    shown = (out if out.isatty() else err).getvalue()
    assert "runs/first: 100 steps" in shown and "first warning" in shown
    assert ('{"steps": 100}' in lines) == has_document
    if has_document:
        assert json.loads(lines[-1]) == {"steps": 100}


def test_json_is_an_option_of_every_command():
    for arguments in (("--json", "env"), ("env", "--json")):
        assert invoke(*arguments)[0] == 0


def test_the_teacher_is_measured_as_eval_measures_it(pair, questions, tmp_path):
    out = tmp_path / "run"
    more = ("--eval-dataset", questions, "--eval-split", "train")
    code, said, err = invoke(*flags(pair, questions, out), *more)
    assert code == 0, err
    result = last_json(said)
    arguments = ("eval", "--model", pair[1], "--dataset", questions, "--split", "train")
    arguments += ("--limit", 4, "--max-new-tokens", 32, "--out", tmp_path / "answers.jsonl")
    code, said, err = invoke(*arguments)
    assert code == 0, err
    assert result["accuracy_teacher"] == last_json(said)["accuracy"]
    texts = []
    for file in (tmp_path / "answers.jsonl", out / "examples-teacher.jsonl"):
        records = [json.loads(line) for line in file.read_text().splitlines()]
        texts.append([record["responses"][0]["text"] for record in records])
    assert len(texts[0]) == 4 and texts[0] == texts[1]
    summary = summarize(load(out))
    assert summary.rows["teacher"].startswith("0.0% [0.0%")
    run = load(out)
    unchanged = dataclasses.replace(run, accuracy_after=run.accuracy_before)
    share = run.accuracy_before.as_share()
    assert summarize(unchanged).rows["accuracy"] == f"{share} → {share}"
    assert summary.rows["model"] == f"{out}/model"


@pytest.mark.parametrize(
    ("before", "after", "teacher", "expected"),
    [(0.2, 0.5, 0.8, 0.5), (0.2, 0.1, 0.6, -0.25), (0.5, 0.6, 0.5, None), (0.5, 0.6, 0.4, None)],
)
def test_the_gap_is_that_between_untrained_student_and_teacher(before, after, teacher, expected):
    values = [{"value": value} for value in (before, after, teacher)]
    found = gap_closed(*values)
    assert found == (expected if expected is None else pytest.approx(expected))
    assert gap_closed(None, *values[1:]) is None and gap_closed(*values[:2], None) is None


@pytest.mark.parametrize(
    "more",
    [
        ("--eval-teacher", "off"),
        ("--problems", 0),
        ("--privileged-column", "answer", "--max-new-tokens", 14),
    ],
)
def test_a_teacher_that_tells_nothing_is_not_measured(pair, questions, tmp_path, more):
    code, said, err = invoke(*flags(pair, questions, tmp_path / "run"), *more)
    assert code == 0, err
    assert last_json(said)["accuracy_teacher"] is None and last_json(said)["gap_closed"] is None
    assert not (tmp_path / "run/examples-teacher.jsonl").exists()


def test_notes_for_developers_need_verbose(pair, questions, tmp_path, monkeypatch):
    monkeypatch.delenv("PREFIX_DISTILL_VERBOSE", raising=False)
    command = flags(pair, questions, tmp_path / "run")
    code, _, err = invoke(*command, "--dry-run")
    assert code == 0 and "the loss uses chunks" not in err and "vocabulary:" not in err
    code, _, err = invoke(*command, "--dry-run", "--verbose")
    assert code == 0 and "the loss uses chunks" in err and "vocabulary:" in err


def test_the_full_arm_omits_the_estimate_of_its_own_cost(pair, questions, tmp_path):
    code, _, err = invoke(*flags(pair, questions, tmp_path / "run"), "--prefix", "full")
    assert code == 0, err
    assert "with full rollouts" not in err
    assert "full rollouts" not in summarize(load(tmp_path / "run")).rows["FLOPs"]


def score(value, tokens=50):
    accuracy = {"value": value, "low": value - 0.05, "high": value + 0.05, "n": 200}
    return {"accuracy": accuracy, "mean_tokens": tokens}


def test_the_table_and_the_example_of_the_demo_fit_80_columns(tmp_path):
    costs = {"flops_useful": 2.31e10, "seconds": 123.0}
    arms = [score(0.895) | costs | {"name": name} for name in ("prefix", "full")]
    table = demo._table(arms, score(0.29), score(0.97))
    console = Console(width=80, file=io.StringIO())
    console.print(table)
    lines = console.file.getvalue().splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 80
    assert any("full rollouts" in line and "123 s" in line for line in lines)
    assert not any("…" in line for line in lines)
    answers = {
        "before": [("x ####1", False), ("y ####2", False)],
        "after": [("x ####3", False), (" ".join(f"{i:02}:00" for i in range(30, 0, -1)), True)],
    }
    for name, texts in answers.items():
        rows = [
            {"prompt": f"p{i}", "reference": "05", "responses": [{"text": t, "correct": c}]}
            for i, (t, c) in enumerate(texts)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"examples-{name}.jsonl").write_text(lines)
    example = demo.find_example(tmp_path)
    assert (example["prompt"], example["before"]) == ("p1", "y ####2")
    document = {"example": example, "flops_ratio_full_to_prefix": 5.0, "picture": "p.png"}
    rows = demo.summarize(document).rows
    assert rows["after"] == "30:00 29:00 28:00 … 03:00 02:00 01:00 (right)"
    assert rows["before"] == "y ####2 (wrong)" and "5.0×" in rows["FLOPs"]
