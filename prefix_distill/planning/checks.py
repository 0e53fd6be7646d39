"""Before a GPU-hour is spent: do student, teacher, prompts, sampling and device go together? What
only the models can answer.

``training.prepare`` has refused what is impossible by then; here both models are asked, in some
seconds.
"""

from dataclasses import replace

import torch

from ..engine import evaluate, loading, scoring
from ..engine.device import Clock, memory_free
from ..engine.meter import Meter
from ..engine.models import Model, decoder
from ..engine.rollout import rollout_of
from ..engine.sampling import GenerationCost, Request, Sampler, generate
from ..errors import UserError
from ..maths.divergence import Terms
from ..maths.seeds import seed_of
from ..prompts.prompt import Rendered
from ..training.run import Check, Run
from . import text_checks
from .case import case
from .forecast import Pair, at_most
from .text_checks import FEW, sides

Writer = tuple[str, Model, str, Sampler]  # role, model, field of Rendered with its prompt, sampler

ZERO = 1e-6  # nats: the most that a model may be away from itself
SECONDS = 15.0  # the most that sampled answers may take, where no number of them was asked for
SHAPING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "do_sample",
    "num_beams",
)


def examine(run: Run, samples: int, limit: float | None = SECONDS) -> list[Check]:
    """All checks, in the order of a token's way. ``samples``: held-out problems that both models
    answer (0: none), left out where that would take more than ``limit`` seconds. Every rank gets
    the same list."""
    found = [
        text_checks.examine_vocabulary(run),
        text_checks.examine_prompts(run),
        text_checks.examine_templates(run),
        text_checks.examine_ends(run),
        text_checks.examine_padding(run),
        _head(run),
        _itself(run),
        _sampling(run),
        text_checks.examine_context(run),
        _memory(run),
    ]
    if samples and run.config.evaluate.problems:
        found.append(_teacher(run, min(samples, len(run.problems.kl)), limit))
    return found


def _head(run: Run) -> Check:
    gaps = {role: loading.check_head(model) for role, model in sides(run)}
    return Check(
        "head",
        "ok",
        f"head(hidden) is the model's own logits, to {max(gaps.values()):.1g} nats",
        gaps,
    )


@torch.no_grad()
def _itself(run: Run) -> Check:
    """The loss of a model against itself, from two readings: 0, but for noise in its layers."""
    terms = (
        replace(run.method.terms, sampled=False)
        if run.method.terms.taught_by == "teacher"
        else Terms("reverse-kl", dtype=run.place.head_dtype)
    )
    facts = {}
    for role, model in sides(run):
        prompts = [getattr(r, f"{role}_ids") for r in run.problems.train[:FEW]]
        rollouts = [rollout_of(i, ids, ids[-FEW:]) for i, ids in enumerate(prompts)]
        itself = replace(run.pair, student=model, teacher=model, shared_support=None)
        scorer = scoring.Scorer(pair=itself, terms=terms, place=run.place)
        values = scorer.measure(rollouts, run.limits.micro_batch_size)
        facts[role] = max(abs(v) for row in values.values() for v in row["divergence"].values())
    worst = max(facts, key=lambda role: facts[role])
    if facts[worst] > ZERO:
        return Check(
            "itself",
            "error",
            f"the {worst} read twice differs from itself by {facts[worst]:.2g} nats per token; "
            "expected 0: something in it is random (dropout, noise); use another copy, or --dtype "
            "float32",
            facts,
        )
    return Check(
        "itself",
        "ok",
        f"each model against itself: {max(facts.values()):.1g} nats per token",
        facts,
    )


def _sampling(run: Run) -> Check:
    sampler = run.method.sampler
    own = {
        role: {k: v for k, v in model.generation_config.to_diff_dict().items() if k in SHAPING}
        for role, model in sides(run)
    }
    facts = {
        "temperature": sampler.temperature,
        "top_p": sampler.top_p,
        "top_k": sampler.top_k,
        "begin": run.config.rollout.begin,
        "max_new_tokens": run.config.rollout.max_new_tokens,
        "eos": sorted(sampler.eos),
        "ignored": own,
    }
    text = (
        f"temperature {sampler.temperature:g}, top-p {sampler.top_p:g}, top-k "
        f"{sampler.top_k or 'off'}"
    )
    ignored = "; ".join(
        f"the {role}'s own {', '.join(f'{k} {v}' for k, v in found.items())}"
        for role, found in own.items()
        if found
    )
    text += f"; without effect: {ignored}" if ignored else ""
    if not sampler.on_policy:
        return Check("sampling", "warning", f"{text}: off-policy for the divergence", facts)
    return Check("sampling", "ok", text, facts)


def _memory(run: Run) -> Check:
    """What the run will need beside the weights, which are loaded, against what is free."""
    place, config = run.place, run.config
    free = memory_free(place.device)
    needs = case(
        config,
        place.dtype,
        place.head_dtype,
        [(len(r.student_ids), len(r.teacher_ids)) for r in run.problems.train],
        run.method.prefix.longest(config.train.steps or 1),
        run.method.prefix.limit,
        place.world,
        run.pair.student.support,
    )
    bound = at_most(run.pair.student, run.pair.teacher, needs)
    facts = {"free_bytes": free, "at_most_bytes": bound}
    if free is None:
        return Check(
            "memory",
            "ok",
            f"what is free on {place.device} is not known; the run needs less than {_gib(bound)}",
            facts,
        )
    if bound < free:
        return Check(
            "memory",
            "ok",
            f"less than {_gib(bound)} by plain arithmetic, {_gib(free)} free on {place.device}",
            facts,
        )
    unknown = _unforeseen(run)
    if unknown is not None:
        text = f"not forecast with {unknown}; {_gib(free)} free on {place.device}"
        return Check("memory", "ok", text, facts)
    try:
        found = Pair(run.pair.student.net.config, run.pair.teacher.net.config).forecast(needs)
    except UserError as error:
        return Check("memory", "ok", f"not forecast: {error}", facts)
    return _compare_memory(found, free, facts, place.device)


