"""Test that trackers get every metric and every evaluation once, also after interruptions.

A tracker that fails does not stop the run.
"""

import importlib.util
import json
import os
import signal

import numpy
import pytest
from helpers import flags, invoke, last_json

from prefix_distill.display import Display
from prefix_distill.errors import Stopped
from prefix_distill.training import session as train
from prefix_distill.training.session import step_optimizer

SMALL = [
    "--batch-size",
    "2",
    "--samples",
    "1",
    "--problems",
    "2",
    "--kl-prompts",
    "2",
    "--max-new-tokens",
    "12",
    "--prefix",
    "6",
    "--check-samples",
    "0",
]


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def read(folder) -> dict[str, list]:
    """Return tag → [(step, value)] from TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    found.Reload()
    return {
        tag: [(event.step, event.value) for event in found.Scalars(tag)]
        for tag in found.Tags()["scalars"]
    }


def wanted(out) -> dict[str, list]:
    """Return the numbers in the run folder, in the form of ``read``."""
    found = {}
    for row in lines(out):
        for name, value in row.items():
            if name != "step" and value is not None:
                found.setdefault(name, []).append((row["step"], value))
    result = json.loads((out / "run.json").read_text())["result"]
    for row in result["evaluations"]:
        for name, value in (
            ("accuracy", row["accuracy"]["value"]),
            ("accuracy_high", row["accuracy"]["high"]),
            ("kl_nats", row["kl"]["value"]),
            ("kl_nats_low", row["kl"]["low"]),
            ("finish_rate", row["finish_rate"]),
            ("mean_tokens", row["mean_tokens"]),
        ):
            found.setdefault(f"evaluation/{name}", []).append((row["step"], value))
    for row in result["tail_probes"]:
        found.setdefault("tail_probe/kl_nats", []).append((row["step"], row["kl"]))
    return found


def interrupted_twice(pair, questions, out, monkeypatch, *more):
    """Do a run that is interrupted twice.

    It stops in update 6; the newest checkpoint is after step 3. It resumes at another learning rate
    and repeats step 4, where SIGINT stops it before the evaluation. The last resume completes it.
    """
    update, row, calls = step_optimizer, Display.row, []

    def fails(*arguments, **named):
        calls.append(1)
        if len(calls) == 6:
            raise Stopped("as full disks do")
        return update(*arguments, **named)

    def sends(self, row_, *rest):
        row(self, row_, *rest)
        if row_["step"] == 4:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(train, "step_optimizer", fails)
    code, _, err = invoke(*flags(pair, questions, out), *SMALL, *more)
    assert (
        code == 1
        and "as full disks do" in err
        and [r["step"] for r in lines(out)] == [1, 2, 3, 4, 5]
    ), err
    first = lines(out)
    monkeypatch.setattr(train, "step_optimizer", update)
    monkeypatch.setattr(Display, "row", sends)
    assert invoke("run", "--resume", "--out", out, "--lr", "5e-4")[0] == 130
    monkeypatch.undo()
    code, said, err = invoke("run", "--resume", "--out", out)
    assert code == 0 and last_json(said)["resumed_from"] == 4 and "is disabled" not in err, err
    assert lines(out)[3]["optimizer/learning_rate"] < first[3]["optimizer/learning_rate"]


def test_tensorboard_holds_what_the_run_folder_holds(pair, questions, tmp_path, monkeypatch):
    out = tmp_path / "run"
    interrupted_twice(
        pair, questions, out, monkeypatch, "--report-to", "tensorboard", "--run-name", "one"
    )
    assert len(list((out / "tensorboard").iterdir())) == 3
    found, expected = read(out / "tensorboard"), wanted(out)
    for tag in expected:  # TensorBoard's scalars are float32
        assert found[tag] == [(step, numpy.float32(value)) for step, value in expected[tag]], tag
    assert expected.keys() <= found.keys() and all(
        tag.startswith("evaluation/") for tag in found.keys() - expected.keys()
    )
    assert [step for step, _ in found["evaluation/accuracy"]] == [0, 2, 4, 6]


def test_a_tracker_that_fails_is_disabled_and_training_continues(
    pair, questions, tmp_path, monkeypatch
):
    from torch.utils.tensorboard import SummaryWriter

    plain = SummaryWriter.add_scalar

    def add_scalar(self, name, value, step, **more):
        if step == 3:
            raise OSError(28, "No space left on device")
        plain(self, name, value, step, **more)

    monkeypatch.setattr(SummaryWriter, "add_scalar", add_scalar)
    code, out, err = invoke(
        *flags(pair, questions, tmp_path / "run"),
        *SMALL,
        "--report-to",
        "tensorboard",
        "--steps",
        "4",
        "--eval-every",
        "0",
    )
    assert code == 0 and last_json(out)["steps"] == 4
    assert (
        err.count(
            "warning: --report-to tensorboard is disabled: OSError: [Errno 28] No space "
            "left on device"
        )
        == 1
    )
    assert {
        step for values in read(tmp_path / "run/tensorboard").values() for step, _ in values
    } <= {0, 1, 2}


def wandb_rows(out) -> list[dict]:
    """Return the history rows of the run's offline files.

    A file is a log in blocks of 32 KiB. A record is a header (CRC, length and kind) and a message
    of wandb.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for file in sorted((out / "wandb").glob("offline-run-*/*.wandb")):
        data, at, whole = file.read_bytes(), 7, b""
        while at + 7 <= len(data):
            if 32768 - at % 32768 < 7:
                at += 32768 - at % 32768
                continue
            size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
            whole, at = whole + data[at + 7 : at + 7 + size], at + 7 + size
            if kind in (1, 4):  # a whole record, or its last part
                record, whole = Record.FromString(whole), b""
                if record.WhichOneof("record_type") == "history":
                    found.append(
                        {
                            item.key or ".".join(item.nested_key): json.loads(item.value_json)
                            for item in record.history.item
                        }
                    )
    return found


