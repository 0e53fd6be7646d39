"""Run ``prefix-distill demo``: distill the built-in pair with a prefix and with full rollouts."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from .. import config as configuration
from ..display import RUNS, Observer, Summary, flops_text, phase
from ..engine.device import Clock
from ..engine.evaluate import evaluate
from ..engine.meter import Meter
from ..engine.sampling import GenerationCost
from ..errors import advising
from ..files import read_rows
from ..training.folder import RunFolder
from ..training.opening import train_in
from ..training.prepare import prepare
from ..training.run import Run
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
NAMES = {"prefix": "24-token prefix", "full": "full rollouts"}  # of the arms
COLUMNS = ("accuracy [95%]", "FLOPs", "time", "tokens")
SHOWN = 44  # characters of an answer
TASK = (
    "A problem gives two labeled numbers. Each term of the answer adds the last two numbers digit "
    "by digit, without carrying, and counts the label down to 01; #### marks the result."
)


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
        "out": str(folder),
        "teacher": teacher["accuracy"],
        "student": student["accuracy"],
        "arms": arms,
        "picture": str(picture),
        "flops_ratio_full_to_prefix": arms[1]["flops_useful"] / arms[0]["flops_useful"],
        "example": find_example(folder / "prefix"),
    }
    return _table(arms, student, teacher), document


def find_example(run: Path) -> dict | None:
    """Return a problem that the untrained student got wrong, and the trained one right.

    {prompt, reference, before, after: answers}; of several problems the first. None: there is none.
    """
    before, _ = read_rows(run / "examples-before.jsonl")
    after, _ = read_rows(run / "examples-after.jsonl")
    for old, new in zip(before, after, strict=True):
        wrong, right = old["responses"][0], new["responses"][0]
        if right["correct"] and not wrong["correct"]:
            return {
                "prompt": old["prompt"],
                "reference": old["reference"],
                "before": wrong["text"],
                "after": right["text"],
            }
    return None


def summarize(document: dict) -> Summary:
    """Return what the student has learned, with an example, and where the files are."""
    rows = {"the task": TASK}
    example = document["example"]
    if example is not None:
        rows["problem"] = f"{example['prompt']} (result: {example['reference']})"
        rows["before"] = f"{_shorten(example['before'])} (wrong)"
        rows["after"] = f"{_shorten(example['after'])} (right)"
    ratio = document["flops_ratio_full_to_prefix"]
    rows["FLOPs"] = f"full rollouts took {ratio:.1f}× the FLOPs of the prefix"
    rows["picture"] = document["picture"]
    command = "prefix-distill help recipes"
    return Summary(title="what the student learned", rows=rows, command=command)


def _shorten(answer: str) -> str:
    """Return the first and the last terms of a long answer."""
    if len(answer) <= SHOWN:
        return answer
    terms = answer.split()
    return " ".join([*terms[:3], "…", *terms[-3:]])


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
                "evaluate.teacher": "off",  # it is the same in both arms
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
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(
        title=f"{UPDATES} steps of {PROMPTS} sampled answers; {PROBLEMS} held-out problems",
        box=SIMPLE,
    )
    table.add_column("")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    table.add_row("student, untrained", *_cells(student))
    for arm in arms:
        table.add_row(NAMES[arm["name"]], *_cells(arm))
    table.add_row("teacher", *_cells(teacher))
    return table


def _cells(score: dict) -> list[str]:
    """Return the cells of a model under COLUMNS; only a trained arm has costs."""
    flops = seconds = ""
    if "name" in score:
        flops = flops_text(score["flops_useful"])
        seconds = f"{score['seconds']:.0f} s"
    accuracy = score["accuracy"]
    interval = f"{accuracy['value']:.1%} [{accuracy['low']:.1%}, {accuracy['high']:.1%}]"
    return [interval, flops, seconds, f"{score['mean_tokens']:.0f}"]
