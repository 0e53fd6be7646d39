"""Sample, grade, measure: accuracy with intervals, pass@k, length, endings, repetition; and the held-out KL.

Evaluation has fixed prompts and seeds of its own and never sees the prefix cap.
"""

import math
from dataclasses import dataclass

import torch

from ..maths.divergence import Terms
from ..prompts import answers
from . import scoring
from .device import Place, seed_of
from .models import Model
from .sampling import Request, Rollout, Sampler, generate

RESAMPLES = 2_000


def interval(values: list[float], seed: int = 0) -> dict:
    """{value, n, low, high}: mean over problems with a 95 % percentile-bootstrap interval (2,000 seeded resamples).

    When all values are equal the bootstrap has no width; the ends then are Wilson's, at z = 1.96, for shares (0 or 1).
    """
    n = len(values)
    data = torch.tensor(values, dtype=torch.float64)
    mean = data.mean().item()
    if data.min() == data.max():
        if mean in (0.0, 1.0):
            edge = 1.96**2 / (n + 1.96**2)
            return {
                "value": mean,
                "n": n,
                "low": mean * (1 - edge),
                "high": mean + (1 - mean) * edge,
            }
        return {"value": mean, "n": n, "low": mean, "high": mean}
    generator = torch.Generator().manual_seed(seed)
    means = (
        torch.stack(
            [data[torch.randint(n, (n,), generator=generator)].mean() for _ in range(RESAMPLES)]
        )
        .sort()
        .values
    )
    return {
        "value": mean,
        "n": n,
        "low": means[int(0.025 * RESAMPLES)].item(),
        "high": means[int(0.975 * RESAMPLES) - 1].item(),
    }


def repeats(ids: tuple[int, ...]) -> bool:
    """Is the response caught in a loop: do more than half of its 4-grams of tokens occur earlier in it?"""
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


def evaluate(
    model: Model,
    problems: list[tuple],
    sampler: Sampler,
    *,
    samples: int,
    max_new_tokens: int,
    answer_format: str,
    place: Place,
    spent=None,
) -> Score:
    """Samples ``samples`` full answers per problem and grades them.

    ``problems``: (Prompt, prompt ids) pairs. Draws are seeded by (seed, problem, sample) alone, so every evaluation of a
    run, and of two models, is paired. accuracy: avg@k over problems; pass_at_k: share with at least one right answer;
    both None when a problem has no reference. Sharded over ranks, grading too (its time limit must not make ranks disagree),
    gathered in problem order.
    """
    mine = [(i, s) for i in range(len(problems)) for s in range(samples)][place.rank :: place.world]
    requests = [Request(tuple(problems[i][1]), ("evaluate", i, s)) for i, s in mine]
    responses = generate(model, requests, max_new_tokens, sampler, spent) if mine else []
    graded = []
    for (i, s), r in zip(mine, responses):
        text, gold = model.tokenizer.decode(r.ids, skip_special_tokens=True), problems[i][0].answer
        graded.append(
            (
                i,
                s,
                {
                    "text": text,
                    "tokens": len(r.ids),
                    "finished": r.finished,
                    "repeats": repeats(r.ids),
                    "correct": None if gold is None else answers.correct(text, gold, answer_format),
                },
            )
        )
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


def _share(rows: list[dict], key: str) -> float:
    return sum(r[key] for r in rows) / len(rows)


def fixed_rollouts(
    student: Model, rendered: list, sampler: Sampler, max_new_tokens: int, place: Place, spent=None
) -> list[Rollout]:
    """Full-length rollouts of held-out prompts: the fixed contexts on which a run measures its KL before and after."""
    requests = [Request(r.student_ids, ("held-out", i)) for i, r in enumerate(rendered)]
    mine = requests[place.rank :: place.world]
    responses = generate(student, mine, max_new_tokens, sampler, spent) if mine else []
    parts = place.gather([(r.ids, r.finished) for r in responses])
    drawn = [parts[i % place.world][i // place.world] for i in range(len(rendered))]
    return [
        Rollout(i, 0, r.student_ids, r.teacher_ids, ids, ids, finished)
        for i, (r, (ids, finished)) in enumerate(zip(rendered, drawn))
    ]


def held_out_facts(
    student: Model,
    teacher: Model,
    shared,
    rollouts: list[Rollout],
    place: Place,
    rows: int,
    spent=None,
) -> list[dict[str, list[float | None]]]:
    """``scoring.row_statistics`` (reverse KL(S‖T), temperature 1) of fixed rollouts → per rollout: name → a number per token; across
    tokenizers (``shared``) at the first token of each unit that is taught, None elsewhere. Sharded over ranks."""
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


def known(values: list[list[float | None]]) -> list[float]:
    """All numbers of some rollouts, one after another."""
    return [v for row in values for v in row if v is not None]


def token_mean(values: list[list[float | None]], seed: int = 0) -> dict:
    """{value, n, low, high} of nats per token; n counts tokens, the bootstrap draws whole rollouts (their tokens are
    not independent). Rollouts without a number are left out."""
    rows = [row for row in (known([row]) for row in values) if row]
    sums = torch.tensor([[sum(row), len(row)] for row in rows], dtype=torch.float64)
    value = (sums[:, 0].sum() / sums[:, 1].sum()).item()
    generator = torch.Generator().manual_seed(seed_of(seed, "token_mean"))
    draws = []
    for _ in range(RESAMPLES):
        drawn = sums[torch.randint(len(sums), (len(sums),), generator=generator)].sum(0)
        draws.append((drawn[0] / drawn[1]).item())
    draws.sort()
    return {
        "value": value,
        "n": int(sums[:, 1].sum()),
        "low": draws[int(0.025 * RESAMPLES)],
        "high": draws[int(0.975 * RESAMPLES) - 1],
    }


def split_mean(values: list[list[float | None]], prefix: int) -> tuple[float | None, float | None]:
    """Mean nats per token (inside the first ``prefix`` tokens, beyond them); None where there is none."""
    head, tail = known([row[:prefix] for row in values]), known([row[prefix:] for row in values])
    return tuple(math.fsum(part) / len(part) if part else None for part in (head, tail))
