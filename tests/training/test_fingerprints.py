"""Test that a resumed run refuses other prompts, models and tokenizers than those it began with."""

import json
import shutil

import pytest
import torch
from helpers import flags, invoke, last_json, prepared, save_tiny
from safetensors.torch import load_file, save_file

from prefix_distill.engine.fingerprint import digest_weights
from prefix_distill.training.fingerprints import (
    KEY,
    describe_differences,
    digest_prompts,
    take_fingerprints,
)
from prefix_distill.training.folder import RunFolder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Return a folder with two models, their data, and runs that stop after two steps.

    ``run`` trains all weights, ``lora`` an adapter.
    """
    root = tmp_path_factory.mktemp("stopped")
    save_tiny(root / "student", seed=1)
    save_tiny(root / "teacher", seed=2)
    rows = [{"question": f"{i}+{i * i}?", "answer": f"#### {i + i * i}"} for i in range(40)]
    (root / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, more in (("run", []), ("lora", ["--lora", "2"])):
        code, _, err = invoke(*short(root, name), *more)
        assert code == 0, err
    return root


def short(root, name):
    names = (str(root / "student"), str(root / "teacher")), root / "sums.jsonl", root / name
    return [*flags(*names), "--steps", "2", "--eval-every", "0"]


@pytest.fixture
def copied(stopped, tmp_path, monkeypatch):
    """Return a copy of the folder, whose models and data the runs name by their new path."""
    shutil.copytree(stopped, tmp_path / "copy")
    for name in ("run", "lora"):
        file = tmp_path / "copy" / name / "config.yaml"
        file.write_text(file.read_text().replace(str(stopped), str(tmp_path / "copy")))
    return tmp_path / "copy"


def resume(folder, name, *more):
    return invoke("run", "--resume", "--out", folder / name, "--steps", "3", *more)


def change_tensor(folder, name):
    """Change one element of one tensor of a model's file."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[name].view(-1)[3] += 2**-7
    save_file(tensors, file, {"format": "pt"})


def change_data(copied):
    lines = (copied / "sums.jsonl").read_text().splitlines(keepends=True)
    lines[3:4] = [json.dumps({"question": "another question?", "answer": "#### 1"}) + "\n"]
    (copied / "sums.jsonl").write_text("".join(lines))


def append_data(copied):
    with open(copied / "sums.jsonl", "a") as file:
        file.write(json.dumps({"question": "one more?", "answer": "#### 1"}) + "\n")


def change_answer(copied):
    file = copied / "sums.jsonl"
    file.write_text(file.read_text().replace("#### ", "#### 1"))


def change_teacher(copied):
    change_tensor(copied / "teacher", "model.norm.weight")


def change_student(copied):
    change_tensor(copied / "student", "model.layers.1.mlp.up_proj.weight")


def change_config(copied):
    file = copied / "teacher/config.json"
    document = json.loads(file.read_text())
    document["rms_norm_eps"] = 1e-3
    file.write_text(json.dumps(document))


def change_template(copied):
    for file in (copied / "teacher").glob("chat_template.jinja"):
        file.write_text(file.read_text().replace("<a>", "<a>\n"))


def change_tokenizer(copied):
    """Swap the ids of two tokens that no prompt contains."""
    for role in ("student", "teacher"):
        file = copied / role / "tokenizer.json"
        document = json.loads(file.read_text())
        vocabulary = document["model"]["vocab"]
        vocabulary["Q"], vocabulary["Z"] = vocabulary["Z"], vocabulary["Q"]
        file.write_text(json.dumps(document))


