"""Test the time left of a run, and that it expects the evaluations and probes that a run makes."""

import time

import pytest
from helpers import prepared, trained

from prefix_distill.display import EVALUATION, SAVING, TAIL_PROBE, Outline
from prefix_distill.display.pace import Pace, list_measurements, list_saves
from prefix_distill.training.opening import describe_outline


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_the_time_left_counts_evaluations_probes_and_saves(clock):
    """Closed form: 10 steps of 2 s, evaluations of 7 s, saves of 3 s."""
    pace = Pace(Outline(steps=10, eval_every=4, save_every=5))
    assert pace.seconds_left is None
    clock[0] += 7
    pace.end_phase(EVALUATION, 7.0)
    clock[0] += 3
    pace.end_phase(SAVING, 3.0)
    clock[0] += 2
    pace.end_step(1)
    # 9 steps, evaluations after 4, 8 and 10, saves after 5 and 10, and the model
    assert pace.seconds_left == pytest.approx(9 * 2 + 3 * 7 + 3 * 3)
    clock[0] += 1
    assert pace.seconds_left == pytest.approx(9 * 2 + 3 * 7 + 3 * 3 - 1)
    for step in (2, 3, 4):
        clock[0] += 2
        pace.end_step(step)
    mean = (2 + 3 + 2 + 2) / 4
    assert pace.seconds_left == pytest.approx(6 * mean + 3 * 7 + 3 * 3)
    clock[0] += 7
    pace.end_phase(EVALUATION, 7.0)
    assert pace.seconds_left == pytest.approx(6 * mean + 2 * 7 + 3 * 3)


def test_other_phases_do_not_count():
    pace = Pace(Outline(steps=2))
    pace.end_phase("sampling", 100.0)
    assert pace.lasted == {}


def test_saves_are_due_every_few_steps_and_twice_at_the_end():
    assert list_saves(Outline(steps=10, save_every=4)) == [4, 8, 10, 10]
    assert list_saves(Outline(steps=10)) == [10, 10]


@pytest.mark.parametrize("eval_every, tail_every", [(0, 0), (3, 0), (0, 2), (5, 2), (2, 3)])
def test_a_run_measures_when_the_outline_says_so(pair, questions, tmp_path, eval_every, tail_every):
    values = {
        "train.steps": 7,
        "evaluate.every": eval_every,
        "evaluate.tail_every": tail_every,
    }
    run = prepared(pair, questions, **values)
    result = trained(run, tmp_path / "run")
    evaluations, probes = list_measurements(describe_outline(run.config, ""))
    assert [row["step"] for row in result["evaluations"]] == [0, *evaluations]
    assert [row["step"] for row in result["tail_probes"]] == probes
    assert TAIL_PROBE in Pace(describe_outline(run.config, "")).due
