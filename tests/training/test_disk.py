"""Test what a finished run keeps on the disk, and models that are saved in bfloat16."""

import json
import os
import shutil

import pytest
import torch
from helpers import flags, invoke, last_json
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from prefix_distill import files


def run(pair, questions, out, *more):
    """Train six steps in ``out`` and return the result document."""
    code, said, err = invoke(*flags(pair, questions, out), *more)
    assert code == 0, err
    return last_json(said), err


def steps(out):
    return sorted(int(f.name.removeprefix("step-")) for f in (out / "checkpoints").iterdir())


def size_on_disk(folder):
    """Return the bytes of a folder's files, each stored file counted once."""
    stored = {}
    for file in folder.rglob("*"):
        if file.is_file():
            facts = file.stat()
            stored[facts.st_ino] = facts.st_size
    return sum(stored.values())


@pytest.mark.parametrize(("keep", "left"), [(1, [6]), (2, [3, 6]), (3, [0, 3, 6])])
def test_a_finished_run_keeps_as_many_checkpoints_as_asked(pair, questions, tmp_path, keep, left):
    run(pair, questions, tmp_path / "run", "--keep-checkpoints", keep)
    assert steps(tmp_path / "run") == left


def test_a_finished_run_with_one_checkpoint_can_be_lengthened(pair, questions, tmp_path):
    short, long = tmp_path / "short", tmp_path / "long"
    constant = ("--lr-schedule", "constant", "--keep-checkpoints", 1)
    run(pair, questions, short, *constant)
    code, _, err = invoke("run", "--resume", "--out", short, "--steps", 8)
    assert code == 0, err
    run(pair, questions, long, *constant, "--steps", 8)
    assert steps(short) == steps(long) == [8]
    name = "checkpoints/step-00000008/student.safetensors"
    assert (short / name).read_bytes() == (long / name).read_bytes()


def test_best_and_model_are_stored_once_if_they_are_equal(pair, questions, tmp_path):
    out = tmp_path / "run"
    # no accuracy: the lowest KL is the best, and this run lowers it at every evaluation
    document, _ = run(pair, questions, out, "--eval-every", 0, "--tail-every", 3)
    weights = [out / name / "model.safetensors" for name in ("model", "best")]
    is_last = document["best"]["step"] == 6
    assert weights[0].samefile(weights[1]) == is_last
    assert is_last  # else this test shows nothing
    copied = tmp_path / "copied"
    shutil.copytree(out, copied)
    size = weights[0].stat().st_size
    assert size_on_disk(copied) - size_on_disk(out) > 0.9 * size


def test_equal_files_stay_where_there_are_no_hard_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no hard links")

    for name in ("model", "best"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text("equal")
        (tmp_path / name / "card").write_text(name)
    monkeypatch.setattr(os, "link", refuse)
    files.share_equal_files(tmp_path / "model", tmp_path / "best")
    assert sorted(os.listdir(tmp_path / "best")) == ["card", "weights"]
    monkeypatch.undo()
    files.share_equal_files(tmp_path / "model", tmp_path / "best")
    assert (tmp_path / "best/weights").samefile(tmp_path / "model/weights")
    assert (tmp_path / "best/card").read_text() == "best"
    assert sorted(os.listdir(tmp_path / "best")) == ["card", "weights"]


def reverse_kl(folder, teacher, contexts):
    """Return the mean KL(student‖teacher) on responses, from plain transformers and full logits."""
    nets = [AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (folder, teacher)]
    total = count = 0
    for row in contexts:
        parts = []
        for net, prompt in zip(nets, (row["student_prompt"], row["teacher_prompt"]), strict=True):
            with torch.no_grad():
                logits = net(torch.tensor([prompt + row["ids"]])).logits[0, len(prompt) - 1 : -1]
            parts.append(logits.double().log_softmax(-1))
        total += (parts[0].exp() * (parts[0] - parts[1])).sum().item()
        count += len(row["ids"])
    return total / count


def test_a_model_saved_in_bfloat16_reports_what_the_rounding_costs(pair, questions, tmp_path):
    out = tmp_path / "run"
    document, err = run(pair, questions, out, "--save-dtype", "bfloat16", "--dtype", "float32")
    saved = load_file(out / "model/model.safetensors")
    trained = load_file(out / "checkpoints/step-00000006/student.safetensors")
    assert saved and all(torch.equal(t, trained[n].bfloat16()) for n, t in saved.items())
    assert json.loads((out / "model/config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(out / "model").dtype == torch.bfloat16
    contexts = json.loads((out / "before.json").read_text())["rollouts"]
    expected = reverse_kl(out / "model", pair[1], contexts)
    before, after = document["kl_before"]["value"], document["kl_after"]["value"]
    rounding = document["rounding"]
    assert rounding["kl"] == pytest.approx(expected, abs=1e-5)
    assert rounding["kl"] != after
    assert rounding["kept"] == pytest.approx((before - expected) / (before - after), abs=1e-3)
    assert "of the KL gain is kept" in err
    assert json.loads((out / "run.json").read_text())["result"]["rounding"] == rounding


def test_updates_that_the_rounding_loses_are_warned_of(pair, questions, tmp_path):
    """At a small rate, most updates are below half a unit in the last place of bfloat16."""
    rate = ("--lr", "1e-6", "--dtype", "float32", "--save-dtype", "bfloat16")
    document, err = run(pair, questions, tmp_path / "run", *rate)
    assert document["kl_after"]["value"] < document["kl_before"]["value"]
    assert document["rounding"]["kept"] < 0.5
    assert "warning: model/ in bfloat16" in err and "--save-dtype float32" in err


def test_a_merged_adapter_is_rounded_once(pair, questions, tmp_path):
    out = tmp_path / "run"
    lora = ("--lora", 4, "--lora-merge", "--save-dtype", "bfloat16", "--dtype", "float32")
    run(pair, questions, out, *lora)
    adapter = load_file(out / "adapter/adapter_model.safetensors")
    base = AutoModelForCausalLM.from_pretrained(pair[0]).state_dict()
    merged = load_file(out / "model/model.safetensors")
    scale = json.loads((out / "adapter/adapter_config.json").read_text())
    for name, weight in merged.items():
        expected = base[name].float()
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if f"{key}A.weight" in adapter:
            delta = adapter[f"{key}B.weight"] @ adapter[f"{key}A.weight"]
            expected = expected + delta * (scale["lora_alpha"] / scale["r"])
        assert torch.equal(weight, expected.bfloat16()), name


def test_an_adapter_alone_is_not_rounded(pair, questions, tmp_path):
    more = ("--lora", 4, "--save-dtype", "bfloat16")
    code, _, err = invoke(*flags(pair, questions, tmp_path / "run"), *more)
    assert code == 2 and "--save-dtype bfloat16 with --lora" in err and "--lora-merge" in err
