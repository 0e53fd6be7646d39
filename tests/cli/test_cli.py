"""The command line prints one JSON document last on stdout, and settings override in their order.

test_bad_input.py tests what is refused.
"""

import json

import pytest
from helpers import command, invoke, last_json


def test_bad_input_in_a_separate_process(tmp_path):
    done = command("run", "--prefix", "0", cwd=tmp_path)
    assert (
        done.returncode == 2 and done.stdout == "" and done.stderr.startswith("error: --prefix 0: ")
    )
    assert len(done.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_dry_run_checks_everything_and_writes_nothing(pair, questions, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, out, _ = invoke(
        "run",
        "--student",
        pair[0],
        "--teacher",
        pair[1],
        "--dataset",
        questions,
        "--prefix",
        "50%",
        "--max-new-tokens",
        "40",
        "--dry-run",
    )
    document = last_json(out)
    assert document["dry_run"] and document["config"]["rollout"]["max_new_tokens"] == 40
    assert document["flops_per_update"]["prefix"] < document["flops_per_update"]["full"]
    assert not list(tmp_path.iterdir())


def test_file_flag_and_set_override_in_that_order(pair, questions, tmp_path):
    (tmp_path / "run.yaml").write_text(
        f"models: {{student: {pair[0]}, teacher: {pair[1]}}}\ndata: {{dataset: {questions}}}\n"
        "train: {steps: 7, batch_size: 2}\nschedule: {lr: 1e-3}\nrollout: {max_new_tokens: 40}\n"
    )
    _, out, _ = invoke(
        "run",
        "--config",
        tmp_path / "run.yaml",
        "--steps",
        "8",
        "--batch-size",
        "3",
        "--set",
        "train.batch_size=4",
        "--dry-run",
    )
    config = last_json(out)["config"]
    assert (config["train"]["steps"], config["train"]["batch_size"], config["schedule"]["lr"]) == (
        8,
        4,
        1e-3,
    )


def test_eval_counts_pass_at_k_and_writes_examples(pair, questions, tmp_path):
    _, out, _ = invoke(
        "eval",
        "--model",
        pair[0],
        "--dataset",
        questions,
        "--samples",
        "3",
        "--problems",
        "5",
        "--max-new-tokens",
        "16",
        "--out",
        tmp_path / "examples.jsonl",
    )
    document = last_json(out)
    assert (
        document["accuracy"].keys() == {"value", "n", "low", "high"}
        and document["accuracy"]["n"] == 5
    )
    assert document["pass_at_k"]["value"] >= document["accuracy"]["value"]
    rows = [json.loads(line) for line in (tmp_path / "examples.jsonl").read_text().splitlines()]
    assert len(rows) == 5 and all(len(r["responses"]) == 3 for r in rows)
    flat = [x for r in rows for x in r["responses"]]
    assert document["mean_tokens"] == pytest.approx(sum(x["tokens"] for x in flat) / 15)
    assert document["finish_rate"] == pytest.approx(sum(x["finished"] for x in flat) / 15)


def test_check_prints_its_notes_before_the_table_and_the_prompts_last():
    code, out, err = invoke("check", "--batch-size", "2", "--check-samples", "0")
    document = last_json(out)
    lines = err.splitlines()
    notes = [lines.index(note) for note in document["notes"]]
    table = next(i for i, line in enumerate(lines) if "check" in line and "result" in line)
    prompt = next(i for i, line in enumerate(lines) if line.startswith("student prompt (13 tokens"))
    assert code == 0 and notes == sorted(notes) and len(notes) > 3
    assert notes[-1] < table < prompt
    assert "last ids and tokens: 8 '2', 7 '1'," in lines[prompt]


def test_progress_counts_steps_and_names_its_phases(tmp_path):
    flags = ("--steps", "1", "--batch-size", "1", "--samples", "1", "--max-new-tokens", "8")
    few = ("--problems", "2", "--kl-prompts", "1", "--check-samples", "0")
    code, _, err = invoke("run", *flags, *few, "--out", tmp_path / "run")
    assert code == 0
    assert "after step 0: accuracy" in err and "after step 1: accuracy" in err
    row = next(line for line in err.splitlines() if line.startswith("step 1/1: train reverse KL "))
    for phase in ("sampling ", "teacher ", "training "):
        assert phase in row
    assert " tok/s, " in row and " useful so far (" in row and " with full rollouts)" in row
