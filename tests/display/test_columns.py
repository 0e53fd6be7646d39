"""Test that the live line fits its width, and what it leaves out first."""

from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from prefix_distill.display.columns import Column, fit_columns


def column(rank, *texts):
    return Column(texts=texts, rank=rank)


texts = st.text(alphabet="ab 12×·漢", min_size=1, max_size=30)
columns = st.lists(
    st.builds(Column, texts=st.tuples(texts), rank=st.integers(0, 12)), min_size=1, max_size=9
)


@given(columns, st.integers(2, 220))
def test_a_line_never_exceeds_its_width(columns, width):
    assert cell_len(fit_columns(columns, width)) <= width


@given(columns)
def test_a_wide_line_shows_every_column_in_its_order(columns):
    expected = " · ".join(c.texts[0] for c in columns)
    assert fit_columns(columns, 1000) == expected


def test_the_highest_rank_is_left_out_first():
    line = [column(0, "8/100"), column(2, "second"), column(1, "first")]
    assert fit_columns(line, 22) == "8/100 · second · first"
    assert fit_columns(line, 21) == "8/100 · first"
    assert fit_columns(line, 12) == "8/100"
    assert fit_columns(line, 4) == "8…"


def test_a_name_that_is_too_long_is_cut_and_leaves_room_for_the_time():
    line = [column(0, "contacting the hub for organization/model"), column(1, "28 s")]
    assert fit_columns(line, 39) == "contacting the hub for org… · 28 s"


def test_columns_come_before_longer_texts_and_these_before_extra_columns():
    line = [column(0, "evaluating (40 s)", "evaluating"), column(5, "acc"), column(12, "bar")]
    assert fit_columns(line, 16) == "evaluating · acc"
    assert fit_columns(line, 23) == "evaluating (40 s) · acc"
    assert fit_columns(line, 29) == "evaluating (40 s) · acc · bar"
