"""Tests of presets.

A table of each preset's schema becomes the expected prompt, reference and answer format. Flags
override presets. Locations and misspelled names are tested as well.
"""

import csv
import json
from dataclasses import replace

import pytest

from prefix_distill.errors import UserError
from prefix_distill.prompts import answers
from prefix_distill.prompts.load import load_evaluation_prompts, load_prompts
from prefix_distill.prompts.presets import BOXED, LETTER, PRESETS
from prefix_distill.prompts.row_format import RowFormat

WRAPPED = (
    "Solve the following math problem step by step. The last line of your response should be of "
    "the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
    'What is 6·7?\n\nRemember to put your answer on its own line after "Answer:".'
)
# preset: (a row of the hub's data set, the user's turn without the instruction, final answer, text
# of a few-shot example)
SCHEMAS = {
    "gsm8k": (
        {"question": "6 times 7?", "answer": "It is 6*7=<<6*7=42>>42.\n#### 42"},
        "6 times 7?",
        "42",
        "It is 6*7=42.\n\n\\boxed{42}",
    ),
    "math": (
        {
            "problem": "Half of 3?",
            "level": "Level 1",
            "type": "Prealgebra",
            "solution": "It is $\\boxed{\\frac{3}{2}}$.",
        },
        "Half of 3?",
        "\\frac{3}{2}",
        "It is $\\boxed{\\frac{3}{2}}$.",
    ),
    "math-500": (
        {
            "problem": "Half of 3?",
            "solution": "$\\boxed{\\frac32}$",
            "answer": "\\frac{3}{2}",
            "subject": "Algebra",
            "level": 1,
            "unique_id": "u",
        },
        "Half of 3?",
        "\\frac{3}{2}",
        "$\\boxed{\\frac32}$",
    ),
    "aime24": (
        {
            "id": 60,
            "problem": "p?",
            "solution": "So 204.",
            "answer": "204",
            "url": "u",
            "year": "2024",
        },
        "p?",
        "204",
        "So 204.\n\n\\boxed{204}",
    ),
    "aime25": ({"id": "0", "problem": "p?", "answer": "70"}, "p?", "70", "\\boxed{70}"),
    "mmlu-pro": (
        {
            "question_id": 1,
            "question": "Which? ",
            "options": ["first", "second", "third"],
            "answer": "C",
            "answer_index": 2,
            "cot_content": "A: It is the third. The answer is (C).",
            "category": "law",
            "src": "s",
        },
        "Which?\n\nA. first\nB. second\nC. third",
        "C",
        "A: It is the third. The answer is (C).\n\n\\boxed{C}",
    ),
    "deepmath-103k": (
        {
            "question": "q?",
            "final_answer": "\\pi",
            "difficulty": 5.0,
            "topic": "t",
            "r1_solution_1": "Long.",
            "r1_solution_2": "x",
            "r1_solution_3": "y",
        },
        "q?",
        "\\pi",
        "Long.\n\n\\boxed{\\pi}",
    ),
    "openthoughts3": (
        {
            "difficulty": 8,
            "source": "s",
            "domain": "math",
            "conversations": [
                {"from": "human", "value": "2+2?"},
                {"from": "gpt", "value": "<think>…</think> \\boxed{4}"},
            ],
        },
        "2+2?",
        "4",
        "<think>…</think> \\boxed{4}",
    ),
    "dapo-math-17k": (
        {
            "prompt": WRAPPED,
            "solution": "42",
            "data_source": "math_dapo",
            "source_prompt": [{"role": "user", "content": WRAPPED}],
            "ability": "MATH",
            "reward_model": {"ground_truth": "42", "style": "rule"},
            "extra_info": {"index": "i"},
        },
        "What is 6·7?",
        "42",
        "\\boxed{42}",
    ),
}
WRONG = [f"Incorrect Answer {i}" for i in (1, 2, 3)]


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def table(folder, name, rows=None):
    return f"{name}={write(folder / 'rows.jsonl', rows or [SCHEMAS[name][0]])}"


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_row_of_each_preset_becomes_the_expected_prompt(name, tmp_path):
    """Check the prompt, the reference and that answers in the preset's format are graded."""
    _, question, final, example = SCHEMAS[name]
    found = load_prompts(table(tmp_path, name), RowFormat(keep_solutions=True))
    [prompt] = found.prompts
    instruction = {"mmlu-pro": LETTER, "openthoughts3": None}.get(name, BOXED)
    assert prompt.messages == (
        {"role": "user", "content": question + (f"\n\n{instruction}" if instruction else "")},
    )
    assert answers.extract_reference(prompt.answer) == final
    form = found.answer_format or "auto"
    assert answers.is_correct(f"I think so. \\boxed{{{final}}}", prompt.answer, form)
    assert not answers.is_correct(
        "I think so. \\boxed{B}", prompt.answer, form
    ) and not answers.is_correct("No idea", prompt.answer, form)
    assert prompt.worked_solution == example and answers.is_correct(
        prompt.worked_solution, prompt.answer, form
    )
    [note] = found.notes
    assert all(
        text in note
        for text in (
            PRESETS[name].license,
            PRESETS[name].note,
            PRESETS[name].answer_format,
            repr(instruction or "none"),
        )
    )


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_case_of_column_names_does_not_matter(name, tmp_path):
    row = {column.title(): value for column, value in SCHEMAS[name][0].items()}
    given = load_prompts(table(tmp_path, name), RowFormat(keep_solutions=True)).prompts
    capitals = load_prompts(table(tmp_path, name, [row]), RowFormat(keep_solutions=True)).prompts
    assert capitals == given


