"""Test that two or three gloo ranks give the results of one process, and that no run hangs.

Rollouts, metrics rows and decisions are equal; weights agree to 1e-5, or to 1e-4 at a rate of 3e-4.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT, invoke, last_json
from safetensors.torch import load_file, save_file

from prefix_distill import config as configuration
from prefix_distill import display
from prefix_distill.api import launch, quiet
from prefix_distill.engine import scoring
from prefix_distill.engine.ranks import Place
from prefix_distill.errors import Stopped
from prefix_distill.planning import probe as probing
from prefix_distill.results import evaluation
from prefix_distill.training import opening
from prefix_distill.training import prepare as preflight
from prefix_distill.training.folder import RunFolder
from prefix_distill.training.session import Session
from prefix_distill.training.update import Update

BASE = {
    "train.steps": 3,
    "schedule.prefix": "12",
    "rollout.max_new_tokens": 32,
    "train.batch_size": 5,
    "rollout.samples": 2,
    "train.micro_batch_size": 2,
    "evaluate.problems": 4,
    "evaluate.every": 2,
    "schedule.lr": 1e-4,
    "runtime.device": "cpu",
    "divergence.reduction": "sequence",
    "runtime.rank_timeout": 60,
}
RANKED = {
    "weights.select": "soft-or",
    "weights.keep": 0.5,
    "rollout.samples": 4,
    "train.steps": 6,
    "evaluate.every": 0,
    "evaluate.problems": 1,
    "evaluate.kl_prompts": 1,
}
CASES = {  # All shards are uneven: 5 prompts on 2 or 3 ranks.
    "plain": {},
    # Adaptive prefix, ranked window, token importance scaled over the global batch, sharded scoring
    # of extrapolation candidates, teacher texts and tail probes.
    "decisions": {
        "weights.select": "soft-or",
        "weights.keep": 0.5,
        "extrapolation.kind": "effopd",
        "extrapolation.score": "heldout-kl",
        "extrapolation.problems": 5,
        "weights.position": "moderate",
        "train.steps": 12,
        "schedule.prefix": "auto:6:3",
        "weights.window": "highest-kl:4",
        "rollout.off_policy": "sft:0.3",
        "evaluate.every": 0,
        "evaluate.tail_every": 5,
        "evaluate.tail_prompts": 3,
    },
    "one reading": {
        "weights.select": "overconfident",
        "weights.keep": 0.5,
        "train.micro_batch_size": 10,
        "train.steps": 2,
        "schedule.prefix": "4",
    },
    "itself": {
        "evaluate.problems": 1,
        "evaluate.kl_prompts": 1,
        "models.teacher": "self",
        "models.teacher_ema": 0.9,
        "data.privileged_column": "answer",
        "data.privileged_template": "{problem} {solution}",
        "divergence.name": "forward-kl",
    },
    "an adapter": {
        "adapter.rank": 2,
        "models.teacher": "self",
        "data.privileged_column": "answer",
        "evaluate.problems": 1,
        "train.steps": 2,
        "data.privileged_template": "{problem} {solution}",
        "divergence.name": "forward-kl",
        "schedule.lr": 1e-2,
    },
    "two tokenizers": {
        "models.student": "lab:choice/student-merged",
        "models.teacher": "lab:choice/teacher",
        "data.dataset": "lab:choice",
        "models.cross_tokenizer": "simct",
        "weights.select": "divergence",
        "rollout.max_new_tokens": None,
        "train.steps": 2,
    },
    "a rank without a taught token": {"train.steps": 2},
    # one rollout at a time, because bfloat16 rounds other shapes differently
    "bfloat16": {
        "runtime.dtype": "bfloat16",
        "train.steps": 1,
        "train.micro_batch_size": 1,
        "rollout.rows": 1,
    },
    # ranked selection with samples that share their first token, at the default rate and above it
    "default rate": {"schedule.lr": 5e-5, **RANKED},
    "high rate": {"schedule.lr": 3e-4, **RANKED},
}
# largest difference of a weight, where the learning rate amplifies rounding
WEIGHTS = {"high rate": 1e-4}
TIMES = ("time/", "flops/executed")
# In these cases ranks batch the rollouts of a prompt differently, so that FLOPs differ.
CUT = dict.fromkeys(
    ("decisions", "two tokenizers", "no room", "resumed", "default rate", "high rate"),
    ("time/", "flops/"),
)


@contextlib.contextmanager
def only_even_prompts_are_taught():
    plain = Update.select

    def select(update, rollouts):
        kept = [r if r.slot % 2 == 0 else dataclasses.replace(r, kept=()) for r in rollouts]
        return plain(update, kept)

    Update.select = select
    yield
    Update.select = plain


@contextlib.contextmanager
def no_room_for_two_on_rank_1():
    plain = scoring.hidden_rows

    def hidden_rows(model, sides):
        if os.environ["RANK"] == "1" and torch.is_grad_enabled() and len(sides) > 1:
            raise torch.OutOfMemoryError("no room")
        return plain(model, sides)

    scoring.hidden_rows = hidden_rows
    yield
    scoring.hidden_rows = plain


@contextlib.contextmanager
def a_bit_flips_on_rank_1():
    plain = Session.step_optimizer

    def step(session):
        result = plain(session)
        run = session.run
        if run.place.rank == 1:
            with torch.no_grad():
                weight = run.pair.student.net.model.layers[1].mlp.up_proj.weight
                weight[2, 3] = weight[2, 3].nextafter(torch.tensor(9.0))
        return result

    Session.step_optimizer = step
    yield
    Session.step_optimizer = plain


@contextlib.contextmanager
def first_gradient_in(file):
    plain = Session.step_optimizer

    def step(session):
        run = session.run
        if session.state.step == 0 and run.place.is_first:
            save_file(
                {name: p.grad.clone() for name, p in run.pair.student.trainable.items()}, file
            )
        return plain(session)

    Session.step_optimizer = step
    yield
    Session.step_optimizer = plain


def go(values, out, trick=contextlib.nullcontext) -> dict:
    """Run training in this process, which may be a rank.

    Save the gradient of the first step beside the run folder.
    """
    out.parent.mkdir(exist_ok=True)
    with trick(), first_gradient_in(out.with_suffix(".gradient")):
        return opening.train_in(
            preflight.prepare(configuration.build(BASE | values | {"checkpoint.out": str(out)})),
            RunFolder(out),
            display.Terminal(),
        )


def looks(given, out) -> dict:
    """Return the documents of `eval` and `probe`, without times, paths and FLOPs."""
    common = {k: v for k, v in (BASE | given).items() if not k.startswith("train.")}
    _, _, found = evaluation.evaluate_model(
        configuration.build(
            common
            | {
                "models.teacher": None,
                "evaluate.rollouts": 3,
                "evaluate.problems": 5,
                "checkpoint.out": str(out / "eval.jsonl"),
            }
        )
    )
    run = preflight.prepare(
        configuration.build(
            common | {"train.steps": 1, "train.batch_size": 3, "evaluate.problems": 0}
        )
    )
    return {
        name: {k: v for k, v in document.items() if k not in ("seconds", "examples", "flops")}
        for name, document in (("eval", found), ("probe", probing.probe(run)))
    }


def rows(out) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_same(one, other, name, tolerance=1e-5):
    for row, its in zip(rows(one), rows(other), strict=True):
        for key in row:
            if not key.startswith(CUT.get(name, TIMES)):
                assert its[key] == pytest.approx(row[key], rel=tolerance), (name, key)
    if one.with_suffix(".gradient").exists():
        gradient, its = (load_file(out.with_suffix(".gradient")) for out in (one, other))
        for key in gradient:
            torch.testing.assert_close(
                its[key],
                gradient[key],
                rtol=1e-5,
                atol=1e-5 * gradient[key].abs().max().item(),
                msg=f"{name}: {key}",
            )
    weights, its = (load_file(next(out.glob("model/*.safetensors"))) for out in (one, other))
    for key in weights:
        torch.testing.assert_close(
            its[key], weights[key], rtol=0, atol=WEIGHTS.get(name, 1e-5), msg=f"{name}: {key}"
        )
    document, its = (json.loads((out / "run.json").read_text())["result"] for out in (one, other))
    for key in ("accuracy_after", "tokens", "steps"):
        assert its[key] == document[key], (name, key)
    assert its["kl_after"]["value"] == pytest.approx(document["kl_after"]["value"], rel=1e-5)


def flags(pair, questions, out, *more):
    return [
        "run",
        "--student",
        pair[0],
        "--teacher",
        pair[1],
        "--dataset",
        questions,
        "--steps",
        "3",
        "--prefix",
        "12",
        "--max-new-tokens",
        "32",
        "--batch-size",
        "5",
        "--samples",
        "2",
        "--micro-batch-size",
        "2",
        "--problems",
        "4",
        "--eval-every",
        "2",
        "--lr",
        "1e-4",
        "--reduction",
        "sequence",
        "--device",
        "cpu",
        "--rank-timeout",
        "60",
        "--check-samples",
        "0",
        "--out",
        str(out),
        *more,
    ]


def values(pair, questions):
    return {"models.student": pair[0], "models.teacher": pair[1], "data.dataset": questions}


def test_two_ranks_equal_one_process(pair, questions, tmp_path):
    """Run all cases in one launch of torchrun, then each case in one process."""
    given, even = values(pair, questions), tmp_path / "even.jsonl"
    even.write_text(
        "".join(json.dumps({"question": f"{i}+{i}?", "answer": "1"}) + "\n" for i in range(10, 50))
    )
    cases = CASES | {"one reading": CASES["one reading"] | {"data.dataset": str(even)}}
    (tmp_path / "cases.json").write_text(json.dumps([given, cases, str(tmp_path)]))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            __file__,
            tmp_path / "cases.json",
        ],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, "\n".join(
        line for line in done.stderr.splitlines() if "rank" in line
    )[-3000:]
    for name, case in cases.items():
        trick = (
            only_even_prompts_are_taught
            if name == "a rank without a taught token"
            else contextlib.nullcontext
        )
        go(given | case, tmp_path / "1" / name, trick)
        assert_same(
            tmp_path / "1" / name, tmp_path / "2" / name, name, 1e-4 if name in CUT else 1e-5
        )
    results = {
        name: [json.loads((tmp_path / n / name / "run.json").read_text())["result"] for n in "12"]
        for name in cases
    }

    alone, both = results["decisions"]
    assert alone["prefix_decisions"] and len(alone["tail_probes"]) == 2
    assert [d["step"] for d in both["prefix_decisions"]] == [
        d["step"] for d in alone["prefix_decisions"]
    ]
    assert [x["step"] for x in alone["extrapolations"]] == [1, 2, 4, 8] and any(
        x["k"] for x in alone["extrapolations"]
    )
    for trigger, other in zip(alone["extrapolations"], both["extrapolations"], strict=True):
        assert other["k"] == trigger["k"] and other["scores"] == pytest.approx(
            trigger["scores"], rel=1e-4
        )
    for probe, other in zip(alone["tail_probes"], both["tail_probes"], strict=True):
        change = [row.pop("kl_tail_change") for row in (probe, other)]
        assert change[1] == pytest.approx(change[0], rel=1e-3, abs=1e-5)
        assert other == pytest.approx(probe, rel=1e-3)
    texts = [json.loads((tmp_path / n / "decisions/teacher-text.json").read_text()) for n in "12"]
    assert texts[0]["texts"] == texts[1]["texts"]
    assert texts[1]["ledger"]["useful"] == pytest.approx(texts[0]["ledger"]["useful"])

    for result in results["one reading"]:  # only the heads are computed twice
        phase = result["flops"]["by_phase"]["selection"]
        assert (
            phase["useful"] == phase["executed"] == 2 * 260 * (32 + 48) * 2 * 10 * 4
        )  # 2 updates × 10 rollouts × 4 tokens

    alone, both = looks(given, tmp_path / "1"), json.loads((tmp_path / "2/looks.json").read_text())
    assert json.loads(json.dumps(alone["eval"])) == both["eval"]
    assert (tmp_path / "1/eval.jsonl").read_text() == (tmp_path / "2/eval.jsonl").read_text()
    for key in (
        "student_tokens",
        "teacher_tokens",
        "recommended_prefix",
        "teacher_prefix_curve",
        "teacher_decay_curve",
    ):
        assert json.loads(json.dumps(alone["probe"][key])) == both["probe"][key], key
    assert both["probe"]["kl"]["value"] == pytest.approx(alone["probe"]["kl"]["value"], rel=1e-5)

    # If one rank runs out of memory, both ranks halve the micro-batch; the result is the same.
    assert_same(tmp_path / "1/plain", tmp_path / "2/no room", "no room")
    assert (
        "rank 1: cpu ran out of memory; --micro-batch-size was lowered from 2 to 1, which does not "
        "change the result" in done.stderr
    )

    # If the weights of the ranks differ, the run stops and does not save them.
    for rank in "01":
        said = (tmp_path / f"2/stopped-{rank}").read_text()
        assert (
            "after step 2 the weights of rank 1 differ from those of rank 0 (first: "
            "model.layers.1.mlp.up_proj.weight)" in said
        )
        assert "the newest checkpoint is step-00000000" in said
    assert [file.name for file in (tmp_path / "2/drift/checkpoints").iterdir()] == ["step-00000000"]


def main() -> None:
    """Run as a rank of `test_two_ranks_equal_one_process`."""
    given, cases, folder = json.loads(Path(sys.argv[1]).read_text())
    quiet.quiet_libraries()
    out = Path(folder) / "2"
    for name, case in cases.items():
        go(
            given | case,
            out / name,
            only_even_prompts_are_taught
            if name == "a rank without a taught token"
            else contextlib.nullcontext,
        )
    found = looks(given, out)
    if os.environ["RANK"] == "0":
        (out / "looks.json").write_text(json.dumps(found))
    go(given, out / "no room", no_room_for_two_on_rank_1)
    try:
        go(
            given | {"runtime.check_ranks_every": 2, "evaluate.every": 0},
            out / "drift",
            a_bit_flips_on_rank_1,
        )
    except Stopped as error:
        (out / f"stopped-{os.environ['RANK']}").write_text(str(error))


def test_gpus_starts_three_ranks_and_the_run_resumes_with_one(pair, questions, tmp_path):
    """After Ctrl-C, one process resumes a run with --gpus 3; it equals an uninterrupted run."""
    more = ["--steps", "12", "--eval-every", "5"]
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "prefix_distill",
            *flags(pair, questions, tmp_path / "3", *more, "--gpus", "3"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_rows(process, tmp_path / "3", 2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 130 and out == "", err
    assert "3 ranks over gloo" in err and "Traceback" not in err
    last = err.strip().splitlines()[-1]
    done = len(rows(tmp_path / "3"))
    assert (
        last
        == (
            f"interrupted (SIGINT) after step {done}; the state is saved; continue "
            f"with prefix-distill run --resume --out {tmp_path / '3'}"
        )
        and 2 <= done < 12
    )
    code, said, err = invoke("run", "--resume", "--out", tmp_path / "3", "--gpus", "1")
    assert code == 0 and "3 ranks before, 1 now" in err, err
    assert last_json(said)["resumed_from"] == done
    code, _, err = invoke(*flags(pair, questions, tmp_path / "1", *more))
    assert code == 0, err
    assert_same(tmp_path / "1", tmp_path / "3", "resumed")


def wait_for_rows(process, out, count):
    while not (out / "metrics.jsonl").exists() or len(rows(out)) < count:
        time.sleep(0.05)
        assert process.poll() is None, process.stderr.read()


def pid_of(rank: int, out) -> int:
    """Return the process id of a rank that --gpus has started for the run in ``out``."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().decode().split("\0")
                variables = (entry / "environ").read_bytes().decode().split("\0")
                started = launch.RANK in words and str(out) in words
                if started and f"RANK={rank}" in variables:
                    return int(entry.name)
    raise LookupError(rank)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc to find the ranks")
