"""Test a user's grader: its scores, its faults, its time limit, and what a run records of it."""

import hashlib
import json
import os
import random
import time

import pytest
from helpers import ROOT, TESTS, command, flags, invoke, last_json, save_tiny

from prefix_distill.errors import GraderError, UserError
from prefix_distill.maths.intervals import ratio_interval
from prefix_distill.prompts.grading import load_grader
from prefix_distill.prompts.own_grader import OwnGrader

GRADERS = TESTS / "graders"
LENGTH = """
def score(row, response):
    print("a grader may print")
    return min(len(response), 8) / 8
"""


def write(tmp_path, text, name="my.py"):
    file = tmp_path / name
    file.write_text(text)
    return f"{file}:score"


def grade(tmp_path, text, row=None, response="answer", seconds=20.0):
    return OwnGrader(write(tmp_path, text), seconds).grade(row or {}, response, 3)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return 0.25", 0.25),
        ("return True", 1.0),
        ("return 0", 0.0),
        ("import numpy; return numpy.float32(0.5)", 0.5),
        ("return row['n'] / 4 if response == 'answer' else 0", 0.75),
        ("import sys; sys.stdin.read(); print('x'); return 1", 1.0),
        ("import os; os.write(1, b'{}'); return 1", 1.0),
    ],
)
def test_a_score_is_a_number_from_0_to_1(tmp_path, body, expected):
    graded = grade(tmp_path, f"def score(row, response):\n    {body}\n", {"n": 3})
    assert graded.score == expected and not graded.timed_out


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return 2", "returned 2; expected a number from 0 to 1"),
        ("return -0.1", "returned -0.1; expected"),
        ("return float('nan')", "returned nan; expected"),
        ("return None", "returned None; expected"),
        ("return '1'", "returned '1'; expected"),
        ("return [1]", "returned list; expected"),
        ("return 1 / 0", "line 2: ZeroDivisionError: division by zero"),
        ("raise SystemExit(3)", "line 2: SystemExit: 3"),
        ("return score(row, response)", "RecursionError"),
        ("import os; os._exit(7)", "the function ended its process (exit code 7)"),
        ("import os; os.kill(os.getpid(), 9)", "the function ended its process (exit code -9)"),
    ],
)
def test_a_fault_of_the_function_names_file_line_and_problem(tmp_path, body, said):
    with pytest.raises(GraderError) as error:
        grade(tmp_path, f"def score(row, response):\n    {body}\n")
    text = str(error.value)
    assert said in text and f"{tmp_path}/my.py:score: problem 3: " in text
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("my.py", "", "expected FILE.py:FUNCTION"),
        ("absent.py:score", "", "cannot be read (No such file or directory)"),
        ("absent_module:score", "", "expected a .py file or an installed module"),
        ("my.py:score", "import absent_package", "line 1: ModuleNotFoundError"),
        ("my.py:score", "def score(:", "line 1: SyntaxError"),
        ("my.py:score", "def other(row, response): return 1", "it has no function score"),
        ("my.py:score", "score = 3", "it has no function score"),
        ("my.py:score", "raise SystemExit", "SystemExit"),
    ],
)
def test_a_file_that_is_no_grader_is_refused_before_any_work(
    tmp_path, monkeypatch, name, text, said
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.py").write_text(text)
    with pytest.raises(UserError, match="grader") as error:
        load_grader(name, 5.0)
    assert said in str(error.value) and len(str(error.value).splitlines()) == 1


def test_an_answer_that_takes_too_long_scores_0_and_its_children_are_ended(tmp_path):
    child = tmp_path / "child"
    text = f"""
import os, subprocess, sys, time

def score(row, response):
    if response == "slow":
        code = "import time; time.sleep(3); open({str(child)!r}, 'w')"
        subprocess.run([sys.executable, "-c", code])
    return 1
"""
    grader = OwnGrader(write(tmp_path, text), 0.5)
    assert grader.grade({}, "quick", 0).score == 1
    began = time.monotonic()
    slow = grader.grade({}, "slow", 1)
    assert slow.timed_out and slow.score == 0 and time.monotonic() - began < 3
    assert grader.grade({}, "quick", 2).score == 1  # by a new process
    time.sleep(3.5)
    assert not child.exists()


def test_the_file_may_import_its_neighbours(tmp_path):
    (tmp_path / "neighbour.py").write_text("VALUE = 0.5\n")
    text = "from neighbour import VALUE\ndef score(row, response):\n    return VALUE\n"
    assert grade(tmp_path, text).score == 0.5


def test_the_examples_of_the_help_page_grade_json_and_code():
    to_json = OwnGrader(f"{GRADERS / 'json_grader.py'}:score", 20.0)
    row = {"answer": json.dumps({"city": "Bonn", "year": 1990})}
    answers = {
        'It is {"city": "Bonn", "year": 1990}.': 1.0,
        '{"city": "Bonn", "year": 1991}': 0.5,
        '{"city": "Bonn"': 0.0,
        "Bonn": 0.0,
    }
    for answer, expected in answers.items():
        assert to_json.grade(row, answer, 0).score == expected, answer
    code = OwnGrader(f"{GRADERS / 'code_grader.py'}:passes", 20.0)
    row = {"test": "assert double(4) == 8"}
    answers = {
        "```python\ndef double(x):\n    return 2 * x\n```": 1.0,
        "```python\ndef double(x):\n    return x\n```": 0.0,
        "```python\nimport os; os._exit(0)\n```": 1.0,  # as the page says: it limits time only
        "double(4) is 8": 0.0,
    }
    for answer, expected in answers.items():
        assert code.grade(row, answer, 0).score == expected, answer


def bootstrap(parts, counts, seed=3):
    """Return the percentile interval of sum(parts) / sum(counts) from other random numbers."""
    rng = random.Random(seed)
    rows = list(zip(parts, counts, strict=True))
    ratios = []
    for _ in range(4000):
        chosen = rng.choices(rows, k=len(rows))
        ratios.append(sum(p for p, _ in chosen) / sum(c for _, c in chosen))
    ratios.sort()
    return ratios[100], ratios[3899]


def test_the_interval_of_a_ratio_is_the_bootstrap_over_problems():
    rng = random.Random(0)
    counts = [rng.randint(1, 4) for _ in range(60)]
    parts = [sum(rng.random() < 0.7 for _ in range(count)) for count in counts]
    found = ratio_interval(parts, counts)
    assert found["value"] == sum(parts) / sum(counts) and found["n"] == sum(counts)
    low, high = bootstrap(parts, counts)
    assert found["low"] == pytest.approx(low, abs=0.015)
    assert found["high"] == pytest.approx(high, abs=0.015)
    assert ratio_interval([], []) is None and ratio_interval([0.0], [0]) is None
    # problems without a finished answer do not count
    assert ratio_interval([*parts, 0.0], [*counts, 0])["value"] == found["value"]
    # all right: Wilson's interval of 5 answers
    assert ratio_interval([2.0, 3.0], [2, 3])["low"] == pytest.approx(5 / (5 + 1.96**2))


def test_eval_reports_the_mean_score_of_rows_without_reference(tmp_path):
    data = tmp_path / "chat.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"Say {i}", "n": i}) + "\n" for i in range(6)))
    grader = write(tmp_path, LENGTH)
    arguments = ("eval", "--model", save_tiny(tmp_path / "model"), "--dataset", data)
    arguments += ("--max-new-tokens", 12, "--samples", 2, "--grader", grader)
    code, out, err = invoke(*arguments, "--out", tmp_path / "answers.jsonl")
    assert code == 0, err
    document = last_json(out)
    records = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    scores = [[r["correct"] for r in record["responses"]] for record in records]
    for record, row in zip(records, scores, strict=True):
        for response, score in zip(record["responses"], row, strict=True):
            assert score == min(len(response["text"]), 8) / 8
    flat = [score for row in scores for score in row]
    assert document["accuracy"]["value"] == pytest.approx(sum(flat) / len(flat))
    assert document["accuracy"]["n"] == 6 and document["grader"] == grader
    full = [max(row) == 1 for row in scores]
    assert document["pass_at_k"]["value"] == pytest.approx(sum(full) / len(full))
    assert "grades every answer" in err


def test_a_run_grades_records_and_compares_its_grader(pair, questions, tmp_path):
    grader = write(tmp_path, LENGTH)
    out = tmp_path / "run"
    code, said, err = invoke(*flags(pair, questions, out), "--grader", grader)
    assert code == 0, err
    assert "after step 0: score " in err
    result = last_json(said)
    assert 0 < result["accuracy_after"]["value"] <= 1
    facts = json.loads((out / "run.json").read_text())
    digest = hashlib.sha256((tmp_path / "my.py").read_bytes()).hexdigest()
    assert [record["sha256"] for record in facts["plugins"]] == [digest]
    assert (out / facts["plugins"][0]["copy"]).read_text() == LENGTH
    assert "mean score of `my.py:score`" in (out / "model/README.md").read_text()
    (tmp_path / "my.py").write_text(LENGTH + "\nCHANGED = True\n")
    code, _, err = invoke("run", "--resume", "--out", out, "--steps", 7)
    assert code == 0 and "my.py:score: its content changed since the last checkpoint" in err


def test_a_fault_in_the_middle_of_a_run_keeps_its_checkpoint(pair, questions, tmp_path):
    counter = tmp_path / "calls"
    text = f"""
def score(row, response):
    with open({str(counter)!r}, "a") as file:
        file.write("x")
    return 1 / (len(open({str(counter)!r}).read()) < 10)
"""
    grader = write(tmp_path, text)
    out = tmp_path / "run"
    code, _, err = invoke(*flags(pair, questions, out), "--grader", grader)
    last = err.splitlines()[-1]
    assert code == 2 and "ZeroDivisionError" in last and "the newest checkpoint is step-" in last
    assert "problem " in last and "--resume" in last
    os.remove(counter)
    (tmp_path / "my.py").write_text(LENGTH)
    code, _, err = invoke("run", "--resume", "--out", out)
    assert code == 0, err


def test_answers_that_were_graded_too_late_are_counted(tmp_path, questions):
    grader = write(tmp_path, "import time\ndef score(row, response):\n    time.sleep(5)\n")
    arguments = ("eval", "--model", save_tiny(tmp_path / "model"), "--dataset", questions)
    arguments += ("--max-new-tokens", 4, "--limit", 2, "--grader", grader)
    arguments += ("--grader-timeout", 0.2, "--out", tmp_path / "answers.jsonl")
    code, out, err = invoke(*arguments)
    assert code == 0, err
    assert last_json(out)["accuracy"]["value"] == 0
    assert "2 answers scored 0" in err and "raise --grader-timeout" in err


def test_a_fault_on_one_rank_ends_all_of_them(tmp_path):
    text = "def score(row, response):\n    return 1 / (row['prompt'] != row['bad'])\n"
    problems = [f"Add 1 and {i}." for i in range(4)]
    data = tmp_path / "data.jsonl"
    lines = [json.dumps({"prompt": p, "bad": problems[1]}) + "\n" for p in problems]
    data.write_text("".join(lines))
    arguments = ("eval", "--model", save_tiny(tmp_path / "model"), "--dataset", data)
    arguments += ("--max-new-tokens", 4, "--grader", write(tmp_path, text), "--gpus", 2)
    arguments += ("--device", "cpu", "--out", tmp_path / "answers.jsonl")
    done = command(*map(str, arguments), timeout=120)
    assert done.returncode == 2, done.stderr
    [line] = [line for line in done.stderr.splitlines() if "error:" in line]
    assert "problem 1: line 2: ZeroDivisionError" in line


def test_the_help_page_has_the_examples_as_they_are():
    page = (ROOT / "prefix_distill/help/plugins.md").read_text(encoding="utf-8")
    for file in sorted(GRADERS.glob("*.py")):
        assert f"```python\n{file.read_text(encoding='utf-8')}```" in page, file.name
