"""Tests of `compare`: several arms from one file.

A comparison can be resumed, has its folder to itself, and counts the full cost of each arm.
"""

import json
import re
import signal

import pytest
import yaml
from helpers import BENCHMARKS, invoke, last_json

from prefix_distill import display
from prefix_distill.errors import UserError
from prefix_distill.results import compare
from prefix_distill.results.compare import ARMS_FILE
from prefix_distill.training.folder import RunFolder
from prefix_distill.training.prepare import prepare

TREE = {
    "base": {
        "rollout": {"max_new_tokens": 24, "samples": 2},
        "train": {"steps": 2, "batch_size": 2},
        "evaluate": {"problems": 6, "every": 1, "kl_prompts": 3, "tail_every": 0},
        "checkpoint": {"save_every": 1},
    },
    "seeds": [0, 1],
    "reference": "full",
    "tune": {
        "schedule.lr": [1e-4, 1e-3],
        "seed": 7,
        "base": {"evaluate": {"split": "validation", "every": 0}},
    },
    "also": {
        "longer": {
            "data": {"dataset": "lab:choice:28-30"},
            "evaluate": {"problems": 5},
            "rollout": {"max_new_tokens": 24},
        }
    },
    "arms": {
        "full": {"schedule": {"prefix": "full"}},
        "warm": {"start": "full", "schedule": {"prefix": "8"}},
    },
}


def write(folder, tree=TREE, **changes):
    file = folder / "arms.yaml"
    file.write_text(yaml.safe_dump(tree | changes))
    return file


def test_arms_that_share_an_alias_start_from_the_same_arm(tmp_path):
    file = tmp_path / "arms.yaml"
    file.write_text(
        "arms:\n"
        "  full: {}\n"
        "  warm: &warm {start: full, schedule: {prefix: 8}}\n"
        "  alias: *warm\n"
        "  merged: {<<: *warm, schedule: {prefix: 16}}\n"
    )
    arms = compare.read_arms(str(file))
    assert arms.start == {"warm": "full", "alias": "full", "merged": "full"}
    assert arms.arms["alias"] == arms.arms["warm"] == {"schedule.prefix": 8}
    assert arms.arms["merged"] == {"schedule.prefix": 16}


def test_an_interrupted_comparison_resumes_with_equal_results(tmp_path, monkeypatch):
    file = write(tmp_path)
    code, out, err = invoke("compare", file, "--out", tmp_path / "whole")
    assert code == 0, err
    numbers = re.findall(r"; run (\d) of 9(?:, \d+ s left in all)?", err)
    assert list(dict.fromkeys(numbers)) == [str(n) for n in range(1, 10)]
    whole = last_json(out)
    assert [row["arm"] for row in whole["arms"]] == ["full", "warm"] and whole["runs"] == 4
    full, warm = whole["arms"]
    assert (
        full["answers"] == 12
        and set(full["also"]) == {"longer"}
        and set(full["cost_ratios"]) == {"1.0", "0.95", "0.9", "0.5"}
    )
    assert (
        warm["flops_useful"] > full["flops_useful"]
    )  # includes the cost of the run it starts from
    chosen = yaml.safe_load((tmp_path / "whole/warm/seed-0/config.yaml").read_text())
    assert chosen["models"]["student"] == str(tmp_path / "whole/full/seed-0/model")
    merits = {
        value: json.loads((tmp_path / f"whole/full/tune-{value}/run.json").read_text())["result"][
            "accuracy_after"
        ]["value"]
        for value in (1e-4, 1e-3)
    }
    taken = yaml.safe_load((tmp_path / "whole/full/seed-0/config.yaml").read_text())["schedule"][
        "lr"
    ]
    assert merits[taken] == max(merits.values())
    tuned = yaml.safe_load((tmp_path / "whole/full/tune-0.001/config.yaml").read_text())
    assert tuned["runtime"]["seed"] == 7 and tuned["evaluate"]["split"] == "validation"

    from prefix_distill.training import session as train
    from prefix_distill.training.optimizer import step_optimizer

    plain, calls = step_optimizer, []

    def update(*arguments, **named):
        calls.append(1)
        if len(calls) == 6:  # in the middle of a run
            raise KeyboardInterrupt
        return plain(*arguments, **named)

    monkeypatch.setattr(train, "step_optimizer", update)
    code, _, err = invoke("compare", file, "--out", tmp_path / "cut")
    assert code == 130
    assert err.splitlines()[-1] == (
        "aborted without saving; the same command continues the comparison"
    )
    code, out, err = invoke("compare", file, "--out", tmp_path / "cut")
    assert (
        code == 0 and "resuming" in err and len(calls) == 18 + 1
    )  # 9 runs of 2 steps, and the interrupted step; finished runs are not repeated

    def same(rows):
        varying = ("seconds", "folders")
        return [{k: v for k, v in row.items() if k not in varying} for row in rows]

    assert same(last_json(out)["arms"]) == same(whole["arms"])
    before = len(calls)
    assert invoke("compare", file, "--out", tmp_path / "cut")[0] == 0 and len(calls) == before

    code, _, err = invoke("compare", write(tmp_path, seeds=[0]), "--out", tmp_path / "cut")
    assert code == 2 and "contains another comparison" in err


