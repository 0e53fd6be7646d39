"""Read run folders, and write the evaluations of their runs as CSV."""

import csv
import dataclasses
import os
import reprlib
from pathlib import Path
from typing import Any, NamedTuple

from ..config import is_text
from ..errors import UserError
from ..maths.intervals import split_mean
from ..maths.weights import QUADRANTS
from .compare import ARMS_FILE
from .shapes import (
    ADVICE,
    AlsoFile,
    ArmsFile,
    ContextsFile,
    Evaluation,
    RunFile,
    ScoresRow,
    TokenValues,
    check,
    read_config,
    read_json,
    read_json_lines,
)

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
    "mean_tokens",
    "flops_useful",
    "flops_executed",
    "seconds",
)
# the horizontal axes of the pictures: the fields of Cost, and the number of steps
AXES = ("useful training FLOPs", "executed training FLOPs", "training time (s)", "steps")


class Cost(NamedTuple):
    """What training cost up to an evaluation."""

    useful: float  # FLOPs
    executed: float  # FLOPs
    seconds: float


NO_COST = Cost(0.0, 0.0, 0.0)


@dataclasses.dataclass(kw_only=True)
class Finished:
    """A finished run.

    ``root``: the folder it was found in. ``right``: step → share of correct answers of every
    problem. ``kl_before``, ``kl_after``: reverse KL per token of the fixed contexts. ``also``: name
    of another dataset → accuracy. ``offset``: the cost of the run it started from.
    """

    arm: str
    seed: int
    path: Path
    root: Path
    config: dict[str, dict[str, Any]]
    result: dict[str, Any]
    right: dict[int, list[float]]
    kl_before: TokenValues
    kl_after: TokenValues
    also: dict[str, float | None]
    offset: Cost = NO_COST

    @property
    def evaluations(self) -> list[Evaluation]:
        return self.result["evaluations"]

    def cost(self, row: Evaluation) -> Cost:
        """Return the cost of training up to an evaluation, including the run it started from."""
        return Cost(
            self.offset.useful + row["flops_useful"],
            self.offset.executed + row["flops_executed"],
            self.offset.seconds + row["seconds"],
        )

    def spent(self, against: str) -> dict[int, float]:
        """Return the x of every evaluation, by its step, on one of the axes AXES."""
        axis = AXES.index(against)
        spent = {}
        for row in self.evaluations:
            step = row["step"]
            spent[step] = (*self.cost(row), step)[axis]
        return spent


def collect_runs(paths: list[Path]) -> list[Finished]:
    """Return the finished runs in ``paths``: run folders, or folders that contain run folders.

    Of a comparison the final runs count, not the tuning runs. Where two folders contain the same
    arm with the same seed, arms are named FOLDER/ARM. UserError: a path contains no finished run,
    or a file of a run is damaged.
    """
    by_folder: dict[Path, Finished] = {}
    for path in paths:
        runs = _finished_runs(path)
        if not runs:
            raise UserError(
                f"{path}: no finished run found; expected a folder whose run.json has a result; "
                "check the path, or finish the run with --resume"
            )
        for run in runs:
            by_folder[run.path.resolve()] = run
    for run in by_folder.values():
        folder = _start(run)
        if folder in by_folder:
            start = by_folder[folder]
            run.offset = start.cost(start.evaluations[-1])
    runs = list(by_folder.values())
    names = {(run.arm, run.seed) for run in runs}
    if len(names) < len(runs):
        for run in runs:
            folder_name = run.root.resolve().name
            run.arm = f"{folder_name}/{run.arm}"
    return runs


def _finished_runs(path: Path) -> list[Finished]:
    """Return the finished runs in a run folder, a comparison, or any other folder."""
    if os.path.isfile(path / "run.json"):
        folders = [path]
    elif os.path.isfile(path / ARMS_FILE):
        folders = _final_folders(path)
    elif os.path.isdir(path):
        folders = sorted(file.parent for file in path.glob("**/run.json"))
    else:
        folders = []
    runs = []
    for folder in folders:
        run = _read_run(folder, path)
        if run is not None:
            runs.append(run)
    return runs


def _final_folders(comparison: Path) -> list[Path]:
    """Return the folders of a comparison's final runs, in the order of its arms and seeds."""
    arms = read_json(comparison / ARMS_FILE, ArmsFile)
    folders = []
    for arm in arms["arms"]:
        for seed in arms["seeds"]:
            folder = comparison / arm / f"seed-{seed}"
            if os.path.isfile(folder / "run.json"):
                folders.append(folder)
    return folders


def _start(run: Finished) -> Path | None:
    """Return the folder of the run that this one started from, if it started from a run.

    The file of a comparison names the arm, so a comparison can be moved. Otherwise the path of the
    student decides.
    """
    if os.path.isfile(run.root / ARMS_FILE):
        start = read_json(run.root / ARMS_FILE, ArmsFile)["start"].get(run.arm)
        if start is not None:
            return (run.root / start / f"seed-{run.seed}").resolve()
    student = run.config["models"]["student"]
    if not is_text(student):
        return None
    return Path(student).parent.resolve()


