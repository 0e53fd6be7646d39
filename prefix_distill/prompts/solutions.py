"""Worked solutions, which few-shot examples show."""

import re
from typing import Any

from . import answers
from .columns import match_name, reach
from .presets import Preset
from .readers import Row


def find_solution(row: Row, answer_column: str | None, preset: Preset | None) -> Any:
    """Return the preset's solution column, else a column named solution with text, or None."""
    if preset is not None and preset.solution:
        return reach(row, match_name(row, preset.solution))
    if answer_column in ("solution", None):
        return None  # the solution is the answer
    solution = row.get("solution")
    if isinstance(solution, str):
        return solution
    return None


def end_with_box(solution: str, gold: str, preset: Preset | None) -> str:
    """Return the solution, followed by the boxed reference unless it has a box."""
    if answers.extract_answer(solution, "boxed") is not None:
        return solution
    if preset is not None and preset.solution_cut:
        solution = re.sub(preset.solution_cut, "", solution)
    solution = solution.strip()
    final = answers.extract_reference(gold)
    if solution == final:
        return f"\\boxed{{{final}}}"
    return f"{solution}\n\n\\boxed{{{final}}}"
