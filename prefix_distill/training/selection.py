"""Micro-batches, their losses, and the token statistics that selection uses."""

import torch

from ..engine import scoring
from ..engine.device import Clock
from ..engine.rollout import Rollout
from ..engine.scoring import Reading
from ..maths.divergence import Terms
from ..maths.flops import Ledger
from .run import Run

# (prompt, sample) → statistic → position → nats
TokenFacts = dict[tuple[int, int], dict[str, dict[int, float]]]


def measure_tokens(
    run: Run, rollouts: list[Rollout], ledger: Ledger, clock: Clock
) -> tuple[TokenFacts, Reading | None]:
    """Return ``scoring.token_statistics`` of this rank's rollouts, and the forward pass if
    reusable.

    The loss can reuse the forward pass if every rank has one micro-batch and the teacher's
    divergence is the loss.
    """
    groups = split_micro_batches(run, rollouts)
    by_teacher = choose_terms(run, rollouts).taught_by == "teacher"
    if max(run.place.gather(len(groups) if by_teacher else 2)) == 1:
        [group] = groups
        found = run.attempt(ledger, lambda spent: _read_once(run, group, spent, clock))
        if found is not None:
            return found
    with clock.phase("selection"):
        return run.fit(
            "micro_batch_size",
            ledger,
            lambda spent: scoring.token_statistics(
                _ranking_terms(run),
                run.student,
                run.teacher,
                run.shared,
                rollouts,
                run.place,
                run.config.train.micro_batch_size,
                run.counts_both(spent, "selection"),
                _needs_forward_kl(run),
            ),
        ), None


def choose_terms(run: Run, rollouts: list[Rollout]) -> Terms:
    """Return the loss of a micro-batch, whose rollouts all come from one model."""
    return run.text_terms if rollouts[0].off_policy else run.terms


def split_micro_batches(run: Run, rollouts: list[Rollout]) -> list[list[Rollout]]:
    """Return this rank's micro-batches; student and teacher rollouts have different losses and are
    never mixed."""
    return [
        group
        for side in (False, True)
        for group in scoring.micro_batches(
            [r for r in rollouts if r.off_policy is side],
            run.config.train.micro_batch_size,
            run.student.reads_once,
        )
    ]


def read_teacher(run: Run, rollouts: list[Rollout], clock: Clock) -> torch.Tensor:
    """Return the teacher's hidden rows [N, E] of the taught tokens, without gradient."""
    with (
        clock.phase("teacher_score"),
        torch.no_grad(),
        run.place.autocast(run.place.teacher_device),
    ):
        return scoring.hidden_rows(run.teacher, rollouts, teacher=True)


def _read_once(
    run: Run, group: list[Rollout], ledger: Ledger, clock: Clock
) -> tuple[TokenFacts, Reading]:
    """Run the forward passes of one micro-batch, with the student's graph; the loss reuses them."""
    with clock.phase("student_update"), run.place.autocast(run.place.device):
        student_ND = scoring.hidden_rows(run.student, group)
    teacher_NE = read_teacher(run, group, clock)
    with clock.phase("selection"):
        facts = scoring.row_statistics(
            _ranking_terms(run),
            run.student,
            student_ND.detach(),
            run.teacher,
            teacher_NE,
            run.shared,
            group,
            _needs_forward_kl(run),
        )
    for model, shape, teacher in (
        (run.student, run.student_shape, False),
        (run.teacher, run.teacher_shape, True),
    ):
        rows = scoring.head_rows(model, group, run.shared, teacher, whole=True)
        ledger.add("selection", shape.output(rows), shape.output(rows))
    return scoring.positions(group, facts), Reading(group, student_ND, teacher_NE)


def _ranking_terms(run: Run) -> Terms:
    """Return the divergence that ranks tokens, independent of the loss."""
    return Terms("reverse-kl", dtype=run.place.head_dtype, memory_bytes=run.terms.memory_bytes)


def _needs_forward_kl(run: Run) -> bool:
    return run.selection is not None and run.selection.kind == "overconfident"
