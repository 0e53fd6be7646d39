"""Test that an interrupted and resumed run is bit for bit equal to an uninterrupted one.

Weights, moments, metric rows and decisions are compared.
"""

import json
import os
import signal
import subprocess
import sys

import pytest
from helpers import BENCHMARKS, Silent, flags, invoke, last_json, prepared, rows
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def whole(pair, questions, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    code, said, err = invoke(*flags(pair, questions, out))
    assert code == 0, err
    return out, last_json(said)


@pytest.mark.long
def test_two_kills_at_random_moments_change_nothing(tmp_path):
    """Kill a run that has every kind of state.

    A kill can come before the first checkpoint, or while a checkpoint or the best student is
    written. By default, `tests/benchmarks/soak.py` kills 50 times.
    """
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "soak.py", "--times", "2", "--seed", "1", "--out", tmp_path],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    document = last_json(done.stdout)
    assert (
        document["kills"] >= 2
        and document["differing"] == []
        and len(document["resumed_from"]) == document["runs"]
    )
    result = json.loads((tmp_path / "whole/run.json").read_text())["result"]
    assert (
        result["best"]["step"] > 0
        and any(x["k"] for x in result["extrapolations"])
        and result["prefix_decisions"]
        and result["tail_probes"]
    )


def test_optimizer_state_is_complete(whole):
    student = load_file(whole[0] / "checkpoints/step-00000006/student.safetensors")
    moments = load_file(whole[0] / "checkpoints/step-00000006/optimizer.safetensors")
    assert {f"{k}/{name}" for k in ("exp_avg", "exp_avg_sq", "step") for name in student} == set(
        moments
    )