def test_every_preset_has_a_schema_here():
    assert {*SCHEMAS, "gpqa"} == set(PRESETS)


def test_options_of_gpqa_are_shuffled_by_seed(tmp_path):
    rows = [
        {
            "Question": f"q{i}",
            "Correct Answer": f"right{i}",
            **{column: f"wrong{i}{column[-1]}" for column in WRONG},
            "Explanation": "Because.",
            "Subdomain": "x",
        }
        for i in range(60)
    ]
    with open(tmp_path / "gpqa.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    found = [
        load_prompts(f"gpqa={tmp_path / 'gpqa.csv'}", RowFormat(seed=seed, keep_solutions=True))
        for seed in (0, 0, 1)
    ]
    assert (
        found[0].prompts == found[1].prompts != found[2].prompts
        and found[0].answer_format == "choice"
    )
    for i, prompt in enumerate(found[0].prompts):
        question, options, instruction = prompt.messages[0]["content"].split("\n\n")
        lines = options.split("\n")
        assert (question, instruction) == (f"q{i}", LETTER)
        assert [line[:3] for line in lines] == ["A. ", "B. ", "C. ", "D. "]
        assert {line[3:] for line in lines} == {f"right{i}", *(f"wrong{i}{k}" for k in "123")}
        assert lines["ABCD".index(prompt.answer)] == f"{prompt.answer}. right{i}"
        assert prompt.worked_solution == f"Because.\n\n\\boxed{{{prompt.answer}}}"
    counts = [[p.answer for p in found[0].prompts].count(letter) for letter in "ABCD"]
    assert (
        min(counts) >= 6 and sum(counts) == 60
    )  # uniform letters fall below 6 with probability 0.2%
    some = load_prompts(f"gpqa={tmp_path / 'gpqa.csv'}#10").prompts
    assert all(
        p.messages == found[0].prompts[p.index].messages for p in some
    )  # the order of a row's options does not depend on other rows


def test_given_settings_override_the_preset(tmp_path):
    given = table(
        tmp_path, "gsm8k", [{"question": "not this", "q": "this", "answer": "#### 1", "gold": "2"}]
    )
    row_format = RowFormat(prompt_column="q", answer_column="gold", instruction="Be brief.")
    found = load_prompts(given, row_format)
    assert (found.prompts[0].messages[0]["content"], found.prompts[0].answer) == (
        "this\n\nBe brief.",
        "2",
    )
    [bare] = load_prompts(given, RowFormat(instruction="")).prompts
    assert bare.messages[0]["content"] == "not this"
    assert (
        "prompt in column q; answer in column gold" in found.notes[0]
        and "'Be brief.'" in found.notes[0]
    )


def test_a_conversation_without_a_boxed_answer_has_no_reference(tmp_path):
    row = {
        "conversations": [
            {"from": "human", "value": "Write code."},
            {"from": "gpt", "value": "print(42)"},
        ]
    }
    [prompt] = load_prompts(
        table(tmp_path, "openthoughts3", [row]), RowFormat(keep_solutions=True)
    ).prompts
    assert prompt.answer is None and prompt.worked_solution == "print(42)"


def test_dapo_in_its_published_format(tmp_path):
    row = {
        "prompt": [{"role": "user", "content": WRAPPED}],
        "reward_model": {"ground_truth": "42", "style": "rule"},
    }
    [prompt] = load_prompts(table(tmp_path, "dapo-math-17k", [row])).prompts
    assert prompt.messages[0]["content"] == f"What is 6·7?\n\n{BOXED}" and prompt.answer == "42"


