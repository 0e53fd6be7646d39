"""Test what is noted and warned about when training and held-out prompts are loaded."""

import json

import pytest

from prefix_distill.config import build
from prefix_distill.training.prompt_sets import load_prompt_sets
from prefix_distill.training.run import Notes


def write_rows(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def load(dataset, **options):
    notes = Notes()
    values = {"data.dataset": dataset, "evaluate.problems": 10}
    sets = load_prompt_sets(build(values | options), notes)
    return sets, notes


def sums(count, start=0):
    return [{"question": f"{i} + 1?", "answer": f"{i + 1}"} for i in range(start, start + count)]


def test_problems_that_are_trained_on_and_evaluated_are_counted(tmp_path):
    once = write_rows(tmp_path / "once.jsonl", sums(100))
    assert load(once)[1].warnings == []
    twice = write_rows(tmp_path / "twice.jsonl", sums(50) + sums(50))
    sets, notes = load(twice)
    trained = {prompt.problem for prompt in sets.train[0].prompts}
    repeated = sum(prompt.problem in trained for prompt in sets.held_out.prompts)
    [warning] = notes.warnings
    assert repeated > 0 and f"{repeated} of 10 held-out problems are also in the" in warning


def test_another_data_set_may_repeat_training_rows(tmp_path):
    train = write_rows(tmp_path / "train.jsonl", sums(30))
    test = write_rows(tmp_path / "test.jsonl", sums(10, start=27))
    _, notes = load(train, **{"evaluate.dataset": test})
    assert [text.split(" held-out")[0] for text in notes.warnings] == ["3 of 10"]


@pytest.mark.parametrize(
    "answer, is_joined",
    [(["3", "4"], True), ([{"role": "assistant", "content": "first 3, then 4"}], False)],
)
def test_only_several_references_are_said_to_be_joined(tmp_path, answer, is_joined):
    rows = [{"prompt": f"{i}?", "completion": answer} for i in range(20)]
    _, notes = load(write_rows(tmp_path / "rows.jsonl", rows))
    assert any("several references" in line for line in notes.lines) == is_joined
