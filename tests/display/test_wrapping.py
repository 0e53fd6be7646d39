"""Test that lines break between words, and that a terminal cuts none of them."""

import io
import itertools
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from prefix_distill.display.wrapping import fit_text, wrap_words

if os.name != "nt":
    from terminals import watch_code

words = st.lists(st.text(alphabet="ab1,·漢", min_size=1, max_size=18), min_size=1, max_size=30)


@given(words, st.integers(40, 120), st.integers(0, 12))
def test_a_line_breaks_only_between_words_and_fits(words, width, margin):
    lines = wrap_words(" ".join(words), width, start="", margin=margin)
    assert " ".join(lines).split() == words
    for line in lines:
        assert cell_len(line) <= width or len(line.split()) == 1
    for line, following in itertools.pairwise(lines):
        assert cell_len(line) + 1 + cell_len(following.split()[0]) > width


def test_a_path_is_never_cut():
    path = "runs/" + "long-name/" * 20
    assert path in wrap_words(f"model: {path} is missing", 40, start="", margin=2)[1]


def test_text_that_no_terminal_gets_is_not_changed():
    text = "  several   spaces, and a line that no terminal has room for " * 9 + "\nend"
    assert fit_text(text, io.StringIO()) == text


NOTES = """
from prefix_distill.cli.app import Terminal, report_failure
from prefix_distill.display import Display, Outline
text = "the dataset has no reference answer for some of its problems; name one in the column answer"
step = {"step": 1, "loss/reverse_kl_nats": 0.5, "rollout/prefix_tokens": 24}
step |= {"rollout/finished_share": 0.6, "time/student_decode_tokens_per_s": 12508.0}
with Terminal() as terminal:
    terminal.note(text)
    terminal.warn(text)
    shown = Display(Outline(steps=2), terminal.screen)
    shown.row(step, 1e12, 2e12)
report_failure(f"{text}; continue with prefix-distill run --resume", 2)
"""


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("columns", [40, 80, 120])
def test_a_terminal_cuts_no_word_of_notes_warnings_and_errors(columns):
    seen = watch_code(NOTES, columns)
    assert seen.code == 0, seen.last
    words = "name one in the column answer"
    assert seen.text.count(words) == 3 and "warning: the dataset" in seen.text
    assert f"error: the dataset has no reference answer for some of its problems; {words}" in (
        seen.text
    )
    assert seen.text.endswith("continue with prefix-distill run --resume")
    started = [line for line in seen.last if not line.startswith("  ")]
    assert len(started) == 3


SIZES = """
import sys
from prefix_distill.display import Summary, render_summary
text = "many words " * 30
print(render_summary(Summary(title=text, rows={"row": text}), sys.stderr), file=sys.stderr)
"""


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("columns", [60, 90])
def test_a_summary_has_the_width_of_its_own_stream(columns):
    """stdout is a pipe here, and its width is not that of the terminal."""
    seen = watch_code(SIZES, columns)
    assert columns - 10 < max(map(len, seen.last)) <= columns
    assert all(line.split()[0] in ("many", "words", "row") for line in seen.last)
