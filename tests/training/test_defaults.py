"""Built-in models and task stand in only where nothing is named; epochs become steps."""

import math
from pathlib import Path

import pytest
from helpers import invoke, last_json, prepared, trained

import prefix_distill
from prefix_distill import config as configuration
from prefix_distill.engine.saving import save_model
from prefix_distill.errors import UserError
from prefix_distill.training import defaults
from prefix_distill.training.folder import RunFolder
from prefix_distill.training.run import Notes

SMALL = ("--check-samples", "0", "--problems", "2", "--kl-prompts", "2", "--tail-prompts", "2")


@pytest.fixture
def named(pair, questions, tmp_path, monkeypatch):
    """Work in an empty folder; return student, teacher and dataset."""
    monkeypatch.chdir(tmp_path)
    return (*pair, questions)


@pytest.mark.parametrize(
    "command, given, missing",
    [
        ("run", ["--student", "{0}"], "add --teacher and --dataset"),
        ("run", ["--student", "{0}", "--teacher", "{1}"], "add --dataset"),
        ("check", ["--dataset", "{2}"], "add --student and --teacher"),
        ("probe", ["--teacher", "{1}", "--dataset", "{2}", "--out", "p"], "add --student"),
        ("plan", ["--teacher", "{1}"], "add --student"),
        ("plan", ["--dataset", "{2}"], "add --student and --teacher"),
        ("run", ["--student", "{0}", "--teacher", "self"], "add --dataset"),
        ("eval", ["--model", "{0}"], "add --dataset"),
        ("eval", ["--dataset", "{2}"], "add --model"),
    ],
)
def test_what_is_missing_is_named_in_one_line(command, given, missing, named):
    words = [word.format(*named) for word in given]
    if "self" in words:
        words += ["--privileged-column", "answer"]
    code, out, err = invoke(command, *words)
    assert code == 2 and out == "" and missing in err
    assert len(err.splitlines()) == 1 and err.startswith("error: expected --")
    assert not list(Path().iterdir())


def test_the_functions_name_what_is_missing(pair, tmp_path):
    with pytest.raises(UserError, match="add --teacher and --dataset"):
        prefix_distill.run(student=pair[0], out=tmp_path / "run")
    with pytest.raises(UserError, match="add --dataset"):
        prefix_distill.evaluate(pair[0], out=tmp_path / "e.jsonl")


def test_the_built_in_pair_has_its_learning_rate_and_others_the_default(pair, questions):
    notes = Notes()
    filled = defaults.fill_in(configuration.build({}), notes)
    assert filled.models.student == "lab:choice/student" and filled.data.dataset == "lab:choice"
    assert filled.schedule.lr == defaults.BUILT_IN_RATE
    assert any("no --lr was given; using 0.0004" in line for line in notes.lines)
    assert defaults.fill_in(configuration.build({"schedule.lr": 1e-3}), notes).schedule.lr == 1e-3
    named = {"models.student": pair[0], "models.teacher": pair[1], "data.dataset": questions}
    filled = defaults.fill_in(configuration.build(named), notes)
    assert filled.schedule.lr == 5e-5


@pytest.mark.parametrize("command", ["plan", "probe"])
def test_a_command_that_does_not_train_names_no_learning_rate(command, tmp_path):
    more = ("--prompt-tokens", "20")
    if command == "probe":
        more = ("--problems", "2", "--max-new-tokens", "8", "--out", tmp_path / "probe")
    code, _, err = invoke(command, *more)
    assert code == 0 and "built-in lab:choice/student" in err and "--lr" not in err


@pytest.mark.long
def test_a_run_of_the_built_in_pair_ends_where_the_demo_does(tmp_path):
    code, out, _ = invoke("run", "--steps", "60", "--out", tmp_path / "run")
    assert code == 0 and last_json(out)["accuracy_after"]["value"] > 0.8


