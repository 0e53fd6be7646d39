"""Test faults of long runs: disks, non-finite numbers, memory, signals, two runs in a folder.

Every fault is reported in one line, and no saved work is lost.
"""

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import typer
from helpers import (
    Silent,
    byte_tokenizer,
    flags,
    invoke,
    last_json,
    prepared,
    rows,
    shortage,
    tiny_net,
)
from safetensors.torch import load_file

from prefix_distill import config as configuration
from prefix_distill.cli.main import app
from prefix_distill.display import Reporter
from prefix_distill.engine import scoring
from prefix_distill.errors import Interrupted, MemoryShortage, Stopped, UserError
from prefix_distill.signals import Interrupt
from prefix_distill.training.folder import RunFolder
from prefix_distill.training.session import Session
from prefix_distill.training.update import Update

COMMANDS = typer.main.get_group(app).commands


def run_in(folder, run, report: Reporter | None = None, resume=False, **more):
    files = RunFolder(folder)
    if not resume:
        files.create(configuration.as_dict(run.config))
    return Session(run, files, report or Silent(), resume, **more).train()


@pytest.fixture(scope="module")
def whole(pair, questions, tmp_path_factory):
    """Run six updates without a fault, with an evaluation after every second one."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, run_in(folder, six(pair, questions))


def six(pair, questions, **changes):
    return prepared(
        pair,
        questions,
        **{"train.steps": 6, "evaluate.every": 2, "checkpoint.save_every": 3, "schedule.lr": 1e-3}
        | changes,
    )


def assert_ends_like(whole, folder, result):
    assert rows(folder) == rows(whole[0])
    for file in (
        "checkpoints/step-00000006/optimizer.safetensors",
        "model/model.safetensors",
        "best/model.safetensors",
        "scores.jsonl",
    ):
        assert (folder / file).read_bytes() == (whole[0] / file).read_bytes(), file
    for key in ("accuracy_after", "kl_after", "tokens", "flops", "best"):
        assert result[key] == whole[1][key], key


# ── disks


@pytest.fixture
def small_disk(tmp_path):
    """Mount a tmpfs of 1 MB, or skip the test if that is not permitted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1000k", "tmpfs", folder], capture_output=True
        )
        if shutil.which("mount")
        else None
    )
    if done is None or done.returncode:
        pytest.skip("cannot mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_stops_the_run_and_it_resumes_when_there_is_space(
    pair, questions, small_disk, whole
):
    out = small_disk / "run"
    code, said, err = invoke(*flags(pair, questions, out))
    assert code == 1 and said == "" and "Traceback" not in err
    last = err.splitlines()[-1]
    assert (
        last.startswith("error: ")
        and "cannot be written" in last
        and "the newest checkpoint is step-00000003" in last
    )
    assert not list(out.rglob("*.partial"))
    subprocess.run(["mount", "-o", "remount,size=10m", small_disk], check=True)
    code, said, err = invoke("run", "--resume", "--out", out)
    assert code == 0 and last_json(said)["resumed_from"] == 3, err
    alone = small_disk.parent / "alone"
    assert invoke(*flags(pair, questions, alone))[0] == 0
    assert rows(out) == rows(alone)
    assert (out / "model/model.safetensors").read_bytes() == (
        alone / "model/model.safetensors"
    ).read_bytes()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    code, said, err = invoke("run", "--resume", "--out", out, "--steps", "8")
    assert code == 2 and "cannot be written (Read-only file system)" in err.splitlines()[-1]