def trackio_rows(out) -> list[dict]:
    from trackio.sqlite_storage import SQLiteStorage

    [name] = [name for name in SQLiteStorage.get_runs("prefix-distill") if name.startswith("one-")]
    return SQLiteStorage.get_logs("prefix-distill", name)


@pytest.mark.long
@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_wandb_and_trackio_hold_every_number_once(pair, questions, tmp_path, monkeypatch, name):
    """Run offline. These trackers keep the first values of repeated steps."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    settings = {
        "WANDB_MODE": "offline",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "WANDB_CONFIG_DIR": str(tmp_path),
        "WANDB_CACHE_DIR": str(tmp_path),
    }
    for key, value in settings.items():
        monkeypatch.setenv(key, value)
    with monkeypatch.context() as inner:
        interrupted_twice(
            pair, questions, tmp_path / "run", inner, "--report-to", name, "--run-name", "one"
        )
    rows = {"wandb": wandb_rows, "trackio": trackio_rows}[name](tmp_path / "run")
    for tag, values in wanted(tmp_path / "run").items():
        found = [(row["step"], row[tag]) for row in rows if tag in row]
        assert [step for step, _ in found] == [step for step, _ in values], tag
        assert found[:2] == values[:2], tag  # before the repeated steps
    assert json.loads((tmp_path / "run/trackers.json").read_text())[name]["at"] == [6, 1]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_missing_package_is_reported_before_a_model_is_loaded(
    pair, questions, tmp_path, monkeypatch, name
):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda wanted, *rest: None if wanted == name else find(wanted, *rest),
    )
    code, out, err = invoke(
        "run",
        "--student",
        "no/model",
        "--report-to",
        f"tensorboard,{name}",
        "--out",
        tmp_path / "run",
    )
    assert (
        code == 2
        and out == ""
        and err.splitlines()[-1].endswith(
            f'pip install -e ".[{name}]" in the checkout, or omit --report-to'
        )
    )
    assert not (tmp_path / "run").exists()
