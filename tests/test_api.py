"""Test the Python API: equality with the commands, typed results, threads and notebooks."""

import contextlib
import dataclasses
import io
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import typing
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
import typer
from helpers import ROOT, invoke, last_json, rows
from safetensors.torch import load_file

import prefix_distill
from prefix_distill import config as configuration
from prefix_distill.api import keywords, launch, public, settings
from prefix_distill.api.events import EventObserver, Relay
from prefix_distill.api.observers import LogObserver
from prefix_distill.cli.main import app
from prefix_distill.errors import Interrupted, PreflightError, Stopped, UserError
from prefix_distill.signals import find_stop_signals

SMALL = {
    "prefix": 12,
    "max_new_tokens": 32,
    "steps": 4,
    "batch_size": 2,
    "samples": 2,
    "problems": 4,
    "kl_prompts": 2,
    "eval_every": 2,
    "check_samples": 0,
    "lr": 1e-3,
}


@pytest.fixture
def given(pair, questions) -> dict:
    """Return the options of a small run, without the run folder."""
    return SMALL | {"student": pair[0], "teacher": pair[1], "dataset": questions}


def flags(options: dict) -> list[str]:
    """Return options as command-line arguments."""
    words = []
    for name, value in options.items():
        words += ["--" + name.replace("_", "-"), str(value)]
    return words


def without_times(document: dict) -> dict:
    """Return a document without wall times and paths, which differ between two calls."""
    text = json.dumps(document)
    plain = json.loads(text, object_hook=lambda d: {k: v for k, v in d.items() if k not in UNEQUAL})
    return typing.cast(dict, plain)


UNEQUAL = ("seconds", "out", "examples")


def state_of_process() -> dict:
    """Return the process-wide state that a call could change."""
    return {
        "environment": dict(os.environ),
        "warning filters": list(warnings.filters),
        "signals": [signal.getsignal(n) for n in find_stop_signals()],
        "threads": threading.active_count(),
        "torch threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "gradients": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "random numbers": torch.random.get_rng_state().tolist(),
        "verbosity": transformers.logging.get_verbosity(),
        "bars": transformers.utils.logging.is_progress_bar_enabled(),
        "hub": logging.getLogger("huggingface_hub").level,
    }


def parameters_of(command: str) -> set[str]:
    """Return the flags of a command as Python keywords."""
    names = set()
    for parameter in typer.main.get_group(app).commands[command].params:
        for flag in parameter.opts:
            if flag.startswith("--"):
                names.add(settings.keyword(flag))
    return names - {"help"}


# Names and settings


def test_keywords_equal_the_flags():
    arguments = {"config", "set", "resume", "dry_run"}  # flags of the command only
    assert keywords.RunOptions.__annotations__.keys() == parameters_of("run") - arguments
    assert keywords.PlanOptions.__annotations__.keys() == parameters_of("plan") - arguments
    assert keywords.RunOptions.__annotations__.keys() == parameters_of("check") - arguments
    assert keywords.EvalOptions.__annotations__.keys() == parameters_of("eval") - {"out"}
    own = {"out", "problems"}  # parameters of the function `probe`
    assert keywords.ProbeOptions.__annotations__.keys() == parameters_of("probe") - own
    assert keywords.ExportOptions.__annotations__.keys() == parameters_of("export") - {"out"}
    assert settings.run_names().keys() == keywords.RunOptions.__annotations__.keys()
    assert settings.eval_names().keys() == keywords.EvalOptions.__annotations__.keys()
    assert settings.probe_names().keys() == keywords.ProbeOptions.__annotations__.keys()


def test_keywords_have_the_types_of_the_options():
    hints = typing.get_type_hints(keywords.RunOptions)
    for name, path in settings.run_names().items():
        field = configuration.options()[path]
        declared = field.type
        allowed = set(typing.get_args(hints[name])) or {hints[name]}
        expected = set(typing.get_args(declared)) or {declared}
        assert expected <= allowed, name
        more = {int, os.PathLike[str]}
        if configuration.is_automatic(field):
            more |= {typing.Literal["auto"]}
        assert allowed - expected <= more, name


