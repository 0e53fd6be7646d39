"""Test the built-in laboratory: its problems, its models, and a run on them."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import invoke, last_json

from prefix_distill.engine import loading
from prefix_distill.lab import build, task
from prefix_distill.lab.build import BANDS, NETS, Stage
from prefix_distill.lab.task import MAX_NEW_TOKENS, MODELS, ROLES, TASKS, Problem
from prefix_distill.prompts import templates
from prefix_distill.prompts.prompt import Prompt

PAIRS = [(name, role) for name in TASKS for role in ROLES[name]]


@pytest.mark.parametrize("name", TASKS)
def test_splits_are_disjoint_plentiful_and_repeatable(name):
    sets = {split: task.sample_problems(name, split, 3000) for split in ("train", "test")}
    sets["validation"] = task.sample_problems(name, "validation", 1000)
    for split, found in sets.items():
        assert len(set(found)) == len(found) and all(p.split == split for p in found)
    prompts = [{p.prompt for p in found} for found in sets.values()]
    assert (
        not prompts[0] & prompts[1] and not prompts[0] & prompts[2] and not prompts[1] & prompts[2]
    )
    assert task.sample_problems(name, "test", 50, seed=3) == task.sample_problems(
        name, "test", 50, seed=3
    )
    assert task.sample_problems(name, "test", 50, seed=3) != task.sample_problems(
        name, "test", 50, seed=4
    )


def test_a_problem_worked_by_hand():
    p = Problem(task="choice", first=41, second=73, steps=3)
    assert p.prompt == "05:41 04:73"
    # digit by digit without carrying: 41 + 73 = 14, 73 + 14 = 87, 14 + 87 = 91
    assert p.solution == "03:14 02:87 01:91 ####91" and p.answer == "91"
    assert p.privileged_prompt == "03:14 02:87 01:91 ####91 05:41 04:73"
    assert {p.short_cut(random.Random(i)) for i in range(20)} == {"####91", "03:14 ####91"}


@pytest.mark.parametrize("name", TASKS)
def test_traces_are_long_and_prompts_short(name):
    model = loading.load_model(
        f"lab:{name}/student", device=torch.device("cpu"), dtype=torch.float32
    )
    for problem in task.sample_problems(name, "test", 20):
        prompt = templates.render(
            model,
            Prompt(index=0, messages=({"role": "user", "content": problem.prompt},), answer=None),
            "chat",
        )
        trace = model.tokenizer(problem.solution, add_special_tokens=False).input_ids
        assert (
            len(prompt) <= 14
            and 120 <= len(trace) < MAX_NEW_TOKENS
            and len(trace) >= 8 * len(prompt)
        )
        assert model.tokenizer.decode(trace) == problem.solution


def test_no_answer_is_common():
    for name in TASKS:
        answers = [p.answer for p in task.sample_problems(name, "test", 2000)]
        assert max(answers.count(a) for a in set(answers)) / 2000 < 0.05


def test_everything_shipped_fits_in_4_mb():
    assert sum(f.stat().st_size for f in MODELS.rglob("*") if f.is_file()) <= 4e6


@pytest.mark.parametrize("name, role", PAIRS)
def test_shipped_models_reach_their_accuracy_bands(name, role, tmp_path):
    """Evaluate at temperature 1 on 60 held-out problems; compare the interval with the band."""
    _, out, _ = invoke(
        "eval",
        "--model",
        f"lab:{name}/{role}",
        "--dataset",
        f"lab:{name}",
        "--problems",
        "60",
        "--generation-rows",
        "60",
        "--out",
        tmp_path / "e.jsonl",
    )
    found = last_json(out)
    low, high = BANDS[role]
    assert found["accuracy"]["high"] >= low and found["accuracy"]["low"] <= high
    assert found["finish_rate"] > (0.97 if role == "teacher" else 0.8)


@pytest.mark.parametrize("role", ["student-told", "teacher-half"])
def test_models_of_privileged_prompts_write_the_given_solution(role):
    problems = task.sample_problems("choice", "test", 60)
    answers = build.sample(
        task.model_path("choice", role), [p.privileged_prompt for p in problems], 0
    )
    assert sum(answer == p.solution for p, answer in zip(problems, answers, strict=True)) >= 51


@pytest.mark.long
def test_run_then_eval_on_the_embedded_pair(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = invoke(
        "run", "--steps", "5", "--prefix", "16", "--problems", "40", "--out", "X"
    )
    assert code == 0 and err.count("using the built-in lab:choice") == 3
    document = last_json(out)
    assert document["steps"] == 5 and document["flops"]["useful"] < document["flops"]["executed"]
    assert document["kl_after"]["value"] < document["kl_before"]["value"]
    assert document["full_rollout_cost"] > document["flops"]["useful"]
    config = (Path("X") / "config.yaml").read_text()
    assert "lab:choice/student" in config and "max_new_tokens: 192" in config
    code, out, _ = invoke(
        "eval", "--model", "X", "--dataset", "lab:choice", "--problems", "40", "--out", "e.jsonl"
    )
    evaluated = last_json(out)
    assert code == 0 and evaluated["accuracy"]["n"] == 40
    # the same problems, seeds and weights as at the end of the run
    assert evaluated["accuracy"] == document["accuracy_after"]


def test_only_stages_with_privileged_prompts_use_random_numbers_for_them():
    p = Problem(task="choice", first=41, second=73, steps=3)
    plain = Stage(updates=1, batch=1, lr=1.0, short_cuts=0.5)
    privileged = Stage(updates=1, batch=1, lr=1.0, short_cuts=1.0, privileged=0.5)
    rng, same = random.Random(0), random.Random(0)
    for _ in range(20):
        expected = p.short_cut(same) if same.random() < 0.5 else p.solution
        assert build.make_pair(p, plain, rng) == (p.prompt, expected)
    pairs = {build.make_pair(p, privileged, rng) for _ in range(40)}
    assert pairs == {
        (p.privileged_prompt, p.solution),
        (p.prompt, "####91"),
        (p.prompt, "03:14 ####91"),
    }


def test_rebuilding_a_model_is_deterministic(tmp_path):
    """Train three updates of the committed recipe twice; compare the files byte by byte.

    The loader accepts the folder.
    """
    net = replace(NETS[0], stages=(replace(NETS[0].stages[0], updates=3),))
    for name in ("a", "b"):
        model = build.make_model(net)
        build.train(net, model)
        build.save(model, tmp_path / name, build.make_tokenizer())
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name
    assert loading.load_model(
        str(tmp_path / "a"), device=torch.device("cpu"), dtype=torch.float32
    ).eos == {1}
    assert json.loads((tmp_path / "a/tokenizer.json").read_text()) == json.loads(
        (task.model_path("choice", "teacher") / "tokenizer.json").read_text()
    )
