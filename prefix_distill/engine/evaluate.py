"""Evaluation: sample and grade full answers, and measure the held-out KL.

An evaluation reports accuracy with intervals, pass@k, length, endings and repetition. It has fixed
prompts and seeds, and the prefix limit does not apply to it.
"""

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass

from ..maths.intervals import interval
from ..prompts import answers, expressions
from ..prompts.prompt import Prompt, Rendered
from .memory import MemoryLimits
from .meter import Meter
from .models import Model
from .rollout import Rollout, rollout_of
from .sampling import GenerationCost, Request, Response, Sampler
from .scoring import Scorer, TokenFacts

Problem = tuple[Prompt, tuple[int, ...]]  # a prompt and its token ids
Facts = dict[str, list[float | None]]  # one rollout: statistic → a number per token


def repeats(ids: tuple[int, ...]) -> bool:
    """Return whether the response loops: more than half of its token 4-grams occur earlier."""
    grams = [ids[i : i + 4] for i in range(len(ids) - 3)]
    return bool(grams) and len(set(grams)) < len(grams) / 2


@dataclass(frozen=True, kw_only=True)
class Score:
    """The result of an evaluation: aggregates as in the JSON output, one record per problem.

    ``finished_accuracy``: share of correct answers among the finished ones; None without any.
    """

    accuracy: dict | None
    finished_accuracy: float | None
    pass_at_k: dict | None
    finish_rate: float
    mean_tokens: float
    repetition_rate: float
    records: list[dict]

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
    answer_format: str
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
    """
    place = limits.place
    every = [(i, s) for i in range(len(problems)) for s in range(how.samples)]
    mine = every[place.rank :: place.world]
    requests = [Request(ids=tuple(problems[i][1]), key=("evaluate", i, s)) for i, s in mine]
    if how.answer_format not in ("exact", "choice") and any(p.answer for p, _ in problems):
        expressions.start()  # so that a missing package is named before any answer is sampled
    responses: list[Response] = []
    if mine:
        responses = limits.sample(
            model, requests, max_new_tokens=how.max_new_tokens, sampler=how.sampler, cost=cost
        )
    graded = []
    for (i, s), response in zip(mine, responses, strict=True):
        gold = problems[i][0].answer
        record = _grade(model, response, gold, answer_format=how.answer_format)
        if how.prefix is not None:
            record["prefix_characters"] = count_characters(model, response.ids[: how.prefix])
        graded.append((i, s, record))
    records = [_empty_record(prompt) for prompt, _ in problems]
    gathered = itertools.chain.from_iterable(place.gather(graded))
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
        pass_at_k = interval([float(any(row)) for row in right])
        graded = [r for record in gradable for r in record["responses"]]
        finished = [r for r in graded if r["finished"]]
        if finished:
            finished_accuracy = _share(finished, "correct")
    return Score(
        accuracy=accuracy,
        finished_accuracy=finished_accuracy,
        pass_at_k=pass_at_k,
        finish_rate=_share(responses, "finished"),
        mean_tokens=sum(r["tokens"] for r in responses) / len(responses),
        repetition_rate=_share(responses, "repeats"),
        records=records,
    )


def _gradable(records: list[dict]) -> list[dict]:
    """Return the records of the problems that have a reference."""
    return [record for record in records if record["reference"] is not None]


def decode(model: Model, ids: Sequence[int]) -> str:
    """Return the text of a response, without special tokens."""
    text: str = model.tokenizer.decode(list(ids), skip_special_tokens=True)  # type: ignore[assignment]  # a str for one sequence
    return text


def count_characters(model: Model, ids: Sequence[int]) -> int:
    """Return the length of the text of ids, without a character of which the end is missing."""
    return len(decode(model, ids).rstrip("\ufffd"))


def _grade(model: Model, response: Response, gold: str | None, answer_format: str) -> dict:
    """Return the record of a response; ``correct`` is None without a reference answer."""
    text = decode(model, response.ids)
    return {
        "text": text,
        "tokens": len(response.ids),
        "finished": response.finished,
        "repeats": repeats(response.ids),
        "correct": None if gold is None else answers.is_correct(text, gold, answer_format),
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
    responses: list[Response] = []
    if mine:
        responses = limits.sample(
            student, mine, max_new_tokens=how.max_new_tokens, sampler=how.sampler, cost=cost
        )
    parts = place.gather([(r.ids, r.finished) for r in responses])
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
    merged: TokenFacts = {}
    for part in place.gather(limits.measure(scorer, mine, meter=meter, phase=phase)):
        merged |= part
    facts = []
    for r in rollouts:
        of_rollout: Facts = {}
        for name, values in merged[r.key].items():
            of_rollout[name] = [values.get(t) for t in range(len(r.ids))]
        facts.append(of_rollout)
    return facts
