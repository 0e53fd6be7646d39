"""Kill a process at every file-system call of a run folder, and check what the next one finds.

An audit hook sees each call before it takes effect. A killed process runs no `finally` block, so
every child process is a fork that ends with SIGKILL.
"""

import json
import os
import subprocess
import sys

import pytest
from helpers import Silent, prepared, trained

from prefix_distill import config as configuration
from prefix_distill.training import checkpoints
from prefix_distill.training.folder import RunFolder
from prefix_distill.training.session import Session

CHILD = r"""
import json, os, shutil, signal, sys
from pathlib import Path

import safetensors.torch
import torch
import yaml

from prefix_distill.files import replace_folder
from prefix_distill.training.folder import RunFolder

torch.set_num_threads(1)
os.fsync = lambda handle: None  # it protects from power failures, not from kills
EVENTS = {"open", "shutil.rmtree"}
EVENTS |= {f"os.{name}" for name in ("link", "rename", "remove", "rmdir", "mkdir", "truncate")}
root = Path(sys.argv[1])
state = {"calls": 0, "dies_at": None, "folder": "", "done": None}

def hook(event, arguments):
    if event not in EVENTS or state["dies_at"] is None:
        return
    path = arguments[0]
    if not isinstance(path, (str, Path)):
        # os.rmdir and others in shutil.rmtree name a file in an open folder
        path = state["folder"] if event != "open" else ""
    if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & os.O_WRONLY):
        return
    state["calls"] += 1
    if state["calls"] == state["dies_at"]:
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hook)

def save(folder, step):
    weight = {"w": torch.full((3,), float(step))}
    folder.save_checkpoint(step, {"student": weight, "optimizer": weight}, {"step": step})
    print(step, flush=True)

def save_best(folder, step):
    scratch = folder.path / ".best.partial"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    (scratch / "config.json").write_text(str(step))
    (scratch / "weights").write_text(str(step))
    replace_folder(scratch, folder.best)

def work(folder):
    folder.create({"train": {"steps": 4}}, {"facts": 1}, {"ok": True})
    save(folder, 0)
    save_best(folder, 0)
    save(folder, 1)
    save_best(folder, 1)
    save(folder, 2)
    save(folder, 2)  # a signal saves once more
    shutil.copytree(folder.best, folder.model, dirs_exist_ok=True)
    folder.finish(keep=1)

work(RunFolder(root / "undisturbed"))  # imports what the children need
number = 0
ended = False
while not ended:
    number += 1
    path = root / f"run-{number}"
    log = root / f"log-{number}"
    child = os.fork()
    if child == 0:
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 1)
        state["folder"], state["dies_at"] = str(path), number
        work(RunFolder(path))
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    ended = status == 0
    if status not in (0, -signal.SIGKILL):
        sys.exit(f"call {number}: exit {status}")
print("calls", number)
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Return the folder of runs that were killed at call 1, 2, 3, …, and their number."""
    root = tmp_path_factory.mktemp("killed")
    done = subprocess.run(
        [sys.executable, "-c", CHILD, root], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    number = int(done.stdout.splitlines()[-1].removeprefix("calls "))
    assert number > 50
    return root, number


def test_after_a_kill_at_any_call_the_folder_is_whole(killed):
    root, number = killed
    created = 0
    for k in range(1, number + 1):
        path = root / f"run-{k}"
        folder = RunFolder(path)
        saved = [int(line) for line in (root / f"log-{k}").read_text().split()]
        if not folder.is_created:
            assert not saved
            folder.create({}, {"facts": 2}, {"ok": False})  # the same command starts again
            assert sorted(os.listdir(path)) == ["config.yaml", "preflight.json", "run.json"], k
            assert folder.read_json("preflight.json") == {"ok": False}, k
            continue
        created += 1
        assert folder.read_json("preflight.json") == {"ok": True}, k
        folder.recover()
        if saved:
            warned = []
            step, tensors, _ = folder.read_latest_checkpoint(warned.append)
            assert step >= saved[-1] and not warned, k
            assert tensors["student"]["w"].tolist() == [float(step)] * 3
            folder.prune(step)
        names = sorted(os.listdir(path / "checkpoints")) if (path / "checkpoints").exists() else []
        assert len(names) <= 2 and all(name.startswith("step-") for name in names), (k, names)
        assert not [name for name in os.listdir(path) if name.startswith(".")], k
        if len(saved) > 1:
            parts = {(path / "best" / name).read_text() for name in ("config.json", "weights")}
            assert len(parts) == 1, k
            assert sorted(os.listdir(path / "best")) == ["config.json", "weights"], k
    assert created > number // 2


def test_an_intact_checkpoint_outlives_two_damaged_newer_ones(tmp_path):
    """Check a third checkpoint that a kill left behind, which is the only intact one."""
    import torch

    folder = RunFolder(tmp_path / "run")
    folder.create({})
    weight = {"w": torch.zeros(2)}
    for step in (1, 2, 3):
        folder.save_checkpoint(step, {"student": weight}, {})
        if step == 1:
            (tmp_path / "run/checkpoints/step-00000001").rename(tmp_path / "kept")
    (tmp_path / "kept").rename(tmp_path / "run/checkpoints/step-00000001")
    for step in (2, 3):
        (tmp_path / f"run/checkpoints/step-{step:08d}/state.json").write_text("{}")
    folder.recover()
    warned = []
    step, _, _ = folder.read_latest_checkpoint(warned.append)
    assert step == 1 and len(warned) == 2
    folder.prune(step)
    assert os.listdir(tmp_path / "run/checkpoints") == ["step-00000001"]


class Killed(BaseException):
    """Stands for SIGKILL, where a fork would cost too much."""


def test_a_resume_deletes_the_third_checkpoint_that_a_kill_left(
    pair, questions, tmp_path, monkeypatch
):
    """Stop in the last save, before the oldest checkpoint is deleted; no later save deletes it."""

    def dies(folder):
        raise Killed

    def run():
        return prepared(
            pair, questions, train__steps=2, checkpoint__save_every=1, evaluate__problems=0
        )

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "remove_folder", dies)
        with pytest.raises(Killed):
            trained(run(), tmp_path / "run")
    saved = tmp_path / "run/checkpoints"
    assert len(list(saved.iterdir())) == 3
    trained(run(), tmp_path / "run", resume=True)
    assert sorted(os.listdir(saved)) == ["step-00000001", "step-00000002"]


def test_a_kill_in_the_end_of_a_run_keeps_the_diagnostics(pair, questions, tmp_path, monkeypatch):
    """Stop after displacement.json is written, and resume twice."""

    def run():
        return prepared(
            pair,
            questions,
            extrapolation__kind="random",
            extrapolation__diagnostics=True,
            evaluate__problems=0,
        )

    folder = RunFolder(tmp_path / "run")
    first = run()
    folder.create(configuration.as_dict(first.config))
    plain = RunFolder.write_json

    def dies(self, name, tree):
        if name == "run.json" and "result" in tree:
            raise Killed
        plain(self, name, tree)

    monkeypatch.setattr(RunFolder, "write_json", dies)
    with pytest.raises(Killed):
        Session(first, folder, Silent()).train()
    monkeypatch.undo()
    before = json.loads((tmp_path / "run/displacement.json").read_text())
    assert [row["step"] for row in before] == [1, 2, 4]
    for _ in range(2):
        Session(run(), folder, Silent(), True).train()
        assert json.loads((tmp_path / "run/displacement.json").read_text()) == before
        assert not (tmp_path / "run/displacements").exists()
