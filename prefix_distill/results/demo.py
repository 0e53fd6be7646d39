"""Run ``prefix-distill demo``: distil the built-in pair with a prefix and with full rollouts."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from .. import config as configuration
from ..display import RUNS, Observer, accuracy_text, flops_text, phase
from ..engine.device import Clock
from ..engine.evaluate import evaluate
from ..engine.meter import Meter
from ..engine.sampling import GenerationCost
from ..errors import advising
from ..training.folder import RunFolder
from ..training.prepare import prepare
from ..training.run import Run
from ..training.session import train_in
from .plots import draw_demo

if TYPE_CHECKING:
    from rich.table import Table

UPDATES = 30
PROMPTS = 16  # per step
RATE = 4e-4  # learning rate
PROBLEMS = 200  # held-out
EVERY = 10  # steps between evaluations
ARMS = {"prefix": "24", "full": "full"}  # arm → prefix
AT_STOP = "start the demo again with another --out"
COLUMNS = ("prefix", "accuracy", "useful FLOPs", "training time", "finished answers", "mean tokens")


def demonstrate(folder: Path, seed: int, observer: Observer) -> tuple["Table", dict]:
    """Train both arms in ``folder``, and return the table and the result document.

    ``observer`` watches the runs.
    """
    arms: list[dict] = []
    with phase("demonstrating", len(ARMS), RUNS) as progress, advising(AT_STOP):
        for name, prefix in ARMS.items():
            run = _prepare(folder / name, prefix, seed)
            if not arms:
                teacher = _evaluate_teacher(run)
            result = train_in(run, RunFolder(folder / name), observer, label=f"{name} arm:")
            arms.append(_describe(name, run, result))
            progress.advance()
    student = arms[0]["evaluations"][0]
    picture = folder / "accuracy-against-flops.png"
    title = f"{UPDATES} steps of {PROMPTS} rollouts, evaluated every {EVERY}"
    with phase("drawing the picture"):
        draw_demo(arms, teacher["accuracy"]["value"], title=title, file=picture)
    document = {
        "teacher": teacher["accuracy"],
        "student": student["accuracy"],
        "arms": arms,
        "picture": str(picture),
        "flops_ratio_full_to_prefix": arms[1]["flops_useful"] / arms[0]["flops_useful"],
    }
    return _table(arms, student, teacher), document


def _prepare(folder: Path, prefix: str, seed: int) -> Run:
    return prepare(
        configuration.build(
            {
                "schedule.prefix": prefix,
                "schedule.lr": RATE,
                "schedule.warmup": "0",
                "train.steps": UPDATES,
                "train.batch_size": PROMPTS,
                "train.micro_batch_size": PROMPTS,
                "rollout.samples": 1,
                "rollout.rows": PROBLEMS,
                "evaluate.problems": PROBLEMS,
                "evaluate.every": EVERY,
                "checkpoint.save_every": 0,
                "runtime.seed": seed,
                "checkpoint.out": str(folder),
            }
        )
    )


def _evaluate_teacher(run: Run) -> dict:
    """Return the teacher's score on the held-out problems as JSON values."""
    cost = GenerationCost(meter=Meter(Clock(device=run.place.device)))
    how = dataclasses.replace(run.evaluation, samples=1)
    score = evaluate(run.pair.teacher, run.problems.held_out, how, limits=run.limits, cost=cost)
    return score.summary()


def _describe(name: str, run: Run, result: dict) -> dict:
    """Return the settings, costs and results of a finished arm."""
    last = result["evaluations"][-1]
    phases = result["seconds"]["by_phase"]
    return {
        "name": name,
        "prefix": run.method.prefix.length(0),
        "updates": result["steps"],
        "accuracy": last["accuracy"],
        "flops_useful": result["flops"]["useful"],
        "flops_executed": result["flops"]["executed"],
        "seconds": sum(v for phase, v in phases.items() if phase != "evaluation"),
        "finish_rate": last["finish_rate"],
        "mean_tokens": last["mean_tokens"],
        "tokens_taught": result["tokens"],
        "evaluations": result["evaluations"],
    }


def _table(arms: list[dict], student: dict, teacher: dict) -> "Table":
    from rich.table import Table

    table = Table(
        title=f"{UPDATES} steps of {PROMPTS} rollouts in both arms; accuracy on {PROBLEMS} "
        "held-out problems, one sample each, with 95% interval"
    )
    table.add_column("")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    table.add_row("student, untrained", *_cells(student))
    for arm in arms:
        table.add_row(f"{arm['name']} arm", *_cells(arm))
    table.add_row("teacher", *_cells(teacher))
    return table


def _cells(score: dict) -> list[str]:
    """Return the cells of a model under COLUMNS; only a trained arm has a prefix and costs."""
    prefix = flops = seconds = "–"
    if "prefix" in score:
        prefix = str(score["prefix"])
        flops = flops_text(score["flops_useful"])
        seconds = f"{score['seconds']:.0f} s"
    finished = f"{score['finish_rate']:.0%}"
    tokens = f"{score['mean_tokens']:.0f}"
    return [prefix, accuracy_text(score["accuracy"]), flops, seconds, finished, tokens]
