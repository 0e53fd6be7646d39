"""Compare full answers of both models to a few problems, before a run."""

from dataclasses import dataclass, replace

from ..display import phase
from ..engine import evaluate
from ..engine.decoder import make_decoder
from ..engine.device import Clock
from ..engine.meter import Meter
from ..engine.models import Model
from ..engine.sampling import GenerationCost, Request, Sampler, generate
from ..maths.seeds import seed_of
from ..prompts.prompt import Rendered
from ..training.run import Check, Run
from .case import Ids
from .outcomes import passed, warned

TRIAL = 8  # tokens that are sampled to estimate the time of full answers


@dataclass(frozen=True, kw_only=True)
class Respondent:
    """A model that answers problems, and how its answers are sampled."""

    role: str
    model: Model
    sampler: Sampler


def check_teacher(run: Run, problems: list[Rendered], limit: float | None) -> Check:
    """Compare full answers of both models: who is right, and who ends its turn."""
    count = len(problems)
    max_new_tokens = run.method.prefix.limit
    respondents = [
        _make_respondent(run, "student", model=run.pair.student, sampler=run.method.sampler),
        _make_respondent(run, "teacher", model=run.pair.teacher, sampler=run.method.text_sampler),
    ]
    if limit is not None:
        seconds = _estimate_seconds(run, respondents, problems)
        if seconds > limit:
            text = (
                f"not sampled: {count} answers of up to {max_new_tokens} tokens from each model "
                f"may take {seconds:.0f} s, more than {limit:.0f} s; run `prefix-distill check`, "
                "or lower --check-samples"
            )
            return passed("teacher", text, {"expected_seconds": seconds})
    facts = {}
    texts = []
    for respondent in respondents:
        result = _grade(run, respondent, problems)
        facts[respondent.role] = result
        texts.append(_describe_grade(respondent.role, result))
    text = "; ".join(texts)
    student, teacher = facts["student"], facts["teacher"]
    # The student learns from the teacher that a turn never ends.
    if teacher["finish_rate"] == 0 < student["finish_rate"]:
        text += (
            f"; the teacher never ends a turn within {max_new_tokens} tokens, so the student will "
            "stop ending its own; raise --max-new-tokens, or change --eos"
        )
        return warned("teacher", text, facts)
    graded = student["right"] is not None and teacher["right"] is not None
    if graded and teacher["right"] <= student["right"]:
        text += (
            f"; the teacher did not beat the student on these {count} problems; raise "
            "--check-samples, or use another teacher"
        )
        return warned("teacher", text, facts)
    return passed("teacher", text, facts)


def _make_respondent(run: Run, role: str, model: Model, sampler: Sampler) -> Respondent:
    """Return a model with the sampler of an evaluation."""
    sampler = replace(
        run.method.eval_sampler,
        eos=sampler.eos,
        pad=sampler.pad,
        support=sampler.support,
        seed=seed_of(run.config.runtime.seed, "preflight"),
        record=False,
    )
    return Respondent(role=role, model=make_decoder(model, run.place.dtype), sampler=sampler)


def _grade(run: Run, respondent: Respondent, problems: list[Rendered]) -> dict:
    """Sample one answer to every problem and return {right, answers, finish_rate, mean_tokens}.

    ``right`` is None if the problems have no reference answers.
    """
    how = replace(
        run.evaluation,
        sampler=respondent.sampler,
        samples=1,
        max_new_tokens=run.method.prefix.limit,
    )
    prompts = [(r.prompt, prompt_ids(r, respondent.role)) for r in problems]
    cost = GenerationCost(meter=Meter(Clock(device=run.place.device)))
    score = evaluate.evaluate(respondent.model, prompts, how, limits=run.limits, cost=cost)
    right = None
    if score.accuracy is not None:
        right = round(sum(score.right()))
    return {
        "right": right,
        "answers": len(problems),
        "finish_rate": score.finish_rate,
        "mean_tokens": score.mean_tokens,
    }


def _describe_grade(role: str, result: dict) -> str:
    """Return the result of ``_grade`` in words."""
    finished = f"finished {result['finish_rate']:.0%} of its answers"
    if result["right"] is None:
        return f"the {role} {finished}"
    return f"the {role} got {result['right']} of {result['answers']} right and {finished}"


def _estimate_seconds(run: Run, respondents: list[Respondent], problems: list[Rendered]) -> float:
    """Estimate the seconds of full answers on the slowest rank, from a trial with few tokens."""
    clock = Clock(device=run.place.device)
    tokens = min(TRIAL, run.method.prefix.limit)
    for respondent in respondents:
        requests = []
        for i, rendered in enumerate(problems):
            requests.append(Request(ids=prompt_ids(rendered, respondent.role), key=("trial", i)))
        # Without EOS ids, every answer has exactly these tokens.
        endless = replace(respondent.sampler, eos=frozenset())
        with clock.phase("trial"), phase("timing a few tokens"):
            generate(respondent.model, requests, max_new_tokens=tokens, sampler=endless)
    return max(run.place.gather(clock.seconds["trial"])) * run.method.prefix.limit / tokens


def prompt_ids(rendered: Rendered, role: str) -> Ids:
    if role == "student":
        return rendered.student_ids
    return rendered.teacher_ids
