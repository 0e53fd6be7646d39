"""Prompt sets: every format, every usual column, each model's own template, and which prompt comes when."""

import csv
import gzip
import json

import pytest
import torch

from prefix_distill import data, models
from prefix_distill.config import build
from prefix_distill.errors import UserError

ROWS = [{"question": f"{i}+1?", "answer": str(i + 1)} for i in range(6)]


def write(folder, suffix, rows=ROWS):
    file = folder / f"set{suffix}"
    if suffix == ".jsonl":
        file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    elif suffix == ".jsonl.gz":
        with gzip.open(file, "wt") as handle:
            handle.write("".join(json.dumps(r) + "\n" for r in rows))
    elif suffix == ".json":
        file.write_text(json.dumps(rows))
    elif suffix == ".csv":
        with open(file, "w", newline="") as handle:
            writer = csv.DictWriter(handle, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        from datasets import Dataset

        Dataset.from_list(rows).to_parquet(file)
    return str(file)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet"])
def test_every_format_reads_the_same(tmp_path, suffix):
    found = data.load(write(tmp_path, suffix), split="train")
    assert [(p.index, p.messages[-1]["content"], p.answer) for p in found.prompts] == [
        (i, f"{i}+1?", str(i + 1)) for i in range(6)]
    assert found.answered


@pytest.mark.parametrize("row, prompt, answer", [
    ({"prompt": "a", "solution": "b"}, "a", "b"),
    ({"problem": "a"}, "a", None),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "a", "b"),
    ({"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}], "answer": 3}, "a", "3"),
    ({"instruction": "a", "final_answer": 2.5}, "a", "2.5"),
])
def test_usual_columns(tmp_path, row, prompt, answer):
    (found,) = data.load(write(tmp_path, ".jsonl", [row]), split="train").prompts
    assert found.messages[-1] == {"role": "user", "content": prompt} and found.answer == answer


def test_given_columns_reach_into_records_and_text_is_added(tmp_path):
    file = write(tmp_path, ".jsonl", [{"doc": {"q": "a", "gold": "b"}, "question": "not this"}])
    (found,) = data.load(file, split="train", prompt_column="doc.q", answer_column="doc.gold", system="s",
                         instruction="think").prompts
    assert [m["content"] for m in found.messages] == ["s", "a\n\nthink"] and found.answer == "b"


def test_nothing_is_left_in_the_cache(tmp_path, monkeypatch):
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    data.load(write(tmp_path, ".jsonl"), split="train")
    assert not list((tmp_path / "scratch").iterdir())


@pytest.mark.parametrize("rows, message", [
    ([{"question": "  "}], "row 0 has no prompt text"),
    ([{"question": None, "x": 1}], "row 0 has no prompt text"),
    ([{"words": "a"}], "no prompt column"),
])
def test_bad_rows(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        data.load(write(tmp_path, ".jsonl", rows), split="train")


@pytest.fixture(scope="module")
def student(pair):
    return models.load(pair[0], device=torch.device("cpu"), dtype=torch.float32)


def test_templates(student):
    prompt = data.Prompt(0, ({"role": "user", "content": "hi"},), None)
    chat, plain = (student.tokenizer.decode(data.render(student, prompt.messages, t)) for t in ("auto", "plain"))
    assert (chat, plain) == ("<u>hi<a>", "hi")


def test_long_prompts_are_dropped_and_counted_never_cut(student):
    prompts = [data.Prompt(i, ({"role": "user", "content": "x" * n},), None) for i, n in enumerate([3, 50, 8, 9])]
    config = build({"data.max_prompt_tokens": 10})
    kept, dropped = data.render_all(prompts, student, student, config)
    assert [len(r.student_ids) for r in kept] == [5, 10] and dropped == 2
    with pytest.raises(UserError, match="all 1 prompts are longer"):
        data.render_all(prompts[1:2], student, student, config)


def test_every_epoch_is_a_permutation_and_steps_are_arithmetic():
    stream = [data.batch(list(range(7)), step, 3, seed=0) for step in range(14)]
    flat = [p for batch in stream for p in batch]
    epochs = [flat[i : i + 7] for i in range(0, 42, 7)]
    assert all(sorted(e) == list(range(7)) for e in epochs) and len({tuple(e) for e in epochs}) == 6
    assert data.batch(list(range(7)), 9, 3, seed=0) == stream[9]
    assert data.batch(list(range(7)), 9, 3, seed=1) != stream[9]


def test_held_out_rows_are_disjoint_from_training(tmp_path):
    whole = data.load(write(tmp_path, ".jsonl"), split="train")
    taught, held = data.hold_out(whole, 2, seed=0)
    assert len(held.prompts) == 2 and {p.index for p in taught.prompts} | {p.index for p in held.prompts} == set(range(6))
    assert len(taught.prompts) == 4
