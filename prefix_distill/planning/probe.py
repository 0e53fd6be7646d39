"""`prefix-distill probe`: measure before training where the student differs from the teacher.

Keys of its document:

by_position          reverse KL(S‖T) and entropy of S (nats per token), in bins of the student's own
                     full rollouts
kl_share             share of each rollout's KL in its first 10, 25 and 50%, over all rollouts
kl_share_by_tokens   share of the KL in the first N tokens, for every prefix length tried
quadrants            entropy × divergence of the student's tokens, above or below their medians
                     (``weights.quadrants``)
teacher_prefix_curve the student's accuracy after the teacher's first N tokens (arXiv 2602.15260)
teacher_decay_curve  the teacher's accuracy after the student's first N tokens
recommended_prefix   tokens, "full", or None if there is nothing to recommend
expected_saving      useful FLOPs of a step with full rollouts over those with the prefix
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .. import config as configuration
from ..config import Config
from ..engine import evaluate
from ..engine.device import Clock
from ..engine.memory import PROBE_REMEDIES
from ..engine.meter import Meter
from ..engine.models import Model
from ..engine.rollout import rollout_of
from ..engine.scoring import Scorer
from ..errors import ignore
from ..maths import intervals
from ..maths.weights import quadrants
from ..training.defaults import fill_in
from ..training.prompt_sets import load_prompt_sets
from ..training.run import Notes, Run, settled
from .answering import Answering, Answers
from .case import Ids

# prefix lengths that are tried, as shares of the teacher's mean length
SHARES = (0.025, 0.05, 0.1, 0.2, 0.35, 0.5)
# share of the accuracy gap between student and teacher that a recommended prefix must close
RECOVERED = 0.8
# share of the divergence that it must hold if there are no answers to grade
HELD = 0.8
BINS = 24

Values = list[list[float | None]]  # nats per token, by rollout


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Accuracy by the number N of given tokens, one point {tokens, value, …} per N.

    ``student``: of the student after N teacher tokens; ``teacher``: of the teacher after N student
    tokens.
    """

    student: list[dict]
    teacher: list[dict]


def fit_to_data(config: Config) -> tuple[Config, list[str]]:
    """Return the config with at most as many prompts as its datasets hold, and a note if fewer.

    Streamed sets have no known size and are left alone.
    """
    if config.data.streaming:
        return config, []
    notes = Notes()
    sets = load_prompt_sets(fill_in(config, notes), notes)
    available = 0
    for s in sets.train:
        available += len(tuple(s.prompts))
    wanted = config.train.batch_size
    if wanted <= available:
        return config, []
    note = f"--problems {wanted}: the data has {available} training prompts; all are probed"
    return configuration.replace(config, train={"batch_size": available}), [note]


def probe(run: Run, say: Callable[[str], None] = ignore) -> dict:
    """Return the document of `prefix-distill probe` for the run's training prompts.

    If answers can be graded, the recommended prefix is the shortest of those tried, up to half of
    the teacher's mean length, with which the student closes 80% of the gap in accuracy. This tells
    a wrong start, which a prefix can correct, from a missing skill, which the rest of the answer
    needs as well. Otherwise it is the shortest prefix whose tokens hold 80% of the KL. ``say``
    receives a line per step.
    """
    prompts = run.problems.train
    run.limits.remedies = PROBE_REMEDIES
    clock = Clock(device=run.place.device)
    answering = Answering(run)
    with clock.phase("probe"):
        say(f"both models answer {len(prompts)} prompts in full")
        student = answering.answer(answering.student)
        teacher = answering.answer(answering.teacher)
        length = _mean_length(_in_student_tokens(run, teacher))
        tried = sorted({max(1, round(share * length)) for share in SHARES})
        kl, entropy = _measure_tokens(run, student, answering.meter)
        curves = None
        if all(run.problems.grader.can_grade(p.prompt) for p in prompts):
            curves = _measure_curves(answering, student, teacher, tried=tried, say=say)
    kl_by_tokens = {n: _share_of_kl(kl, [n] * len(kl)) for n in tried}
    recommended, reason = recommend(curves, kl_by_tokens, length)
    # Without a recommended length, a step costs as much as with full rollouts.
    response = length
    if isinstance(recommended, int):
        response = recommended
    return {
        "recommended_prefix": recommended,
        "reason": reason,
        "expected_saving": run.update_cost(prompts, length) / run.update_cost(prompts, response),
        "prompts": len(prompts),
        "prompt_tokens": _mean_length(answering.student.prompts),
        "student_tokens": _mean_length(student.ids),
        "teacher_tokens": length,
        "kl": intervals.token_mean(kl),
        "kl_share": {
            "first_10_percent": _share_of_kl(kl, _shorten(kl, 0.1)),
            "first_25_percent": _share_of_kl(kl, _shorten(kl, 0.25)),
            "first_50_percent": _share_of_kl(kl, _shorten(kl, 0.5)),
        },
        "kl_share_by_tokens": {str(n): share for n, share in kl_by_tokens.items()},
        "by_position": _bin_positions(kl, entropy),
        "quadrants": quadrants(intervals.known(entropy), intervals.known(kl)),
        **_publish(curves),
        "flops": answering.total_flops().summary() | {"not_counted": run.pair.not_counted},
        "seconds": clock.seconds["probe"],
    }