def _unforeseen(run: Run) -> str | None:
    """Return a feature of this run that the forecast does not cover, or None."""
    models, runtime = run.config.models, run.config.runtime
    if models.student_quantize != "none":
        return "--student-quantize"
    if models.teacher_quantize != "none":
        return "--teacher-quantize"
    if runtime.teacher_device == "auto":
        return "--teacher-device auto"
    if run.pair.alignment is not None:
        return "different tokenizers"
    return None


def _compare_memory(found: dict, free: int, facts: dict, device: torch.device) -> Check:
    """Compare a forecast (``Pair.forecast``) with the ``free`` bytes of ``device``."""
    loaded = sum(found["weights"].get(role, 0) for role in ("student", "teacher"))
    needed = found["total"] - loaded
    fixed = sum(found["weights"].values()) - loaded + found["gradients"]
    facts = facts | {
        "needed_bytes": needed,
        "fixed_bytes": fixed,
        "set_by": found["set_by"],
        "phases": found["phases"],
    }
    text = (
        f"{_gib(needed)} beside the loaded weights, most in {found['set_by']}; {_gib(free)} "
        f"free on {device}"
    )
    if fixed > free:
        return Check(
            "memory",
            "error",
            f"{text}: optimizer, gradients and copies alone take {_gib(fixed)}, whatever the "
            "batch; use --lora 16, a smaller model, or --teacher-device for the teacher",
            facts,
        )
    if needed > free:
        return Check(
            "memory",
            "warning",
            f"{text}: batches will be halved until they fit; lower --micro-batch-size or "
            "--generation-rows, or use --gradient-checkpointing",
            facts,
        )
    return Check("memory", "ok", text, facts)


def _gib(size: float) -> str:
    return f"{size / 2**30:.3g} GiB"


def _teacher(run: Run, count: int, limit: float | None) -> Check:
    """Full answers of both models to held-out problems, with the same seeds: who is right, and
    who can end a turn."""
    name, cap = "teacher", run.method.prefix.limit
    rendered = run.problems.kl[:count]
    writers = _writers(run)
    if limit is not None:
        expected = _expected_seconds(run, writers, rendered)
        if expected > limit:
            return Check(
                name,
                "ok",
                f"not sampled: {count} answers of up to {cap} tokens of each model may take "
                f"{expected:.0f} s; `prefix-distill check` does it, --check-samples sets how many",
                {"expected_seconds": expected},
            )
    scores = _answer_problems(run, writers, rendered)
    rights = {
        role: None if score.accuracy is None else round(sum(score.right()))
        for role, score in scores.items()
    }
    facts = {
        role: {
            "right": rights[role],
            "answers": count,
            "finish_rate": score.finish_rate,
            "mean_tokens": score.mean_tokens,
        }
        for role, score in scores.items()
    }
    text = "; ".join(
        f"{role} "
        + ("" if rights[role] is None else f"{rights[role]} of {count} right, ")
        + f"{score.finish_rate:.0%} end"
        for role, score in scores.items()
    )
    ours, theirs = rights["student"], rights["teacher"]
    never_ends = scores["teacher"].finish_rate == 0 < scores["student"].finish_rate
    if never_ends:
        return Check(
            name,
            "warning",
            f"{text}: the teacher never ends a turn within {cap} tokens, so the student will "
            "unlearn it; longer --max-new-tokens, or another --eos",
            facts,
        )
    if ours is not None and theirs is not None and theirs <= ours:
        return Check(
            name,
            "warning",
            f"{text}: on this small sample the teacher is not better than the student; what should "
            "it teach?",
            facts,
        )
    return Check(name, "ok", text, facts)


def _writers(run: Run) -> list[Writer]:
    """Return both models with the samplers of the answers to grade."""
    writers = (
        ("student", run.pair.student, "student_ids", run.method.sampler),
        ("teacher", run.pair.teacher, "teacher_ids", run.method.text_sampler),
    )
    return [
        (
            role,
            decoder(model, run.place.dtype),
            ids,
            replace(
                sampler,
                seed=seed_of(run.config.runtime.seed, "preflight"),
                temperature=run.config.evaluate.temperature,
                top_p=1.0,
                top_k=0,
                record=False,
            ),
        )
        for role, model, ids, sampler in writers
    ]


def _answer_problems(
    run: Run, writers: list[Writer], rendered: list[Rendered]
) -> dict[str, evaluate.Score]:
    """Sample and grade one answer of each model to every problem."""
    scores = {}
    for role, model, ids, sampler in writers:
        how = replace(
            run.evaluation, sampler=sampler, samples=1, max_new_tokens=run.method.prefix.limit
        )
        problems = [(r.prompt, getattr(r, ids)) for r in rendered]
        cost = GenerationCost(meter=Meter(Clock(run.place.device)))
        scores[role] = evaluate.evaluate(model, problems, how, run.limits, cost)
    return scores


def _expected_seconds(run: Run, writers: list[Writer], rendered: list[Rendered]) -> float:
    """Estimate the seconds of full answers on the slowest rank, from a trial with a few tokens."""
    cap = run.method.prefix.limit
    clock, short = Clock(run.place.device), min(8, cap)
    for _, model, ids, sampler in writers:
        with clock.phase("trial"):
            generate(
                model,
                [Request(getattr(r, ids), ("trial", i)) for i, r in enumerate(rendered)],
                short,
                replace(sampler, eos=frozenset()),
            )
    return max(run.place.gather(clock.seconds["trial"])) * cap / short
