"""Test the live line of a command at every width, with a clock that the test sets.

The file screens/live-line.txt holds what a person sees. PREFIX_DISTILL_WRITE_SCREENS=1 writes it.
"""

import os
import time

import pytest
from helpers import TESTS
from rich.cells import cell_len

from prefix_distill.display import (
    EVALUATION,
    RUNS,
    Display,
    Outline,
    Screen,
    listening,
    phase,
    phases,
)

FILE = TESTS / "screens" / "live-line.txt"
WIDTHS = (40, 80, 100, 120, 220)


def row(step, divergence=0.51, name="reverse_kl"):
    return {
        "step": step,
        f"loss/{name}_nats": divergence,
        "loss/first_8_tokens_nats": divergence,
        "rollout/prefix_tokens": 24,
        "rollout/finished_share": 0.6,
        "time/student_decode_tokens_per_s": 12508.0,
        "time/teacher_score_tokens_per_s": 51496.0,
        "time/student_update_tokens_per_s": 8120.0,
    }


def evaluated(step, accuracy):
    return {
        "step": step,
        "accuracy": {"value": accuracy, "low": 0.5, "high": 0.7, "n": 200},
        "graded_by": None,
        "finish_rate": 0.9,
        "mean_tokens": 55.0,
        "kl": {"value": 0.12},
        "kl_tail": None,
        "sampler_kl": None,
    }


class Scene:
    """A screen and a clock; ``show`` writes the line at every width."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        self.screen = Screen()
        self.lines: list[str] = []

    def show(self, title):
        self.lines.append(f"# {title}")
        for width in WIDTHS:
            text = self.screen.compose(width - 1)
            assert cell_len(text) < width
            self.lines.append(f"{width:>3} {text}")

    def train(self, display, steps, seconds):
        for _ in range(steps):
            self.now += seconds
            display.row(row(display.step + 1), 1e12, 4.1e12)


@pytest.fixture
def scene(monkeypatch):
    made = Scene(monkeypatch)
    monkeypatch.setattr(phases, "_newest", phases.Phase(""))  # no phase ended before this test
    with listening(made.screen):
        yield made


def play_before_a_run(scene):
    with phase("preparing"):
        with phase("loading libraries"):
            scene.now += 3
            scene.show("libraries load")
        with phase("loading the teacher"):
            scene.now += 75
            scene.show("a large model loads")
        with phase("checking", 12, "checks") as checks:
            checks.advance(2)
            with phase("determinism"):
                scene.now += 4
                scene.show("a check")
            with phase("evaluating", 64, "answers") as p:
                scene.now += 10
                p.advance(16)
                scene.show("the checks sample answers")


def play_a_run(scene):
    outline = Outline(steps=100, eval_every=10, save_every=25)
    display = Display(outline, scene.screen)
    scene.screen.run = display
    with phase(EVALUATION), phase("evaluating", 200, "answers") as p:
        scene.now += 8
        p.set(0, begun=64.0)
        scene.show("the untrained student is evaluated; no answer has ended")
        scene.now += 17
    display.evaluation(evaluated(0, 0.62))
    with phase("sampling"):
        scene.now += 2
        scene.show("the first step")
    scene.train(display, 8, 3)
    with phase("sampling"):
        scene.now += 1
        scene.show("training")
    scene.train(display, 2, 2)
    with phase(EVALUATION), phase("evaluating", 200, "answers") as p:
        scene.now += 8
        p.advance(64)
        scene.show("an evaluation")
    scene.train(display, 15, 2)
    with phase("saving"):
        scene.now += 12
        scene.show("a checkpoint is saved")
    scene.screen.run = None


def play_several_runs(scene):
    with phase("comparing", 6, RUNS) as runs:
        runs.skip(2)
        scene.now += 1
        scene.show("nothing says what happens")
        with phase("loading the student"):
            scene.now += 2
            scene.show("the third run is prepared")
        display = Display(Outline(steps=40, label="prefix-64 seed 1:"), scene.screen)
        scene.screen.run = display
        display.evaluation(evaluated(0, 0.1))
        scene.train(display, 20, 6)
        with phase("training"):
            scene.now += 2
            scene.show("the third of six runs")
        scene.screen.run = None
        runs.advance(3)
        display = Display(Outline(steps=40, label="full seed 1:"), scene.screen)
        scene.screen.run = display
        scene.train(display, 20, 6)
        with phase("training"):
            scene.now += 2
            scene.show("the last of six runs")
        scene.screen.run = None


@pytest.mark.parametrize("play", [play_before_a_run, play_a_run, play_several_runs])
def test_the_live_line_is_as_in_the_file(scene, play):
    play(scene)
    wanted = FILE.read_text(encoding="utf-8") if FILE.exists() else ""
    shown = "\n".join([f"== {play.__name__}", *scene.lines]) + "\n"
    if os.environ.get("PREFIX_DISTILL_WRITE_SCREENS"):
        before, _, rest = wanted.partition(f"== {play.__name__}\n")
        following = rest.partition("\n== ")
        after = f"== {following[2]}" if following[1] else ""
        FILE.write_text(before + shown + after, encoding="utf-8")
        return
    assert shown in wanted


def test_at_80_columns_a_run_shows_step_divergence_accuracy_saving_and_time_left(scene):
    play_a_run(scene)
    training = scene.lines.index("# training")
    line = scene.lines[training + 1 + WIDTHS.index(80)]
    assert line == (" 80 8/100 · train reverse KL 0.51 · acc 62.0% · saved 4.1× · 9 min left · 1 s")


@pytest.mark.parametrize(
    "metric, name",
    [
        ("reverse_kl", "train reverse KL"),
        ("forward_kl", "train forward KL"),
        ("jsd", "train JSD"),
        ("tv", "train tv"),
        ("my_plugin", "train my plugin"),
    ],
)
def test_the_mean_carries_the_name_of_its_divergence(scene, metric, name):
    display = Display(Outline(steps=20), scene.screen)
    scene.screen.run = display
    for step in range(1, 13):
        scene.now += 1
        display.row(row(step, step / 10, metric), 1e9, 2e9)
    # the mean of the last ten steps: 0.3 … 1.2
    assert f"12/20 · {name} 0.75 · " in scene.screen.compose(100)


def test_a_saving_that_is_none_is_not_shown(scene):
    display = Display(Outline(steps=2), scene.screen)
    scene.screen.run = display
    display.row(row(1), 2e9, 2e9)
    assert "saved" not in scene.screen.compose(200)


def test_the_share_of_begun_answers_moves_while_none_has_ended(scene):
    with phase("evaluating", 64, "answers") as p:
        shown = []
        for begun in (0.0, 8.0, 32.0):
            scene.now += 10
            p.set(0, begun=begun)
            shown.append(scene.screen.compose(30))
        p.set(63, begun=0.99)
        assert "evaluating 63/64 answers (99%)" in scene.screen.compose(80)
        p.advance()
        assert "(100%)" in scene.screen.compose(80)
    texts = [line.partition(" · ")[0] for line in shown]
    assert texts == ["evaluating 0/64 answers", "evaluating 12%", "evaluating 50%"]


def test_the_last_of_several_runs_tells_the_time_left_once(scene, capsys):
    with phase("comparing", 2, RUNS) as runs:
        for is_last in (False, True):
            display = Display(Outline(steps=2), scene.screen)
            scene.screen.run = display
            scene.train(display, 1, 6)
            assert scene.screen.compose(200).count("left") == 1 + (not is_last)
            assert capsys.readouterr().err.count("left") == 1 + (not is_last)
            runs.advance()