def _read_run(folder: Path, root: Path) -> Finished | None:
    """Return the run in ``folder``, or None if it has no result yet."""
    file = folder / "run.json"
    document = read_json(file, dict[str, object])
    if "result" not in document:
        return None
    check(document, RunFile, str(file))
    also = {}
    for other in sorted(folder.glob("also-*.json")):
        accuracy = read_json(other, AlsoFile)["accuracy"]
        also[as_text(other.stem.removeprefix("also-"))] = accuracy and accuracy["value"]
    run = Finished(
        arm=_arm_of(folder, root),
        seed=document["seed"],
        path=folder,
        root=root,
        config=read_config(folder / "config.yaml"),
        result=document["result"],
        right=_read_scores(folder / "scores.jsonl"),
        kl_before=read_json(folder / "before.json", ContextsFile)["kl_by_token"],
        kl_after=read_json(folder / "after.json", ContextsFile)["kl_by_token"],
        also=also,
    )
    _check_steps(run)
    _check_quadrants(run)
    return run


def _arm_of(folder: Path, root: Path) -> str:
    """Return the arm's name: of ARM/seed-N it is ARM, else the path of the folder inside root."""
    if folder.name.startswith("seed-"):
        name = folder.parent.name
    elif folder == root:
        name = folder.name
    else:
        name = str(folder.relative_to(root))
    return as_text(name)


def as_text(name: str) -> str:
    """Return a file name, with "?" for every byte that is not UTF-8."""
    return name.encode(errors="replace").decode()


def _read_scores(file: Path) -> dict[int, list[float]]:
    if not os.path.exists(file):
        return {}
    scores = {}
    for row in read_json_lines(file, ScoresRow):
        scores[row["step"]] = row["right"]
    return scores


def _check_steps(run: Finished) -> None:
    """Raise UserError unless evaluations and scores belong to the same, ascending steps."""
    steps = [row["step"] for row in run.evaluations]
    if not steps or steps[0] != 0 or steps != sorted(set(steps)):
        raise UserError(
            f"{run.path / 'run.json'}: result.evaluations: expected ascending steps from 0, got "
            f"{reprlib.repr(steps)}; {ADVICE}"
        )
    if not run.right:
        return
    complete = list(run.right) == steps and all(run.right.values())
    if not complete or any(row["accuracy"] is None for row in run.evaluations):
        raise UserError(
            f"{run.path / 'scores.jsonl'}: expected a row with scores for each of the steps "
            f"{reprlib.repr(steps)}, got rows for {reprlib.repr(list(run.right))}; {ADVICE}"
        )


def _check_quadrants(run: Finished) -> None:
    """Raise UserError unless every evaluation has all quadrants, or has none."""
    for row in run.evaluations:
        quadrants = row.get("quadrants")
        if quadrants is not None and set(quadrants["quadrants"]) != set(QUADRANTS):
            raise UserError(
                f"{run.path / 'run.json'}: result.evaluations: step {row['step']}: expected the "
                f"quadrants {'; '.join(QUADRANTS)}, got {list(quadrants['quadrants'])}; {ADVICE}"
            )


def by_arm(runs: list[Finished]) -> dict[str, list[Finished]]:
    """Return the runs of each arm, sorted by seed; arms keep their order."""
    arms: dict[str, list[Finished]] = {}
    for run in runs:
        arms.setdefault(run.arm, []).append(run)
    for group in arms.values():
        group.sort(key=lambda run: run.seed)
    return arms


def common_steps(runs: list[Finished]) -> list[int]:
    """Return the steps at which all runs were evaluated.

    A resumed run can be longer than the others, and runs can differ in --eval-every.
    """
    common = {row["step"] for row in runs[0].evaluations}
    for run in runs:
        common &= {row["step"] for row in run.evaluations}
    return sorted(common)


def common_tail(runs: list[Finished]) -> int:
    """Return the longest prefix of the arms that truncate; beyond it none of them is trained."""
    longest = 0
    for run in runs:
        prefix = run.result["prefix"]
        if prefix < run.config["rollout"]["max_new_tokens"]:
            longest = max(longest, prefix)
    return longest


def write_csv(runs: list[Finished], file: Path) -> None:
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


def _csv_row(run: Finished, row: Evaluation, tail: int) -> dict[str, object]:
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
    if row is run.evaluations[-1]:
        cells["prefix"] = run.result["prefix"]
        cells["kl_beyond"] = split_mean(run.kl_after, tail)[1]
        for name, share in run.also.items():
            cells[f"also_{name}"] = share
    for name, value in cells.items():
        if isinstance(value, float):
            cells[name] = f"{value:.6g}"
    return cells
