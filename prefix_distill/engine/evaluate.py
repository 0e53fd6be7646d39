"""Sample, grade, measure: accuracy with intervals, pass@k, length, endings, repetition; and the
held-out KL.

Evaluation has fixed prompts and seeds of its own and never sees the prefix cap.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..maths.divergence import Terms
from ..maths.intervals import interval
from ..maths.simct import Support
from ..prompts import answers
from ..prompts.prompt import Prompt, Rendered
from . import scoring
from .models import Model
from .ranks import Place
from .rollout import Rollout
from .sampling import Reads, Request, Response, Sampler, generate

Problem = tuple[Prompt, tuple[int, ...]]  # a prompt and its token ids


def repeats(ids: tuple[int, ...]) -> bool:
    """Is the response caught in a loop: do more than half of its 4-grams of tokens occur earlier
    in it?"""
    grams = [ids[i : i + 4] for i in range(len(ids) - 3)]
    return bool(grams) and len(set(grams)) < len(grams) / 2


@dataclass(frozen=True)
class Score:
    """An evaluation: aggregates as in the JSON output, and one record per problem."""

    accuracy: dict | None
    pass_at_k: dict | None
    finish_rate: float
    mean_tokens: float
    repetition_rate: float
    records: list[dict]

    def right(self) -> list[float]:
        """Share of right answers, problem by problem."""
        return [
            sum(r["correct"] for r in record["responses"]) / len(record["responses"])
            for record in self.records
        ]

    def summary(self) -> dict:
        return {
            "accuracy": self.accuracy,
            "pass_at_k": self.pass_at_k,
            "finish_rate": self.finish_rate,
            "mean_tokens": self.mean_tokens,
            "repetition_rate": self.repetition_rate,
        }


def evaluate(  # noqa: PLR0913  sampling and grading arguments, mostly by keyword
    model: Model,
    problems: list[Problem],
    sampler: Sampler,
    *,
    samples: int,
    max_new_tokens: int,
    answer_format: str,
    place: Place,
    spent: Callable[[list[Reads]], None] | None = None,
) -> Score:
    """Samples ``samples`` full answers per problem and grades them.

    ``problems``: (Prompt, prompt ids) pairs. Draws are seeded by (seed, problem, sample) alone, so
    every evaluation of a run, and of two models, is paired. accuracy: avg@k over problems;
    pass_at_k: share with at least one right answer; both None when a problem has no reference.
    Sharded over ranks, grading too (its time limit must not make ranks disagree), gathered in
    problem order.
    """
    mine = [(i, s) for i in range(len(problems)) for s in range(samples)][place.rank :: place.world]
    requests = [Request(tuple(problems[i][1]), ("evaluate", i, s)) for i, s in mine]
    responses = generate(model, requests, max_new_tokens, sampler, spent) if mine else []
    graded = [
        (i, s, _grade(model, response, problems[i][0].answer, answer_format))
        for (i, s), response in zip(mine, responses, strict=True)
    ]
    records = [
        {
            "problem": prompt.index,
            "prompt": prompt.messages[-1]["content"],
            "reference": prompt.answer,
            "responses": [],
        }
        for prompt, _ in problems
    ]
    for i, _, response in sorted(
        (row for part in place.gather(graded) for row in part), key=lambda row: row[:2]
    ):
        records[i]["responses"].append(response)
    flat = [r for record in records for r in record["responses"]]
    accuracy = pass_at_k = None
    if all(r["correct"] is not None for r in flat):
        right = [[r["correct"] for r in record["responses"]] for record in records]
        accuracy = interval([sum(row) / len(row) for row in right])
        pass_at_k = interval([float(any(row)) for row in right])
    return Score(
        accuracy,
        pass_at_k,
        _share(flat, "finished"),
        sum(r["tokens"] for r in flat) / len(flat),
        _share(flat, "repeats"),
        records,
    )


def decode(model: Model, ids: Sequence[int]) -> str:
    """Return the text of a response, without special tokens."""
    text: str = model.tokenizer.decode(list(ids), skip_special_tokens=True)  # type: ignore[assignment]  # a str for one sequence
    return text


def _grade(model: Model, response: Response, gold: str | None, answer_format: str) -> dict:
    """Return the record of a response; ``correct`` is None without a reference answer."""
    text = decode(model, response.ids)
    return {
        "text": text,
        "tokens": len(response.ids),
        "finished": response.finished,
        "repeats": repeats(response.ids),
        "correct": None if gold is None else answers.correct(text, gold, answer_format),
    }


def _share(rows: list[dict], key: str) -> float:
    return sum(r[key] for r in rows) / len(rows)


def fixed_rollouts(  # noqa: PLR0913  sampling arguments and a callback
    student: Model,
    rendered: list[Rendered],
    sampler: Sampler,
    max_new_tokens: int,
    place: Place,
    spent: Callable[[list[Reads]], None] | None = None,
) -> list[Rollout]:
    """Full-length rollouts of held-out prompts: the fixed contexts on which a run measures its
    KL before and after."""
    requests = [Request(r.student_ids, ("held-out", i)) for i, r in enumerate(rendered)]
    mine = requests[place.rank :: place.world]
    responses = generate(student, mine, max_new_tokens, sampler, spent) if mine else []
    parts = place.gather([(r.ids, r.finished) for r in responses])
    drawn = [parts[i % place.world][i // place.world] for i in range(len(rendered))]
    return [
        Rollout(i, 0, r.student_ids, r.teacher_ids, ids, ids, finished)
        for i, (r, (ids, finished)) in enumerate(zip(rendered, drawn, strict=True))
    ]


def held_out_facts(  # noqa: PLR0913  both models, their inputs and a callback
    student: Model,
    teacher: Model,
    shared: Support | None,
    rollouts: list[Rollout],
    place: Place,
    rows: int,
    spent: Callable[[list[Rollout]], None] | None = None,
) -> list[dict[str, list[float | None]]]:
    """``scoring.row_statistics`` (reverse KL(S‖T), temperature 1) of fixed rollouts → per rollout:
    name → a number per token; across tokenizers (``shared``) at the first token of each unit that
    is taught, None elsewhere. Sharded over ranks."""
    found = scoring.token_statistics(
        Terms("reverse-kl", dtype=place.head_dtype),
        student,
        teacher,
        shared,
        rollouts[place.rank :: place.world],
        place,
        rows,
        spent,
    )
    merged = {key: row for part in place.gather(found) for key, row in part.items()}
    return [
        {
            name: [values.get(t) for t in range(len(r.ids))]
            for name, values in merged[r.prompt, r.sample].items()
        }
        for r in rollouts
    ]
