"""Test that every version resumes the run folders of older versions, or refuses them.

Version 0.1.0 wrote tests/format-1. To write such a folder for the next format:

    PYTHONPATH=tests python tests/training/test_format.py FOLDER

It holds two tiny models, their data, and an interrupted run with every kind of state: TIP, EffOPD,
an automatic prefix and a best student. expected.json holds the metrics of the last two steps.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import yaml
from helpers import TESTS, invoke, last_json, save_tiny

FOLDER = TESTS / "format-1"
FLAGS = [
    "--student",
    "student",
    "--teacher",
    "teacher",
    "--dataset",
    "sums.jsonl",
    "--steps",
    "6",
    "--prefix",
    "auto:6:3",
    "--max-new-tokens",
    "16",
    "--batch-size",
    "2",
    "--samples",
    "2",
    "--micro-batch-size",
    "3",
    "--problems",
    "2",
    "--kl-prompts",
    "2",
    "--eval-every",
    "2",
    "--save-every",
    "3",
    "--select",
    "soft-or",
    "--extrapolate",
    "effopd",
    "--extrapolate-score",
    "heldout-kl",
    "--extrapolate-problems",
    "2",
    "--lr",
    "1e-3",
    "--device",
    "cpu",
    "--dtype",
    "float32",
    "--out",
    "run",
]


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write(folder: Path) -> None:
    from prefix_distill.display import Display

    folder.mkdir()
    os.chdir(folder)
    save_tiny("student", seed=1, width=8, layers=1)
    save_tiny("teacher", seed=2, width=8, layers=1)
    Path("sums.jsonl").write_text(
        "".join(
            json.dumps({"question": f"{i}+{i * i}?", "answer": f"#### {i + i * i}"}) + "\n"
            for i in range(20)
        )
    )
    code, _, err = invoke("run", *FLAGS)
    assert code == 0, err
    Path("expected.json").write_text(
        json.dumps(
            [
                {k: v for k, v in row.items() if not k.startswith("time/")}
                for row in rows(Path("run"))[4:]
            ]
        )
    )
    shutil.rmtree("run")
    plain = Display.row

    def row(self, row, *rest):
        plain(self, row, *rest)
        if row["step"] == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    Display.row = row
    code, _, err = invoke("run", *FLAGS)
    assert code == 143, err


@pytest.fixture
def copied(tmp_path, monkeypatch):
    shutil.copytree(FOLDER, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def test_a_committed_folder_resumes(copied):
    before = rows(copied / "run")
    code, out, err = invoke("run", "--resume", "--out", "run")
    assert code == 0 and last_json(out)["resumed_from"] == 4, err
    found = rows(copied / "run")
    assert found[:4] == before and [row["step"] for row in found] == [1, 2, 3, 4, 5, 6]
    for row, wanted in zip(
        found[4:], json.loads((copied / "expected.json").read_text()), strict=True
    ):
        for key, value in wanted.items():
            # another machine may round differently
            assert row[key] == pytest.approx(value, rel=1e-3), key
    assert (
        last_json(out)["best"]["step"] in (0, 2, 4, 6)
        and (copied / "run/model/model.safetensors").exists()
    )


def test_a_moved_folder_resumes_and_does_not_contain_its_old_path(copied, monkeypatch):
    (copied / "elsewhere").mkdir()
    (copied / "run").rename(copied / "elsewhere/moved")
    code, out, err = invoke("run", "--resume", "--out", "elsewhere/moved", "--steps", "7")
    assert (
        code == 0 and last_json(out)["out"] == "elsewhere/moved" and last_json(out)["steps"] == 7
    ), err
    assert not (copied / "run").exists()
    for file in (copied / "elsewhere/moved").rglob("*.*"):
        if file.suffix in (".json", ".jsonl", ".yaml"):
            text = file.read_text()
            assert str(copied) not in text and "elsewhere" not in text, file
    assert (
        "out"
        not in yaml.safe_load((copied / "elsewhere/moved/config.yaml").read_text())["checkpoint"]
    )
    code, out, err = invoke("report", "elsewhere/moved", "--out", "report")
    assert code == 0 and last_json(out)["runs"] == 1, err


@pytest.mark.parametrize(
    "where, message",
    [
        (
            "run.json",
            "run folder run: format 2, this version reads 1; continue with the version that wrote "
            "it (run.json names it)",
        ),
        (
            "checkpoints/step-00000004/state.json",
            "format 2, this version reads 1; resume with the version that wrote it",
        ),
    ],
)
def test_an_unknown_format_is_refused_and_not_changed(copied, where, message):
    document = json.loads((copied / "run" / where).read_text())
    (copied / "run" / where).write_text(json.dumps(document | {"format": 2}))
    before = {file: file.read_bytes() for file in (copied / "run").rglob("*") if file.is_file()}
    code, out, err = invoke("run", "--resume", "--out", "run")
    assert code == 2 and out == "" and message in err.splitlines()[-1], err
    assert before == {
        file: file.read_bytes() for file in (copied / "run").rglob("*") if file.is_file()
    }


if __name__ == "__main__":
    write(Path(sys.argv[1]).absolute())
