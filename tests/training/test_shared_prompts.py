"""Test that a run checks shared prompts with its own prompts, and reports what it found."""

import json

import pytest
import torch
from helpers import prepared

from prefix_distill.engine import sharing
from prefix_distill.engine.sharing import Comparison
from prefix_distill.planning import checks
from prefix_distill.training.opening import describe_run


@pytest.fixture
def asked(monkeypatch):
    """Return the (prompts, whether autocast is on) of every check of a run from now on."""
    calls = []
    plain = sharing.make_sides

    def make_sides(model, prompts):
        calls.append((prompts, torch.is_autocast_enabled("cpu")))
        return plain(model, prompts)

    monkeypatch.setattr(sharing, "make_sides", make_sides)
    return calls


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_asks_with_its_own_prompts_without_autocast(pair, questions, asked, dtype):
    """The rounding of autocast would hide a fault."""
    run = prepared(pair, questions, runtime__dtype=dtype)
    assert run.pair.student.encodes_prompt_once and run.pair.teacher.encodes_prompt_once
    first = run.problems.train[: run.config.train.batch_size]
    student = [r.student_ids for r in first]
    teacher = [r.teacher_ids for r in first]
    assert len(asked) >= 3
    assert all(call in ((student, False), (teacher, False)) for call in asked)


def shown(notes):
    """Return the notes that are shown without --verbose."""
    return [note for note in notes.lines if note not in notes.details]


def test_a_run_notes_and_records_where_a_prompt_runs_once(pair, questions):
    run = prepared(pair, questions)
    notes = [note for note in shown(run.notes) if "runs a prompt" in note]
    assert notes == [found.text for found in run.shared_prompts]
    start = "the student runs a prompt once for all its samples in sampling and training: hidden"
    assert notes[0].startswith(start) and "; gradients change by" in notes[0]
    assert notes[1].startswith("the teacher runs a prompt once for all its samples in scoring: ")
    recorded = json.loads(json.dumps(describe_run(run)))["shared_prompts"]
    student = recorded["student"]
    assert student["once"] == ["sampling", "training"] and student["per_sample"] == []
    assert student["hidden_states"]["change"] <= student["hidden_states"]["allowed"] <= 1e-3
    [check] = [c for c in checks.examine(run, 0) if c.name == "shared prompts"]
    assert check.status == "ok" and check.text == "; ".join(notes)
    assert check.facts["teacher"]["once"] == ["scoring"]


def test_one_sample_per_prompt_makes_the_note_a_detail(pair, questions):
    run = prepared(pair, questions, rollout__samples=1)
    texts = [found.text for found in run.shared_prompts]
    assert not set(texts) & set(shown(run.notes))
    assert set(texts) <= set(run.notes.lines)


def test_a_run_that_recomputes_layers_says_why_training_repeats_the_prompt(pair, questions):
    run = prepared(pair, questions, train__gradient_checkpointing=True)
    student = run.shared_prompts[0]
    assert student.once == ("sampling",) and student.repeated == ("training",)
    assert "samples in sampling, once per sample in training: hidden states" in student.text
    assert student.text.endswith("--gradient-checkpointing, whose layers cannot fill the KV cache")


def test_a_run_says_why_its_models_do_not_share(pair, questions, monkeypatch):
    found = Comparison(what="hidden states", change=0.2, noise=1e-6, allowed=1e-5)
    monkeypatch.setattr(sharing, "check_sharing", lambda model, prompts: found)
    run = prepared(pair, questions)
    assert not run.pair.student.shares_prompts and not run.pair.teacher.shares_prompts
    assert run.shared_prompts[0].text == (
        "the student runs a prompt once per sample in sampling and training: hidden states change "
        "by 0.2 of their norm, expected at most 1e-05 (in a padded batch by 1e-06)"
    )
    assert run.shared_prompts[0].repeated == ("sampling", "training")
    assert run.shared_prompts[1].facts["hidden_states"]["exact"] is False
