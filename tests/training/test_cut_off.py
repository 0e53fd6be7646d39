"""Test that a stop signal cuts evaluations off on all ranks, and that a resume repeats them.

A listener of phases sends the signal while answers are sampled.
"""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, Silent, last_json, prepared, rows

from prefix_distill import config as configuration
from prefix_distill.display import EVALUATION, TAIL_PROBE, listening
from prefix_distill.engine import stopping
from prefix_distill.engine.ranks import Place
from prefix_distill.errors import Interrupted
from prefix_distill.signals import Interrupt
from prefix_distill.training import teacher_text
from prefix_distill.training.folder import RunFolder
from prefix_distill.training.session import Session

TEXT = "sampling the teacher's text"
VALUES = {"train.steps": 6, "checkpoint.save_every": 3, "schedule.lr": 1e-3}


class Presses:
    """Sends SIGINT once the phase ``name`` begins for the ``number``-th time and advances.

    ``after``: how often a phase has advanced since then.
    """

    def __init__(self, name: str, number: int):
        self.name = name
        self.number = number
        self.begun = 0
        self.after = 0

    def began(self, phase):
        self.begun += phase.name == self.name

    def moved(self, phase):
        if self.begun <= self.number:
            return
        if self.after == 0:
            os.kill(os.getpid(), signal.SIGINT)
        self.after += 1

    def ended(self, phase): ...


def train(folder, run, resume=False, presses=None) -> dict:
    files = RunFolder(folder)
    if not resume:
        files.create(configuration.as_dict(run.config))
    with listening(presses), Interrupt() as interrupt:
        return Session(run, files, Silent(), resume, interrupt).train()


@pytest.mark.parametrize(
    "case",
    [
        ({"evaluate.every": 2}, EVALUATION, 0, None),
        ({"evaluate.every": 2}, EVALUATION, 2, 4),
        ({"evaluate.every": 2}, EVALUATION, 3, 6),
        ({"evaluate.tail_every": 2}, TAIL_PROBE, 1, 4),
        ({"rollout.off_policy": "sft"}, TEXT, 0, 0),
    ],
)
def test_what_is_cut_off_is_repeated_and_the_run_ends_bit_for_bit(pair, questions, tmp_path, case):
    """A case: options, phase, how many such phases are not cut off, step of the saved state."""
    options, name, number, step = case

    def run():
        return prepared(pair, questions, **VALUES, **options)

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    expected = train(whole, run())
    presses = Presses(name, number)
    where = f"after step {step}; the state is saved"
    if step is None:
        where = "before the first step, so training starts from the beginning"
    with pytest.raises(Interrupted, match=rf"interrupted \(SIGINT\) {where}; continue with"):
        train(cut, run(), presses=presses)
    assert presses.after < 5  # it left at once
    result = train(cut, run(), resume=True)
    assert rows(cut) == rows(whole)
    assert [row["step"] for row in result["evaluations"]] == [
        row["step"] for row in expected["evaluations"]
    ]
    for file in ("model/model.safetensors", "checkpoints/step-00000006/optimizer.safetensors"):
        assert (cut / file).read_bytes() == (whole / file).read_bytes()
    for key in ("accuracy_after", "kl_after", "tail_probes", "flops", "tokens"):
        assert result[key] == expected[key], key


def test_the_sampling_of_a_step_is_not_cut_off(pair, questions, tmp_path):
    run = prepared(pair, questions, **VALUES)

    class InAStep(Silent):
        def row(self, row, *_):
            if row["step"] == 1:
                os.kill(os.getpid(), signal.SIGINT)

    files = RunFolder(tmp_path / "run")
    files.create(configuration.as_dict(run.config))
    with pytest.raises(Interrupted, match="after step 1"), Interrupt() as interrupt:
        Session(run, files, InAStep(), interrupt=interrupt).train()