def test_a_local_copy_of_the_hub_repository(tmp_path):
    """A folder has the splits and configurations of the hub; the datasets library loads them."""
    for config in ("main", "socratic"):
        (tmp_path / config).mkdir()
        for split in ("train", "test"):
            write(
                tmp_path / config / f"{split}.jsonl",
                [{"question": f"{config} {split}", "answer": "#### 1"}],
            )
    (tmp_path / "README.md").write_text(
        "---\nlicense: mit\nconfigs:\n"
        + "".join(
            f"- config_name: {config}\n  data_files:\n"
            + "".join(
                f"  - split: {split}\n    path: {config}/{split}.jsonl\n"
                for split in ("train", "test")
            )
            for config in ("socratic", "main")
        )
        + "---\n"
    )
    name = f"GSM8K={tmp_path}"
    train, test = {"test": (name, "test")}, {"examples": (name, "train")}
    bare = RowFormat(instruction="")
    for found, text, other_splits in (
        (load_prompts(name, bare), "main train", train),
        (load_evaluation_prompts(name, bare), "main test", test),
        (load_prompts(name, bare, split="test"), "main test", test),
        (load_prompts(name, replace(bare, streaming=True)), "main train", train),
    ):
        assert [p.messages[0]["content"] for p in found.prompts] == [
            text
        ] and found.other_splits == other_splits
    with pytest.raises(
        UserError, match="expected the split validation, got the splits test, train"
    ):
        load_prompts(name, split="validation")


def test_evaluation_rows_are_spread_over_a_sorted_set(tmp_path):
    rows = [SCHEMAS["mmlu-pro"][0] | {"question": f"q{i}"} for i in range(10)]
    name = table(tmp_path, "mmlu-pro", rows)
    found = load_evaluation_prompts(name, limit=4)
    assert [p.index for p in found.prompts] == [0, 2, 5, 7]
    streamed = load_evaluation_prompts(name, RowFormat(streaming=True), limit=4)
    assert [p.index for p in streamed.prompts] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "text, letter",
    [
        (r"\boxed{C}", "C"),
        (r"\boxed{(C)}", "C"),
        (r"\boxed{\text{C}}", "C"),
        (r"\boxed{\textbf{(C)}}", "C"),
        (r"\boxed{C. 42 m}", "C"),
        ("The answer is (C).", "C"),
        ("Answer: C", "C"),
        ("**Answer:** C", "C"),
        ("the answer is B. No, the answer is C", "C"),
        (r"\boxed{B} The answer is C", "B"),
        (r"\boxed{C_6H_6}", None),
        ("The answer is Cold", None),
        ("The answer is a good one", None),
        ("C", None),
    ],
)
def test_extraction_of_answer_letters(text, letter):
    assert answers.extract_answer(text, "choice") == letter
    assert answers.is_correct(text, "C", "choice") is (letter == "C")


@pytest.mark.parametrize(
    "name, message",
    [
        ("gms8k", "neither a file nor a preset; did you mean gsm8k?"),
        ("AIME2024", "did you mean aime24?"),
        ("gms8k=x.jsonl", "did you mean gsm8k?"),
        ("gsm8k=", "expected PRESET=LOCATION such as gsm8k=my.jsonl"),
        ("gsm8k=lab:choice", "expected PRESET=LOCATION"),
        ("mine=x.jsonl", "presets are gsm8k, math, math-500"),
        ("gsm8k=nowhere.jsonl", "dataset nowhere.jsonl: no such file"),
        ("gsm8k#0", "expected a number of rows after #, such as gsm8k#1000, got '0'"),
        ("gsm8k#many", "got 'many'"),
        ("#5", "expected a number of rows"),
        ("gsm8k#" + "9" * 5000, "expected a number of rows"),
        ("gsm8k", "openai/gsm8k cannot be loaded from the hub"),
    ],
)
def test_invalid_names_are_refused(name, message, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "datasets.config.HF_DATASETS_CACHE", tmp_path
    )  # the user's cache may contain it
    with pytest.raises(UserError, match="dataset") as error:
        load_prompts(name)
    assert (
        message in str(error.value)
        and "\n" not in str(error.value)
        and len(str(error.value)) < 1000
    )


@pytest.mark.parametrize(
    "name, row, message",
    [
        (
            "mmlu-pro",
            {"question": "q", "options": "A, B", "answer": "A"},
            "row 0 needs 2 to 26 text options in 'options', got 'A, B'",
        ),
        ("mmlu-pro", {"question": "q", "options": ["one"], "answer": "A"}, "row 0 needs 2 to 26"),
        (
            "gpqa",
            {"Question": "q", "Correct Answer": "a"},
            "row 0 needs 2 to 26 text options in 'Incorrect Answer 1, Incorrect Answer 2",
        ),
        (
            "gsm8k",
            {"problem": "q", "answer": "a"},
            "no column 'question'; it has problem, answer; change --prompt-column",
        ),
        (
            "gsm8k",
            {"question": "q", "solution": "a"},
            "no column 'answer'; it has question, solution; change --answer-column",
        ),
    ],
)
def test_tables_of_another_schema_are_refused(name, row, message, tmp_path):
    with pytest.raises(UserError) as error:
        load_prompts(f"{name}={write(tmp_path / 'rows.jsonl', [row])}")
    assert message in str(error.value)