@pytest.mark.long
def test_a_second_ctrl_c_kills_the_ranks(pair, questions, tmp_path):
    """The test suspends the ranks with SIGSTOP, so that the first Ctrl-C cannot end them."""
    out = tmp_path / "run"
    more = ["--steps", "100000", "--gpus", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "prefix_distill", *flags(pair, questions, out, *more)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_rows(process, out, 2)
    ranks = [pid_of(rank, out) for rank in (0, 1)]
    for rank in ranks:
        os.kill(rank, signal.SIGSTOP)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    said, err = process.communicate(timeout=30)
    assert process.returncode == 130 and said == "" and "Traceback" not in err
    assert err.splitlines()[-1].startswith("aborted without saving; ")
    for rank in (0, 1):
        with pytest.raises(LookupError):
            pid_of(rank, out)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc to find the ranks")
@pytest.mark.long
def test_a_warning_of_a_batch_system_to_every_process_saves_the_state(pair, questions, tmp_path):
    """Send SIGUSR1 to the launcher and both ranks, as slurm does: it counts once."""
    out = tmp_path / "run"
    more = ["--steps", "100000", "--save-every", "0", "--gpus", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "prefix_distill", *flags(pair, questions, out, *more)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_rows(process, out, 2)
    for receiver in (pid_of(0, out), process.pid, pid_of(1, out)):
        os.kill(receiver, signal.SIGUSR1)
    said, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGUSR1 and said == "", err
    done = len(rows(out))
    last = err.strip().splitlines()[-1]
    assert last.startswith(f"interrupted (SIGUSR1) after step {done}; the state is saved"), err
    assert (out / f"checkpoints/step-{done:08}").is_dir()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc to find the ranks")
@pytest.mark.long
@pytest.mark.parametrize("what", ["dies", "is slow"])
def test_the_run_ends_if_a_rank_fails_and_the_error_names_it(pair, questions, tmp_path, what):
    out = tmp_path / "run"
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "prefix_distill",
            *flags(
                pair,
                questions,
                out,
                "--steps",
                "100000",
                "--gpus",
                "2",
                "--rank-timeout",
                "60" if what == "dies" else "10",
            ),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_rows(process, out, 2)
    rank, start = pid_of(1, out), time.monotonic()
    os.kill(rank, signal.SIGKILL if what == "dies" else signal.SIGSTOP)
    if what == "is slow":  # the rank continues after the other one has timed out
        time.sleep(13)
        os.kill(rank, signal.SIGCONT)
    said, err = process.communicate(timeout=50)
    assert time.monotonic() - start < (30 if what == "dies" else 40)
    assert process.returncode == 1 and said == "" and "Traceback" not in err
    assert (
        err.strip()
        .splitlines()[-1]
        .startswith(
            "error: rank 1 was killed by signal 9 (SIGKILL), and the other ranks were stopped; "
            if what == "dies"
            else "error: rank 0 of 2: rank 1 failed or timed out ("
        )
    )
    with pytest.raises(LookupError):
        pid_of(0, out)
    assert (out / "checkpoints/step-00000000/state.json").exists() and not (out / "model").exists()


@pytest.mark.long
def test_two_launches_with_different_node_ranks_equal_one_process(pair, questions, tmp_path):
    """Run the two-machine command of `help devices` as two torchrun processes on one machine."""
    page = (ROOT / "prefix_distill/help/devices.md").read_text(encoding="utf-8")
    [line] = [line for line in page.splitlines() if line.startswith("torchrun --nnodes")]
    launch = shlex.split(line.split(" run ")[0])[1:]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        ours = {"K": None, "4": "1", "10.0.0.1": "127.0.0.1", "29500": str(free.getsockname()[1])}
    nodes = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                *(str(node) if word == "K" else ours.get(word, word) for word in launch),
                *flags(pair, questions, tmp_path / "2"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in range(2)
    ]
    said = [node.communicate(timeout=300) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said[0][1][-2000:] + said[1][1][-2000:]
    assert said[1][0] == "" and last_json(said[0][0])["steps"] == 3
    code, _, err = invoke(*flags(pair, questions, tmp_path / "1"))
    assert code == 0, err
    assert_same(tmp_path / "1", tmp_path / "2", "two nodes")


@pytest.mark.long
def test_accelerate_launches_ranks(pair, questions, tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--cpu",
            "--num_processes",
            "2",
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            "prefix_distill.py",
            *flags(pair, questions, tmp_path / "2"),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    code, _, err = invoke(*flags(pair, questions, tmp_path / "1"))
    assert code == 0, err
    assert_same(tmp_path / "1", tmp_path / "2", "accelerate")


@pytest.mark.parametrize(
    "more, message",
    [
        (["--gpus", "2", "--device", "cuda:1"], "every rank needs its own GPU"),
        (
            ["--gpus", "64", "--batch-size", "64"],
            "expected 64 visible GPUs, got ",
        ),
        (
            ["--gpus", "2", "--device", "cpu", "--batch-size", "1"],
            "--batch-size 1: expected at least 2 prompts, one for each rank",
        ),
        pytest.param(
            ["--gpus", "2", "--device", "cpu", "--student", "nowhere/at/all"],
            "model nowhere/at/all: no such folder",
            marks=pytest.mark.long,
        ),
    ],
)
def test_bad_input_with_gpus_gives_a_one_line_error(pair, questions, tmp_path, more, message):
    given = flags(pair, questions, tmp_path / "run")
    given = [
        x
        for i, x in enumerate(given)
        if not {"--device", "--batch-size", "--student"} & {x, given[i - 1]}
    ]
    code, out, err = invoke(*given, *more)
    errors = [line for line in err.splitlines() if line.startswith("error")]
    assert code == 2 and out == "" and len(errors) == 1 and message in errors[0], err
    assert not (tmp_path / "run").exists()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_equal_one(pair, questions, tmp_path):
    """Gradients use NCCL and control messages use gloo.

    The dtype is float32, so results agree to the accuracy of matmuls.
    """
    for name, more in (("1", []), ("2", ["--gpus", "2"])):
        given = flags(pair, questions, tmp_path / name, "--dtype", "float32", *more)
        code, _, err = invoke(
            *[
                "cuda" if before == "--device" else word
                for before, word in itertools.pairwise(["", *given])
            ]
        )
        assert code == 0, err
    assert_same(tmp_path / "1", tmp_path / "2", "no room", 1e-3)


LEAVE = """
import atexit, sys, time
import torch.distributed as dist
from prefix_distill.config import Runtime
from prefix_distill.engine.ranks import join_ranks

atexit.register(lambda: print("group", dist.is_initialized()))  # the last function at exit
place = join_ranks(Runtime(device="cpu", dtype="float32", rank_timeout=int(sys.argv[1])), lambda: 0)
place.gather(0)
if len(sys.argv) > 2:
    if place.rank == 1:
        time.sleep(600)
    place.gather(0)
"""


@pytest.mark.parametrize("is_lost", [False, True])
def test_a_rank_leaves_its_group_unless_a_collective_failed(is_lost):
    """Without it, one of 80 processes aborted (SIGABRT) while Python shut down."""
    arguments = ["20"]  # seconds
    if is_lost:
        arguments.append("lost")
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", LEAVE, *arguments],
            env=os.environ
            | {
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "LOCAL_RANK": str(rank),
                "OMP_NUM_THREADS": "1",
            }
            | {"LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    output, error = ranks[0].communicate(timeout=60)
    if is_lost:
        ranks[1].kill()
        assert "Stopped: rank 0 of 2: rank 1 failed or timed out" in error
    ranks[1].communicate(timeout=60)
    assert output == f"group {is_lost}\n", error
    assert is_lost or [rank.returncode for rank in ranks] == [0, 0], error


def test_fingerprints_detect_one_changed_bit():
    place = Place(
        device=torch.device("cpu"),
        teacher_device=torch.device("cpu"),
        dtype=torch.float32,
        head_dtype=torch.float32,
        rank=0,
        world=2,
        reasons=(),
    )
    weights = {"a": torch.randn(5, 7), "b": torch.randn(3).bfloat16()}
    flipped = weights | {"b": weights["b"].clone()}
    flipped["b"].view(torch.int16)[1] ^= 1
    found = []
    for other in (weights, flipped):
        sent = []

        def send(value, sent=sent):
            sent.append(value)
            return [value]

        def receive(value, sent=sent):
            return [value, *sent]

        probe = dataclasses.replace(place)
        object.__setattr__(probe, "gather", send)
        object.__setattr__(place, "gather", receive)
        probe.find_difference(other)
        found.append(place.find_difference(weights))
    assert found == [None, (1, "b")]


if __name__ == "__main__":
    main()