def test_public_names_load_when_used():
    code = (
        "import sys, prefix_distill\n"
        "assert prefix_distill.__version__ and 'torch' not in sys.modules\n"
        "assert set(prefix_distill.__all__) <= set(dir(prefix_distill))\n"
        "from prefix_distill import *\n"
        "assert Config.from_options(steps=5).train.steps == 5\n"
        "assert callable(run) and 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (ROOT / "prefix_distill/py.typed").is_file()
    with pytest.raises(AttributeError, match="has no attribute 'distil'"):
        _ = prefix_distill.distil
    assert public.__all__ == prefix_distill.__all__


def test_a_config_comes_from_keywords_and_yaml(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("schedule: {prefix: 512, lr: 1e-3}\ntrain: {steps: 7}\n")
    config = prefix_distill.Config.from_yaml(file, steps=8)
    assert (config.schedule.prefix, config.schedule.lr, config.train.steps) == ("512", 1e-3, 8)
    assert config == prefix_distill.Config.from_options(prefix=512, lr=1e-3, steps=8)
    assert config.to_dict() == configuration.as_dict(config)
    assert "<td>schedule.lr</td><td>0.001</td>" in config._repr_html_()
    assert "batch_size" not in config._repr_html_()


def test_numbers_of_other_packages_and_paths_are_options():
    numpy = pytest.importorskip("numpy")
    options = {"steps": numpy.int64(3), "lr": numpy.float64(0.5), "student": Path("a") / "b"}
    config = prefix_distill.Config.from_options(**options)
    assert (config.train.steps, config.schedule.lr) == (3, 0.5)
    assert config.models.student == os.path.join("a", "b")


# Runs


def test_runs_equal_the_command_bit_for_bit_and_restore_the_process_state(given, tmp_path, capfd):
    code, out, err = invoke("run", *flags(given), "--out", tmp_path / "cli")
    assert code == 0, err
    expected = last_json(out)
    config = prefix_distill.Config.from_options(**given)
    capfd.readouterr()
    before = state_of_process()
    for name in ("first", "second"):
        steps: list[dict] = []
        folder = tmp_path / name
        result = prefix_distill.run(config, out=folder, on_step=steps.append)
        assert capfd.readouterr() == ("", "")
        assert state_of_process() == before
        assert rows(folder) == rows(tmp_path / "cli")
        assert steps == result.metrics() and len(steps) == 4
        weights, others = (
            load_file(root / "model/model.safetensors") for root in (folder, tmp_path / "cli")
        )
        assert all(torch.equal(weights[key], others[key]) for key in others)
        assert without_times(result.to_dict()) == without_times(expected)
        assert result.to_dict().keys() == expected.keys()
    assert result.accuracy_after is not None
    assert dataclasses.asdict(result.accuracy_after) == expected["accuracy_after"]
    assert result.flops.useful == expected["flops"]["useful"]
    assert result.out == folder and result.model == folder / "model"
    assert [row["step"] for row in result.evaluations] == [0, 2, 4]
    assert prefix_distill.load(folder) == result
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.steps = 5


DAMAGES: dict[str, object] = {
    "no object": [],
    "no result": {"result": None},
    "an empty result": {"result": {}},
    "flops": {"flops": "x"},
    "steps": {"steps": "two"},
    "accuracy": {"accuracy_after": [1]},
    "an interval": {"accuracy_after": {"value": "x", "n": 4, "low": 0, "high": 1}},
    "evaluations": {"evaluations": [5]},
    "seconds": {"seconds": []},
}


def test_a_damaged_run_folder_gives_a_one_line_error(given, tmp_path):
    prefix_distill.run(**given | {"steps": 1}, out=tmp_path / "run")
    file = tmp_path / "run/run.json"
    whole = json.loads(file.read_text())
    for name, damage in DAMAGES.items():
        document = damage
        if isinstance(damage, dict) and "result" not in damage:
            document = whole | {"result": whole["result"] | damage}
        file.write_text(json.dumps(document))
        with pytest.raises(UserError, match=r"run\.json: .*expected .*, got ") as raised:
            prefix_distill.load(tmp_path / "run")
        assert "\n" not in str(raised.value) and "--out" not in str(raised.value), name
    file.write_text("{")
    with pytest.raises(UserError, match="expected JSON"):
        prefix_distill.load(tmp_path / "run")
    file.write_text(json.dumps(whole))
    result = prefix_distill.load(tmp_path / "run")
    (tmp_path / "run/metrics.jsonl").write_text("[1]\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl line 1: expected an object"):
        result.metrics()
    with pytest.raises(UserError, match=r"expected a run\.json, got none"):
        prefix_distill.load(tmp_path)


def config_with_number() -> object:
    return prefix_distill.Config(train=typing.cast(typing.Any, 5))


# call, as source text → regular expression that its error message matches
WRONG_ARGUMENTS = {
    "api.run('x')": "config: expected a Config, got 'x'",
    "api.run({'train': {'steps': 1}})": "config: expected a Config, got {'train'",
    "api.check(config_with_number())": "config.train: expected Train, got 5",
    "api.run(out='')": "--out '': expected a folder name, got empty text",
    "api.resume(5)": "out: expected a path, got 5",
    "api.resume('')": "out: expected the name of a file or folder, got ''",
    "api.load(5)": "out: expected a path, got 5",
    "api.load(b'r0')": "out: expected a path, got b'r0'",
    "api.probe(5)": "out: expected a path, got 5",
    "api.probe('')": "out: expected the name of a file or folder, got ''",
    "api.probe('p', problems='5')": "problems: expected a whole number, got '5'",
    "api.probe('p', problems=None)": "problems: expected a whole number, got None",
    "api.probe('p', problems=True)": "problems: expected a whole number, got True",
    "api.evaluate(out=5)": "out: expected a path, got 5",
    "api.evaluate(out='')": "out: expected the name of a file or folder, got ''",
    "api.plan(prompt_tokens='5')": "prompt_tokens: expected a whole number, got '5'",
    "api.plan(prefixes=5)": "prefixes: expected a list of prefixes, got 5",
    "api.plan(device_tflops=True)": "device_tflops: expected a number, got True",
    "api.plan(measure='no')": "measure: expected true or false, got 'no'",
    "api.plan(from_run=5)": "from_run: expected text, got 5",
    "api.compare(None, 'c')": "arms_file: expected a path, got None",
    "api.compare('a.yaml', '')": "out: expected the name of a file or folder, got ''",
    "api.report(None, 'rep')": "folders: expected a list of folders, got None",
    "api.report('r0', 'rep')": "folders: expected a list of folders, got 'r0'",
    "api.report([], 'rep')": r"folders: expected at least one folder, got \[\]",
    "api.report([5], 'rep')": "folders: expected a path, got 5",
    "api.report(['r0'], 'rep', title=5)": "title: expected text, got 5",
    "api.report(['r0'], 3)": "out: expected a path, got 3",
    "api.export(5, 'e')": "source: expected a path, got 5",
    "api.export('r0', '')": "out: expected the name of a file or folder, got ''",
    "api.Config.from_yaml(5)": "path: expected a path, got 5",
}


@pytest.mark.parametrize("call", WRONG_ARGUMENTS)
def test_a_wrong_argument_is_refused_before_anything_is_written(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"api": prefix_distill, "config_with_number": config_with_number}
    with pytest.raises(UserError, match=WRONG_ARGUMENTS[call]) as raised:
        eval(call, names)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_a_callback_may_change_the_working_directory(given, tmp_path, monkeypatch):
    """The run folder and the plugin have relative paths, and resume still finds the plugin."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "mine.py").write_text(
        "from prefix_distill import register_schedule\n"
        "register_schedule('mine')(lambda arguments, limit: lambda step: 6)\n"
    )
    options = given | {"plugin": "mine.py", "prefix": "mine", "out": "run"}
    result = prefix_distill.run(**options, on_step=lambda row: os.chdir(tmp_path / "elsewhere"))
    assert result.out == tmp_path / "run" and len(result.metrics()) == 4
    assert not list((tmp_path / "elsewhere").iterdir())
    assert prefix_distill.resume(tmp_path / "run", steps=5).steps == 5


def in_thread(work: Callable[[], object]) -> list:
    """Run ``work`` in a thread and return a list with its result or exception."""
    results: list[object] = []

    def call() -> None:
        try:
            results.append(work())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    return results


def test_calls_in_two_threads_take_turns(given, tmp_path, capfd):
    """Both runs, and a run after them, equal a run in the main thread."""
    whole = prefix_distill.run(**given, out=tmp_path / "main")
    before = state_of_process()
    results: list = []

    def work(name: str) -> None:
        results.append(prefix_distill.run(**given, out=tmp_path / name))

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    for result in results:
        assert without_times(result.to_dict()) == without_times(whole.to_dict())
        assert rows(result.out) == rows(tmp_path / "main")
    assert state_of_process() == before
    again = prefix_distill.run(**given, out=tmp_path / "again")
    assert without_times(again.to_dict()) == without_times(whole.to_dict())
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("where", ["main thread", "thread"])
def test_a_callback_that_raises_stops_with_the_state_saved(given, tmp_path, where):
    def stop(row: dict) -> None:
        if row["step"] == 3:
            raise ValueError("enough")

    def run() -> object:
        return prefix_distill.run(**given, out=tmp_path / "run", on_step=stop)

    if where == "thread":
        [error] = in_thread(run)
    else:
        with pytest.raises(ValueError) as raised:
            run()
        error = raised.value
    assert isinstance(error, ValueError) and str(error) == "enough"
    assert "after step 3; the state is saved" in error.__notes__[0]
    assert (tmp_path / "run/checkpoints/step-00000003").is_dir()
    result = prefix_distill.resume(tmp_path / "run")
    assert result.resumed_from == 3 and result.steps == 4
    prefix_distill.run(**given, out=tmp_path / "whole")
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
def test_a_callback_that_exits_stops_with_the_state_saved(given, tmp_path, kind):
    def stop(row: dict) -> None:
        raise kind(7)

    with pytest.raises(kind) as raised:
        prefix_distill.run(**given, out=tmp_path / "run", on_step=stop)
    assert "after step 1; the state is saved" in raised.value.__notes__[0]
    assert (tmp_path / "run/checkpoints/step-00000001").is_dir()


def test_a_callback_that_cannot_be_called_is_refused(given, tmp_path):
    calls: list[Callable[[], object]] = [
        lambda: prefix_distill.run(**given, out=tmp_path / "run", on_step=5),
        lambda: prefix_distill.compare("arms.yaml", tmp_path / "run", on_step="x"),
    ]
    for call in calls:
        with pytest.raises(UserError, match="on_step: expected a function of a metrics row, got"):
            call()
    assert not (tmp_path / "run").exists()


def test_a_callback_may_raise_at_the_last_update(given, tmp_path):
    def stop(row: dict) -> None:
        if row["step"] == 4:
            raise ValueError("enough")

    with pytest.raises(ValueError, match="enough"):
        prefix_distill.run(**given, out=tmp_path / "run", on_step=stop)
    assert prefix_distill.resume(tmp_path / "run").resumed_from == 4


def test_ctrl_c_saves_and_the_run_resumes(given, tmp_path):
    def press(row: dict) -> None:
        if row["step"] == 1:
            signal.raise_signal(signal.SIGINT)

    former = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="after step 1; the state is saved"):
        prefix_distill.run(**given, out=tmp_path / "run", on_step=press)
    assert signal.getsignal(signal.SIGINT) is former
    result = prefix_distill.resume(tmp_path / "run", steps=5, lr_schedule="linear")
    assert result.resumed_from == 1 and result.steps == 5
    assert prefix_distill.resume(tmp_path / "run", prefix=12).steps == 5
    with pytest.raises(UserError, match="--batch-size was 2, got 3"):
        prefix_distill.resume(tmp_path / "run", batch_size=3)
    with pytest.raises(UserError, match="name the run folder"):
        prefix_distill.resume()
    saved = (tmp_path / "run/config.yaml").read_bytes()
    with pytest.raises(UserError, match="5 steps are done; --steps must be at least 5, got 4"):
        prefix_distill.resume(tmp_path / "run", steps=4)
    with pytest.raises(UserError, match="resume: the run folder is given twice"):
        prefix_distill.resume(tmp_path / "run", out=tmp_path / "other")
    assert (tmp_path / "run/config.yaml").read_bytes() == saved


@pytest.mark.long
def test_a_callback_receives_the_rows_of_two_ranks_in_any_thread(given, tmp_path, capfd):
    """A callback stops a run of two ranks. The resumed run starts two ranks again."""
    seen: list[dict] = []

    def stop(row: dict) -> None:
        seen.append(row)
        if row["step"] == 2:
            raise ValueError("enough")

    options = given | {"gpus": 2, "device": "cpu", "steps": 100_000, "eval_every": 0}
    options["lr_schedule"] = "constant"
    before = state_of_process()
    [error] = in_thread(lambda: prefix_distill.run(**options, out=tmp_path / "run", on_step=stop))
    assert isinstance(error, ValueError) and "the state is saved" in error.__notes__[0]
    done = len(rows(tmp_path / "run"))
    assert [row["step"] for row in seen] == [1, 2] and done >= 2
    metrics = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert seen == [json.loads(line) for line in metrics[:2]]
    result = prefix_distill.resume(tmp_path / "run", steps=done + 1, on_step=seen.append)
    assert result.resumed_from == done and seen[2:] == result.metrics()[done:]
    assert any(note.startswith("2 ranks") for note in result.notes)
    assert capfd.readouterr() == ("", "") and state_of_process() == before


@pytest.mark.parametrize("streams", ["kept apart", "inherited"])
def test_the_error_of_a_crashed_rank_quotes_its_last_line(
    given, tmp_path, capfd, monkeypatch, streams
):
    """The API quotes the last line. The command shows the ranks' tracebacks on stderr."""
    monkeypatch.setattr(launch, "RANK", "raise RuntimeError('a bug')")
    options = given | {"gpus": 2, "device": "cpu"}
    if streams == "kept apart":
        with pytest.raises(Stopped, match="ended with exit code 1; RuntimeError: a bug"):
            prefix_distill.run(**options, out=tmp_path / "run")
        assert capfd.readouterr() == ("", "")
        return
    code, out, err = invoke("run", *flags(options), "--out", tmp_path / "run")
    assert code == 1 and out == "" and err.endswith("ended with exit code 1; see above\n")
    assert "Traceback" in capfd.readouterr().err  # lines of two ranks may interleave


def test_a_crashed_rank_is_named_and_not_the_one_that_was_stopped(given, tmp_path, monkeypatch):
    crash = """import os, time
if os.environ["RANK"] == "0":
    time.sleep(600)
raise RuntimeError("a bug")
"""
    monkeypatch.setattr(launch, "RANK", crash)
    with pytest.raises(Stopped, match="rank 1 ended with exit code 1; RuntimeError: a bug"):
        prefix_distill.run(**given, gpus=2, device="cpu", out=tmp_path / "run")


@pytest.mark.parametrize(
    "options, kind",
    [
        ({"prefix": 0}, UserError),
        ({"steps": "many"}, UserError),
        ({"student": "nowhere/at/all"}, UserError),
        ({"max_new_tokens": 500}, PreflightError),
        ({"lr": 1e38}, Stopped),
        ({"gpus": 2, "device": "cpu", "batch_size": 1}, UserError),
        ({"gpus": 2, "device": "cuda:1"}, UserError),
    ],
)
def test_errors_have_the_same_text_as_the_command(given, tmp_path, capfd, options, kind):
    options = given | options
    with pytest.raises(kind) as raised:
        prefix_distill.run(**options, out=tmp_path / "run")
    assert capfd.readouterr() == ("", "")
    message = str(raised.value)
    if options["steps"] == "many":  # the command-line parser has its own message
        assert message == "--steps: expected a whole number, got 'many'; change it"
        return
    code, _, err = invoke("run", *flags(options), "--out", tmp_path / "cli")
    assert code == raised.value.exit_code
    expected = " ".join(message.replace(str(tmp_path / "run"), str(tmp_path / "cli")).split())
    assert err.splitlines()[-1] == f"error: {expected}"


HINTS = {
    "learning_rate": r"did you mean lr\?",
    "max_steps": r"did you mean steps\?",
    "dry_run": r"call check\(",
    "resume": r"call resume\(out\)",
    "config": r"pass Config\.from_yaml\(path\)",
}


def test_an_unknown_keyword_is_refused_with_the_nearest_one(tmp_path):
    with pytest.raises(UserError, match="unknown option 'stepz'; did you mean steps"):
        prefix_distill.run(stepz=4, out=tmp_path / "run")
    for name, hint in HINTS.items():
        with pytest.raises(UserError, match=f"unknown option '{name}'; {hint}"):
            prefix_distill.Config.from_options(**{name: 1})
    with pytest.raises(UserError, match="unknown option 'qqqqqqq'; known are model, "):
        prefix_distill.evaluate(qqqqqqq=4)


@pytest.mark.parametrize("ranks", [{}, {"gpus": 2, "device": "cpu"}], ids=["alone", "two ranks"])
def test_an_error_of_a_plugin_is_a_user_error(given, tmp_path, ranks):
    plugin = tmp_path / "broken.py"
    plugin.write_text(BROKEN_PLUGIN)
    options = given | ranks | {"plugin": plugin, "divergence": "broken"}
    with pytest.raises(UserError, match="a mistake") as raised:
        prefix_distill.run(**options, out=tmp_path / "run")
    assert "\n" not in str(raised.value)


BROKEN_PLUGIN = """from prefix_distill import register_divergence

@register_divergence("broken")
def broken(student, teacher):
    if student.shape[-1] != 300:  # not on the small tensors of the registration's own checks
        raise KeyError("a mistake")
    return (student.exp() * (student - teacher)).sum(-1)
"""


def test_a_rank_that_aborts_after_its_error_names_the_error(given, tmp_path):
    plugin = tmp_path / "broken.py"
    plugin.write_text(BROKEN_PLUGIN + ABORT_AT_EXIT)
    options = given | {"plugin": plugin, "divergence": "broken", "gpus": 2, "device": "cpu"}
    with pytest.raises(UserError, match="a mistake"):
        prefix_distill.run(**options, out=tmp_path / "run")


ABORT_AT_EXIT = """
import atexit, os
if "RANK" in os.environ:
    atexit.register(os.abort)
"""


def test_notes_and_warnings_are_logged(given, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "prefix_distill"):
        result = prefix_distill.run(**given, eos="student", out=tmp_path / "run")
    texts = [record.getMessage() for record in caplog.records]
    assert set(result.notes) <= set(texts)
    assert any(text.startswith("after step 4: accuracy") for text in texts)
    # notes for developers, before the run and during it
    assert any(text.startswith("the loss uses chunks of ") for text in texts)
    assert any(text.startswith("the teacher gives the first tokens") for text in texts)


def test_notes_for_developers_come_from_ranks(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("RANK", "0")
    EventObserver(tmp_path).detail("a detail")
    with (
        caplog.at_level(logging.INFO, "prefix_distill"),
        Relay(tmp_path, LogObserver(), pytest.fail) as relay,
    ):
        relay.pass_on()
    assert [record.getMessage() for record in caplog.records] == ["a detail"]


# The other functions


def test_evaluate_equals_the_command(pair, questions, tmp_path, capfd):
    options = {"dataset": questions, "samples": 2, "limit": 4, "max_new_tokens": 8}
    _, out, _ = invoke("eval", "--model", pair[0], *flags(options), "--out", tmp_path / "a.jsonl")
    capfd.readouterr()
    result = prefix_distill.evaluate(pair[0], out=tmp_path / "b.jsonl", **options)
    assert without_times(result.to_dict()) == without_times(last_json(out))
    assert result.examples.read_text() == (tmp_path / "a.jsonl").read_text()
    assert result.accuracy is not None and result.accuracy.n == 4
    assert "pass@2" in result._repr_html_() and capfd.readouterr() == ("", "")


def test_probe_equals_the_command(pair, questions, tmp_path, capfd):
    options = {"student": pair[0], "teacher": pair[1], "dataset": questions, "max_new_tokens": 16}
    words = flags(options | {"problems": 3})
    _, out, _ = invoke("probe", *words, "--out", tmp_path / "cli")
    capfd.readouterr()
    numpy = pytest.importorskip("numpy")
    result = prefix_distill.probe(tmp_path / "run", problems=numpy.int64(3), **options)
    assert capfd.readouterr() == ("", "")
    assert without_times(result.to_dict()) == without_times(last_json(out))
    assert result.reason in result._repr_html_() and "data:image/png" in result._repr_html_()
    with pytest.raises(UserError, match="--problems 0: expected at least 1 prompt"):
        prefix_distill.probe(tmp_path / "none", problems=0)


def test_plan_and_check_equal_the_commands(given, capfd):
    _, out, _ = invoke("plan", *flags(given), "--prefixes", "4,8", "--device-tflops", "1")
    _, checked, _ = invoke("check", *flags(given))
    capfd.readouterr()
    planned = prefix_distill.plan(**given, prefixes=[4, 8], device_tflops=1)
    documents = planned.to_dict(), last_json(out)
    for document in documents:  # free memory varies
        document["machine"].pop("free_bytes")
        document["notes"] = [n for n in document["notes"] if not n.startswith("this machine has")]
    assert documents[0] == documents[1]
    assert [row["prefix"] for row in planned.prefixes] == ["12", "4", "8"]
    assert "flags that fit" in planned._repr_html_()
    check = prefix_distill.check(**given)
    document = last_json(checked)
    notes = [note for note in document["notes"] if not note.startswith("chosen: ")]
    assert [note for note in check.notes if not note.startswith("chosen: ")] == notes
    assert check.warnings == tuple(document["warnings"])
    # one note and the facts include free memory, which varies
    for ours, theirs in zip(check.checks, document["checks"], strict=True):
        assert (ours["name"], ours["status"]) == (theirs["name"], theirs["status"])
    assert check.ok
    check.raise_for_error()
    assert capfd.readouterr() == ("", "")


def test_compare_and_report_equal_the_commands(given, tmp_path, capfd):
    base = prefix_distill.Config.from_options(**(given | {"steps": 2})).to_dict()
    del base["export"]
    arms = {"base": base, "arms": {"short": {"schedule": {"prefix": "4"}}}, "seeds": [0, 1]}
    file = tmp_path / "arms.yaml"
    file.write_text(json.dumps(arms))
    capfd.readouterr()
    steps: list[dict] = []
    result = prefix_distill.compare(file, tmp_path / "out", on_step=steps.append)
    assert capfd.readouterr() == ("", "")
    assert [(row["run"], row["step"]) for row in steps] == [
        ("short seed 0", 1),
        ("short seed 0", 2),
        ("short seed 1", 1),
        ("short seed 1", 2),
    ]
    _, out, _ = invoke("compare", file, "--out", tmp_path / "out")
    assert result.to_dict() == last_json(out) and result.runs == 2
    report = prefix_distill.report([tmp_path / "out"], tmp_path / "report")
    assert report.arms == result.arms and (tmp_path / "report/report.html").is_file()
    assert "<td>short</td>" in report._repr_html_()


def test_export_equals_the_command(pair, tmp_path, capfd):
    _, out, _ = invoke("export", pair[0], "--out", tmp_path / "a", "--dtype", "bfloat16")
    capfd.readouterr()
    result = prefix_distill.export(pair[0], tmp_path / "b", dtype="bfloat16")
    assert without_times(result.to_dict()) == without_times(last_json(out))
    assert result.out == tmp_path / "b" and capfd.readouterr() == ("", "")
    with pytest.raises(UserError, match="unknown option 'gguff'"):
        prefix_distill.export(pair[0], tmp_path / "c", gguff="f16")


def test_html_escapes_every_text(tmp_path):
    result = prefix_distill.EvaluationResult.read(
        {
            "model": "<script>alert(1)</script>",
            "dataset": '"&',
            "accuracy": None,
            "pass_at_k": None,
            "samples": 1,
            "finish_rate": 1.0,
            "mean_tokens": 3.0,
            "seconds": 1.0,
            "examples": "a<b",
        }
    )
    page = result._repr_html_()
    assert "<script" not in page and "a<b" not in page
    assert "&lt;script&gt;" in page and "&quot;&amp;" in page
    config = prefix_distill.Config.from_options(student="<img src=x>")
    assert "<img" not in config._repr_html_()


NOTEBOOK = (
    """
from prefix_distill import evaluate, load, resume, run
steps = []
result = run(prefix=24, steps=3, batch_size=2, problems=4, kl_prompts=2, tail_every=0,
             check_samples=0, max_new_tokens=40, out="run", on_step=steps.append)
assert [row["step"] for row in steps] == [1, 2, 3]
result
""",
    """
resume("run", steps=4)
""",
    """
import signal
def press(row):
    signal.raise_signal(signal.SIGINT)
try:
    run(prefix=24, steps=3, batch_size=2, problems=4, kl_prompts=2, tail_every=0,
        check_samples=0, max_new_tokens=40, out="stopped", on_step=press)
except Exception as error:
    stopped = repr(error)
stopped
""",
    """
evaluate("run/model", dataset="lab:choice", problems=2, max_new_tokens=8, out="answers.jsonl")
""",
)


def test_a_notebook_runs_in_a_jupyter_kernel(tmp_path):
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    cells = [nbformat.v4.new_code_cell(code.strip()) for code in NOTEBOOK]
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(
        notebook,
        timeout=120,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute(env=os.environ | {"PYTHONPATH": str(ROOT)})
    outputs = [cell.outputs for cell in notebook.cells]
    # Nothing is printed: each cell has one output, the value of its last line.
    assert [len(output) for output in outputs] == [1, 1, 1, 1], outputs
    first, resumed, stopped, evaluated = (output[0]["data"] for output in outputs)
    assert "<td>steps</td><td>3</td>" in first["text/html"]
    assert "<td>steps</td><td>4</td>" in resumed["text/html"]
    assert (
        stopped["text/plain"].startswith('"Interrupted(')
        and "the state is saved" in stopped["text/plain"]
    )
    assert "<td>model</td><td>run/model</td>" in evaluated["text/html"]
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 4


def test_a_notebook_shows_an_error_in_one_line():
    shell = pytest.importorskip("IPython.core.interactiveshell").InteractiveShell.instance()
    code = "import prefix_distill; prefix_distill.run(prefx=3)"
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        shell.run_cell(code)
    assert shown.getvalue().strip().startswith("UserError: unknown option 'prefx'; did you mean")
    assert len(shown.getvalue().strip().splitlines()) == 1


def test_dir_lists_the_public_names_alone():
    assert set(dir(prefix_distill)) == {*prefix_distill.__all__, "__version__"}


LATE = """
import atexit, sys, time
from pathlib import Path
from prefix_distill.api import rank
from prefix_distill.api.launch import LOOK, SIGNAL

def work(folder):
    (folder / SIGNAL).write_text("2")
    return 130

rank.work = work
atexit.register(time.sleep, 5 * LOOK)
rank.main()
"""


def test_a_rank_ignores_a_signal_after_its_work_has_ended(tmp_path):
    """A signal that arrives while Python shuts down would cause a traceback.

    This happens if another rank received the signal first and all ranks have stopped.
    """
    with launch.listen(1) as listener:
        command = [sys.executable, "-c", LATE, tmp_path, str(listener.getsockname()[1])]
        done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "")
