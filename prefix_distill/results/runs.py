"""Read run folders."""

import dataclasses
import hashlib
import json
import os
import reprlib
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from ..config import is_text
from ..errors import UserError
from ..maths.weights import QUADRANTS
from . import unfinished
from .compare import ARMS_FILE
from .shapes import (
    ADVICE,
    AlsoFile,
    ArmsFile,
    ContextsFile,
    Evaluation,
    RunFile,
    ScoresRow,
    StartedRunFile,
    TokenValues,
    check,
    read_config,
    read_json,
    read_json_lines,
)
from .texts import BEFORE, Example, read_stored, state_of

# the horizontal axes of the pictures: the fields of Cost, and the number of steps
AXES = ("useful training FLOPs", "executed training FLOPs", "training time (s)", "steps")


class Cost(NamedTuple):
    """What training cost up to an evaluation."""

    useful: float  # FLOPs
    executed: float  # FLOPs
    seconds: float


NO_COST = Cost(0.0, 0.0, 0.0)


@dataclasses.dataclass(kw_only=True)
class StoredRun:
    """A run whose evaluations are reported.

    ``state``: finished, running or interrupted; ``problems``: a digest of the held-out problems, ""
    without their file; ``metrics``: a row per step. ``root``: the folder it was found in.
    ``right``: step → share of correct answers of every problem. ``kl_before``, ``kl_after``:
    reverse KL per token of the fixed contexts. ``also``: name of another dataset → accuracy.
    ``offset``: the cost of the run it started from.
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
    problems: str = ""
    state: str = "finished"
    metrics: list[dict[str, Any]] = dataclasses.field(default_factory=list)
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


def collect_runs(paths: list[Path]) -> list[StoredRun]:
    """Return the runs in ``paths``: run folders, or folders that contain run folders.

    Of a comparison the final runs count, not the tuning runs. An unfinished run counts if a path
    names its folder, or contains no finished run (``find_left_out``). Where two folders contain the
    same arm with the same seed, that arm is named FOLDER/ARM. UserError: a path is no folder or
    contains no run with an evaluation, or a file of a run is damaged.
    """
    by_folder: dict[Path, StoredRun] = {}
    for path in paths:
        if not os.path.isdir(path):  # Path.is_dir raises for a name that is too long
            raise UserError(f"{path}: no such folder; name a run folder, or one that contains runs")
        runs = _runs_in(path)
        finished = [run for run in runs if run.state == "finished"]
        if finished:
            runs = finished
        if not runs:
            raise UserError(
                f"{path}: no finished run found; expected a folder whose run.json has a result, or "
                "a run with an evaluation; check the path, or finish the run with --resume"
            )
        for run in runs:
            by_folder[run.path.resolve()] = run
    for run in by_folder.values():
        folder = _start(run)
        if folder in by_folder:
            start = by_folder[folder]
            run.offset = start.cost(start.evaluations[-1])
    runs = list(by_folder.values())
    counts = Counter((run.arm, run.seed) for run in runs)
    ambiguous = {arm for (arm, _), count in counts.items() if count > 1}
    for run in runs:
        if run.arm in ambiguous:
            run.arm = f"{run.root.resolve().name}/{run.arm}"
    return runs


def find_left_out(paths: list[Path], runs: list[StoredRun]) -> list[str]:
    """Return a warning that names the unfinished runs in ``paths`` that are not among ``runs``."""
    taken = {run.path for run in runs}
    names = []
    for path in paths:
        names += [str(folder) for folder in _folders_in(path) if folder not in taken]
    if not names:
        return []
    return [
        f"left out, because they have not finished: {', '.join(names)}; finish them with --resume, "
        "or name one of them to report on it alone"
    ]


def _runs_in(path: Path) -> list[StoredRun]:
    """Return the runs with an evaluation in a run folder, a comparison, or any other folder."""
    runs = []
    for folder in _folders_in(path):
        run = _read_run(folder, path)
        if run is not None:
            runs.append(run)
    return runs


def _folders_in(path: Path) -> list[Path]:
    """Return the run folders in a folder, or the folder itself."""
    if os.path.isfile(path / "run.json"):
        return [path]
    if os.path.isfile(path / ARMS_FILE):
        return _final_folders(path)
    if os.path.isdir(path):
        return sorted(file.parent for file in path.glob("**/run.json"))
    return []


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


def _start(run: StoredRun) -> Path | None:
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


def _read_run(folder: Path, root: Path) -> StoredRun | None:
    """Return the run in ``folder``, or None if it has no evaluation yet."""
    file = folder / "run.json"
    document = read_json(file, dict[str, object])
    state = "finished"
    if "result" not in document:
        document["result"] = unfinished.read_result(folder)
        if document["result"] is None:
            return None
        state = state_of(folder)
        check(document, StartedRunFile, str(file))
    else:
        check(document, RunFile, str(file))
    run = StoredRun(
        arm=_arm_of(folder, root),
        seed=document["seed"],
        path=folder,
        root=root,
        config=read_config(folder / "config.yaml"),
        result=document["result"],
        right={},
        kl_before=[],
        kl_after=[],
        also=_read_also(folder),
        problems=_digest_problems(folder),
        state=state,
        metrics=read_stored(folder / "metrics.jsonl", dict[str, object]),
    )
    _read_measurements(run)
    _check_steps(run)
    _check_quadrants(run)
    return run


def _read_measurements(run: StoredRun) -> None:
    """Read the scores and the KL of the fixed contexts, of an unfinished run as far as stored."""
    folder = run.path
    if run.state == "finished":
        run.right = _read_scores(folder / "scores.jsonl")
        run.kl_before = read_json(folder / "before.json", ContextsFile)["kl_by_token"]
        run.kl_after = read_json(folder / "after.json", ContextsFile)["kl_by_token"]
        return
    steps = [row["step"] for row in run.evaluations]
    run.right = unfinished.read_scores(folder, steps)
    if os.path.isfile(folder / "before.json"):
        run.kl_before = read_json(folder / "before.json", ContextsFile)["kl_by_token"]


def _read_also(folder: Path) -> dict[str, float | None]:
    """Return the accuracy on other datasets by their names."""
    also = {}
    for other in sorted(folder.glob("also-*.json")):
        accuracy = read_json(other, AlsoFile)["accuracy"]
        also[as_text(other.stem.removeprefix("also-"))] = accuracy and accuracy["value"]
    return also


def _digest_problems(folder: Path) -> str:
    """Return a digest of the held-out problems and their references; "" without their file.

    Templates and instructions do not count: arms may differ in them and share their problems.
    """
    rows: list[Example] = read_stored(folder / BEFORE, Example)
    if not rows:
        return ""
    problems = [(row["problem"], row["reference"]) for row in rows]
    return hashlib.sha256(json.dumps(problems).encode()).hexdigest()[:16]


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


def _check_steps(run: StoredRun) -> None:
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


def _check_quadrants(run: StoredRun) -> None:
    """Raise UserError unless every evaluation has all quadrants, or has none."""
    for row in run.evaluations:
        quadrants = row.get("quadrants")
        if quadrants is not None and set(quadrants["quadrants"]) != set(QUADRANTS):
            raise UserError(
                f"{run.path / 'run.json'}: result.evaluations: step {row['step']}: expected the "
                f"quadrants {'; '.join(QUADRANTS)}, got {list(quadrants['quadrants'])}; {ADVICE}"
            )


def by_arm(runs: list[StoredRun]) -> dict[str, list[StoredRun]]:
    """Return the runs of each arm, sorted by seed; arms keep their order."""
    arms: dict[str, list[StoredRun]] = {}
    for run in runs:
        arms.setdefault(run.arm, []).append(run)
    for group in arms.values():
        group.sort(key=lambda run: run.seed)
    return arms


def common_steps(runs: list[StoredRun]) -> list[int]:
    """Return the steps at which all runs were evaluated.

    A resumed run can be longer than the others, and runs can differ in --eval-every.
    """
    common = {row["step"] for row in runs[0].evaluations}
    for run in runs:
        common &= {row["step"] for row in run.evaluations}
    return sorted(common)


def common_tail(runs: list[StoredRun]) -> int:
    """Return the longest prefix of the arms that truncate; beyond it none of them is trained."""
    longest = 0
    for run in runs:
        prefix = run.result["prefix"]
        if prefix < run.config["rollout"]["max_new_tokens"]:
            longest = max(longest, prefix)
    return longest
