"""Test that arbitrary configs, datasets and answers give a value or a one-line error in time."""

import json
import signal
import subprocess
import sys
import threading
import time

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefix_distill import config
from prefix_distill.errors import UserError
from prefix_distill.maths.schedule import parse_prefix
from prefix_distill.prompts import expressions
from prefix_distill.prompts.answers import extract_answer, extract_reference, is_correct
from prefix_distill.prompts.expressions import SECONDS
from prefix_distill.prompts.load import load_prompts
from prefix_distill.prompts.row_format import RowFormat

PLAIN = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.just(10**400),
        st.floats(),
        st.text(max_size=8),
        st.dates(),
        st.binary(max_size=4),
    ),
    lambda inside: st.one_of(
        st.lists(inside, max_size=3),
        st.dictionaries(st.one_of(st.text(max_size=5), st.integers()), inside, max_size=3),
    ),
    max_leaves=8,
)
SECTIONS = sorted({path.split(".")[0] for path in config.options()})
KEYS = sorted({path.split(".")[1] for path in config.options()})
LATEX = st.lists(
    st.sampled_from(
        [
            *"0123456789+-*/^_=(){}[]<>!,.%$ xyz\\\n",
            "\\frac",
            "\\boxed{",
            "\\sqrt",
            "####",
            "\\begin{matrix}",
            "\\end{matrix}",
            "&",
            "\\text{",
            "\\pi",
            "\\infty",
            "\\left(",
            "\\cup",
            "\\int",
            "\\sum_{k=1}^{n}",
            "^{",
            "}",
            "1e9",
            "²",
            "٣",
            "\x00",
            "\ud800",
        ]
    ),
    max_size=30,
).map("".join)


def quick(count):
    return settings(
        max_examples=count,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )


def one_line(error: UserError) -> None:
    """Check that a message names its cause in several words; ``main`` prints it on one line."""
    assert len(str(error).split()) > 3 and (": " in str(error) or "unknown setting" in str(error))


def loads(file) -> None:
    try:
        found = config.build(config.read_yaml(str(file)))
    except UserError as error:
        one_line(error)
    else:
        assert isinstance(found, config.Config)


@given(
    text=st.one_of(
        st.text(max_size=60),
        st.text("train:{}[]&*<!|>-? \n\t'\"#%@`,0x1e9.~", max_size=40).map(lambda t: "train: " + t),
    )
)
@quick(250)
def test_any_text_gives_a_config_or_a_one_line_error(text, tmp_path):
    (tmp_path / "c.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    loads(tmp_path / "c.yaml")


@given(content=st.binary(max_size=60))
@quick(60)
def test_any_bytes_give_a_config_or_a_one_line_error(content, tmp_path):
    (tmp_path / "c.yaml").write_bytes(content)
    loads(tmp_path / "c.yaml")


@given(
    tree=st.dictionaries(
        st.one_of(st.sampled_from(SECTIONS), st.text(max_size=3)),
        st.one_of(PLAIN, st.dictionaries(st.sampled_from(KEYS), PLAIN, max_size=3)),
        max_size=3,
    )
)
@quick(200)
def test_any_tree_gives_a_config_or_a_one_line_error(tree, tmp_path):
    (tmp_path / "c.yaml").write_text(
        yaml.dump(tree, allow_unicode=True), encoding="utf-8", errors="surrogatepass"
    )
    loads(tmp_path / "c.yaml")


@given(path=st.sampled_from(sorted(config.options())), value=PLAIN)
@quick(300)
def test_any_value_of_any_key_is_accepted_or_gives_a_one_line_error(path, value):
    try:
        config.build({path: value})
    except UserError as error:
        one_line(error)


@given(
    text=st.one_of(
        st.text(max_size=20),
        st.lists(
            st.sampled_from(
                [
                    "linear",
                    "staircase",
                    "auto",
                    "full",
                    ":",
                    "%",
                    "0",
                    "1",
                    "25",
                    "-",
                    "+",
                    ".",
                    " ",
                    "9" * 30,
                    "٣",
                    "e",
                ]
            ),
            max_size=8,
        ).map("".join),
    ),
    limit=st.integers(1, 4096),
    step=st.integers(0, 10**9),
)
@quick(500)
def test_any_prefix_gives_lengths_in_range_or_a_one_line_error(text, limit, step):
    try:
        schedule = parse_prefix(text, limit)
    except UserError as error:
        one_line(error)
    else:
        assert 1 <= schedule.length(0) <= schedule.length(step) <= limit


def reads(file, **columns) -> None:
    try:
        found = load_prompts(str(file), RowFormat(**columns))
    except UserError as error:
        one_line(error)
    else:
        assert found.prompts
        for prompt in found.prompts:
            assert prompt.messages[-1]["content"].strip() and all(
                isinstance(m["content"], str) for m in prompt.messages
            )
            assert prompt.answer is None or isinstance(prompt.answer, str)
            f"{prompt}".encode()


CELL = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.lists(
        st.dictionaries(
            st.sampled_from(["role", "content"]),
            st.one_of(st.none(), st.integers(), st.sampled_from(["user", "assistant", "", "a"])),
            max_size=2,
        ),
        max_size=3,
    ),
)
ROWS = st.lists(
    st.dictionaries(st.sampled_from(["question", "messages", "answer", "x", ""]), CELL, max_size=3),
    max_size=4,
)