CHANGES = {
    change_data: "training prompts",
    append_data: "training prompts",
    change_answer: "held-out prompts",
    change_teacher: "the teacher's weights",
    change_student: "the student's weights",
    change_config: "the teacher's config",
    change_template: "training prompts",
    change_tokenizer: "the student's tokenizer",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_is_refused_in_one_line(copied, change):
    change(copied)
    before = {f: f.read_bytes() for f in (copied / "run").rglob("*") if f.is_file()}
    code, out, err = resume(copied, "run")
    last = err.splitlines()[-1]
    assert code == 2 and out == "" and last.startswith("error: --resume"), err
    assert CHANGES[change] in last and "differ" in last and "--allow-changed" in last
    dry_code, out, dry_err = resume(copied, "run", "--dry-run")
    assert (dry_code, out, dry_err.splitlines()[-1]) == (2, "", last)
    assert before == {f: f.read_bytes() for f in (copied / "run").rglob("*") if f.is_file()}


def test_a_dry_run_of_a_resume_reads_the_checkpoint_and_writes_nothing(copied):
    change_teacher(copied)
    before = {f: f.read_bytes() for f in (copied / "run").rglob("*") if f.is_file()}
    code, out, err = resume(copied, "run", "--dry-run", "--allow-changed")
    assert code == 0 and last_json(out)["dry_run"], err
    notes = " ".join(err.split())
    assert "--allow-changed: the teacher's weights differ" in notes
    assert "a resume continues after step 2" in notes
    assert before == {f: f.read_bytes() for f in (copied / "run").rglob("*") if f.is_file()}
    for state in (copied / "run/checkpoints").glob("*/state.json"):
        state.write_text("{}")
    dry = resume(copied, "run", "--dry-run", "--allow-changed")
    code, out, err = resume(copied, "run", "--allow-changed")
    assert dry[0] == code == 2 and "no intact checkpoint" in err.splitlines()[-1], dry
    assert dry[2].splitlines()[-1] == err.splitlines()[-1]


def test_an_accepted_change_needs_a_run_to_resume(tmp_path):
    code, out, err = invoke("run", "--allow-changed", "--out", tmp_path / "run")
    assert (code, out) == (2, "") and "--allow-changed: expected with --resume" in err
    assert not (tmp_path / "run").exists()


def test_an_accepted_change_is_reported_and_recorded(copied):
    change_teacher(copied)
    code, out, err = resume(copied, "run", "--allow-changed")
    assert code == 0 and last_json(out)["steps"] == 3, err
    assert "--allow-changed: the teacher's weights differ from those that this run began with" in (
        " ".join(err.split())
    )
    document = json.loads((copied / "run/run.json").read_text())
    assert len(document[KEY]["earlier"]) == 1
    assert "allow_changed" not in (copied / "run/config.yaml").read_text()
    # the record is now that of the changed teacher, and the permission is not kept
    code, _, err = invoke("run", "--resume", "--out", copied / "run", "--steps", "4")
    assert code == 0, err
    change_student(copied)
    code, _, err = invoke("run", "--resume", "--out", copied / "run", "--steps", "5")
    assert code == 2 and "the student's weights" in err.splitlines()[-1]


def test_another_base_of_an_adapter_is_refused(copied):
    change_student(copied)
    code, _, err = resume(copied, "lora")
    assert code == 2 and "the student's weights" in err.splitlines()[-1], err


def test_the_checkpoint_of_an_adapter_is_not_exported_with_another_base(copied):
    out = copied / "exported"
    code, _, err = invoke("export", copied / "lora", "--which", "2", "--out", out)
    assert code == 0, err
    change_student(copied)
    again = copied / "again"
    code, _, err = invoke("export", copied / "lora", "--which", "2", "--out", again)
    last = err.splitlines()[-1]
    assert code == 2 and "the student's weights" in last and not again.exists(), err


def test_an_older_run_folder_resumes_with_a_note_and_is_recorded(copied):
    file = copied / "run/run.json"
    document = json.loads(file.read_text())
    del document[KEY]
    file.write_text(json.dumps(document))
    code, _, err = resume(copied, "run")
    assert code == 0 and "no fingerprints" in err, err
    change_teacher(copied)
    code, _, err = invoke("run", "--resume", "--out", copied / "run", "--steps", "4")
    assert code == 2 and "the teacher's weights" in err.splitlines()[-1]


@pytest.mark.parametrize("damage", [[], {"student": 1}, "text"])
def test_damaged_fingerprints_are_those_of_an_older_folder(copied, damage):
    file = copied / "run/run.json"
    document = json.loads(file.read_text())
    file.write_text(json.dumps(document | {KEY: damage}))
    code, _, err = resume(copied, "run")
    assert code == 0 and "no fingerprints" in err, err


def test_what_may_change_on_resume_does_not_change_a_fingerprint(copied):
    code, _, err = resume(copied, "run", "--dtype", "bfloat16", "--lr", "1e-4")
    assert code == 0, err
    code, _, err = invoke(
        "run", "--resume", "--out", copied / "run", "--steps", "4", "--dtype", "float32"
    )
    assert code == 0, err
    change_teacher(copied)
    code, _, err = invoke(
        "run", "--resume", "--out", copied / "run", "--steps", "5", "--dtype", "bfloat16"
    )
    assert code == 2 and "the teacher's weights" in err.splitlines()[-1], err


def test_a_change_of_prompts_is_seen_at_any_number_of_steps(pair, questions):
    run = prepared(pair, questions, train__steps=60)
    prompts = run.problems.train
    stored = digest_prompts(prompts)
    assert 2 <= len(stored["digests"]) <= 129
    for count in (1, 5, 36):
        fewer = prompts[:count]
        assert not describe_differences(
            {"training prompts": stored}, {}, {"training prompts": fewer}
        )
        changed = [*fewer[:-1], prompts[count - 2]]
        assert describe_differences({"training prompts": stored}, {}, {"training prompts": changed})
    many = digest_prompts(prompts * 12)
    assert not describe_differences(
        {"training prompts": many}, {}, {"training prompts": prompts[:3]}
    )
    short = digest_prompts(prompts[:10])
    assert not describe_differences({"training prompts": short}, {}, {"training prompts": prompts})
    changed = [prompts[1], *prompts[1:]]
    assert describe_differences({"training prompts": short}, {}, {"training prompts": changed})


def test_every_change_of_one_tensor_changes_the_digest():
    """Change one bit, swap two elements, swap two rows, and swap two tensors of one shape."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 7), torch.nn.Linear(7, 7))
    net.register_buffer("correction", torch.arange(3))
    net.register_buffer("table", torch.arange(3), persistent=False)
    found = digest_weights(net)
    assert set(found) == {"float32", "bfloat16"}
    with torch.no_grad():
        net.table += 1
        assert digest_weights(net) == found
        net.correction[1] += 1
        assert differs(digest_weights(net), found, ["float32", "bfloat16"])
        net.correction[1] -= 1
        weight = net[1].weight
        plain = weight.clone()
        bits = weight.view(torch.int32)
        bits[2, 3] ^= 1
        assert differs(digest_weights(net), found, ["float32"])
        weight.copy_(plain[[1, 0, 2, 3, 4, 5, 6]])
        assert differs(digest_weights(net), found, ["float32", "bfloat16"])
        weight.copy_(plain)
        weight[0, :2] = plain[0, :2].flip(0)
        assert differs(digest_weights(net), found, ["float32", "bfloat16"])
        weight.copy_(plain)
        assert digest_weights(net) == found
        net[1], net[2] = net[2], net[1]
        assert differs(digest_weights(net), found, ["float32", "bfloat16"])


def differs(one, other, keys) -> bool:
    return [key for key in one if one[key] != other[key]] == keys


def test_the_digest_does_not_depend_on_dtype_adapter_or_name(pair, questions):
    plain = take_fingerprints(prepared(pair, questions))
    adapted = take_fingerprints(prepared(pair, questions, adapter__rank=2))
    half = take_fingerprints(prepared(pair, questions, runtime__dtype="bfloat16"))
    assert plain["student"] == adapted["student"]
    assert plain["teacher"]["weights"]["bfloat16"] == half["teacher"]["weights"]["bfloat16"]
    assert "float32" not in half["teacher"]["weights"]


def test_a_teacher_that_is_spread_has_the_fingerprint_of_a_whole_one(pair, questions):
    pytest.importorskip("accelerate")
    whole = take_fingerprints(prepared(pair, questions))
    spread = take_fingerprints(
        prepared(
            pair,
            questions,
            runtime__teacher_device="auto",
            runtime__teacher_memory=60_000 / 2**30,
        )
    )
    assert spread["teacher"] == whole["teacher"]


def test_a_new_folder_has_its_fingerprints_before_its_config(stopped):
    document = RunFolder(stopped / "run").read_json("run.json")
    assert {"student", "teacher", "training prompts", "held-out prompts"} <= set(document[KEY])
    assert str(stopped) not in json.dumps(document[KEY])
