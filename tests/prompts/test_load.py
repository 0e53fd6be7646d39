"""Tests of prompt sets: file formats, usual columns, chat templates, mixtures and order."""

import csv
import gzip
import itertools
import json
import re
from fractions import Fraction

import pytest
import torch
from helpers import byte_tokenizer, invoke, last_json

from prefix_distill.config import build, options
from prefix_distill.engine import loading
from prefix_distill.errors import UserError
from prefix_distill.prompts import sources, templates
from prefix_distill.prompts import stream as prompt_stream
from prefix_distill.prompts.load import load_evaluation_prompts, load_prompts
from prefix_distill.prompts.prompt import Prompt, PromptSet
from prefix_distill.prompts.row_format import RowFormat
from prefix_distill.prompts.rows import BUFFER
from prefix_distill.prompts.stream import (
    assign_slots,
    count_slots,
    hold_out,
    insert_turns,
    join_sets,
    mix,
    take_examples,
)
from prefix_distill.training import prepare as preflight

ROWS = [{"question": f"{i}+1?", "answer": str(i + 1)} for i in range(6)]
STREAMING = RowFormat(streaming=True)


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
    found = load_prompts(write(tmp_path, suffix), split="train")
    assert [(p.index, p.messages[-1]["content"], p.answer) for p in found.prompts] == [
        (i, f"{i}+1?", str(i + 1)) for i in range(6)
    ]
    assert all(p.answer is not None for p in found.prompts)


@pytest.mark.parametrize(
    "row, prompt, answer",
    [
        ({"prompt": "a", "solution": "b"}, "a", "b"),
        ({"problem": "a"}, "a", None),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            "a",
            "b",
        ),
        (
            {
                "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}],
                "answer": 3,
            },
            "a",
            "3",
        ),
        (
            {"messages": [{"role": "u", "from": "human", "value": "a"}]},
            "a",
            None,
        ),
        ({"instruction": "a", "final_answer": 2.5}, "a", "2.5"),
    ],
)
def test_usual_columns(tmp_path, row, prompt, answer):
    (found,) = load_prompts(write(tmp_path, ".jsonl", [row]), split="train").prompts
    assert found.messages[-1] == {"role": "user", "content": prompt} and found.answer == answer


def test_given_columns_may_be_nested_and_texts_are_added(tmp_path):
    file = write(tmp_path, ".jsonl", [{"doc": {"q": "a", "gold": "b"}, "question": "not this"}])
    row_format = RowFormat(
        prompt_column="doc.q", answer_column="doc.gold", system="s", instruction="think"
    )
    (found,) = load_prompts(file, row_format).prompts
    assert [m["content"] for m in found.messages] == ["s", "a\n\nthink"] and found.answer == "b"


def test_the_given_system_message_replaces_that_of_a_row(tmp_path):
    own = [{"role": "system", "content": "of the row"}, {"role": "user", "content": "q"}]
    rows = [{"messages": own}, {"messages": own[1:]}]
    found = load_prompts(write(tmp_path, ".jsonl", rows), RowFormat(system="given"))
    for prompt in found.prompts:
        assert [m["content"] for m in prompt.messages] == ["given", "q"]
    assert any("--system replaces the system turn in 1 of 2 rows" in note for note in found.notes)


def test_tools_of_a_row_are_read_from_a_list_or_its_json_text(tmp_path):
    tool = {"type": "function", "function": {"name": "add"}}
    question = {"question": "a"}
    rows = [question | {"tools": t} for t in ([tool], json.dumps([tool]), None, "", [])]
    found = load_prompts(write(tmp_path, ".jsonl", rows)).prompts
    assert [prompt.tools for prompt in found] == [(tool,), (tool,), (), (), ()]
    with pytest.raises(UserError, match="row 1 has no list of tools in 'tools'"):
        load_prompts(write(tmp_path, ".jsonl", [question | {"tools": t} for t in ([], "a text")]))
    # a column of that name that holds something else from the start is left out, and listed
    other = load_prompts(write(tmp_path, ".jsonl", [question | {"tools": ["calculator"]}]))
    assert other.prompts[0].tools == () and "not used: tools" in other.notes[0]


