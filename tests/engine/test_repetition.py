"""Test the measure of repetition, and where a loop at the end of an answer begins."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefix_distill.engine.repetition import LOOP, ROUNDS, find_loop, repeats

TEXT = tuple(range(1000, 1600))
LINE = tuple(range(11, 19))
ids = st.lists(st.integers(0, 2), max_size=120)


def by_the_definition(ids):
    """Try every period and compare token by token."""
    for period in range(1, len(ids) // ROUNDS + 1):
        start = len(ids) - period
        while start > 0 and ids[start - 1] == ids[start - 1 + period]:
            start -= 1
        if len(ids) - start >= max(LOOP, ROUNDS * period):
            return start
    return None


@given(ids, st.lists(st.integers(0, 2), min_size=1, max_size=6), st.integers(0, 40))
def test_the_loop_is_found_by_its_definition(start, unit, rounds):
    text = [*start, *unit * rounds]
    assert find_loop(text) == by_the_definition(text)


@pytest.mark.parametrize("cut", [0, 3])
def test_a_loop_after_a_long_text_is_found_with_its_start(cut):
    text = TEXT + LINE * 62
    text = text[: len(text) - cut]
    assert find_loop(text) == len(TEXT)
    assert repeats(text)


@pytest.mark.parametrize(
    "text",
    [
        (),
        (1,),
        TEXT,
        TEXT + (5,) * (LOOP - 1),  # a row of dashes
        TEXT + tuple(range(40)) * 2,  # two rounds: a summary that says it again
        TEXT + LINE * 62 + (3,),  # the loop has ended
    ],
)
def test_other_ends_are_no_loop(text):
    assert find_loop(text) is None


def test_many_repeated_grams_count_without_a_loop():
    counted = [token for i in range(30) for token in (*range(15), 100 + i)]
    assert find_loop(counted) is None and repeats(counted)
    assert repeats((1, 2, 3) * 10) and repeats((7,) * 20)
    assert not repeats(tuple(range(30))) and not repeats((1, 2, 3))
    assert not repeats(tuple(range(20)) + tuple(range(10)))