def test_eval_takes_a_run_folder(pair, questions, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = prepared(pair, questions, train__steps=1)
    trained(run, tmp_path / "run")
    (tmp_path / "run/config.yaml").touch()
    flags = ("--dataset", questions, "--problems", "3", "--max-new-tokens", "8")
    scores = []
    for k, name in enumerate(("run", "run/model")):
        code, out, err = invoke("eval", "--model", name, *flags, "--out", f"{k}.jsonl")
        assert code == 0, err
        assert ("evaluating its trained student, model/" in err) == (name == "run")
        scores.append(last_json(out)["mean_tokens"])
        assert last_json(out)["model"] == "run/model"
    assert scores[0] == scores[1]

    unfinished = RunFolder(tmp_path / "half")
    unfinished.create({}, {})
    code, _, err = invoke("eval", "--model", "half", *flags)
    assert code == 2 and "there is no checkpoint yet" in err and "--resume --out half" in err
    save_model(run.pair.student, unfinished.best)
    code, out, err = invoke("eval", "--model", "half", *flags, "--out", "2.jsonl")
    assert code == 0 and "its best student so far, best/" in err


def test_every_command_writes_below_runs_by_default(pair, questions, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trained(prepared(pair, questions, train__steps=1), tmp_path / "first")
    named = ["--student", pair[0], "--teacher", pair[1], "--dataset", questions]
    few = ["--problems", "2", "--max-new-tokens", "8"]
    for name, words in {
        "run": [*named, *SMALL, *few, "--steps", "1", "--batch-size", "2"],
        "eval": ["--model", pair[0], "--dataset", questions, *few],
        "probe": [*named, *few],
        "export": [pair[0]],
    }.items():
        code, _, err = invoke(name, *words)
        assert code == 0, err
    (run,) = Path("runs").glob("run-*")
    assert invoke("report", run)[0] == 0
    assert prefix_distill.report([run]).out.name.startswith("report-")
    written = sorted(path.name.split("-")[0] for path in Path("runs").iterdir())
    assert set(written) == {"eval", "export", "probe", "report", "run"}
    assert sorted(path.name for path in Path().iterdir()) == ["first", "runs"]
    assert next(Path("runs").glob("eval-*")).suffix == ".jsonl"


def test_epochs_are_steps_and_a_resumed_run_may_change_them(pair, questions, tmp_path):
    flags = ["--student", pair[0], "--teacher", pair[1], "--dataset", questions, *SMALL]
    flags += ["--max-new-tokens", "8", "--samples", "1", "--batch-size", "10"]
    out = ["--out", tmp_path / "run"]
    code, printed, err = invoke("run", *flags, "--num_train_epochs", "0.5", *out)
    rows = 40 - 2  # two are held out
    steps = math.ceil(0.5 * rows / 10)
    assert code == 0 and f"steps {steps}: --epochs 0.5 × {rows} training rows" in err
    assert last_json(printed)["steps"] == steps
    code, printed, _ = invoke("run", "--resume", "--epochs", "0.5", *out)
    assert code == 0 and last_json(printed)["steps"] == steps
    code, printed, _ = invoke("run", "--resume", "--steps", steps + 1, *out)
    assert code == 0 and last_json(printed)["steps"] == steps + 1


@pytest.mark.parametrize(
    "given, message",
    [
        (["--epochs", "2", "--streaming"], "is streamed, so its number of rows is not known"),
        (["--epochs", "2", "--steps", "3"], "--steps 3 with --epochs 2: the epochs are 10 steps"),
        (["--epochs", "0"], "--epochs 0: expected a number above 0"),
    ],
)
def test_epochs_that_cannot_be_steps_are_refused(given, message, named):
    flags = ["--student", named[0], "--teacher", named[1], "--dataset", named[2], *SMALL]
    code, out, err = invoke("run", *flags, *given, "--out", "run")
    assert code == 2 and out == "" and message in err.splitlines()[-1]


def test_a_plan_counts_the_steps_of_its_epochs(pair, questions):
    named = ["--student", pair[0], "--teacher", pair[1], "--dataset", questions, *SMALL]
    _, out, _ = invoke("plan", *named, "--epochs", "2", "--max-new-tokens", "16")
    assert last_json(out)["updates"] == 10
    code, _, err = invoke("plan", *named[:4], "--epochs", "2", "--prompt-tokens", "9")
    assert code == 2 and "--epochs 2: its number of steps follows from the rows" in err
