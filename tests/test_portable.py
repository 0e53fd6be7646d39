"""Test portability without other hardware: Windows paths, Apple GPUs, plots without color."""

import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers import ROOT, state_of, write_run
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prefix_distill import config as configuration
from prefix_distill.engine import folders, free_memory, loading, sampling, scoring
from prefix_distill.engine.device import Clock, choose_device
from prefix_distill.engine.rollout import rollout_of, student_sides
from prefix_distill.errors import UserError
from prefix_distill.maths.flops import STRETCH
from prefix_distill.prompts.load import load_prompts
from prefix_distill.prompts.sources import is_path
from prefix_distill.results import plots, runs
from prefix_distill.results.plots import COLORS
from prefix_distill.training import prepare as preflight
from prefix_distill.training.optimizer import step_optimizer
from prefix_distill.training.update import Update


@pytest.mark.parametrize(
    "name, local",
    {
        "C:\\models\\x": True,
        "C:/models/x": True,
        ".\\x": True,
        "\\\\server\\x": True,
        "models\\x": True,
        "./x": True,
        "~/x": True,
        "/x": True,
        "org/name": False,
        "gpt2": False,
        "lab:choice/student": False,
        "org/name#1000": False,
    }.items(),
)
def test_a_path_of_any_system_is_not_looked_up_on_the_hub(name, local):
    assert is_path(name) is local
    if local:
        with pytest.raises(UserError, match="no such folder; check the path"):
            folders.locate(name)
        with pytest.raises(UserError, match="no such file; check the path"):
            load_prompts(name, split="train")