@pytest.mark.parametrize("name", ["student.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["a byte", "cut"])
def test_a_damaged_checkpoint_is_reported_and_skipped(whole, tmp_path, name, damage):
    import shutil

    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    newest = out / "checkpoints/step-00000006" / name
    data = bytearray(newest.read_bytes())
    # in state.json, a digit of a count: the file is still valid JSON
    place = data.index(b'"tokens": ') + 10 if name == "state.json" else len(data) // 2
    data[place] ^= 1
    newest.write_bytes(data if damage == "a byte" else data[: len(data) // 3])
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "torn')
    code, said, err = invoke("run", "--resume", "--out", out)
    assert (
        code == 0
        and "step-00000006 is damaged" in err
        and ((name == "state.json" and damage == "cut") or "checksum" in err)
    )
    assert "metrics.jsonl: removed 1 incomplete line left by the interruption" in err
    assert last_json(said)["resumed_from"] == 3
    assert rows(out) == rows(whole[0])
    assert (out / "model/model.safetensors").read_bytes() == (
        whole[0] / "model/model.safetensors"
    ).read_bytes()


def test_other_settings_are_refused_on_resume(whole):
    code, _, err = invoke("run", "--resume", "--out", whole[0], "--samples", "3")
    assert code == 2 and "--samples was 2, got 3" in err


def test_settings_changed_on_resume_are_reported_and_kept(whole, tmp_path, monkeypatch):
    """Extend a run from six to eight steps at another learning rate; interrupt it after seven.

    The second resume needs no flags to reach step 8.
    """
    import shutil

    from prefix_distill.display import Display

    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    plain = Display.row

    def row(self, row, *rest):
        plain(self, row, *rest)
        if row["step"] == 7:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Display, "row", row)
    code, _, err = invoke("run", "--resume", "--out", out, "--steps", "8", "--lr", "5e-4")
    assert (
        code == 130 and "--lr changes from 0.001 to 0.0005" in err and "8 steps instead of 6" in err
    )
    monkeypatch.undo()
    code, said, err = invoke("run", "--resume", "--out", out)
    assert code == 0 and (last_json(said)["resumed_from"], last_json(said)["steps"]) == (7, 8), err
    assert [r["step"] for r in rows(out)] == list(range(1, 9)) and rows(out)[6][
        "optimizer/learning_rate"
    ] < 5e-4


def test_a_used_folder_is_refused_without_resume(whole, pair, questions):
    code, _, err = invoke(*flags(pair, questions, whole[0]))
    assert code == 2 and "add --resume" in err
    assert os.listdir(whole[0])


SETTINGS = {
    "staircase": {"schedule.prefix": "staircase:4:4:2"},
    "auto, having grown": {"schedule.prefix": "auto:4:4", "train.steps": 14},
    "the teacher's text": {"rollout.off_policy": "sft:0.5"},
    "a window by divergence": {"weights.window": "highest-kl:4"},
    "sampled off the policy": {"divergence.estimator": "sampled", "rollout.temperature": 0.8},
    "selection, extrapolation, between two triggers": {
        "weights.select": "soft-or",
        "weights.position": "moderate",
        "extrapolation.kind": "effopd",
        "extrapolation.score": "heldout-kl",
        "extrapolation.problems": 4,
        "extrapolation.diagnostics": True,
        "train.steps": 9,
    },
    "random candidates, all weights, moments forgotten": {
        "weights.select": "entropy-sample",
        "weights.keep": 0.2,
        "extrapolation.kind": "random",
        "extrapolation.modules": "all",
        "extrapolation.reset": True,
        "train.steps": 9,
    },
    "an averaged teacher of its own": {
        "models.teacher": "self",
        "models.teacher_ema": 0.9,
        "data.privileged_column": "answer",
        "divergence.name": "forward-kl",
        "data.privileged_template": "{problem} {solution}",
        "divergence.clip": 0.05,
    },
    "tail probes": {"evaluate.every": 0, "evaluate.tail_every": 2, "evaluate.tail_prompts": 3},
}


RARELY = (
    "random candidates, all weights, moments forgotten",
    "an averaged teacher of its own",
    "tail probes",
    "staircase",
    "a window by divergence",
    "sampled off the policy",
)  # the state of the last three depends on the seed and the step only


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * (name in RARELY)) for name in SETTINGS]
)
def test_resume_is_exact_inside_every_schedule_and_method(
    pair, questions, tmp_path, monkeypatch, name
):

    from prefix_distill.training import session as train
    from prefix_distill.training.folder import RunFolder
    from prefix_distill.training.session import Session, step_optimizer

    plain, calls = step_optimizer, []

    def go(folder, resume=False, fails_at=None):
        def update(*arguments, **named):
            calls.append(1)
            if len(calls) == fails_at:
                raise InterruptedError
            return plain(*arguments, **named)

        calls.clear()
        monkeypatch.setattr(train, "step_optimizer", update)
        run = prepared(
            pair,
            questions,
            **{"train.steps": 6, "checkpoint.save_every": 4, "schedule.lr": 1e-3} | SETTINGS[name],
        )
        files = RunFolder(folder)
        if not resume:
            files.create({})
            files.write_json("run.json", {})
        return Session(run, files, Silent(), resume).train()

    whole = go(tmp_path / "whole")
    with pytest.raises(InterruptedError):
        go(tmp_path / "cut", fails_at=12 if "auto" in name else 6)
    again = go(tmp_path / "cut", resume=True)
    assert again["resumed_from"] == (8 if "auto" in name else 4)
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    for file in (
        "model/model.safetensors",
        "scores.jsonl",
        "teacher-text.json",
        "displacement.json",
    ):
        if (tmp_path / "whole" / file).exists():
            assert (tmp_path / "cut" / file).read_bytes() == (
                tmp_path / "whole" / file
            ).read_bytes(), file
    for key in (
        "accuracy_after",
        "kl_after",
        "tokens",
        "flops",
        "full_rollout_cost",
        "prefix",
        "prefix_decisions",
        "tail_probes",
        "best",
        "extrapolations",
    ):
        assert again[key] == whole[key], key
    lengths = [row["rollout/prefix_tokens"] for row in rows(tmp_path / "whole")]
    if name == "auto, having grown":
        assert whole["prefix_decisions"] and lengths[0] < lengths[-1]
    if name == "tail probes":
        assert [row["step"] for row in whole["tail_probes"]] == [2, 4] and whole["best"][
            "step"
        ] in (0, 2, 4, 6)
    if "triggers" in name:
        assert [x["step"] for x in whole["extrapolations"]] == [1, 2, 4, 8] and not (
            tmp_path / "whole/displacements"
        ).exists()
        assert (
            whole["flops"]["by_phase"]["extrapolation"]["useful"]
            == sum(x["flops"] for x in whole["extrapolations"])
            > 0
        )
        table = json.loads((tmp_path / "whole/displacement.json").read_text())
        assert [row["step"] for row in table] == [1, 2, 4, 8] and all(
            -1 <= row["modules"]["all"]["cosine"] <= 1 for row in table
        )
    if name == "the teacher's text":
        assert {"teacher_prefill", "teacher_decode"} < whole["flops"]["by_phase"].keys()