def alone() -> Place:
    device = torch.device("cpu")
    return Place(
        device=device,
        teacher_device=device,
        dtype=torch.float32,
        head_dtype=torch.float32,
        rank=0,
        world=1,
        reasons=(),
    )


def test_only_work_that_may_be_cut_off_is():
    with Interrupt() as interrupt:
        interrupt.ask(signal.SIGTERM)
        stopping.look()
        with stopping.cutting_off(interrupt):
            with pytest.raises(stopping.CutOff):
                stopping.look()
            with pytest.raises(stopping.CutOff) as caught:
                stopping.gather_results(alone(), stopping.look)
        assert caught.value.number == signal.SIGTERM
        stopping.look()


RANK = """
import os, signal, sys
from prefix_distill import config as configuration
from prefix_distill.engine import stopping
from prefix_distill.engine.ranks import join_ranks
from prefix_distill.signals import Interrupt

class Small:
    parameters = 1

config = configuration.build({"runtime.device": "cpu", "runtime.dtype": "float32"})
place = join_ranks(config.runtime, Small())
interrupt = Interrupt()

def work():
    for token in range(4):
        if place.rank == 1 and token == 2:
            interrupt.ask(signal.SIGUSR1)
        stopping.look()
    return place.rank

assert stopping.gather_results(place, lambda: place.rank) == [0, 1]
with stopping.cutting_off(interrupt):
    try:
        stopping.gather_results(place, work)
    except stopping.CutOff as cut_off:
        assert cut_off.number == signal.SIGUSR1
        left = True
assert left and place.gather(place.rank) == [0, 1]
print("left")
"""


def test_all_ranks_leave_together_if_one_is_asked_to_stop():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ranks = []
    for rank in range(2):
        environment = os.environ | {
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, "-c", RANK]
        ranks.append(subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True))
    assert [rank.communicate(timeout=100)[0] for rank in ranks] == ["left\n", "left\n"]


LARGE = (
    *("--device", "cpu", "--steps", "4", "--batch-size", "2", "--samples", "1", "--prefix", "8"),
    *("--problems", "600", "--kl-prompts", "2", "--check-samples", "0"),
    *("--generation-rows", "4"),
)


@pytest.mark.long
def test_ctrl_c_cuts_an_evaluation_of_two_ranks_off(tmp_path):
    out = tmp_path / "run"
    program = [sys.executable, "-m", "prefix_distill", "run"]
    process = subprocess.Popen(
        [*program, *LARGE, "--out", out, "--gpus", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    said = []
    for line in process.stderr:
        said.append(line)
        if line.startswith("evaluating "):
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, (said, err)
    assert "leaving this evaluation unfinished; no step was trained; press again" in err
    assert "interrupted (SIGINT) before the first step" in err and "Traceback" not in err
    done = subprocess.run(
        [*program, "--resume", "--out", out], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert last_json(done.stdout)["steps"] == 4
    assert json.loads((out / "run.json").read_text())["result"]["resumed_from"] is None


def test_the_texts_of_the_teacher_so_far_are_kept(pair, questions, tmp_path, monkeypatch):
    """Batches of one row, kept two by two: the signal comes at the fifth text."""
    monkeypatch.setattr(teacher_text, "BATCHES", 2)

    def run():
        return prepared(pair, questions, **VALUES, **{"rollout.off_policy": "sft"}, rollout__rows=1)

    class AtTheFifth(Presses):
        def moved(self, phase):
            if phase.name == TEXT and phase.done >= 4:
                super().moved(phase)

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    expected = train(whole, run())
    with pytest.raises(Interrupted, match="after step 0; the state is saved"):
        train(cut, run(), presses=AtTheFifth(TEXT, 0))
    kept = json.loads((cut / teacher_text.FILE).read_text())["texts"]
    assert len(kept) == 4
    result = train(cut, run(), resume=True)
    assert (cut / teacher_text.FILE).read_bytes() == (whole / teacher_text.FILE).read_bytes()
    assert result["flops"] == expected["flops"] and rows(cut) == rows(whole)