@given(
    rows=ROWS,
    suffix=st.sampled_from([".jsonl", ".json"]),
    column=st.sampled_from([None, "x", "x.y", "", ".", "messages"]),
)
@quick(300)
def test_any_json_rows_give_prompts_or_a_one_line_error(rows, suffix, column, tmp_path):
    import json

    text = (
        json.dumps(rows) if suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    )
    (tmp_path / f"d{suffix}").write_text(text)
    reads(tmp_path / f"d{suffix}", prompt_column=column)


@given(
    text=st.one_of(
        st.text(max_size=60),
        st.text('question,answer\n\r";a1', max_size=30).map(lambda t: "question,answer\n" + t),
        st.text('{"question":[] a1.\n\\}', max_size=30).map(lambda t: '{"question": "a"}\n' + t),
    ),
    suffix=st.sampled_from([".jsonl", ".json", ".csv"]),
)
@quick(300)
def test_any_text_gives_prompts_or_a_one_line_error(text, suffix, tmp_path):
    (tmp_path / f"d{suffix}").write_bytes(text.encode("utf-8", "surrogatepass"))
    reads(tmp_path / f"d{suffix}")


@given(
    content=st.binary(max_size=40),
    suffix=st.sampled_from([".jsonl", ".json", ".csv", ".jsonl.gz", ".csv.gz"]),
)
@quick(150)
def test_any_bytes_give_prompts_or_a_one_line_error(content, suffix, tmp_path):
    (tmp_path / f"d{suffix}").write_bytes(content)
    reads(tmp_path / f"d{suffix}")


@given(
    response=st.text(max_size=40),
    gold=st.text(max_size=20),
    form=st.sampled_from(["auto", "boxed", "hash", "last-number", "exact"]),
)
@quick(150)
def test_any_response_is_graded_right_or_wrong(response, gold, form):
    assert is_correct(response, gold, form) in (True, False)


@given(response=LATEX, gold=LATEX)
@quick(60)
def test_any_latex_is_graded_within_the_time_limit(response, gold):
    start = time.monotonic()
    assert is_correct(f"\\boxed{{{response}}}", gold) in (True, False)
    assert (
        time.monotonic() - start < SECONDS + 20
    )  # plus the start of a new worker on a busy machine


@pytest.mark.parametrize(
    "text",
    [
        "9^{9^{9^{9}}}",
        "9**9**9**9",
        "((10!)!)!",
        r"\binom{10^{9}}{10^{8}}",
        "{" * 900 + "1" + "}" * 900,
    ],
    ids=lambda text: text[:12],
)
def test_an_answer_that_exceeds_the_time_limit_is_graded_wrong(text, monkeypatch):
    monkeypatch.setattr(expressions, "SECONDS", 1)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGALRM)]
    signal.setitimer(signal.ITIMER_REAL, 3600)
    start = time.monotonic()
    try:
        assert not is_correct(f"#### {text}", "3")
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 3000  # the caller's alarm is unchanged
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    assert time.monotonic() - start < 20
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGALRM)]
    monkeypatch.setattr(expressions, "SECONDS", 30)
    assert is_correct("#### x+7", "7+x")  # a new worker grades this answer


@pytest.mark.parametrize(
    "text",
    [
        "{" * 10_000 + "1" + "}" * 10_000,
        r"\frac{1}{" * 10_000 + "1" + "}" * 10_000,
        r"\sqrt{" * 10_000,
        "(" * 10_000 + "1" + ")" * 10_000,
        r"\begin{pmatrix}" + r"\\".join(["&".join("1" * 300)] * 300) + r"\end{pmatrix}",
        "1+" * 500_000 + "1",
        "x" * 10**6,
        "9" * 10**6,
        "\\boxed{" * 100_000,
        "####" * 250_000,
        "-$" * 500_000,
        "1," * 500_000,
        "\\boxed{" + "{" * 10**6,
        "#### " + " " * 10**6,
    ],
    ids=lambda text: text[:12],
)
@pytest.mark.parametrize("form", ["#### %s", "\\boxed{%s}"])
def test_a_very_long_answer_is_graded_wrong_at_once(text, form):
    start = time.monotonic()
    assert not is_correct(form % text, "3")
    assert isinstance(extract_answer(form % text) or extract_reference(form % text), str)
    assert time.monotonic() - start < 10


def test_numbers_of_any_length_are_compared():
    digits = "1" * 100_000
    assert (
        is_correct(f"#### 00{digits}", digits)
        and not is_correct(f"#### {digits}2", digits)
        and is_correct("#### 000", "0")
    )


def test_answers_are_compared_in_any_thread():
    found = []
    threads = [
        threading.Thread(target=lambda i=i: found.append(is_correct(rf"\boxed{{x+{i}}}", f"{i}+x")))
        for i in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 3


def test_a_killed_grading_worker_is_replaced():
    assert is_correct("#### x+1000", "1000+x")
    expressions._worker[0].kill()
    expressions._worker[0].wait()
    assert is_correct("#### x+1001", "1001+x")


def test_a_grading_worker_enforces_its_own_time_limit():
    """The main process may be killed, so the worker enforces its own time limit."""
    worker = subprocess.Popen(
        [sys.executable, "-P", expressions.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    with worker:
        for row in (["x+1", "1+x", 30], ["((10!)!)!", "3", 1]):
            worker.stdin.write(json.dumps(row).encode() + b"\n")
        worker.stdin.flush()
        try:
            assert worker.wait(timeout=60) == 1
        finally:
            worker.kill()
        assert worker.stdout.read().split() == [b"ready", b"True"]
