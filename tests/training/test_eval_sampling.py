"""Evaluation can sample with top-p and top-k, or as the model's own generation config says."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
from helpers import Silent, invoke, last_json, prepared, trained
from transformers import GenerationConfig

from prefix_distill.engine.recommended import read_recommended
from prefix_distill.engine.sampling import Sampler
from prefix_distill.errors import UserError
from prefix_distill.planning import checks
from prefix_distill.training.folder import RunFolder
from prefix_distill.training.session import Session
from prefix_distill.training.tails import advise_on_length

FEW = ("--problems", "6", "--max-new-tokens", "12")


def recommended(**settings):
    return read_recommended(SimpleNamespace(generation_config=GenerationConfig(**settings)))


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20}, (0.6, 0.95, 20)),
        ({"do_sample": True}, (1.0, 1.0, 50)),
        ({}, (0.0, 1.0, 0)),
        ({"temperature": 0.6, "do_sample": False}, (0.0, 1.0, 0)),
    ],
)
def test_the_settings_are_those_that_generate_would_use(settings, expected):
    found = recommended(**settings)
    assert (found.temperature, found.top_p, found.top_k) == expected and found.left_out == {}


def test_settings_that_cannot_be_applied_are_named():
    found = recommended(do_sample=True, top_k=20, repetition_penalty=1.1, min_p=0.0)
    assert found.left_out == {"repetition_penalty": 1.1}
    assert found.describe().endswith("top-k 20; not applied: repetition_penalty 1.1")


def test_a_run_evaluates_with_the_settings_and_trains_with_its_own(pair, questions, tmp_path):
    run = prepared(pair, questions, evaluate__top_p=0.5, evaluate__top_k=3, train__steps=1)
    used = run.method.eval_sampler
    assert (used.temperature, used.top_p, used.top_k) == (1.0, 0.5, 3)
    assert run.method.sampler.on_policy
    # the tiny models' own settings
    run = prepared(pair, questions, evaluate__sampling="model", train__steps=1)
    used = run.method.eval_sampler
    assert (used.temperature, used.top_p, used.top_k) == (0.3, 1.0, 7)
    assert any(
        "as the model recommends: temperature 0.3, top-p 1, top-k 7" in line
        for line in run.notes.lines
    )
    assert dataclasses.replace(run.method.sampler, seed=0) == dataclasses.replace(
        prepared(pair, questions, train__steps=1).method.sampler, seed=0
    )
    (check,) = [c for c in checks.examine(run, 2) if c.name == "sampling"]
    assert "from the student's generation config: temperature 0.3, top-p 1, top-k 7" in check.text
    assert check.facts["ignored"]["student"] == {} and check.facts["ignored"]["teacher"]


def test_the_sampling_is_recorded(pair, questions, tmp_path):
    named = ["--student", pair[0], "--teacher", pair[1], "--dataset", questions, *FEW]
    given = ["--steps", "1", "--batch-size", "2", "--check-samples", "0", "--kl-prompts", "2"]
    code, out, err = invoke(
        "run", *named, *given, "--eval-sampling", "model", "--out", tmp_path / "run"
    )
    assert code == 0, err
    used = {"temperature": 0.3, "top_p": 1.0, "top_k": 7}
    assert json.loads((tmp_path / "run/run.json").read_text())["eval_sampling"] == used
    scores = {}
    for words in (["--sampling", "model"], ["--eval-sampling=model"], ["--top-k", "7"]):
        file = tmp_path / f"{len(scores)}.jsonl"
        model = tmp_path / "run"
        code, out, err = invoke(
            "eval", "--model", model, "--dataset", questions, *FEW, *words, "--out", file
        )
        assert code == 0, err
        scores[words[0]] = last_json(out)["sampling"]
    assert scores["--sampling"] == scores["--eval-sampling=model"] == used
    assert scores["--top-k"] == {"temperature": 1.0, "top_p": 1.0, "top_k": 7}


def test_two_ways_to_sample_are_refused(pair, questions):
    with pytest.raises(UserError, match=r"temperature 0\.5 with .*sampling model"):
        prepared(pair, questions, evaluate__sampling="model", evaluate__temperature=0.5)
    code, _, err = invoke("eval", "--sampling", "model", "--top-p", "0.5")
    assert code == 2 and err.startswith("error: --top-p 0.5 with --sampling model: ")


def test_a_sampler_describes_itself():
    sampler = Sampler(eos=frozenset(), pad=0, support=1, seed=0, top_p=0.9)
    assert sampler.describe() == {"temperature": 1.0, "top_p": 0.9, "top_k": 0}


def test_cut_answers_get_advice_once(pair, questions, tmp_path):
    """The tiny student ends few answers."""
    run = prepared(pair, questions, evaluate__every=1)
    files = RunFolder(tmp_path / "run")
    files.create({})
    files.write_json("run.json", {})
    report = Silent()
    Session(run, files, report).train()
    advice = [text for text in report.warnings if "raise --max-new-tokens" in text]
    assert len(advice) == 1 and "end within --max-new-tokens 32" in advice[0]
    code, _, err = invoke(
        *("eval", "--model", pair[0], "--dataset", questions, *FEW),
        *("--out", tmp_path / "e.jsonl"),
    )
    warnings = [line for line in err.splitlines() if line.startswith("warning: only ")]
    assert code == 0 and len(warnings) == 1 and "raise --max-new-tokens" in warnings[0]
    assert advise_on_length(0.8, 32, "--student-thinking") == []
    assert trained(prepared(pair, questions), tmp_path / "run", resume=True)["steps"] == 4