class Doubles(TorchDispatchMode):
    """Record which of our functions creates or uses a float64 tensor in any operation."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if any(
            isinstance(x, torch.Tensor) and x.dtype == torch.float64
            for x in tree_leaves((args, kwargs, out))
        ):
            frame = sys._getframe(1)
            while frame is not None and "prefix_distill" not in frame.f_code.co_filename:
                frame = frame.f_back
            self.seen.add(
                "?"
                if frame is None
                else f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_qualname}"
            )
        return out


@pytest.mark.parametrize(
    "more",
    [
        {"weights.select": "soft-or", "weights.position": "moderate"},
        {
            "divergence.name": "jsd:0.5",
            "divergence.estimator": "top-k:8",
            "weights.window": "highest-kl:4",
            "rollout.top_p": 0.9,
            "rollout.temperature": 0.7,
        },
        pytest.param(
            {
                "divergence.estimator": "sampled",
                "runtime.dtype": "bfloat16",
                "train.grad_clip": 0.0,
            },
            marks=pytest.mark.long,
        ),
    ],
)
def test_no_float64_reaches_a_device(pair, questions, more):
    """Apple GPUs do not support float64.

    A step uses it in one place: token weights on the host, before the conversion to float32.
    """
    run = preflight.prepare(
        configuration.build(
            {
                "models.student": pair[0],
                "models.teacher": pair[1],
                "data.dataset": questions,
                "schedule.prefix": "6",
                "rollout.max_new_tokens": 6,
                "rollout.samples": 2,
                "train.batch_size": 2,
                "train.steps": 1,
                "evaluate.problems": 0,
                "evaluate.kl_prompts": 1,
                "runtime.device": "cpu",
                **more,
            }
        )
    )
    state = state_of(run)
    with Doubles() as watch:
        update = Update(state, 0)
        update.backward(update.select(update.sample()))
        norm = step_optimizer(
            state.optimizer, run.pair.student.trainable, 1e-3, run.config.train.grad_clip
        )
    assert norm > 0 and watch.seen == {"update.Update._weight_tensor"}


def test_the_clock_synchronizes_an_apple_gpu():
    with mock.patch("torch.mps.synchronize") as wait:
        Clock(device=torch.device("mps")).now()
        Clock(device=torch.device("cpu")).now()
    assert wait.call_count == 1
    with pytest.raises(
        UserError, match="2 ranks run on this machine and each needs its own GPU; use --device cpu"
    ):
        choose_device("mps", 0, 2, [])


class FakeMps:
    """An allocator that keeps every freed buffer and reuses one only for the same size."""

    def __init__(self):
        self.kept = set()
        self.releases = 0

    def use(self, size):
        """Allocate and free a buffer."""
        self.kept.add(size)

    def driver_allocated_memory(self):
        return sum(self.kept) + 500

    def current_allocated_memory(self):
        return 500

    def recommended_max_memory(self):
        return 100_000

    def empty_cache(self):
        self.kept.clear()
        self.releases += 1


def test_an_apple_gpu_keeps_little_unused_memory_when_lengths_vary(monkeypatch):
    """Without release, buffers of 1,000 different sizes would be kept."""
    mps = FakeMps()
    monkeypatch.setattr(torch, "mps", mps)
    most = 0
    for length in range(1, 1001):
        free_memory.release_cache(torch.device("mps"))
        mps.use(length)
        most = max(most, sum(mps.kept))
    assert most <= free_memory.MOST_CACHED * 100_000 + 1000 and 10 < mps.releases < 100
    mps.releases = 0
    for _ in range(1000):  # of equal lengths nothing needs to be released
        free_memory.release_cache(torch.device("mps"))
        mps.use(7)
    free_memory.release_cache(torch.device("cpu"))
    assert mps.releases <= 1


def test_every_forward_pass_and_every_stretch_of_decoding_releases_memory(monkeypatch, pair):
    released = []
    for module in (scoring, sampling):
        monkeypatch.setattr(module, "release_cache", released.append)
    cpu = torch.device("cpu")
    model = loading.load_model(pair[0], device=cpu, dtype=torch.float32)
    requests = [sampling.Request(ids=(5, 6, 7), key=(0,))]
    sampler = sampling.Sampler(eos=frozenset(), pad=0, support=256, seed=0, rows=1)
    [response] = sampling.generate(model, requests, 2 * STRETCH + 1, sampler)
    assert released == [cpu] * 3
    scoring.hidden_rows(model, student_sides([rollout_of(0, (5, 6, 7), response.ids)]))
    assert released == [cpu] * 4


def test_lines_of_a_plot_differ_without_colors(tmp_path):
    """Lines differ in marker or line style, even if markers repeat.

    The colors are from the Okabe-Ito palette, in which lightness differs between colors.
    """
    from matplotlib import pyplot

    for i in range(12):
        write_run(tmp_path / f"{i:02}" / "seed-0", 0, [0.2, 0.5 + i / 100], 10.0)
    pictures = {"report": plots.draw_report(runs.collect_runs([tmp_path]))}
    score = {"value": 0.5, "low": 0.4, "high": 0.6}
    rows = [{"flops_useful": 1e9 * i, "accuracy": score} for i in range(3)]
    curve = [{"tokens": 4, **score}]
    probed = {
        "by_position": [{"from": 0, "to": 4, "kl": 1.0, "entropy": 2.0}],
        "teacher_prefix_curve": curve,
        "teacher_decay_curve": curve,
        "recommended_prefix": "4",
        "quadrants": {
            "borders": (0.5, 0.5),
            "quadrants": {"high entropy, high divergence": {"tokens": 0.25, "divergence": 0.5}},
        },
    }
    for name, draw in (
        (
            "demo",
            lambda file: plots.draw_demo(
                [{"name": n, "prefix": 24, "evaluations": rows} for n in ("prefix", "full")],
                0.9,
                "a title",
                file,
            ),
        ),
        ("probe", lambda file: plots.draw_probe(probed, file)),
    ):
        with (
            mock.patch.object(pyplot, "close"),
            mock.patch("matplotlib.figure.Figure.savefig"),
        ):  # keep the figure open, because the test inspects its lines
            draw(tmp_path / f"{name}.png")
        pictures[name] = pyplot.gcf()
    for name, figure in pictures.items():
        for axes in figure.axes:
            styles = [
                (line.get_marker(), line.get_linestyle())
                for line in axes.get_lines()
                if line.get_marker() not in ("None", None, "|", "_")
            ]
            assert len(set(styles)) == len(styles), (name, styles)
            assert name != "report" or len(styles) == 12
            assert {line.get_color() for line in axes.get_lines()} <= {
                *COLORS,
                "#555555",
                "black",
            }, name
        pyplot.close(figure)


HOLD = """
import subprocess, sys, time
from prefix_distill.api.launch import listen
with listen(2) as listener:
    rank = [sys.executable, "-c", sys.argv[1], str(listener.getsockname()[1])]
    process = subprocess.Popen(rank)
    time.sleep(100)
"""
WATCH = """
import sys, threading, time
from prefix_distill.api.rank import end_with_launcher
threading.Thread(target=end_with_launcher, args=(int(sys.argv[1]),), daemon=True).start()
time.sleep(0.5)
print("runs", flush=True)
time.sleep(100)
"""


def test_a_rank_ends_with_a_killed_launcher():
    """Every system closes the sockets of a process that ends, however it ends."""
    command = [sys.executable, "-c", HOLD, WATCH]
    launcher = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert launcher.stdout.readline() == "runs\n"
    killed = time.monotonic()
    launcher.kill()
    assert launcher.stdout.read() == ""  # it ends when the rank has ended as well
    assert time.monotonic() - killed < 20
    launcher.wait()
