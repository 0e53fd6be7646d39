"""Test phases: who hears of them, how they nest, and what they expect of the time left."""

import threading
import time

import pytest

from prefix_distill.display import find_phase, listening, phase
from prefix_distill.display.phases import list_phases


class Heard:
    """A listener that keeps what it hears."""

    def __init__(self):
        self.events = []

    def began(self, phase):
        self.events.append(("began", phase.name))

    def moved(self, phase):
        self.events.append(("moved", phase.name, phase.done))

    def ended(self, phase):
        self.events.append(("ended", phase.name))


@pytest.fixture
def clock(monkeypatch):
    """Return a list with the time, which a test changes."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_phases_nest_and_reach_the_listener_in_order():
    heard = Heard()
    with listening(heard), phase("outer"):
        with phase("inner", 3, "answers") as inner:
            inner.advance(2)
            assert [p.name for p in list_phases()] == ["outer", "inner"]
            assert find_phase("answers") is inner
        assert find_phase("answers") is not inner
    assert heard.events == [
        ("began", "outer"),
        ("began", "inner"),
        ("moved", "inner", 2),
        ("ended", "inner"),
        ("ended", "outer"),
    ]


def test_without_a_listener_a_phase_leaves_nothing_behind():
    with phase("alone", 3) as alone:
        alone.advance()
        assert list_phases() == [] and alone.done == 1


def test_a_phase_ends_with_an_exception_and_when_its_listener_has_gone():
    heard = Heard()
    with pytest.raises(ValueError), listening(heard), phase("failing"):
        raise ValueError
    assert heard.events[-1] == ("ended", "failing")
    with listening(heard):
        opened = phase("outlives")
        opened.__enter__()
    opened.__exit__(None, None, None)
    assert list_phases() == []


def test_an_exception_of_a_listener_does_not_reach_the_program():
    class Broken:
        def __getattr__(self, name):
            raise RuntimeError(name)

    with listening(Broken()), phase("work", 2) as p:
        p.advance()
    assert p.done == 1


def test_a_decorated_function_is_a_phase_at_every_call():
    heard = Heard()

    @phase("called")
    def function():
        return 7

    with listening(heard):
        assert function() + function() == 14
    assert heard.events.count(("began", "called")) == 2


def test_phases_of_several_threads_all_end():
    def work():
        for _ in range(100):
            with phase("thread", 5, "parts") as p:
                p.advance(5)

    with listening(Heard()):
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert list_phases() == []


def test_the_time_left_is_that_of_the_rest_at_the_speed_so_far(clock):
    """40 of 200 answers in 10 s: the other 160 take 40 s, of which 15 s have passed."""
    with phase("evaluating", 200, "answers") as p:
        assert p.seconds_left is None
        clock[0] += 10
        p.advance(40)
        assert p.seconds_left == pytest.approx(40)
        clock[0] += 15
        assert p.seconds_left == pytest.approx(25)
        clock[0] += 100
        assert p.seconds_left == 0


def test_begun_units_count_in_part_and_skipped_ones_take_no_time(clock):
    with phase("runs", 6, "runs") as p:
        p.skip(2)
        assert p.seconds_left is None
        clock[0] += 30
        p.advance()
        assert p.done == 3 and p.seconds_left == pytest.approx(90)
    with phase("answers", 8, "answers") as p:
        clock[0] += 4
        p.set(0, begun=2.0)
        assert p.seconds_left == pytest.approx(12)


def test_each_of_several_ranks_counts_for_all_and_never_beyond_the_total():
    with phase("evaluating", 5, "answers", ranks=2) as p:
        p.advance(2)
        assert p.done == 4
        p.advance()
        assert p.done == 5


def test_a_phase_that_goes_on_at_once_keeps_its_time(clock):
    """Libraries load in several places, which are one phase on the screen."""
    with listening(Heard()):
        with phase("loading"):
            clock[0] += 3
        with phase("loading") as again:
            clock[0] += 1
            assert again.seconds == pytest.approx(4)
