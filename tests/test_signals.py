"""Test the stop signals: which they are, what the first and the second one do, and the ranks."""

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from helpers import ROOT

from prefix_distill import signals
from prefix_distill.api.launch import SIGNAL, _Signals
from prefix_distill.prompts import answers, expressions
from prefix_distill.signals import Interrupt, find_stop_signals, pass_on

ALL = find_stop_signals()
posix = pytest.mark.skipif(os.name != "posix", reason="Windows lacks these signals")


@pytest.fixture
def heard():
    """Record every stop signal with a handler, as a host program might; restore the handlers."""
    received = []
    former = {n: signal.signal(n, lambda number, _: received.append(number)) for n in ALL}
    yield received
    for number, handler in former.items():
        signal.signal(number, handler)


@posix
def test_warnings_of_batch_systems_are_stop_signals():
    names = {number.name for number in ALL}
    assert {"SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"} <= names


def test_signals_are_listed_in_one_place():
    for file in (ROOT / "prefix_distill").rglob("*.py"):
        if file.name != "signals.py":
            assert "SIGHUP" not in file.read_text(encoding="utf-8"), file


@pytest.mark.parametrize("number", ALL)
def test_the_first_signal_is_a_request_and_the_second_has_its_usual_effect(heard, number):
    with Interrupt() as interrupt:
        signal.raise_signal(number)
        assert interrupt.received == number and heard == []
        signal.raise_signal(signal.SIGTERM)
        assert heard == [signal.SIGTERM]
    signal.raise_signal(number)
    assert heard == [signal.SIGTERM, number]


@posix
def test_a_repeated_sigxcpu_changes_nothing(heard):
    """The system sends SIGXCPU after every second of CPU time until the hard limit."""
    with Interrupt() as interrupt:
        for _ in range(3):
            signal.raise_signal(signal.SIGXCPU)
        assert interrupt.received == signal.SIGXCPU and heard == []
        signal.raise_signal(signal.SIGUSR1)
        assert heard == [signal.SIGUSR1]


def test_the_signal_of_the_launcher_is_not_a_second_one(heard):
    with Interrupt() as interrupt:
        signal.raise_signal(signal.SIGTERM)
        pass_on(signal.SIGTERM)
        assert interrupt.received == signal.SIGTERM and heard == []
    pass_on(signal.SIGTERM)  # the run has been stopped by then
    assert heard == []


def test_a_direct_signal_after_that_of_the_launcher_is_not_a_second_one(heard):
    with Interrupt() as interrupt:
        pass_on(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert interrupt.received == signal.SIGTERM and heard == []


@pytest.mark.parametrize("system", ["posix", "windows"])
def test_before_a_run_the_launchers_signal_has_its_usual_effect(heard, monkeypatch, system):
    monkeypatch.setattr(signals, "_requests", [])
    if system == "windows":
        monkeypatch.delattr(signal, "pthread_kill")
    pass_on(signal.SIGTERM)
    assert heard == [signal.SIGTERM]


def test_a_system_without_some_signals_catches_the_others(heard, monkeypatch):
    few = {name: signal.Signals[name] for name in ("SIGINT", "SIGTERM")}

    class Signals:
        __members__ = few

        def __class_getitem__(cls, name):
            return few[name]

    fake = SimpleNamespace(**vars(signal))
    fake.Signals = Signals
    monkeypatch.setattr(signals, "signal", fake)
    assert find_stop_signals() == [signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize("number", ALL)
def test_the_launcher_passes_the_first_signal_on_and_kills_at_the_second(heard, tmp_path, number):
    rank = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (tmp_path / f"{rank.pid}.pid").touch()
    (tmp_path / "999999999.pid").touch()  # a rank that has ended
    with _Signals(tmp_path) as caught:
        signal.raise_signal(number)
        assert (tmp_path / SIGNAL).read_text() == str(int(number)) and rank.poll() is None
        signal.raise_signal(signal.SIGINT)
        assert rank.wait(10) != 0 and caught.second == signal.SIGINT and heard == []


@posix
def test_a_stop_signal_to_the_grading_worker_loses_no_answer():
    """A batch system sends its signal to every process of a job."""
    assert answers.is_correct(r"\boxed{1/2}", "0.5")
    worker = expressions._worker[0]
    for number in ALL:
        os.kill(worker.pid, number)
    assert answers.is_correct(r"\boxed{3/4}", "0.75")
    assert expressions._worker[0] is worker and worker.poll() is None


@posix
def test_a_cpu_limit_of_the_system_is_caught():
    """After the soft limit of one second, the system sends SIGXCPU."""
    program = (
        "import resource, time\n"
        "from prefix_distill.signals import Interrupt\n"
        "used = int(time.process_time()) + 1\n"
        "resource.setrlimit(resource.RLIMIT_CPU, (used, used + 30))\n"
        "with Interrupt() as interrupt:\n"
        "    while time.process_time() < used + 1.5: pass\n"
        "print(interrupt.received.name)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "SIGXCPU\n"), done.stderr