def _mean_length(rows: Sequence[Ids]) -> float:
    """Return the mean number of ids."""
    return sum(map(len, rows)) / len(rows)


def _in_student_tokens(run: Run, answers: Answers) -> list[Ids]:
    """Return the teacher's answers in the student's tokens."""
    if run.pair.alignment is None:
        return answers.ids
    return list(map(run.pair.alignment.to_student, answers.ids, answers.finished))


def _in_teacher_tokens(run: Run, answers: Answers) -> list[Ids]:
    """Return the student's answers in the teacher's tokens."""
    if run.pair.alignment is None:
        return answers.ids
    texts = []
    for ids, finished in zip(answers.ids, answers.finished, strict=True):
        teacher_ids, _ = run.pair.alignment.align(ids, finished)
        texts.append(teacher_ids)
    return texts


def _cut(answers: Answers, tokens: int) -> Answers:
    """Return the first ``tokens`` of every answer."""
    cut = Answers(ids=[], finished=[])
    for ids, finished in zip(answers.ids, answers.finished, strict=True):
        cut.ids.append(ids[:tokens])
        cut.finished.append(finished and len(ids) <= tokens)
    return cut


def _measure_tokens(run: Run, answers: Answers, meter: Meter) -> tuple[Values, Values]:
    """Return the reverse KL and the entropy of every token of the student's answers."""
    rollouts = []
    for slot, prompt in enumerate(run.problems.train):
        rollout = rollout_of(
            slot,
            prompt.student_ids,
            answers.ids[slot],
            finished=answers.finished[slot],
            teacher_prompt=prompt.teacher_ids,
        )
        rollouts.append(rollout)
    scorer = Scorer.reverse_kl(run.pair, run.place, run.method.terms.memory_bytes)
    facts = evaluate.held_out_facts(
        scorer, run.pair.align(rollouts), run.limits, meter=meter, phase="scoring"
    )
    kl: Values = []
    entropy: Values = []
    for row in facts:
        kl.append(row["divergence"])
        entropy.append(row["entropy"])
    return kl, entropy


def _measure_curves(
    answering: Answering,
    student: Answers,
    teacher: Answers,
    tried: list[int],
    say: Callable[[str], None],
) -> Curves:
    """Return both accuracy curves, at N = 0 and every number ``tried``."""
    run = answering.run
    curves = Curves(
        student=[_grade(run, run.pair.student, student, tokens=0)],
        teacher=[_grade(run, run.pair.teacher, teacher, tokens=0)],
    )
    teacher_texts = _in_student_tokens(run, teacher)
    for n in tried:
        say(f"swap test: each model continues the other's first {n} tokens")
        starts = [ids[:n] for ids in teacher_texts]
        continued = answering.continue_from(answering.student, starts, n)
        curves.student.append(_grade(run, run.pair.student, continued, tokens=n))
        starts = _in_teacher_tokens(run, _cut(student, n))
        continued = answering.continue_from(answering.teacher, starts, n)
        curves.teacher.append(_grade(run, run.pair.teacher, continued, tokens=n))
    return curves


def _grade(run: Run, model: Model, answers: Answers, tokens: int) -> dict:
    """Return the accuracy of answers after ``tokens`` given tokens, with its interval.

    ``right``: the score of every prompt, from 0 to 1. All prompts must be gradable.
    """
    right = []
    for prompt, ids in zip(run.problems.train, answers.ids, strict=True):
        text = evaluate.decode(model, ids)
        grade = run.problems.grader.grade(prompt.prompt, text)
        right.append(settled(grade, "the grade").score)
    of_finished = [score * done for score, done in zip(right, answers.finished, strict=True)]
    return {
        "tokens": tokens,
        **intervals.interval(right),
        "finish_rate": sum(answers.finished) / len(answers.finished),
        "finished_accuracy": intervals.ratio_interval(of_finished, answers.finished),
        "right": right,
    }


