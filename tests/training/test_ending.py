"""--stop-when and --max-hours end a run early and complete; --save-minutes saves by the clock."""

import json
import time
from types import SimpleNamespace

import pytest
from helpers import Silent, invoke, last_json, prepared, trained

from prefix_distill.config import StopWhen, parse_stop_when
from prefix_distill.errors import UserError
from prefix_distill.maths.intervals import wilson
from prefix_distill.training import ending, session
from prefix_distill.training.ending import find_reason
from prefix_distill.training.folder import RunFolder
from prefix_distill.training.session import Session
from prefix_distill.training.state import Progress

SMALL = {"evaluate__tail_every": 0, "train__steps": 9}
# the tiny student answers nothing right, so every evaluation is one without improvement
PATIENT = SMALL | {"evaluate__every": 2, "train__stop_when": "accuracy 2"}


def row(step, accuracy=0.5, finish=1.0, repetition=0.0, answers=200, **more):
    measured = {"finish_rate": finish, "repetition_rate": repetition, "answers": answers}
    return {"step": step, "accuracy": {"value": accuracy}, **measured, **more}


def reason_of(rule, *rows, probes=()):
    return find_reason(parse_stop_when(rule), Progress(evaluations=rows, tail_probes=probes))


@pytest.mark.parametrize(
    "text, expected",
    {
        "none": StopWhen(),
        "accuracy 3": StopWhen(patience=3),
        "accuracy:3": StopWhen(patience=3),
        "collapse": StopWhen(collapse=True),
        "accuracy 3, collapse": StopWhen(patience=3, collapse=True),
        "collapse,accuracy:1": StopWhen(patience=1, collapse=True),
    }.items(),
)
def test_rules_are_read(text, expected):
    assert parse_stop_when(text) == expected


@pytest.mark.parametrize("text", ["", "accuracy", "accuracy 0", "accuracy x", "kl 3", "collapse 2"])
def test_other_rules_are_refused(text):
    with pytest.raises(UserError, match=r"--stop-when .*: expected none, 'accuracy N'"):
        parse_stop_when(text)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"train__stop_when": "accuracy 3"}, "expected evaluations of the accuracy, got none"),
        (
            {"train__stop_when": "collapse", "evaluate__tail_every": 0},
            "expected evaluations or tail probes, got none",
        ),
    ],
)
def test_a_rule_without_measurements_is_refused(changes, message, pair, questions):
    with pytest.raises(UserError, match=message):
        prepared(pair, questions, **changes)


def test_a_rule_of_accuracy_needs_reference_answers(pair, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(40)))
    with pytest.raises(UserError, match="no held-out problem has a reference answer"):
        prepared(pair, str(file), **PATIENT)
    grader = tmp_path / "grader.py"
    grader.write_text("def score(row, response):\n    return len(response) > 3\n")
    run = prepared(pair, str(file), evaluate__grader=f"{grader}:score", **PATIENT)
    assert run.config.train.stop_when == PATIENT["train__stop_when"]


def test_a_plateau_counts_evaluations_without_improvement():
    curve = [0.3, 0.5, 0.5, 0.4, 0.5]
    rows = [row(10 * k, accuracy=value) for k, value in enumerate(curve)]
    assert [bool(reason_of("accuracy 3", *rows[: n + 1])) for n in range(5)] == [False] * 4 + [True]
    assert "did not improve on 50.0% in 3 evaluations (50.0%, 40.0%, 50.0%)" in reason_of(
        "accuracy 3", *rows
    )
    assert reason_of("accuracy 3", *rows, row(50, accuracy=0.6)) is None
    assert reason_of("collapse", *rows) is None


def test_a_collapse_is_outside_the_intervals_of_the_best_measurement():
    good = row(0, finish=0.95)
    assert "95% [91%, 97%]" in reason_of("collapse", good, row(10, finish=0.7))
    assert reason_of("collapse", good, row(10, finish=0.9)) is None  # less than 10 points
    assert reason_of("collapse", good, row(10, finish=0.75, answers=8)) is None  # too few answers
    assert "repeat themselves" in reason_of("collapse", good, row(10, repetition=0.3))
    assert "repeat themselves" in reason_of(
        "collapse", good, probes=[row(5, finish=0.95, repetition=0.9, answers=8)]
    )
    rise = {"before": 0.5, "value": 0.3, "low": 0.11, "high": 0.5}
    assert "rose from 0.5 by 0.3 [0.11, 0.5]" in reason_of(
        "collapse", good, row(10, finish=0.95, kl_tail_change=rise)
    )
    small = rise | {"low": 0.09}
    assert reason_of("collapse", good, row(10, finish=0.95, kl_tail_change=small)) is None
    old = {"step": 10, "accuracy": None, "finish_rate": 0.1}  # of an older version
    assert reason_of("collapse", old, old | {"step": 20}) is None


def test_wilson_by_hand():
    assert wilson(0.0, 8) == pytest.approx((0.0, 1.96**2 / (8 + 1.96**2)))
    low, high = wilson(0.5, 100)
    assert (low, high) == pytest.approx((0.4038, 0.5962), abs=1e-4)


def test_a_run_without_improvement_ends_complete(pair, questions, tmp_path):
    result = trained(prepared(pair, questions, **PATIENT), tmp_path / "run")
    assert result["steps"] == 4 and result["stopped"]["step"] == 4
    assert result["stopped"]["reason"].startswith("--stop-when accuracy 2: the accuracy did not")
    assert [e["step"] for e in result["evaluations"]] == [0, 2, 4]
    assert (tmp_path / "run/model/model.safetensors").is_file()
    assert RunFolder(tmp_path / "run").newest_step == 4
    stored = json.loads((tmp_path / "run/run.json").read_text())["result"]
    assert stored["stopped"] == result["stopped"]
    # goes on with another rule
    run = prepared(pair, questions, **PATIENT | {"train__stop_when": "none"})
    again = trained(run, tmp_path / "run", resume=True)
    assert again["steps"] == 9 and again["stopped"] is None


