"""Test that a teacher with the student's weights is reported, whatever it is called."""

import os
import shutil
from pathlib import Path

import pytest
from helpers import prepared, save_tiny
from transformers import AutoModelForCausalLM

SAME = "have the same weights: wherever both see the same prompt"


@pytest.mark.parametrize("more", [{}, {"adapter__rank": 2}, {"runtime__dtype": "bfloat16"}])
@pytest.mark.parametrize("copied", [False, True])
def test_a_teacher_with_the_students_weights_is_a_warning(pair, questions, tmp_path, copied, more):
    teacher = pair[0]
    if copied:
        teacher = str(shutil.copytree(teacher, tmp_path / "copy"))
    run = prepared((pair[0], teacher), questions, **more)
    [warning] = [text for text in run.notes.warnings if SAME in text]
    assert "nothing to teach; use another --teacher" in warning


@pytest.mark.parametrize("way", ["trailing slash", "link", "relative", "shards"])
def test_another_path_or_copy_of_the_student_is_a_warning(
    pair, questions, tmp_path, monkeypatch, way
):
    student = Path(shutil.copytree(pair[0], tmp_path / "student"))
    teacher = f"{student}/"
    if way == "link":
        teacher = str(tmp_path / "link")
        os.symlink(student, teacher)
    elif way == "relative":
        monkeypatch.chdir(tmp_path)
        teacher = "./student"
    elif way == "shards":
        teacher = str(shutil.copytree(student, tmp_path / "shards"))
        AutoModelForCausalLM.from_pretrained(student).save_pretrained(
            teacher, max_shard_size="40KB"
        )
    run = prepared((str(student), teacher), questions)
    assert any(SAME in text for text in run.notes.warnings)


def test_other_weights_of_the_same_shape_are_no_warning(pair, questions, tmp_path):
    teacher = str(save_tiny(tmp_path / "teacher", seed=5))
    run = prepared((pair[0], teacher), questions)
    assert not any("same weights" in text for text in run.notes.warnings)
