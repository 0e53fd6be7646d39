"""Read what a running or interrupted run has stored so far."""

from pathlib import Path
from typing import Any

from ..training.text_lines import EVALUATIONS
from .shapes import Evaluation, ScoresRow, check
from .texts import EvaluationRow, read_stored


def read_result(folder: Path) -> dict[str, Any] | None:
    """Return the evaluations of an unfinished run as a result; None without an evaluation."""
    file = folder / EVALUATIONS
    rows: list[EvaluationRow] = read_stored(file, EvaluationRow)
    if not rows:
        return None
    evaluations = [row["evaluation"] for row in rows]
    check(evaluations, list[Evaluation], str(file))
    return {"evaluations": evaluations, "prefix": rows[-1]["prefix"], "full_rollout_cost": None}


def read_scores(folder: Path, steps: list[int]) -> dict[int, list[float]]:
    """Return the scores of the evaluations after ``steps``; {} if one is missing."""
    scores = {}
    for row in read_stored(folder / "scores.jsonl", ScoresRow):
        scores[row["step"]] = row["right"]
    if not all(step in scores for step in steps):
        return {}
    return {step: scores[step] for step in steps}
