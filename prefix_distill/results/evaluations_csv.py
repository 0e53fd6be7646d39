"""Write the evaluations of runs as CSV."""

import csv
from pathlib import Path

from ..maths.intervals import split_mean
from .runs import StoredRun, common_tail
from .shapes import Evaluation

COLUMNS = (
    "arm",
    "seed",
    "update",
    "accuracy",
    "low",
    "high",
    "n",
    "lr",
    "prefix",
    "kl",
    "kl_prefix",
    "kl_tail",
    "kl_beyond",
    "finish_rate",
    "finished_accuracy",
    "finished_low",
    "finished_high",
    "mean_tokens",
    "flops_useful",
    "flops_executed",
    "seconds",
)


def write_csv(runs: list[StoredRun], file: Path) -> None:
    """Write a row per run and evaluation under COLUMNS, and a column per other dataset.

    ``kl_beyond``: reverse KL beyond ``common_tail``, after the last step.
    """
    tail = common_tail(runs)
    other_sets: set[str] = set()
    for run in runs:
        other_sets.update(run.also)
    also = [f"also_{name}" for name in sorted(other_sets)]
    with open(file, "w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, [*COLUMNS, *also], lineterminator="\n")
        writer.writeheader()
        for run in runs:
            for row in run.evaluations:
                writer.writerow(_csv_row(run, row, tail))


def _csv_row(run: StoredRun, row: Evaluation, tail: int) -> dict[str, object]:
    """Return an evaluation under COLUMNS; what holds for the whole run is in its last row."""
    cost = run.cost(row)
    cells: dict[str, object] = {
        "arm": run.arm,
        "seed": run.seed,
        "update": row["step"],
        "n": 0,
        "lr": run.config["schedule"]["lr"],
        "kl": row["kl"]["value"],
        "kl_prefix": row["kl_prefix"],
        "kl_tail": row["kl_tail"],
        "finish_rate": row["finish_rate"],
        "mean_tokens": row["mean_tokens"],
        "flops_useful": cost.useful,
        "flops_executed": cost.executed,
        "seconds": cost.seconds,
    }
    accuracy = row["accuracy"]
    if accuracy is not None:
        cells["accuracy"] = accuracy["value"]
        cells["low"] = accuracy["low"]
        cells["high"] = accuracy["high"]
        cells["n"] = accuracy["n"]
    finished = row.get("finished_accuracy")
    if finished is not None:
        cells["finished_accuracy"] = finished["value"]
        cells["finished_low"] = finished["low"]
        cells["finished_high"] = finished["high"]
    if row is run.evaluations[-1]:
        cells["prefix"] = run.result["prefix"]
        cells["kl_beyond"] = split_mean(run.kl_after, tail)[1]
        for name, share in run.also.items():
            cells[f"also_{name}"] = share
    for name, value in cells.items():
        if isinstance(value, float):
            cells[name] = f"{value:.6g}"
    return cells