@pytest.mark.parametrize(
    "name, limit", [("best", 100_000), ("checkpoints/step-00000003", 200_000), ("model", 0)]
)
def test_a_failed_write_keeps_the_earlier_files(  # noqa: PLR0913  fixtures and parameters of one test
    pair, questions, tmp_path, whole, monkeypatch, name, limit
):
    """Simulate a full disk by a limit of the file size.

    The limit is hit by the best student, by a checkpoint, or by the final model.
    """
    run, folder, plain = six(pair, questions), tmp_path / "run", RunFolder.save_model
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_model(self, which, *rest, **named):
        if which == "model" == name:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        return plain(self, which, *rest, **named)

    monkeypatch.setattr(RunFolder, "save_model", save_model)
    try:
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        with pytest.raises(Stopped, match=f"{name} cannot be written .*File too large"):
            run_in(folder, run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        monkeypatch.undo()
    assert not list(folder.rglob("*.partial")) and not (folder / name).exists()
    assert_ends_like(whole, folder, run_in(folder, six(pair, questions), resume=True))


def test_a_folder_deleted_during_the_run_stops_it(pair, questions, tmp_path):
    class Deletes(Silent):
        def row(self, row, *_):
            if row["step"] == 2:
                shutil.rmtree(tmp_path / "run")

    with pytest.raises(Stopped, match="the run folder is gone"):
        run_in(tmp_path / "run", six(pair, questions), Deletes())
    assert not (tmp_path / "run").exists()


def test_two_runs_cannot_share_a_folder(pair, questions, tmp_path, whole):
    out = tmp_path / "run"
    with RunFolder(out).lock():
        code, _, err = invoke(*flags(pair, questions, out))
        assert (
            code == 2
            and "another run is working in it" in err.splitlines()[-1]
            and os.listdir(out) == [".lock"]
        )
    shutil.copytree(whole[0], out, dirs_exist_ok=True)
    with RunFolder(out).lock():
        code, _, err = invoke("run", "--resume", "--out", out)
        assert code == 2 and "another run is working in it" in err.splitlines()[-1]
    assert rows(out) == rows(whole[0])


HOLDER = """
import sys, time
from prefix_distill.training.folder import RunFolder
with RunFolder(sys.argv[1]).lock():
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_killed_process_releases_the_lock(tmp_path):
    out = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, out], stdout=subprocess.PIPE)
    with holder:
        try:
            assert holder.stdout.readline() == b"held\n"
            with pytest.raises(UserError, match="another run"), RunFolder(out).lock():
                pass
        finally:
            holder.kill()
    with RunFolder(out).lock():
        assert (out / ".lock").is_file()


def test_a_file_system_without_flock_needs_no_warning(tmp_path, monkeypatch, recwarn):
    """Check the lock without flock: a file that exists while its holder uses the folder."""
    fcntl = pytest.importorskip("fcntl")

    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    for _ in range(2):
        with (
            RunFolder(tmp_path / "run").lock(),
            pytest.raises(UserError, match="another run is working in it"),
            RunFolder(tmp_path / "run").lock(),
        ):
            pass
    assert [str(warning.message) for warning in recwarn] == []


# ── numbers


def poison(model, name):
    with torch.no_grad():
        dict(model.net.named_parameters())[name].view(-1)[5] = float("nan")


@pytest.mark.parametrize(
    "what, match, saved",
    [
        (
            "teacher's weight",
            "step 3: the divergence of .*: the teacher's weight model.norm.weight is not finite; "
            "no weight was changed, and the state after step 2 is saved",
            2,
        ),
        (
            "teacher's logits",
            "step 3: the divergence of .*: the teacher's hidden states there are not finite; "
            "no weight was changed",
            2,
        ),
        (
            "divergence",
            "step 3: the divergence of .* is nan, but the logits of both models are finite "
            "[(]--divergence reverse-kl[)]; no weight was changed",
            2,
        ),
        (
            "gradient",
            "step 3: the gradient of model.layers.1.mlp.up_proj.weight is not finite; no "
            "weight was changed",
            2,
        ),
        (
            "student's weight",
            "after step 2 the student's weight lm_head.weight is not finite; this state is not "
            "saved, the newest checkpoint is step-00000000",
            0,
        ),
    ],
)
def test_non_finite_numbers_stop_the_run_before_they_are_saved(  # noqa: PLR0913  fixtures and parameters of one test
    pair, questions, tmp_path, monkeypatch, what, match, saved
):
    run = six(pair, questions, **{"evaluate.every": 0})
    hidden_rows, backward = scoring.hidden_rows, Update.backward

    def infinite(model, sides):
        rows = hidden_rows(model, sides)
        return rows * float("inf") if model is run.pair.teacher else rows

    def disturbed(update, rollouts):
        if update.step == 2:
            if what == "teacher's weight":
                poison(run.pair.teacher, "model.norm.weight")
            if what == "student's weight":
                poison(run.pair.student, "lm_head.weight")
            if what == "teacher's logits":
                monkeypatch.setattr(scoring, "hidden_rows", infinite)
        losses = backward(update, rollouts)
        if update.step == 2 and what == "divergence":
            next(iter(losses.values.values()))[0] = float("nan")
        if update.step == 2 and what == "gradient":
            weights = dict(run.pair.student.net.named_parameters())
            weights["model.layers.1.mlp.up_proj.weight"].grad[1, 2] = float("inf")
        return losses

    monkeypatch.setattr(Update, "backward", disturbed)
    with pytest.raises(Stopped, match=match):
        run_in(tmp_path / "run", run)
    assert sorted(os.listdir(tmp_path / "run/checkpoints"))[-1] == f"step-{saved:08d}"
    for tensor in load_file(
        tmp_path / f"run/checkpoints/step-{saved:08d}/student.safetensors"
    ).values():
        assert torch.isfinite(tensor).all()
    assert len(rows(tmp_path / "run")) == 2


# ── memory


@pytest.fixture(scope="module")
def plenty(pair, questions, tmp_path_factory):
    """Run six updates that generate eight answers at once."""
    folder = tmp_path_factory.mktemp("plenty") / "run"
    return folder, run_in(folder, six(pair, questions, **{"rollout.rows": 8}))


@pytest.mark.parametrize(
    "where, said",
    [
        (
            "training",
            [
                "--micro-batch-size was lowered from 4 to 2",
                "--micro-batch-size was lowered from 2 to 1",
            ],
        ),
        (
            "scoring",
            [
                "--micro-batch-size was lowered from 4 to 2",
                "--micro-batch-size was lowered from 2 to 1",
            ],
        ),
        (
            "generation",
            [
                "--generation-rows was lowered from 8 to 4",
                "--generation-rows was lowered from 4 to 2",
                "--generation-rows was lowered from 2 to 1",
            ],
        ),
    ],
)
def test_out_of_memory_halves_the_batch_and_keeps_the_result(  # noqa: PLR0913  fixtures and parameters of one test
    pair, questions, tmp_path, plenty, monkeypatch, where, said
):
    settings, (folder, plain) = {"rollout.rows": 8}, plenty
    shortage(monkeypatch, where, 1)
    report = Silent()
    result = run_in(tmp_path / "short", six(pair, questions, **settings), report)
    found = [text for text in report.warnings if "ran out of memory" in text]
    assert [text.split("; ")[1].split(",")[0] for text in found] == said
    for row, other in zip(rows(folder), rows(tmp_path / "short"), strict=True):
        for key in row:
            if not key.startswith("flops/"):
                assert other[key] == pytest.approx(row[key], rel=1e-4), key
    assert result["accuracy_after"] == plain["accuracy_after"] and result["flops"]["executed"] > 0
    for (name, one), other in zip(
        load_file(folder / "model/model.safetensors").items(),
        load_file(tmp_path / "short/model/model.safetensors").values(),
        strict=True,
    ):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-5, msg=name)
    # the lower limits are saved, so the resumed run does not run out of memory again
    shutil.rmtree(tmp_path / "short/checkpoints/step-00000006")
    report = Silent()
    again = run_in(tmp_path / "short", six(pair, questions, **settings), report, resume=True)
    assert again["resumed_from"] == 3 and not any(
        "ran out of memory" in text for text in report.warnings
    )


def test_out_of_memory_in_the_forward_pass_that_selects_tokens(pair, tmp_path, monkeypatch):
    """Run out of memory in the forward pass that selects tokens and computes the loss.

    Tokens are then selected in separate forward passes, and the ledger counts them. The trained
    weights are the same.
    """
    file = tmp_path / "even.jsonl"
    file.write_text(
        "".join(json.dumps({"question": f"{i}+{i}?", "answer": "1"}) + "\n" for i in range(10, 50))
    )
    settings = {
        "weights.select": "soft-or",
        "train.micro_batch_size": 10,
        "train.steps": 2,
        "schedule.prefix": "4",
    }
    plain = run_in(tmp_path / "plain", prepared(pair, str(file), **settings))
    shortage(monkeypatch, "training", 5)
    report = Silent()
    short = run_in(tmp_path / "short", prepared(pair, str(file), **settings), report)
    assert [text.split("; ")[1].split(",")[0] for text in report.warnings if "ran out" in text] == [
        "--micro-batch-size was lowered from 10 to 5"
    ]
    assert (
        short["flops"]["by_phase"]["selection"]["useful"]
        > plain["flops"]["by_phase"]["selection"]["useful"]
    )
    one, other = (
        load_file(tmp_path / name / "model/model.safetensors") for name in ("plain", "short")
    )
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "where, message",
    [
        ("training", "one rollout per pass; use --gradient-checkpointing"),
        ("generation", "one answer per batch; use shorter answers"),
    ],
)
def test_when_not_even_one_rollout_fits_the_run_stops(  # noqa: PLR0913  fixtures and parameters of one test
    pair, questions, tmp_path, monkeypatch, where, message
):
    run = six(pair, questions)
    shortage(monkeypatch, where, 0)
    with pytest.raises(
        MemoryShortage,
        match=f"cpu is out of memory even with {message}",
    ) as stop:
        run_in(tmp_path / "run", run)
    assert stop.value.exit_code == 4


def test_an_evaluation_halves_its_batch_and_gives_the_same_answers(
    pair, questions, tmp_path, monkeypatch
):
    """Generate six answers of which only two fit in memory at once.

    The score and the answers are those of a larger batch, and the command reports the lower limit.
    """
    arguments = ("eval", "--model", pair[0], "--dataset", questions, "--problems", "3")
    arguments = (*arguments, "--samples", "2", "--max-new-tokens", "8")
    code, plenty, err = invoke(*arguments, "--out", tmp_path / "plenty.jsonl")
    assert code == 0, err
    shortage(monkeypatch, "generation", 2)
    code, short, err = invoke(*arguments, "--out", tmp_path / "short.jsonl")
    assert code == 0 and "--generation-rows was lowered from 4 to 2" in err, err
    answers = [(tmp_path / f"{name}.jsonl").read_text() for name in ("plenty", "short")]
    assert answers[0] == answers[1]
    for key in ("accuracy", "finish_rate", "mean_tokens"):
        assert last_json(short)[key] == last_json(plenty)[key]


def test_a_network_that_fails_in_a_step_is_named_and_the_state_is_saved(
    pair, questions, tmp_path, whole
):
    """The rehearsal and two steps pass; then a layer raises, as an architecture may."""
    run = six(pair, questions)
    trained = []

    def fail(*_):
        if torch.is_grad_enabled():
            trained.append(1)
            if len(trained) == 12:
                raise RuntimeError("one of the variables has been modified by an inplace operation")

    run.pair.student.net.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(Stopped) as stopped:
        run_in(tmp_path, run)
    text = str(stopped.value)
    found = re.match(r"step (\d): the network's code failed \(student\.model\.layers\.1: ", text)
    assert found and int(found[1]) > 1 and "modified by an inplace operation" in text
    assert f"the state after step {int(found[1]) - 1} is saved" in text
    result = run_in(tmp_path, six(pair, questions), resume=True)
    assert_ends_like(whole, tmp_path, result)


def run_out_of_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    "words", ["eval generation", "probe generation", "probe scoring", "probe loading"]
)
def test_a_command_without_memory_advises_what_it_has(
    pair, questions, tmp_path, monkeypatch, words
):
    """One line, which names no flag that the command lacks."""
    command, where = words.split()
    arguments = ["--model", pair[0]]
    if command == "probe":
        arguments = ["--student", pair[0], "--teacher", pair[1], "--problems", "3"]
    arguments += ["--dataset", questions, "--max-new-tokens", "8", "--out", tmp_path / "out"]
    if where == "loading":
        shortage(monkeypatch, "scoring", 0)
    elif where == "scoring":
        monkeypatch.setattr(scoring.Scorer, "statistics", run_out_of_memory)
    else:
        shortage(monkeypatch, where, 0)
    code, out, err = invoke(command, *arguments)
    line = err.splitlines()[-1]
    assert (code, out) == (4, "") and not list(tmp_path.iterdir()), err
    assert ("out of memory" in line and "even with one" in line) or where == "loading", line
    flags_of_command = {flag for option in COMMANDS[command].params for flag in option.opts}
    assert set(re.findall(r"--[a-z-]+", line)) <= flags_of_command, line


# ── signals


@pytest.mark.parametrize(
    "moment, number",
    [
        ("update", "SIGINT"),
        ("update", "SIGHUP"),
        ("update", "SIGUSR1"),
        ("update", "SIGXCPU"),
        ("evaluation", "SIGTERM"),
    ],
)
def test_a_signal_saves_the_state_and_the_run_resumes(  # noqa: PLR0913  fixtures and parameters of one test
    pair, questions, tmp_path, whole, moment, number
):
    number = signal.Signals[number]

    class Sends(Silent):
        def row(self, row, *_):
            # before the evaluation after step 4, which the resumed run does
            if moment == "update" and row["step"] == 4:
                os.kill(os.getpid(), number)

        def evaluation(self, row):
            if moment == "evaluation" and row["step"] == 4:
                os.kill(os.getpid(), number)

    former = signal.getsignal(number)
    with (
        pytest.raises(
            Interrupted,
            match=rf"interrupted \({number.name}\) after step 4; the state is saved; "
            f"continue with prefix-distill run --resume --out {tmp_path / 'run'}",
        ) as stop,
        Interrupt() as interrupt,
    ):
        run_in(tmp_path / "run", six(pair, questions), Sends(), interrupt=interrupt)
    assert stop.value.exit_code == 128 + number and signal.getsignal(number) is former
    evaluated = json.loads((tmp_path / "run/checkpoints/step-00000004/state.json").read_text())[
        "facts"
    ]["evaluations"]
    assert evaluated[-1]["step"] == (2 if moment == "update" else 4)
    assert_ends_like(
        whole, tmp_path / "run", run_in(tmp_path / "run", six(pair, questions), resume=True)
    )


def test_an_ignored_signal_stays_ignored():
    """Check SIGHUP, which nohup ignores."""
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, former)


def test_a_second_ctrl_c_ends_at_once_and_keeps_the_checkpoint(pair, questions, tmp_path, whole):
    class Sends(Silent):
        def row(self, row, *_):
            if row["step"] == 5:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)  # the signals arrive before this ends
                raise AssertionError("the second SIGINT had no effect")

    with pytest.raises(KeyboardInterrupt), Interrupt() as interrupt:
        run_in(tmp_path / "run", six(pair, questions), Sends(), interrupt=interrupt)
    result = run_in(tmp_path / "run", six(pair, questions), resume=True)
    assert result["resumed_from"] == 3
    assert_ends_like(whole, tmp_path / "run", result)


def test_a_closed_stderr_is_ignored_and_sighup_saves_the_state(pair, questions, tmp_path):
    """Close the reader of stderr before the first update, and send SIGHUP some updates later.

    The run is in another process.
    """
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "prefix_distill",
            *flags(pair, questions, tmp_path / "run"),
            "--steps",
            "100000",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stderr.readline()
    process.stderr.close()
    while not (tmp_path / "run/metrics.jsonl").exists() or len(rows(tmp_path / "run")) < 3:
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGHUP)
    assert process.stdout.read() == "" and process.wait(60) == 129
    state = json.loads(sorted((tmp_path / "run/checkpoints").glob("*/state.json"))[-1].read_text())
    assert state["step"] == len(rows(tmp_path / "run")) >= 3


# ── very long answers and prompts


def test_a_student_that_never_ends_is_cut_at_the_length_limit(pair, questions, tmp_path):
    student = tmp_path / "student"
    net = tiny_net("llama", 5)
    with torch.no_grad():
        net.model.embed_tokens.weight[257] = 0
        net.lm_head.weight[257] = 0
        net.lm_head.weight[65:70] *= 8
    net.generation_config.eos_token_id = 257
    net.save_pretrained(student)
    byte_tokenizer().save_pretrained(student)
    result = run_in(
        tmp_path / "run",
        prepared(
            (str(student), pair[1]), questions, **{"schedule.prefix": "full", "train.steps": 2}
        ),
    )
    assert all(
        row["rollout/finished_share"] < 0.2 and row["rollout/taught_tokens"] <= 10 * 32
        for row in rows(tmp_path / "run")
    )
    assert result["steps"] == 2


def test_a_prompt_of_a_million_characters_is_dropped_and_counted(pair, tmp_path):
    file = tmp_path / "long.jsonl"
    file.write_text(
        "".join(
            json.dumps({"question": "word " * 200_000 if i == 7 else f"{i}+{i}?", "answer": "1"})
            + "\n"
            for i in range(30)
        )
    )
    start = time.monotonic()
    run = prepared(pair, str(file))
    assert time.monotonic() - start < 30
    assert any(
        "1 training and 0 held-out prompts exceed" in text
        or "0 training and 1 held-out prompts exceed" in text
        for text in run.notes.warnings
    )
    assert run_in(tmp_path / "run", run)["steps"] == 4