def test_loading_leaves_no_temporary_files(tmp_path, monkeypatch):
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    load_prompts(write(tmp_path, ".jsonl"), split="train")
    assert not list((tmp_path / "scratch").iterdir())


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"question": "  "}], "row 0 has no prompt text"),
        ([{"question": None, "x": 1}], "row 0 has no prompt text"),
        ([{"words": "a"}], "no prompt column"),
    ],
)
def test_bad_rows(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        load_prompts(write(tmp_path, ".jsonl", rows), split="train")


@pytest.fixture(scope="module")
def student(pair):
    return loading.load_model(pair[0], device=torch.device("cpu"), dtype=torch.float32)


def test_templates(student):
    prompt = Prompt(index=0, messages=({"role": "user", "content": "hi"},), answer=None)
    chat, plain = (
        student.tokenizer.decode(templates.render(student, prompt, t)) for t in ("auto", "plain")
    )
    assert (chat, plain) == ("<u>hi<a>", "hi")


def test_long_prompts_are_dropped_and_counted_and_never_truncated(student):
    prompts = [
        Prompt(index=i, messages=({"role": "user", "content": "x" * n},), answer=None)
        for i, n in enumerate([3, 50, 8, 9])
    ]
    config = build({"data.max_prompt_tokens": 10})
    kept, dropped = templates.render_all(prompts, student, student, config)
    assert [len(r.student_ids) for r in kept] == [5, 10] and dropped == 2
    kept, dropped = templates.render_all(prompts[1:2], student, student, config)
    with pytest.raises(UserError, match=r"^dataset x\.jsonl: all 1 prompts are longer"):
        templates.check_kept("x.jsonl", kept, dropped, config=config)


def test_every_epoch_is_a_permutation_and_any_step_is_computed_alone():
    stream = [prompt_stream.prompts_of_step(list(range(7)), step, 3, seed=0) for step in range(14)]
    flat = [p for batch in stream for p in batch]
    epochs = [flat[i : i + 7] for i in range(0, 42, 7)]
    assert all(sorted(e) == list(range(7)) for e in epochs) and len({tuple(e) for e in epochs}) == 6
    assert prompt_stream.prompts_of_step(list(range(7)), 9, 3, seed=0) == stream[9]
    assert prompt_stream.prompts_of_step(list(range(7)), 9, 3, seed=1) != stream[9]


def test_held_out_rows_are_disjoint_from_training(tmp_path):
    whole = load_prompts(write(tmp_path, ".jsonl"), split="train")
    taught, held = hold_out(whole, 2, seed=0)
    assert len(held.prompts) == 2 and {p.index for p in taught.prompts} | {
        p.index for p in held.prompts
    } == set(range(6))
    assert len(taught.prompts) == 4


def lines(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def questions_of(prompts):
    return [p.messages[-1]["content"] for p in prompts]


@pytest.mark.parametrize(
    "text, found",
    [
        ("gsm8k", [("gsm8k", 1)]),
        ("lab:choice:20-25", [("lab:choice:20-25", 1)]),
        ("C:\\x.jsonl", [("C:\\x.jsonl", 1)]),
        ("a/b", [("a/b", 1)]),
        ("gsm8k:3,extra.jsonl:1", [("gsm8k", 3), ("extra.jsonl", 1)]),
        ("lab:choice:20-25:2, C:\\x.jsonl", [("lab:choice:20-25", 2), ("C:\\x.jsonl", 1)]),
        (
            "gsm8k=C:\\x.jsonl#10:0.5,org/name:1.5",
            [("gsm8k=C:\\x.jsonl#10", Fraction(1, 2)), ("org/name", Fraction(3, 2))],
        ),
    ],
)
def test_names_and_weights(text, found):
    assert sources.split_sources(text) == found


@pytest.mark.parametrize("text", ["a,", ",", "a:0,b", "a,,b", "a:1,:2"])
def test_invalid_weights_are_refused(text):
    with pytest.raises(UserError, match="expected datasets with weights above 0, such as"):
        sources.split_sources(text)


def test_an_existing_file_takes_precedence_over_the_source_syntax(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a:2,b.jsonl", "x=y.jsonl", "gsm8k=z.jsonl"):
        lines(tmp_path / name, ROWS)
        [(found, weight)] = sources.split_sources(name)
        assert len(load_prompts(found).prompts) == 6 and weight == 1
    lines(tmp_path / "a.jsonl#3", ROWS)
    with pytest.raises(UserError, match=r"expected one of \.jsonl"):
        load_prompts("a.jsonl#3")


def test_a_number_of_rows_is_sampled_by_seed(tmp_path):
    file = lines(tmp_path / "x.jsonl", [{"question": f"q{i}"} for i in range(50)])
    some = [
        [p.index for p in load_prompts(f"{file}#20", RowFormat(seed=seed)).prompts]
        for seed in (0, 0, 1)
    ]
    assert some[0] == some[1] != some[2] and all(
        len(set(rows)) == 20 and rows == sorted(rows) for rows in some
    )
    assert [p.index for p in load_evaluation_prompts(f"{file}#20", limit=5).prompts] == some[0][:5]
    assert load_prompts(f"{file}#20", RowFormat(seed=3)).notes[1:] == (
        f"dataset {file}#20: 20 of 50 rows, sampled with --seed 3",
    )
    assert questions_of(load_prompts(f"{file}#50").prompts) == [f"q{i}" for i in range(50)]
    assert (
        len(load_prompts("lab:choice#7").prompts)
        == len(load_prompts("lab:choice:20-25#7", split="test").prompts)
        == 7
    )
    for streaming in (False, True):
        with pytest.raises(UserError, match="expected at least 51 rows, got 50"):
            load_prompts(f"{file}#51", RowFormat(streaming=streaming))


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".csv", ".parquet"])
def test_streaming_shuffles_the_rows_of_the_file(tmp_path, suffix):
    file = write(tmp_path, suffix, [{"question": f"q{i}", "answer": str(i)} for i in range(40)])
    orders = [
        [
            (p.index, *questions_of([p]), p.answer)
            for p in load_prompts(file, RowFormat(streaming=True, seed=seed)).prompts
        ]
        for seed in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(row[1:] for row in orders[0]) == sorted(
        (f"q{i}", str(i)) for i in range(40)
    ) and [row[0] for row in orders[0]] == list(range(40))
    first = load_evaluation_prompts(file, STREAMING, limit=5).prompts
    assert (
        questions_of(first)
        == questions_of(load_evaluation_prompts(file, limit=5).prompts)
        == [f"q{i}" for i in range(5)]
    )
    assert len({*questions_of(load_prompts(f"{file}#6", STREAMING).prompts)}) == 6


def test_a_stream_is_read_lazily(tmp_path):
    """A damaged line beyond the buffer raises only when the stream reaches it."""
    file = tmp_path / "x.jsonl"
    lines(file, [{"question": f"q{i}"} for i in range(BUFFER + 100)])
    with open(file, "a") as handle:
        handle.write('{"ques\n')
    stream = load_prompts(str(file), STREAMING).prompts
    taken = list(itertools.islice(stream, 90))
    assert len({p.messages[0]["content"] for p in taken}) == 90
    with pytest.raises(UserError, match=f"not readable as jsonl .line {BUFFER + 101}"):
        list(stream)
    with pytest.raises(UserError, match="not readable as jsonl"):
        load_prompts(str(file))


def test_columns_of_a_stream_are_the_union_over_its_first_rows(tmp_path):
    file = lines(
        tmp_path / "x.jsonl",
        [{"question": f"q{i}"} | ({"answer": str(i)} if i == 7 else {}) for i in range(9)],
    )
    for seed in range(3):
        found = load_prompts(file, RowFormat(streaming=True, seed=seed)).prompts
        assert {(p.messages[0]["content"], p.answer) for p in found} == {
            (f"q{i}", "7" if i == 7 else None) for i in range(9)
        }


def test_files_that_cannot_be_streamed_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"--streaming cannot read a \.json file"):
        load_prompts(write(tmp_path, ".json"), STREAMING)
    for name, content, message in (
        ("none.csv", b"question\n", "it has no rows"),
        ("torn.parquet", b"PAR1xxxxPAR1", "not readable as parquet"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            load_prompts(str(tmp_path / name), STREAMING)


def test_template_and_instruction_around_the_problem(tmp_path):
    file = lines(tmp_path / "x.jsonl", [{"question": "a {b}?", "doc": {"level": 3}, "why": "so"}])

    def load(template):
        row_format = RowFormat(
            prompt_template=template,
            instruction="Box it.",
            system="s",
            privileged_column="why",
        )
        return load_prompts(file, row_format).prompts[0]

    prompt = load("L{doc.level} {{x}} \\boxed{} Q: {prompt} A:")
    assert [m["content"] for m in prompt.messages] == [
        "s",
        "L3 {x} \\boxed{} Q: a {b}?\n\nBox it. A:",
    ]
    *_, shown = templates.teacher_messages(prompt, "P {problem} S {solution} E")
    assert shown["content"] == "L3 {x} \\boxed{} Q: P a {b}? S so E\n\nBox it. A:"
    with pytest.raises(
        UserError, match="row 0 has no 'level' for --prompt-template; it has question, doc, why"
    ):
        load("{level} {prompt}")
    for template in ("no field", "{prompt} {prompt}"):
        with pytest.raises(UserError, match=re.escape("expected {prompt} in it once")):
            build({"data.prompt_template": template})


def test_examples_before_every_prompt_in_chat_and_in_plain_text(student, tmp_path):
    """Examples are alternating turns if there is a chat template.

    A base model without a template gets them as blocks of text.
    """
    file = lines(
        tmp_path / "x.jsonl",
        [{"question": f"q{i}?", "answer": f"#### {i}", "solution": f"since {i}"} for i in range(9)],
    )
    base = loading.load_model(student.name, device=torch.device("cpu"), dtype=torch.float32)
    base.tokenizer = byte_tokenizer()
    base.tokenizer.chat_template = None
    for template, middle, last in ((None, "\n\n", ""), ("Q: {prompt} A:", " ", " A:")):
        config = build({"data.prompt_template": template})
        row_format = RowFormat(prompt_template=template, system="s", keep_solutions=True)
        whole = load_prompts(file, row_format)
        rest, turns = take_examples(whole, 2, seed=0, evaluated=whole.prompts[:3])
        used = [int(turn["content"].removeprefix("since ")) for turn in turns[1::2]]
        assert min(used) >= 3 and [p.index for p in rest.prompts] == [
            i for i in range(9) if i not in used
        ]
        assert take_examples(whole, 2, seed=0, evaluated=whole.prompts[:3])[1] == turns
        [first, *_] = insert_turns(rest, turns).prompts
        lead = "" if template is None else "Q: "
        q = {i: f"{lead}q{i}?{last}" for i in (0, *used)}
        chat, plain = (
            model.tokenizer.decode(
                templates.render(
                    model, first, "auto", separator=templates.answer_separator(config.data)
                )
            )
            for model in (student, base)
        )
        assert chat == (
            "<u>s" + "".join(f"<u>{q[i]}<u>since {i}<e>" for i in used) + f"<u>{q[0]}<a>"
        )
        assert plain == "s\n\n" + "".join(f"{q[i]}{middle}since {i}\n\n" for i in used) + q[0]
    with pytest.raises(
        UserError,
        match=r"--few-shot 7: dataset .* has 6 rows with a solution outside the evaluation set",
    ):
        take_examples(whole, 7, seed=0, evaluated=whole.prompts[:3])
    unsolved = load_prompts(
        lines(
            tmp_path / "y.jsonl",
            [{"question": "q", "answer": None}, {"question": "r", "answer": "1"}],
        ),
        RowFormat(keep_solutions=True),
    )
    with pytest.raises(UserError, match="has 1 rows with a solution"):
        take_examples(unsolved, 2, seed=0)


WEIGHTS = [
    [Fraction(3), Fraction(1)],
    [Fraction(1)] * 3,
    [Fraction(1, 2), Fraction(3, 10), Fraction(7)],
    [Fraction(1), Fraction(999)],
]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_shares_of_the_stream_are_the_weights_at_every_length(weights):
    taken = list(itertools.islice(assign_slots(weights), 300))
    for length in range(1, 301):
        for k, weight in enumerate(weights):
            assert abs(taken[:length].count(k) - length * weight / sum(weights)) < 1
    assert count_slots(weights, 300) == [taken.count(k) for k in range(len(weights))]


def test_a_mixed_stream_keeps_the_order_of_each_set():
    parts, weights = [list("abcdefg"), list("XYZ")], WEIGHTS[0]
    stream = mix(parts, weights, 80, seed=5)
    assert stream[:30] == mix(
        parts, weights, 30, seed=5
    )  # a longer run starts with the prompts of a shorter one
    for part in parts:
        own = [item for item in stream if item in part]
        assert own == prompt_stream.prompts_of_step(part, 0, len(own), seed=5)


def test_joined_sets_contain_every_prompt_once():
    sets = [
        PromptSet(
            name=name,
            prompts=tuple(Prompt(index=i * 2 + k, messages=(), answer=None) for i in range(n)),
            answer_format=form,
            max_new_tokens=9,
        )
        for k, (name, n, form) in enumerate([("a", 6, "hash"), ("b", 2, None)])
    ]
    found = join_sets(sets, [Fraction(1), Fraction(1)])
    assert [p.index for p in found.prompts] == [0, 1, 2, 3, 4, 6, 8, 10]
    assert (found.name, found.answer_format, found.max_new_tokens) == (
        "a, b",
        None,
        9,
    ) and join_sets(sets[:1], [Fraction(1)]) is sets[0]


def rows_of(folder):
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith("time/")}
        for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


@pytest.fixture
def mixture(pair, tmp_path):
    gsm8k = lines(
        tmp_path / "g.jsonl",
        [{"question": f"{i}+1?", "answer": f"{i} and 1.\n#### {i + 1}"} for i in range(20)],
    )
    more = lines(
        tmp_path / "m.jsonl",
        [
            {"problem": "x" * 300 if i == 5 else f"{i}-1?", "solution": str(i - 1)}
            for i in range(30)
        ],
    )
    return {
        "--student": pair[0],
        "--teacher": pair[1],
        "--dataset": f"gsm8k={gsm8k}#18:3,{more}:1",
        "--eval-dataset": f"{more}#3",
        "--problems": "2",
        "--kl-prompts": "2",
        "--prefix": "3",
        "--max-new-tokens": "4",
        "--batch-size": "4",
        "--samples": "1",
        "--device": "cpu",
        "--instruction": "",
        "--lr-schedule": "constant",
        "--few-shot": "1",
        "--max-prompt-tokens": "200",
        "--answer-format": "hash",
        "--tail-every": "0",
    }


@pytest.mark.parametrize("streaming", [False, True])
def test_a_longer_run_begins_with_the_prompts_of_a_shorter_one(mixture, streaming):
    paths = {field.metadata["flag"]: path for path, field in options().items()}
    values = {
        paths[flag]: int(value) if value.isdecimal() and flag != "--prefix" else value
        for flag, value in mixture.items()
    }
    short, long = (
        preflight.prepare(build(values | {"data.streaming": streaming, "train.steps": steps}))
        for steps in (3, 20)
    )
    assert long.problems.train[:12] == short.problems.train and len(long.problems.train) == 80
    sets = [
        [
            "problem" if "-" in text else "question"
            for text in questions_of(r.prompt for r in run.problems.train)
        ]
        for run in (short, long)
    ]
    assert [names.count("problem") for names in sets] == [3, 20]
    prompts = [r.prompt for r in long.problems.train] + [p for p, _ in long.problems.held_out]
    [shown] = {p.messages[0]["content"] for p in prompts}
    assert shown not in questions_of(r.prompt for r in long.problems.train)


def test_a_resumed_mixed_run_equals_an_uninterrupted_one(mixture, tmp_path):
    """One step and, after a resume, two more have the metrics of three uninterrupted steps.

    The streamed rows are the same again. The notes state license, sampling and shares.
    """
    flags = [text for pair in mixture.items() for text in pair] + ["--streaming"]
    for steps, folder in (("3", "whole"), ("1", "parts")):
        code, _, err = invoke("run", *flags, "--steps", steps, "--out", tmp_path / folder)
        assert code == 0, err
    code, _, err = invoke("run", "--resume", "--steps", "3", "--out", tmp_path / "parts")
    assert code == 0, err
    assert (
        rows_of(tmp_path / "parts") == rows_of(tmp_path / "whole")
        and len(rows_of(tmp_path / "whole")) == 3
    )
    notes = "\n".join(json.loads((tmp_path / "whole/run.json").read_text())["notes"])
    for text in (
        "license: MIT; grade-school",
        "#18: 18 rows, sampled with --seed 0",
        "streamed; a buffer of 1,000 rows",
        "9 of gsm8k=",
        "(75.0%; 9 different ones)",
        "few-shot: every prompt starts with 1 solved rows of gsm8k=",
    ):
        assert text in notes


def test_dropped_prompts_are_counted_by_set(pair, tmp_path):
    files = [
        lines(
            tmp_path / f"{name}.jsonl",
            [{"question": "x" * (300 if i < dropped else 3)} for i in range(12)],
        )
        for name, dropped in (("a", 4), ("b", 7))
    ]
    code, _, err = invoke(
        "run",
        "--student",
        pair[0],
        "--teacher",
        pair[1],
        "--dataset",
        ",".join(files),
        "--eval-dataset",
        "lab:choice",
        "--problems",
        "2",
        "--max-new-tokens",
        "8",
        "--max-prompt-tokens",
        "100",
        "--steps",
        "50",
        "--dry-run",
        "--device",
        "cpu",
    )
    assert (
        code == 0
        and f"11 ({files[0]} 4, {files[1]} 7) training and 0 held-out prompts exceed" in err
    ), err


def test_eval_takes_presets_samples_and_examples(pair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gsm8k = lines(
        tmp_path / "g.jsonl",
        [{"question": f"{i}+1?", "answer": f"#### {i + 1}"} for i in range(20)],
    )
    code, out, err = invoke(
        "eval",
        "--model",
        pair[0],
        "--dataset",
        f"gsm8k={gsm8k}#5",
        "--few-shot",
        "2",
        "--instruction",
        "",
        "--max-new-tokens",
        "2",
        "--device",
        "cpu",
        "--out",
        "e.jsonl",
        "--template",
        "plain",
        "--answer-format",
        "hash",
    )
    assert (
        code == 0
        and last_json(out)["accuracy"]["n"] == 3
        and "license: MIT" in err
        and "5 of 20 rows" in err
    ), err
    records = [json.loads(line) for line in (tmp_path / "e.jsonl").read_text().splitlines()]
    assert [r["reference"] for r in records] == [f"#### {r['problem'] + 1}" for r in records]
    code, out, err = invoke(
        "eval",
        "--model",
        pair[0],
        "--dataset",
        "lab:choice",
        "--few-shot",
        "1",
        "--problems",
        "2",
        "--max-new-tokens",
        "2",
        "--device",
        "cpu",
        "--out",
        "f.jsonl",
    )
    assert (
        code == 0
        and last_json(out)["accuracy"]["n"] == 2
        and "few-shot: every prompt starts with 1 solved rows of lab:choice, split train" in err
    ), err


def test_a_preset_is_evaluated_on_its_test_split_unless_it_is_trained_on(pair, tmp_path):
    for split in ("train", "test"):
        lines(
            tmp_path / f"{split}.jsonl",
            [{"problem": f"{split} {i}", "solution": f"\\boxed{{{i}}}"} for i in range(20)],
        )
    values = {
        "models.student": pair[0],
        "models.teacher": pair[1],
        "data.dataset": f"math={tmp_path}",
        "runtime.device": "cpu",
        "data.instruction": "",
        "rollout.max_new_tokens": 8,
        "evaluate.problems": 4,
        "evaluate.kl_prompts": 1,
        "train.steps": 3,
    }

    def split_of(run):
        return [
            {text.split()[0] for text in questions_of(found)}
            for found in (
                [r.prompt for r in run.problems.train],
                [p for p, _ in run.problems.held_out],
            )
        ]

    run = preflight.prepare(build(values))
    assert (
        split_of(run) == [{"train"}, {"test"}]
        and [p.index for p, _ in run.problems.held_out] == [0, 5, 10, 15]
        and run.problems.grader.answer_format == "boxed"
    )
    run = preflight.prepare(build(values | {"data.split": "test"}))
    assert split_of(run) == [{"test"}, {"test"}] and len(run.problems.held_out) == 2
    assert not {p.index for p, _ in run.problems.held_out} & {
        r.prompt.index for r in run.problems.train
    }


@pytest.mark.parametrize("kind", ["prompt", "answer"])
def test_the_built_in_problems_have_no_other_columns(kind):
    row_format = RowFormat(**{f"{kind}_column": "nonsense"})
    message = f"expected the column {kind}, got 'nonsense'; change --{kind}-column"
    with pytest.raises(UserError, match=message):
        load_prompts("lab:choice#3", row_format)
    assert len(load_prompts("lab:choice#3", RowFormat(**{f"{kind}_column": kind})).prompts) == 3
