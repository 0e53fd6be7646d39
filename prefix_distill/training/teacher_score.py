"""Measure the teacher on the held-out problems, to see how much of the gap a run closes."""

from typing import TYPE_CHECKING

from ..config.sections import SELF
from ..display import phase
from ..engine.decoder import make_decoder
from ..engine.evaluate import Evaluation, evaluate
from ..engine.sampling import GenerationCost

if TYPE_CHECKING:
    from ..engine.evaluate import Score
    from .run import Run
    from .state import State


def is_measured(run: "Run") -> bool:
    """Return whether the teacher's accuracy says how far the student could come.

    Not so if the teacher is the student itself, or sees privileged text; and a teacher without
    graded problems has no accuracy.
    """
    config = run.config
    return (
        config.evaluate.teacher == "auto"
        and config.models.teacher != SELF
        and config.data.privileged_column is None
        and any(
            run.problems.grader.can_grade(prompt) for prompt, _ in run.problems.teacher_held_out
        )
    )


@phase("evaluating the teacher", at_stop="leaving the teacher's evaluation unfinished")
def measure_teacher(state: "State") -> "Score":
    """Sample and grade the teacher's answers to the held-out problems, with the student's seeds.

    The FLOPs are in the ledger's row ``evaluation``, which is not a cost of training.
    """
    run = state.run
    how = Evaluation(
        sampler=run.method.teacher_eval_sampler,
        samples=run.config.evaluate.rollouts,
        max_new_tokens=run.max_new_tokens,
        grader=run.problems.grader,
    )
    meter = state.meter()
    with meter.phase("evaluation"):
        score = evaluate(
            make_decoder(run.pair.teacher, run.place.dtype),
            run.problems.teacher_held_out,
            how,
            limits=run.limits,
            cost=GenerationCost.in_phase(meter, run.pair.teacher_shape, "evaluation"),
        )
    state.count(meter)
    return score


def gap_closed(before: dict | None, after: dict | None, teacher: dict | None) -> float | None:
    """Return (after - before) / (teacher - before) of three accuracies.

    None: one is not known, or the teacher is not better than the untrained student.
    """
    if before is None or after is None or teacher is None:
        return None
    gap = teacher["value"] - before["value"]
    if gap <= 0:
        return None
    gained: float = after["value"] - before["value"]
    return gained / gap