def test_two_processes_cannot_run_one_comparison(tmp_path):
    arms = compare.read_arms(write(tmp_path))
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / ARMS_FILE).write_text(
        json.dumps(json.loads(json.dumps(compare.dataclasses.asdict(arms))))
    )
    with RunFolder(folder).lock(), pytest.raises(UserError, match="another run"):
        compare.compare(arms, folder, display.Terminal(), prepare)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"arm": {}}, "unknown key 'arm'"),
        (
            {"arms": {"full": {"runtime": {"seed": 3}}}},
            "runtime.seed: an arm cannot set it, because every arm runs with the seeds of the file",
        ),
        (
            {"arms": {"full": {"checkpoint": {"out": "x"}}}},
            "checkpoint.out: an arm cannot set it, because its run folders are --out/ARM/seed-N",
        ),
        ({"arms": {}}, "expected at least one arm under 'arms', got none"),
        ({"arms": []}, "expected arms to contain keys"),
        ({"seeds": [0, 0]}, "different whole numbers"),
        ({"seeds": [True]}, "different whole numbers"),
        ({"seeds": 3}, "different whole"),
        ({"reference": "none"}, "reference 'none': expected one of its arms"),
        ({"arms": {"full": {"start": "no"}}}, "starts from 'no'"),
        (
            {"arms": {"full": {"schedule": {"prefxi": "8"}}}},
            "arms.yaml: unknown setting 'schedule.prefxi'",
        ),
        ({"arms": {"full": {"schedule": {"prefix": "0"}}}}, "--prefix 0: expected"),
        ({"arms": {"full": {"schedule": 3}}}, "arm 'full': expected sections with keys"),
        ({"arms": {"../x": {}}, "reference": None}, "a folder cannot have the name"),
        ({"tune": {"schedule.lr": 1e-4}}, "list of values"),
        ({"tune": {"schedule.lr": [1e-4], "train.steps": [3]}}, "one setting"),
        ({"tune": {"schedule.lr": ["x"]}}, "schedule.lr: expected"),
        ({"also": {"longer": {"data": {"dataset": 3.5, "x": 1}}}}, "data.x"),
        ({"arms": {"full": {}, "b": None}}, "to contain keys, got"),
    ],
)
def test_a_wrong_arms_file_is_refused_in_one_line(tmp_path, changes, said):
    code, out, err = invoke("compare", write(tmp_path, TREE | changes), "--out", tmp_path / "out")
    assert code == 2 and said in err and len(err.strip().splitlines()) == 1 and not out, err
    assert not (tmp_path / "out").exists()


def test_the_committed_arms_files_are_valid():

    files = sorted((BENCHMARKS / "arms").glob("*.yaml"))
    assert len(files) >= 3
    for file in files:
        assert compare.read_arms(str(file)).arms


def test_a_stop_signal_saves_the_run_and_advises_the_same_command(tmp_path, monkeypatch):
    monkeypatch.setattr(display.Display, "row", lambda *_: signal.raise_signal(signal.SIGINT))
    code, out, err = invoke("compare", write(tmp_path), "--out", tmp_path / "out")
    assert (code, out) == (130, "")
    assert err.splitlines()[-1] == (
        "interrupted (SIGINT) after step 1; the state is saved; the same command continues the "
        "comparison"
    )