@pytest.mark.parametrize("fails_at", [3, 4])
def test_a_resumed_run_ends_at_the_same_step_with_the_same_weights(
    pair, questions, tmp_path, monkeypatch, fails_at
):
    settings = PATIENT | {"checkpoint__save_every": 1}
    whole = trained(prepared(pair, questions, **settings), tmp_path / "whole")
    plain, calls = session.step_optimizer, []

    def failing(*arguments, **named):
        calls.append(1)
        if len(calls) == fails_at:
            raise InterruptedError
        return plain(*arguments, **named)

    monkeypatch.setattr(session, "step_optimizer", failing)
    with pytest.raises(InterruptedError):
        trained(prepared(pair, questions, **settings), tmp_path / "cut")
    monkeypatch.setattr(session, "step_optimizer", plain)
    again = trained(prepared(pair, questions, **settings), tmp_path / "cut", resume=True)
    assert again["resumed_from"] == fails_at - 1 and again["stopped"] == whole["stopped"]
    weights = "model/model.safetensors"
    assert (tmp_path / "cut" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
    assert again["flops"] == whole["flops"]
    # a finished run that is resumed ends at once
    third = trained(prepared(pair, questions, **settings), tmp_path / "cut", resume=True)
    assert third["steps"] == 4 and third["stopped"] == whole["stopped"]


def test_a_run_of_few_seconds_ends_before_its_limit(tmp_path):
    flags = ("--problems", "20", "--kl-prompts", "4", "--batch-size", "2", "--check-samples", "0")
    began = time.monotonic()
    invoke("run", *flags, "--steps", "2", "--out", tmp_path / "short")
    # enough on a machine of any speed
    seconds = max(20, 2.5 * (time.monotonic() - began))
    given = ("--steps", "100000", "--save-every", "0", "--max-hours", seconds / 3600)
    began = time.monotonic()
    code, out, err = invoke("run", *flags, *given, "--out", tmp_path / "run")
    elapsed = time.monotonic() - began
    result = last_json(out)
    # Other processes of the machine may slow the end down, which an estimate cannot know.
    assert code == 0 and elapsed < 1.25 * seconds, err
    assert 0 < result["steps"] < 100000 and elapsed > 0.4 * seconds
    assert "are left; a step takes" in result["stopped"]["reason"]
    assert result["evaluations"][-1]["step"] == result["steps"]
    assert (tmp_path / "run/model/model.safetensors").is_file()
    more = ("--steps", result["steps"] + 2, "--max-hours", "1")
    code, out, _ = invoke("run", "--resume", *more, "--out", tmp_path / "run")
    assert last_json(out)["steps"] == result["steps"] + 2 and last_json(out)["stopped"] is None


DAMAGE = ("--lr", "0.05", "--stop-when", "accuracy 4, collapse", "--eval-every", "2")
DAMAGE += ("--problems", "20", "--kl-prompts", "8", "--steps", "20", "--batch-size", "2")
DAMAGE += ("--check-samples", "0", "--prefix", "24", "--max-hours", "1", "--save-minutes", "1")


def test_a_student_that_collapses_ends_the_run_with_the_measured_numbers(tmp_path):
    """The learning rate is a hundred times too high."""
    code, out, err = invoke("run", *DAMAGE, "--out", tmp_path / "run")
    stopped = last_json(out)["stopped"]
    assert code == 0 and stopped["step"] == last_json(out)["steps"] < 20
    assert stopped["reason"].startswith("--stop-when collapse: 0% [0%, ")
    assert "of the answers repeat themselves" in stopped["reason"] and stopped["reason"] in err
    assert "the KL beyond the prefix rose from" in stopped["reason"]


@pytest.mark.long
def test_two_ranks_end_alike(tmp_path):
    ranks = ("--gpus", "2", "--device", "cpu", "--dtype", "float32")
    code, out, _ = invoke("run", *DAMAGE, *ranks, "--out", tmp_path / "run")
    assert code == 0 and last_json(out)["stopped"]["step"] == last_json(out)["steps"] < 20


def test_the_clock_of_rank_0_asks_for_checkpoints(pair, questions, tmp_path, monkeypatch):
    """Each look at the clock is 20 seconds later than the one before."""
    saved = []
    now = iter(range(0, 10**6, 20))
    # of this module alone, because the screen looks at the clock too
    clock = SimpleNamespace(monotonic=lambda: float(next(now)))
    monkeypatch.setattr(ending, "time", clock)
    run = prepared(pair, questions, **SMALL, checkpoint__save_every=0, checkpoint__save_minutes=1.0)
    files = RunFolder(tmp_path / "run")
    files.create({})
    files.write_json("run.json", {})
    plain = files.save_checkpoint

    def save(step, *rest):
        saved.append(step)
        return plain(step, *rest)

    files.save_checkpoint = save
    Session(run, files, Silent()).train()
    assert saved[0] == 0 and saved[-1] == 9 and 2 < len(saved) < 10


@pytest.mark.parametrize(("hours", "has_time"), [(10.0, True), (1e-4, False)])
def test_the_teacher_is_evaluated_only_if_time_is_left(pair, questions, tmp_path, hours, has_time):
    run = prepared(pair, questions, **SMALL | {"train__max_hours": hours})
    result = trained(run, tmp_path / "run")
    assert (result["accuracy_teacher"] is not None) == has_time
    assert (result["stopped"] is None) == has_time
