"""Tests of templates that write today's date: a run on two days has the prompts of the first."""

import datetime
import json
import shutil
from types import SimpleNamespace

import pytest
from helpers import flags, invoke, rows, save_tiny
from transformers import AutoTokenizer

from prefix_distill.config import build
from prefix_distill.training.problems import settle_template_date

DATED = (
    "Today Date: {{ strftime_now('%d %b %Y') }}\n"
    "{% for m in messages %}<u>{{ m.content }}<e>{% endfor %}<a>"
)


def set_clock(monkeypatch, year: int) -> None:
    """Make it January 2nd of ``year``."""

    class Clock(datetime.date):
        @classmethod
        def today(cls):
            return datetime.date(year, 1, 2)

    fake = SimpleNamespace(date=Clock, datetime=datetime.datetime)
    for module in ("training.problems", "prompts.chat", "results.evaluation"):
        monkeypatch.setattr(f"prefix_distill.{module}.datetime", fake)


@pytest.fixture(scope="module")
def dated(tmp_path_factory):
    """Return two models whose chat template writes the date, as Llama 3's does."""
    folder = tmp_path_factory.mktemp("dated")
    names = []
    for seed in (0, 1):
        names.append(save_tiny(folder / str(seed), seed=seed))
        tokenizer = AutoTokenizer.from_pretrained(names[-1])
        tokenizer.chat_template = DATED
        tokenizer.save_pretrained(names[-1])
    return tuple(names)


def interrupt(whole, folder):
    """Copy a run folder as a kill after step 3 leaves it."""
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoints/step-00000006")
    shutil.rmtree(folder / "model")


def test_a_resume_on_another_day_has_the_prompts_of_the_first(
    dated, questions, tmp_path, monkeypatch
):
    set_clock(monkeypatch, 2001)
    whole, later = tmp_path / "whole", tmp_path / "later"
    code, _, err = invoke(*flags(dated, questions, whole))
    assert code == 0 and "chat templates write the date 2001-01-02 (--template-date)" in err, err
    interrupt(whole, later)
    set_clock(monkeypatch, 2002)
    code, _, err = invoke("run", "--resume", "--out", later)
    assert code == 0 and "2001-01-02" in err and "2002" not in err, err
    for name in ("model/model.safetensors", "examples-after.jsonl"):
        assert (whole / name).read_bytes() == (later / name).read_bytes()
    assert rows(whole) == rows(later)

    evaluation = ["eval", "--model", later / "model", "--dataset", questions, "--limit", "2"]
    code, _, err = invoke(*evaluation, "--max-new-tokens", "4", "--out", tmp_path / "e.jsonl")
    assert code == 0 and "the chat template writes the date 2002-01-02 (--template-date)" in err


def test_the_date_of_the_first_rank_counts():
    model = SimpleNamespace(name="m", tokenizer=SimpleNamespace(chat_template=DATED))
    pair = SimpleNamespace(student=model, teacher=model)
    place = SimpleNamespace(gather=lambda date: ["1999-12-31", date])
    notes = SimpleNamespace(note=print)
    config = settle_template_date(build({}), pair, place, notes=notes)
    assert config.data.template_date == "1999-12-31"


def test_a_pattern_that_matches_another_file_is_refused_on_resume(pair, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    row = {"question": "What is 6*7?", "answer": "42"}
    lines = "".join(json.dumps(row | {"question": f"What is 6*{i}?"}) + "\n" for i in range(20))
    (folder / "a.jsonl").write_text(lines)
    out = tmp_path / "run"
    code, _, err = invoke(*flags(pair, folder / "*.jsonl", out))
    assert code == 0, err
    (folder / "b.jsonl").write_text(lines.replace("6", "8"))
    code, _, err = invoke("run", "--resume", "--out", out)
    assert code == 2 and "prompts" in err and "--allow-changed" in err, err
