"""Test the prefix length at every step, the growth of `auto`, and the off-policy rows."""

import pytest
from hypothesis import given, strategies

from prefix_distill.errors import UserError
from prefix_distill.maths.schedule import PATIENCE, OffPolicy, parse_off_policy, parse_prefix


@pytest.mark.parametrize(
    "text, lengths",
    [
        ("7", [7] * 6),
        ("25%", [25] * 6),
        ("full", [100] * 6),
        ("linear:1:30", [1, 31, 61, 91, 100, 100]),
        ("linear:10%:5%", [10, 15, 20, 25, 30, 35]),
        ("staircase:10:20:2", [10, 10, 30, 30, 50, 50]),
        ("staircase:90:20:1", [90, 100, 100, 100, 100, 100]),
        ("0.1%", [1] * 6),
    ],
)
def test_lengths_by_hand(text, lengths):
    schedule = parse_prefix(text, 100)
    assert [schedule.length(step) for step in range(6)] == lengths
    assert schedule.longest(6) == max(lengths) and schedule.observe(3, {}, 0.0, 1.0) is None


@pytest.mark.parametrize(
    "text",
    [
        "0",
        "-3",
        "101",
        "0%",
        "101%",
        "linear",
        "linear:1",
        "linear:0:5",
        "linear:1:2:3",
        "staircase:1:2",
        "staircase:1:2:0",
        "auto:5",
        "auto:0:5",
        "cosine:1:2",
        "",
        "1e3",
        "٣",
        "full:2",
    ],
)
def test_invalid_prefixes_are_refused(text):
    with pytest.raises(UserError):
        parse_prefix(text, 100)


@given(strategies.text(alphabet="0123456789%:.-+ autolinerstcf", max_size=20))
def test_any_text_is_a_schedule_within_bounds_or_refused(text):
    try:
        schedule = parse_prefix(text, 50)
    except UserError:
        return
    lengths = [schedule.length(step) for step in range(60)]
    assert all(1 <= n <= 50 for n in lengths) and lengths == sorted(lengths)


def grow(signals, filled=1.0, text="auto:10:5", limit=100):
    """Feed ``signals`` to a schedule; return it, its state and [(step, reason)]."""
    schedule, state, said = parse_prefix(text, limit), {}, []
    for step, signal in enumerate(signals):
        if reason := schedule.observe(step, state, signal, filled):
            said.append((step + 1, reason))
    return schedule, state, said


def test_auto_grows_when_the_newest_window_stops_improving():
    schedule, state, said = grow([1.0] * (2 * PATIENCE))
    assert (
        schedule.length(0, {}) == 10
        and schedule.length(8, state) == 15
        and schedule.window(state) == 10
    )
    assert [step for step, _ in said] == [8]
    assert (
        "from 10 to 15 tokens" in said[0][1]
        and "tokens 0 to 10" in said[0][1]
        and "100%" in said[0][1]
    )


def test_auto_waits_while_the_signal_falls_and_grows_when_it_is_exhausted():
    # falls by 0.12 in PATIENCE steps: more than a tenth of the mean of the first 4
    falling = [1.0 - 0.03 * k for k in range(25)]
    assert grow(falling)[2] == []
    # The signal halves at every step, and the mean of the first 4 is 0.469. After step 12, the
    # mean of 2^-4 … 2^-7 exceeds that of 2^-8 … 2^-11 by 0.0275, which is less than a tenth of
    # 0.469. After step 11, the difference is 0.0549.
    assert grow([2.0**-k for k in range(40)])[2][0][0] == 12
    # a zero or missing signal cannot improve
    assert grow([0.0] * 10)[2] and grow([None] * 10)[2]


def test_auto_needs_rollouts_that_reach_the_prefixs_end_never_shrinks_and_stops_at_the_limit():
    assert grow([1.0] * 50, filled=0.2)[2] == []
    schedule, state, said = grow([1.0] * 400, limit=22)
    assert schedule.length(400, state) == 22 and [step for step, _ in said] == [8, 16, 24]
    lengths, state = [], {}
    for step in range(200):
        lengths.append(schedule.length(step, state))
        schedule.observe(step, state, 1.0 / (step + 1), 1.0)
    assert lengths == sorted(lengths)


def test_auto_alone_starts_at_a_tenth_and_doubles():
    schedule, state, _ = grow([1.0] * 100, text="auto", limit=200)
    assert (schedule.length(0), schedule.longest(3)) == (20, 200)
    lengths, state = [], {}
    for step in range(40):
        lengths.append(schedule.length(step, state))
        schedule.observe(step, state, 1.0, 1.0)
    assert lengths == [20] * 8 + [40] * 8 + [80] * 8 + [160] * 8 + [200] * 8


@given(strategies.floats(0.01, 1.0), strategies.integers(1, 12))
def test_off_policy_rows_add_up_to_the_share(share, rollouts):
    chosen = [OffPolicy(loss="sft", share=share).rows(step, rollouts, 3) for step in range(20)]
    assert all(rows <= set(range(rollouts)) for rows in chosen)
    assert abs(sum(map(len, chosen)) - share * rollouts * 20) < 1 + 1e-6
    assert chosen == [
        OffPolicy(loss="sft", share=share).rows(step, rollouts, 3) for step in range(20)
    ]


def test_off_policy_grammar():
    assert parse_off_policy("none") is None
    assert parse_off_policy("sft") == OffPolicy(loss="sft", share=1.0) and parse_off_policy(
        "divergence:0.25"
    ) == OffPolicy(loss="divergence", share=0.25)
    assert all(len(OffPolicy(loss="sft", share=1.0).rows(k, 6, 0)) == 6 for k in range(3))
    for text in ("", "sft:", "sft:0", "sft:2", "sft:nan", "teacher", "divergence:x", "none:1"):
        with pytest.raises(UserError):
            parse_off_policy(text)
