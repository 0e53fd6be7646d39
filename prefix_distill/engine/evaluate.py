"""Evaluation: sample and grade full answers, and measure the held-out KL.

An evaluation reports accuracy with intervals, pass@k, length, endings and repetition. It has fixed
prompts and seeds, and the prefix limit does not apply to it.
"""

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass

from .. import display
from ..maths.intervals import interval, ratio_interval
from ..prompts.grading import Grader
from ..prompts.prompt import Prompt, Rendered
from . import stopping
from .memory import MemoryLimits
from .meter import Meter
from .models import Model
from .repetition import find_loop, repeats
from .rollout import Rollout, rollout_of
from .sampling import GenerationCost, Request, Response, Sampler
from .scoring import Scorer, TokenFacts

Problem = tuple[Prompt, tuple[int, ...]]  # a prompt and its token ids
Facts = dict[str, list[float | None]]  # one rollout: statistic → a number per token


@dataclass(frozen=True, kw_only=True)
class Score:
    """The result of an evaluation: aggregates as in the JSON output, one record per problem.

    ``finished_accuracy``: accuracy among the finished answers; None without any. ``timeouts``: how
    many answers a user's grader did not grade in time, which score 0.
    """

    accuracy: dict | None
    finished_accuracy: dict | None
    pass_at_k: dict | None
    finish_rate: float
    mean_tokens: float
    repetition_rate: float
    records: list[dict]
    timeouts: int = 0

    def right(self) -> list[float]:
        """Return the share of correct answers of every problem that can be graded."""
        return [
            sum(r["correct"] for r in record["responses"]) / len(record["responses"])
            for record in _gradable(self.records)
        ]

    def summary(self) -> dict:
        """Return the aggregates as JSON values."""
        return {
            "accuracy": self.accuracy,
            "finished_accuracy": self.finished_accuracy,
            "pass_at_k": self.pass_at_k,
            "finish_rate": self.finish_rate,
            "mean_tokens": self.mean_tokens,
            "repetition_rate": self.repetition_rate,
        }


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How problems are sampled and graded: ``samples`` full answers per problem.

    ``prefix``: a number of tokens; records then say how many characters of an answer lie in them.
    """

    sampler: Sampler
    samples: int
    max_new_tokens: int
    grader: Grader
    prefix: int | None = None


def evaluate(
    model: Model,
    problems: list[Problem],
    how: Evaluation,
    limits: MemoryLimits,
    cost: GenerationCost,
) -> Score:
    """Sample full answers to every problem, grade them and return the score.

    ``problems``: (Prompt, prompt ids) pairs. A sample is seeded by (seed, problem, sample) alone,
    so all evaluations of a run, and of two models, are paired. accuracy: avg@k over problems;
    pass_at_k: share of problems with at least one correct answer. Both leave out problems without a
    reference, and are None if no problem has one. The problems are divided among ranks, and each
    rank grades its own answers. Grading has a time limit, so two ranks could grade one answer
    differently. Records are gathered in problem order.

    stopping.CutOff: a signal asked the run to stop, and this evaluation may be cut off.
    """
    place = limits.place
    every = [(i, s) for i in range(len(problems)) for s in range(how.samples)]
    mine = every[place.rank :: place.world]
    requests = [Request(ids=tuple(problems[i][1]), key=("evaluate", i, s)) for i, s in mine]
    how.grader.start(prompt for prompt, _ in problems)

    def answer() -> list[tuple[int, int, dict]]:
        responses: list[Response] = []
        if mine:
            responses = limits.sample(
                model, requests, max_new_tokens=how.max_new_tokens, sampler=how.sampler, cost=cost
            )
        graded = []
        for (i, s), response in zip(mine, responses, strict=True):
            stopping.look()
            record = _grade(model, response, problems[i][0], grader=how.grader)
            if how.prefix is not None:
                record["prefix_characters"] = count_characters(model, response.ids[: how.prefix])
            graded.append((i, s, record))
        return graded

    with display.phase("evaluating", len(every), "answers", ranks=place.world):
        gathered = itertools.chain.from_iterable(stopping.gather_results(place, answer))
    records = [_empty_record(prompt) for prompt, _ in problems]
    for i, _, response_record in sorted(gathered, key=operator.itemgetter(0, 1)):
        records[i]["responses"].append(response_record)
    return _score(records)


def _empty_record(prompt: Prompt) -> dict:
    return {
        "problem": prompt.index,
        "prompt": prompt.messages[-1]["content"],
        "reference": prompt.answer,
        "responses": [],
    }


def _score(records: list[dict]) -> Score:
    """Return the score of graded records."""
    responses = [r for record in records for r in record["responses"]]
    accuracy = pass_at_k = finished_accuracy = None
    gradable = _gradable(records)
    if gradable:
        right = [[r["correct"] for r in record["responses"]] for record in gradable]
        accuracy = interval([sum(row) / len(row) for row in right])
        pass_at_k = interval([float(max(row) == 1) for row in right])
        finished_accuracy = _finished_accuracy(gradable)
    return Score(
        accuracy=accuracy,
        finished_accuracy=finished_accuracy,
        pass_at_k=pass_at_k,
        finish_rate=_share(responses, "finished"),
        mean_tokens=sum(r["tokens"] for r in responses) / len(responses),
        repetition_rate=_share(responses, "repeats"),
        records=records,
        timeouts=sum(r.get("timed_out", False) for r in responses),
    )


def _finished_accuracy(gradable: list[dict]) -> dict | None:
    """Return the accuracy of the finished answers with its interval; None without any."""
    right, counts = [], []
    for record in gradable:
        finished = [r["correct"] for r in record["responses"] if r["finished"]]
        right.append(float(sum(finished)))
        counts.append(len(finished))
    return ratio_interval(right, counts)


def _gradable(records: list[dict]) -> list[dict]:
    """Return the records of the problems whose answers were graded."""
    return [record for record in records if record["responses"][0]["correct"] is not None]


def decode(model: Model, ids: Sequence[int]) -> str:
    """Return the text of a response, without special tokens."""
    text: str = model.tokenizer.decode(list(ids), skip_special_tokens=True)  # type: ignore[assignment]  # a str for one sequence
    return text


def count_characters(model: Model, ids: Sequence[int]) -> int:
    """Return the length of the text of ids, without a character of which the end is missing."""
    return len(decode(model, ids).rstrip("\ufffd"))


def _grade(model: Model, response: Response, prompt: Prompt, grader: Grader) -> dict:
    """Return the record of a response.

    ``correct``: whether it is right, None without a reference answer; of a user's grader its score.
    ``loop_from``: the token at which a response that was cut begins to loop, None without a loop.
    """
    text = decode(model, response.ids)
    grade = grader.grade(prompt, text)
    correct: bool | float | None = None
    extra = {}
    if grade is not None and grader.own is None:
        correct = bool(grade.score)
    elif grade is not None:
        correct = grade.score
        extra["timed_out"] = grade.timed_out
    return {
        "text": text,
        "tokens": len(response.ids),
        "finished": response.finished,
        "repeats": repeats(response.ids),
        "loop_from": None if response.finished else find_loop(response.ids),
        "correct": correct,
        **extra,
    }


def _share(rows: list[dict], key: str) -> float:
    return sum(r[key] for r in rows) / len(rows)


def fixed_rollouts(
    student: Model,
    prompts: list[Rendered],
    how: Evaluation,
    limits: MemoryLimits,
    cost: GenerationCost,
) -> list[Rollout]:
    """Return one full rollout of every held-out prompt.

    They are the fixed contexts on which a run measures its KL before and after.
    """
    place = limits.place
    requests = [Request(ids=p.student_ids, key=("held-out", i)) for i, p in enumerate(prompts)]
    mine = requests[place.rank :: place.world]

    def sample() -> list[tuple[tuple[int, ...], bool]]:
        responses: list[Response] = []
        if mine:
            responses = limits.sample(
                student, mine, max_new_tokens=how.max_new_tokens, sampler=how.sampler, cost=cost
            )
        return [(r.ids, r.finished) for r in responses]

    with display.phase("sampling held-out contexts", len(requests), "answers", ranks=place.world):
        parts = stopping.gather_results(place, sample)
    rollouts = []
    for i, prompt in enumerate(prompts):
        ids, finished = parts[i % place.world][i // place.world]
        rollout = rollout_of(
            i, prompt.student_ids, ids, finished=finished, teacher_prompt=prompt.teacher_ids
        )
        rollouts.append(rollout)
    return rollouts


def held_out_facts(
    scorer: Scorer, rollouts: list[Rollout], limits: MemoryLimits, meter: Meter, phase: str
) -> list[Facts]:
    """Return the token statistics of fixed rollouts: name → a number per token, per rollout.

    Across tokenizers the number is at the first token of each taught unit, None elsewhere. The
    rollouts are divided among ranks.
    """
    place = limits.place
    mine = rollouts[place.rank :: place.world]

    def measure() -> TokenFacts:
        return limits.measure(scorer, mine, meter=meter, phase=phase)

    merged: TokenFacts = {}
    with display.phase("measuring the KL"):
        for part in stopping.gather_results(place, measure):
            merged |= part
    facts = []
    for r in rollouts:
        of_rollout: Facts = {}
        for name, values in merged[r.key].items():
            of_rollout[name] = [values.get(t) for t in range(len(r.ids))]
        facts.append(of_rollout)
    return facts
