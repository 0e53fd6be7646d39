"""A table of data as people have it: what loads, how it is read, and what is refused how.

Every entry is one dataset of small files in the form of a public dataset or of a common tool.
"""

import gzip
import json
from pathlib import Path

import pytest
from helpers import invoke, last_json

from prefix_distill.errors import UserError
from prefix_distill.prompts.load import load_prompts
from prefix_distill.prompts.row_format import RowFormat

ASKED = {"role": "user", "content": "6·7?"}
REPLY = {"role": "assistant", "content": "It is \\boxed{42}."}
SAID = REPLY["content"]
TURNS = [ASKED, REPLY]
SHAREGPT = [{"from": "human", "value": "6·7?"}, {"from": "gpt", "value": "It is \\boxed{42}."}]
PARTS = [{"type": "text", "text": "6·7?"}]
PROSE = "Six times seven is forty-two, since seven times six is forty-two."
ROW = {"question": "6·7?", "answer": "42"}
CSV = "question,answer\n6·7?,42\n"
OPTIONS = "6·7?\n\nA. 40\nB. 42\nC. 44"


def write(folder: Path, files: dict) -> None:
    """Write files: text and bytes as they are, rows in the format of the suffix."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            from datasets import Dataset

            Dataset.from_list(content).to_parquet(path)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str):
            path.write_text(content, encoding="utf-8")
        elif path.suffix == ".json":
            path.write_text(json.dumps(content), encoding="utf-8")
        else:
            lines = "".join(json.dumps(row) + "\n" for row in content)
            path.write_text(lines, encoding="utf-8")


# name → (files, the dataset's name, the last turn or all messages, the reference, text of the note)
LOADED = {
    "jsonl": ({"x.jsonl": [ROW]}, "x.jsonl", "6·7?", "42", "prompt from question; answer from"),
    "json list": ({"x.json": [ROW]}, "x.json", "6·7?", "42", "1 of 1 references can be graded"),
    "one json object": ({"x.json": json.dumps(ROW, indent=1)}, "x.json", "6·7?", "42", ""),
    "csv": ({"x.csv": CSV}, "x.csv", "6·7?", "42", "(1 as text)"),
    "csv with a byte order mark": ({"x.csv": "\ufeff" + CSV}, "x.csv", "6·7?", "42", ""),
    "csv of Windows": ({"x.csv": CSV.replace("\n", "\r\n")}, "x.csv", "6·7?", "42", ""),
    "csv with semicolons": (
        {"x.csv": CSV.replace(",", ";")},
        "x.csv",
        "6·7?",
        "42",
        "cells separated by semicolons",
    ),
    "csv with tabs": (
        {"x.csv": CSV.replace(",", "\t")},
        "x.csv",
        "6·7?",
        "42",
        "separated by tabs",
    ),
    "tsv": ({"x.tsv": "question\tanswer\na, b;c?\t42\n"}, "x.tsv", "a, b;c?", "42", ""),
    "compressed csv": ({"x.csv.gz": gzip.compress(CSV.encode())}, "x.csv.gz", "6·7?", "42", ""),
    "spaces in the header": (
        {"x.csv": 'question , answer\n"6·7?", "42"\n'},
        "x.csv",
        "6·7?",
        "42",
        "answer from answer",
    ),
    "spaces in keys": ({"x.jsonl": [{" question ": "a", "answer ": 1}]}, "x.jsonl", "a", "1", ""),
    "a long cell": (
        {"x.csv": f"question,answer\n{'a' * 200_000},42\n"},
        "x.csv",
        "a" * 200_000,
        "42",
        "",
    ),
    "capitals": ({"x.csv": CSV.title()}, "x.csv", "6·7?", "42", "prompt from Question"),
    "parquet": ({"x.parquet": [ROW]}, "x.parquet", "6·7?", "42", ""),
    "a pattern": (
        {"d/a.parquet": [ROW], "d/b.parquet": [ROW]},
        "d/*.parquet",
        "6·7?",
        "42",
        "rows from 2 files, a.parquet to b.parquet",
    ),
    "a clone of a hub repository": (
        {
            "README.md": "---\nlicense: mit\n---\n# A dataset\n",
            "data/train-00000-of-00002.parquet": [ROW],
            "data/train-00001-of-00002.parquet": [ROW],
            "data/test-00000-of-00001.parquet": [{"question": "secret", "answer": "1"}],
        },
        "",
        "6·7?",
        "42",
        "rows from 2 files",
    ),
    "a folder of jsonl shards": (
        {"part-0.jsonl": [ROW], "part-1.jsonl": [{"question": "b", "answer": 2}]},
        "",
        "6·7?",
        "42",
        "rows from 2 files",
    ),
    "rows in a list": ({"x.json": {"data": [ROW]}}, "x.json", "6·7?", "42", "the list 'data'"),
    "rows beside a version": (
        {"x.json": {"version": "1.1", "data": [ROW]}},
        "x.json",
        "6·7?",
        "42",
        "not used beside it: version",
    ),
    "alpaca": (
        {"x.jsonl": [{"instruction": "Add.", "input": "2 and 3", "output": "5"}]},
        "x.jsonl",
        "Add.\n\n2 and 3",
        "5",
        "with the text of input after it",
    ),
    "alpaca without input": (
        {"x.json": [{"instruction": "6·7?", "input": "", "output": "42"}]},
        "x.json",
        "6·7?",
        "42",
        "",
    ),
    "dolly": (
        {"x.jsonl": [{"instruction": "Who?", "context": "It was Ada.", "response": "Ada"}]},
        "x.jsonl",
        "Who?\n\nIt was Ada.",
        "Ada",
        "",
    ),
    "squad": (
        {"x.jsonl": [{"context": "It was Ada.", "question": "Who?", "answer": "Ada"}]},
        "x.jsonl",
        "It was Ada.\n\nWho?",
        "Ada",
        "with the text of context before it",
    ),
    "orca": (
        {"x.jsonl": [{"system_prompt": "s", "question": "6·7?", "response": "42"}]},
        "x.jsonl",
        [{"role": "system", "content": "s"}, ASKED],
        "42",
        "system message from system_prompt",
    ),
    "messages": ({"x.jsonl": [{"messages": TURNS}]}, "x.jsonl", "6·7?", SAID, "boxed"),
    "messages in parquet": (
        {"x.parquet": [{"messages": TURNS}]},
        "x.parquet",
        [ASKED],
        SAID,
        "",
    ),
    "messages as JSON text": (
        {"x.csv": 'messages\n"' + json.dumps(TURNS).replace('"', '""') + '"\n'},
        "x.csv",
        [ASKED],
        SAID,
        "",
    ),
    "content parts": (
        {"x.jsonl": [{"messages": [{"role": "user", "content": PARTS}], "answer": "42"}]},
        "x.jsonl",
        [ASKED],
        "42",
        "",
    ),
    "sharegpt": (
        {"x.json": [{"conversations": SHAREGPT}]},
        "x.json",
        [ASKED],
        SAID,
        "",
    ),
    "openthoughts": (
        {"x.parquet": [{"system": "Think.", "conversations": SHAREGPT}]},
        "x.parquet",
        [{"role": "system", "content": "Think."}, ASKED],
        "It is \\boxed{42}.",
        "prompt from conversations",
    ),
    "dapo": (
        {"x.parquet": [{"prompt": [ASKED], "reward_model": {"ground_truth": "42"}}]},
        "x.parquet",
        [ASKED],
        "42",
        "answer from reward_model.ground_truth",
    ),
    "prompt and completion": (
        {"x.jsonl": [{"prompt": "6·7?", "completion": "42"}]},
        "x.jsonl",
        "6·7?",
        "42",
        "answer from completion",
    ),
    "prompt and completion as turns": (
        {"x.jsonl": [{"prompt": [ASKED], "completion": [REPLY]}]},
        "x.jsonl",
        [ASKED],
        SAID,
        "",
    ),
    "preferences with a prompt": (
        {"x.jsonl": [{"prompt": "6·7?", "chosen": "42", "rejected": "41"}]},
        "x.jsonl",
        "6·7?",
        None,
        "not used: chosen, rejected",
    ),
    "preferences as turns": (
        {"x.jsonl": [{"chosen": TURNS, "rejected": TURNS}]},
        "x.jsonl",
        [ASKED],
        SAID,
        "not used: rejected",
    ),
    "preferences as transcripts": (
        {"x.jsonl": [{"chosen": "\n\nHuman: 6·7?\n\nAssistant: 42", "rejected": "x"}]},
        "x.jsonl",
        [ASKED],
        "42",
        "",
    ),
    "text": ({"x.jsonl": [{"text": "Once"}]}, "x.jsonl", "Once", None, "no answer column"),
    "a line for each prompt": (
        {"x.txt": "6·7?\n\n  6·8?\r\n"},
        "x.txt",
        "6·7?",
        None,
        "one prompt per line",
    ),
    "compressed lines": (
        {"x.txt.gz": gzip.compress("6·7?".encode())},
        "x.txt.gz",
        "6·7?",
        None,
        "",
    ),
    "texts beside rows": (
        {"train.jsonl": [ROW], "requirements.txt": "secret"},
        "",
        "6·7?",
        "42",
        "",
    ),
    "a folder of texts": (
        {"a.txt": "6·7?", "b.txt": "6·8?"},
        "",
        "6·7?",
        None,
        "rows from 2 files",
    ),
    "inputs and targets": (
        {"x.jsonl": [{"inputs": "6·7?", "targets": "42"}]},
        "x.jsonl",
        "6·7?",
        "42",
        "",
    ),
    "olympiads": (
        {"x.jsonl": [{"problem": "p", "solution": [PROSE], "final_answer": ["5"]}]},
        "x.jsonl",
        "p",
        "5",
        "answer from final_answer",
    ),
    "options with a position": (
        {"x.jsonl": [{"question": "6·7?", "choices": ["40", "42", "44"], "answer": 1}]},
        "x.jsonl",
        OPTIONS,
        "B",
        "with the options in choices",
    ),
    "options with labels": (
        {
            "x.parquet": [
                {
                    "question": "6·7?",
                    "choices": {"text": ["40", "42", "44"], "label": ["1", "2", "3"]},
                    "answerKey": "2",
                }
            ]
        },
        "x.parquet",
        OPTIONS,
        "B",
        "answer from answerKey",
    ),
    "options by letter": (
        {
            "x.jsonl": [
                {"question": "6·7?", "options": {"A": "40", "B": "42", "C": "44"}, "answer": "42"}
            ]
        },
        "x.jsonl",
        OPTIONS,
        "B",
        "",
    ),
    "prose for a reference": (
        {"x.jsonl": [{"question": "6·7?", "answer": PROSE}]},
        "x.jsonl",
        "6·7?",
        None,
        "accuracy does not apply",
    ),
    "a blank answer": ({"x.csv": "question,answer\n6·7?, \n"}, "x.csv", "6·7?", None, "missing"),
    "pandas for nothing": ({"x.csv": "question,answer\n6·7?,NaN\n"}, "x.csv", "6·7?", None, ""),
    "a small number": (
        {"x.jsonl": '{"prompt": "a", "answer": 1e-7}'},
        "x.jsonl",
        "a",
        "0.0000001",
        "",
    ),
    "several answers": ({"x.jsonl": [ROW | {"answer": ["2", 3]}]}, "x.jsonl", "6·7?", "2, 3", ""),
    "a number of 5,000 digits": (
        {"x.jsonl": '{"prompt": "a", "answer": ' + "1" * 5000 + "}\n"},
        "x.jsonl",
        "a",
        "1" * 5000,
        "",
    ),
    "columns of no use": (
        {"x.jsonl": [ROW | {"level": 3, "id": "u"}]},
        "x.jsonl",
        "6·7?",
        "42",
        "not used: level, id",
    ),
    "an image column without images": (
        {"x.jsonl": [ROW | {"image": None}]},
        "x.jsonl",
        "6·7?",
        "42",
        "not used: image (images, video or sound)",
    ),
}

# name → (files, the dataset's name, the message)
REFUSED = {
    "prose in messages": (
        {"x.jsonl": [{"messages": "6·7?"}]},
        "x.jsonl",
        "row 0 has the text '6·7?' in 'messages', expected a list of turns",
    ),
    "turns as Python text": (
        {"x.jsonl": [{"messages": str(TURNS)}]},
        "x.jsonl",
        "row 0 has turns as text in 'messages' that are not JSON",
    ),
    "an image part": (
        {"x.jsonl": [{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}]},
        "x.jsonl",
        "row 0 has a part of type 'image_url' in turn 1, expected text parts only",
    ),
    "a row with an image": (
        {"x.jsonl": [ROW | {"image": "a.png"}]},
        "x.jsonl",
        "row 0 has an image, video or sound in 'image', but the models read text only",
    ),
    "chosen without a prompt": (
        {"x.jsonl": [{"chosen": "good", "rejected": "bad"}]},
        "x.jsonl",
        "row 0 has text in 'chosen', expected turns or a transcript",
    ),
    "a key twice": (
        {"x.jsonl": '{"prompt": "a", "prompt": "b", "answer": "1"}\n'},
        "x.jsonl",
        "line 1: an object has the key 'prompt' twice, expected distinct keys",
    ),
    "a key twice in a later line": (
        {"x.jsonl": '{"prompt": "a"}\n{"prompt": "a", "prompt": "b"}\n'},
        "x.jsonl",
        "line 2: an object has the key 'prompt' twice",
    ),
    "names that differ by spaces": (
        {"x.jsonl": [{"question": "a", "question ": "b"}]},
        "x.jsonl",
        "row 0 has the column 'question' twice, once with spaces around it",
    ),
    "not a number": (
        {"x.jsonl": '{"prompt": "a", "answer": NaN}\n'},
        "x.jsonl",
        "row 0 has nan in 'answer', which no answer can equal",
    ),
    "infinity": ({"x.jsonl": '{"prompt": "a", "answer": Infinity}\n'}, "x.jsonl", "row 0 has inf"),
    "an object for an answer": (
        {"x.jsonl": [ROW | {"answer": {"value": 42}}]},
        "x.jsonl",
        "name a field with --answer-column answer.FIELD",
    ),
    "bytes for an answer": (
        {"x.parquet": [{"prompt": "a", "answer": b"42"}]},
        "x.parquet",
        "row 0 has a value of type bytes in 'answer', expected text or a number",
    ),
    "an answer that is no option": (
        {"x.jsonl": [{"question": "6·7?", "choices": ["40", "42"], "answer": 3}]},
        "x.jsonl",
        "row 0 has the answer '3', expected one of its 2 options",
    ),
    "several lists": (
        {"x.json": {"train": [ROW], "test": [ROW]}},
        "x.json",
        "expected one list of rows, got the lists train, test",
    ),
    "UTF-16": ({"x.jsonl": json.dumps(ROW).encode("utf-16")}, "x.jsonl", "the text is UTF-16"),
    "latin-1": ({"x.csv": "question\nnaïve?\n".encode("latin-1")}, "x.csv", "expected UTF-8"),
    "a model folder": (
        {"m/config.json": {"model_type": "llama"}, "m/tokenizer.json": {"version": "1.0"}},
        "m",
        "expected a folder of data files, got the folder of a model; name a dataset",
    ),
    "an adapter folder": (
        {"m/adapter_config.json": {"peft_type": "LORA"}},
        "m",
        "got the folder of a model",
    ),
    "a run folder": (
        {"r/config.yaml": "{}", "r/run.json": {}, "r/samples.jsonl": [ROW]},
        "r",
        "got the folder of a run",
    ),
    "columns without end": (
        {"x.json": {f"column{i}": i for i in range(50)}},
        "x.json",
        "column18, column19 and 30 more; name it with --prompt-column",
    ),
    "a torn file among others": (
        {"d/a.jsonl": [ROW], "d/b.jsonl": '{"question": "a"}\n{"quest'},
        "d/*.jsonl",
        "d/*.jsonl: b.jsonl: not readable as jsonl (line 2, column 2",
    ),
    "nothing in the folder": ({"d/README.md": "x"}, "d", "expected a folder with .jsonl, .json"),
    "no such files": ({"d/a.parquet": [ROW]}, "d/*.csv", "no file matches the pattern"),
    "only a test split": (
        {"data/test-0.jsonl": [ROW]},
        "",
        "expected the split train, got the splits test; change --split",
    ),
    "several configurations": (
        {
            "README.md": "---\nconfigs:\n- config_name: a\n  data_files: a.jsonl\n"
            "- config_name: b\n  data_files: b.jsonl\n---\n",
            "a.jsonl": [ROW],
            "b.jsonl": [ROW],
        },
        "",
        "expected a folder with one configuration, got a, b",
    ),
}


@pytest.mark.parametrize("shape", LOADED)
def test_data_in_this_shape_loads(shape, tmp_path):
    files, name, prompt, reference, note = LOADED[shape]
    write(tmp_path, files)
    loaded = load_prompts(f"{tmp_path / name}")
    first = loaded.prompts[0]
    if isinstance(prompt, list):
        assert list(first.messages) == prompt
    else:
        assert first.messages[-1] == {"role": "user", "content": prompt}
    assert first.answer == reference
    assert note in " ".join(loaded.notes)
    assert "secret" not in str(loaded.prompts)


@pytest.mark.parametrize("shape", REFUSED)
def test_data_in_this_shape_is_refused(shape, tmp_path):
    files, name, message = REFUSED[shape]
    write(tmp_path, files)
    with pytest.raises(UserError) as error:
        load_prompts(f"{tmp_path / name}")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_folders_of_save_to_disk_load(tmp_path):
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_list([ROW])
    rows.save_to_disk(str(tmp_path / "one"))
    DatasetDict(train=rows, test=Dataset.from_list([ROW, ROW])).save_to_disk(str(tmp_path / "two"))
    for name, split, count in (("one", None, 1), ("two", "train", 1), ("two", "test", 2)):
        for streaming in (False, True):
            row_format = RowFormat(streaming=streaming)
            loaded = load_prompts(str(tmp_path / name), row_format, split=split)
            found = [(prompt.problem, prompt.answer) for prompt in loaded.prompts]
            assert found == [("6·7?", "42")] * count
    with pytest.raises(UserError, match="expected the split dev, got the splits test, train"):
        load_prompts(str(tmp_path / "two"), split="dev")
    [arrow] = (tmp_path / "one").glob("*.arrow")
    with pytest.raises(UserError, match="expected the folder that save_to_disk wrote"):
        load_prompts(str(arrow))


@pytest.mark.parametrize("streaming", [False, True])
def test_empty_parquet_has_no_rows(tmp_path, streaming):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(
        pyarrow.table({"prompt": pyarrow.array([], "string")}), tmp_path / "x.parquet"
    )
    with pytest.raises(UserError, match="it has no rows"):
        load_prompts(str(tmp_path / "x.parquet"), RowFormat(streaming=streaming))


STREAMED = (
    "tsv",
    "a line for each prompt",
    "csv with semicolons",
    "a pattern",
    "a folder of jsonl shards",
    "alpaca",
    "dapo",
)


@pytest.mark.parametrize("shape", STREAMED)
def test_streamed_rows_are_read_as_others(shape, tmp_path):
    files, name, prompt, reference, _ = LOADED[shape]
    files = {
        file.replace(".json", ".jsonl").replace("ll", "l"): rows for file, rows in files.items()
    }
    write(tmp_path, files)
    prompts = list(load_prompts(str(tmp_path / name), RowFormat(streaming=True)).prompts)
    found = [(prompt.messages[-1]["content"], prompt.answer) for prompt in prompts]
    assert (prompt if isinstance(prompt, str) else "6·7?", reference) in found


def test_references_of_a_stream_are_counted_in_its_first_rows(tmp_path):
    rows = [{"question": f"{i}?", "answer": str(i) if i % 2 else None} for i in range(1_200)]
    write(tmp_path, {"x.jsonl": rows})
    loaded = load_prompts(str(tmp_path / "x.jsonl"), RowFormat(streaming=True))
    assert "500 of 1,000 references can be graded (500 missing, 500 as text)" in loaded.notes[0]
    assert loaded.notes[1].endswith("its references were counted in the first 1,000 rows")
    assert loaded.account[-1].endswith("first row: user: '0?'; reference: none that can be graded")
    assert sum(prompt.answer is None for prompt in loaded.prompts) == 600


def test_one_missing_answer_leaves_the_others_graded(tmp_path):
    rows = [{"question": f"{i}?", "answer": str(i) if i else None} for i in range(10)]
    write(tmp_path, {"x.jsonl": rows})
    loaded = load_prompts(str(tmp_path / "x.jsonl"))
    assert [prompt.answer for prompt in loaded.prompts] == [None, *map(str, range(1, 10))]
    assert "9 of 10 references can be graded (9 as text, 1 missing)" in loaded.notes[0]


def test_the_account_says_what_became_of_every_column(tmp_path):
    row = {"instruction": "Add.", "input": "2 and 3", "output": "#### 5", "id": 7, "image": ""}
    write(tmp_path, {"x.jsonl": [row]})
    lines = load_prompts(str(tmp_path / "x.jsonl")).account
    for text in (
        "column instruction: prompt",
        "column input: text after the prompt",
        "column output: reference answer",
        "column id: not used",
        "column image: not used: images, video or sound",
        r"first row: user: 'Add.\n\n2 and 3'; reference: '5'",
    ):
        assert any(line.endswith(text) for line in lines), text


def test_the_account_shows_the_start_and_the_end_of_a_long_text(tmp_path):
    row = {"question": "start " + "a" * 5_000 + " end", "answer": "\\boxed{" + "1" * 400 + "}"}
    write(tmp_path, {"x.jsonl": [row]})
    line = load_prompts(str(tmp_path / "x.jsonl")).account[-1]
    assert "user: 'start aaa" in line and "aaa end'; reference: '111" in line
    assert " … 4,710 characters … " in line and " … 100 characters … " in line
    assert len(line) < 900 + len(str(tmp_path))


def test_a_prompt_template_takes_the_columns_that_it_names(tmp_path):
    row = {"instruction": "Add.", "input": "2 and 3", "output": "5"}
    write(tmp_path, {"x.jsonl": [row]})
    row_format = RowFormat(prompt_template="{input}: {prompt}")
    [prompt] = load_prompts(str(tmp_path / "x.jsonl"), row_format).prompts
    assert prompt.problem == "2 and 3: Add."


def test_prose_is_graded_where_the_whole_text_is_the_answer(tmp_path):
    write(tmp_path, {"x.jsonl": [{"question": "6·7?", "answer": PROSE}]})
    [prompt] = load_prompts(str(tmp_path / "x.jsonl"), RowFormat(answer_format="exact")).prompts
    assert prompt.answer == PROSE


def test_eval_says_once_why_it_measures_no_accuracy(pair, tmp_path):
    rows = [{"question": "6·7?", "answer": PROSE}] * 2
    write(tmp_path, {"x.jsonl": rows})
    code, out, err = invoke(
        *("eval", "--model", pair[0], "--dataset", tmp_path / "x.jsonl"),
        *("--out", tmp_path / "e.jsonl", "--max-new-tokens", "2", "--device", "cpu"),
    )
    assert code == 0 and last_json(out)["accuracy"] is None, err
    words = " ".join(err.split())
    assert "0 of 2 references can be graded (2 without a final answer)" in words
    assert words.count("accuracy does not apply") == 1 and "prose" not in words
    assert "because no problem has a reference answer that can be graded" in words
    [advice] = [line for line in err.splitlines() if line.startswith("warning: only 0% of the")]
    assert "--thinking off" in advice and "--student-thinking" not in err
    assert last_json(out)["warnings"] == [advice.removeprefix("warning: ")]


@pytest.mark.parametrize("words", [("-v", "eval"), ("eval", "--verbose"), ("eval",)])
def test_eval_counts_what_it_cannot_grade_and_lists_columns_on_request(
    words, pair, tmp_path, monkeypatch
):
    monkeypatch.setenv("PREFIX_DISTILL_VERBOSE", "")
    rows = [ROW | {"id": 1}, ROW | {"answer": None}]
    write(tmp_path, {"x.jsonl": rows})
    code, out, err = invoke(
        *words,
        *("--model", pair[0], "--dataset", tmp_path / "x.jsonl", "--out", tmp_path / "e.jsonl"),
        *("--max-new-tokens", "2", "--device", "cpu"),
    )
    assert code == 0 and last_json(out)["accuracy"]["n"] == 1, err
    assert "accuracy is measured on 1 of the 2 evaluated prompts" in err
    assert ("column id: not used" in err) is (len(words) == 2)