def recommend(
    curves: Curves | None, kl_by_tokens: dict[int, float], length: float
) -> tuple[int | str | None, str]:
    """Return the recommended prefix and the reason.

    ``curves``: None without reference answers; ``kl_by_tokens``: N → share of the KL in the first N
    tokens; ``length``: the mean length of the teacher's answers.
    """
    if curves is None:
        return _recommend_by_divergence(kl_by_tokens, length)
    return _recommend_by_accuracy(curves, length)


def _recommend_by_divergence(
    kl_by_tokens: dict[int, float], length: float
) -> tuple[int | str, str]:
    caveat = (
        "accuracy was not measured, because some prompts have no reference answer that can be "
        "graded"
    )
    for n, share in sorted(kl_by_tokens.items()):
        if share >= HELD and n <= length / 2:
            reason = (
                f"the first {n} tokens account for {share:.0%} of the divergence of the student's "
                f"full answers; {caveat}"
            )
            return n, reason
    most = max(kl_by_tokens.values(), default=0)
    reason = (
        f"no prefix suffices: the first half of the answer accounts for only {most:.0%} of the "
        f"divergence; {caveat}"
    )
    return "full", reason


def _recommend_by_accuracy(curves: Curves, length: float) -> tuple[int | str | None, str]:
    student, teacher = curves.student[0], curves.teacher[0]
    accuracies = f"{student['value']:.1%} and {teacher['value']:.1%}"
    gap = teacher["value"] - student["value"]
    # Both models answer the same problems, so the interval is that of paired differences.
    pairs = zip(teacher["right"], student["right"], strict=True)
    difference = intervals.interval([t - s for t, s in pairs], lowest=-1)
    if difference["low"] <= 0:
        reason = (
            "nothing to recommend: the teacher did not beat the student on these problems; "
            f"student and teacher reach {accuracies} (difference {gap:+.1%} "
            f"[{difference['low']:+.1%}, {difference['high']:+.1%}]); use another teacher or other "
            "problems"
        )
        return None, reason
    closed = {}
    for point in curves.student[1:]:
        closed[point["tokens"]] = (point["value"] - student["value"]) / gap
    for n, share in closed.items():
        # The half is rounded up, because the tried lengths are rounded.
        if share >= RECOVERED and n <= length / 2 + 0.5:
            reason = (
                f"a prefix suffices: after the first {n} of the teacher's {length:.0f} tokens, the "
                f"student closes {share:.0%} of the gap between the accuracies of student and "
                f"teacher ({accuracies})"
            )
            return n, reason
    n, share = list(closed.items())[-1]
    reason = (
        f"no prefix suffices: even after the first {n} of the teacher's {length:.0f} tokens, the "
        f"student closes only {share:.0%} of the gap between the accuracies of student and teacher "
        f"({accuracies})"
    )
    return "full", reason


def _publish(curves: Curves | None) -> dict[str, list]:
    """Return both curves as the document shows them: without the results per prompt."""
    if curves is None:
        return {"teacher_prefix_curve": [None], "teacher_decay_curve": [None]}
    for point in curves.student + curves.teacher:
        del point["right"]
    return {"teacher_prefix_curve": curves.student, "teacher_decay_curve": curves.teacher}


def _shorten(values: Values, share: float) -> list[int]:
    """Return the lengths of the first ``share`` of every rollout, rounded up."""
    return [math.ceil(share * len(row)) for row in values]


def _share_of_kl(kl: Values, lengths: Sequence[int]) -> float:
    """Return the share of the total KL in the first ``lengths`` tokens of the rollouts."""
    first = [row[:length] for row, length in zip(kl, lengths, strict=True)]
    return math.fsum(intervals.known(first)) / max(1e-12, math.fsum(intervals.known(kl)))


def _bin_positions(kl: Values, entropy: Values) -> list[dict]:
    """Return means over bins of positions: {from, to (excluded), tokens, kl, entropy}."""
    # At most BINS bins of equal size; the last one may be shorter.
    longest = max(map(len, kl))
    size = max(1, math.ceil(longest / BINS))
    bins = []
    for start in range(0, longest, size):
        # Across tokenizers only the first token of a trained unit has a value.
        kl_values = intervals.known([row[start : start + size] for row in kl])
        entropy_values = intervals.known([row[start : start + size] for row in entropy])
        if kl_values:
            row = {
                "from": start,
                "to": start + size,
                "tokens": len(kl_values),
                "kl": math.fsum(kl_values) / len(kl_values),
                "entropy": math.fsum(entropy_values) / len(entropy_values),
            }
            bins.append(row)
    return bins
