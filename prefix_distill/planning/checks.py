"""Check before a run that student, teacher, prompts, sampling and device are compatible.

``training.prepare`` has already rejected impossible settings; these checks run both models and take
seconds.
"""

import functools
from collections.abc import Callable
from dataclasses import replace

import torch

from ..display import phase
from ..engine import trunk
from ..engine.models import Model
from ..engine.recommended import read_recommended
from ..engine.rollout import Rollout, rollout_of
from ..engine.scoring import Scorer
from ..engine.trace import name_noise
from ..maths.divergence import Terms
from ..training.run import Check, Run
from . import text_checks
from .memory import check_memory
from .outcomes import SAMPLE, both_models, failed, passed, warned
from .teacher_check import check_teacher, prompt_ids

ZERO = 1e-6  # nats per token: the largest difference between two identical forward passes
SECONDS = 15.0  # the most time for sampled answers, unless their number was asked for
# fields of a generation config that would shape a response
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
    "length_penalty",
    "min_length",
    "min_new_tokens",
    "suppress_tokens",
    "begin_suppress_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "bad_words_ids",
    "sequence_bias",
    "encoder_repetition_penalty",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "epsilon_cutoff",
    "eta_cutoff",
    "top_h",
    "guidance_scale",
    "constraints",
    "force_words_ids",
    "penalty_alpha",
    "remove_invalid_values",
    "renormalize_logits",
    "watermarking_config",
    "stop_strings",
)


def examine(run: Run, samples: int, limit: float | None = SECONDS) -> list[Check]:
    """Return the results of all checks; every rank gets the same list.

    ``samples``: held-out problems that both models answer (0: none). They are left out if that
    would take more than ``limit`` seconds; None is no limit.
    """
    examiners: dict[str, Callable[[], Check]] = {}
    for name, examiner in EXAMINERS.items():
        examiners[name] = functools.partial(examiner, run)
    if samples and run.config.evaluate.problems:
        problems = run.problems.kl[:samples]
        examiners["teacher"] = functools.partial(check_teacher, run, problems, limit)
    checks = []
    with phase("checking", len(examiners), "checks") as progress:
        for name, examine_run in examiners.items():
            with phase(name):
                checks.append(examine_run())
            progress.advance()
    return checks


def _check_head(run: Run) -> Check:
    """Return the largest difference between a model's logits and its head on its hidden states.

    The loss applies the heads itself. PreflightError: the difference is too large.
    """
    gaps = {role: trunk.check_head(model) for role, model in both_models(run)}
    text = f"head(hidden states) equals the model's logits within {max(gaps.values()):.1g} nats"
    return passed("head", text, gaps)


@torch.no_grad()
def _check_determinism(run: Run) -> Check:
    """Compare each model with itself: the loss of two identical forward passes must be 0."""
    # A loss on given text has no teacher, and a sampled one is not 0 for every token.
    terms = Terms(name="reverse-kl", dtype=run.place.head_dtype)
    if run.method.terms.taught_by == "teacher":
        terms = replace(run.method.terms, sampled=False)
    facts = {}
    for role, model in both_models(run):
        itself = replace(run.pair, student=model, teacher=model, shared_support=None)
        scorer = Scorer(pair=itself, terms=terms, place=run.place)
        values = scorer.measure(_prompt_ends(run, role), run.limits.micro_batch_size)
        gaps = [abs(gap) for row in values.values() for gap in row["divergence"].values()]
        facts[role] = max(gaps)
    worst = max(facts, key=lambda role: facts[role])
    if facts[worst] > ZERO:
        where = name_noise(dict(both_models(run))[worst])
        text = (
            f"the {worst} is not deterministic: two identical passes differ by "
            f"{facts[worst]:.2g} nats per token, expected 0{where}; remove the dropout or noise "
            "from its layers, or use --dtype float32"
        )
        return failed("determinism", text, facts)
    text = f"two identical passes of a model differ by {facts[worst]:.1g} nats per token"
    return passed("determinism", text, facts)


def _prompt_ends(run: Run, role: str) -> list[Rollout]:
    """Return some prompts of a model, each with its own last ids as the response."""
    rollouts = []
    for slot, rendered in enumerate(run.problems.train[:SAMPLE]):
        ids = prompt_ids(rendered, role)
        rollouts.append(rollout_of(slot, ids, ids[-SAMPLE:]))
    return rollouts


def _check_shared_prompts(run: Run) -> Check:
    """Return where each model runs a prompt once for all its samples, and why."""
    text = "; ".join(found.text for found in run.shared_prompts)
    facts = {found.role: found.facts for found in run.shared_prompts}
    return passed("shared prompts", text, facts)


def _check_sampling(run: Run) -> Check:
    """Return how rollouts are sampled, and which settings of the models have no effect."""
    sampler = run.method.sampler
    ignored = {role: _shaping_fields(model) for role, model in both_models(run)}
    recommends = run.config.evaluate.sampling == "model"
    if recommends:
        left_out = read_recommended(run.pair.student).left_out
        ignored["student"] = {k: v for k, v in ignored["student"].items() if k in left_out}
    facts = {
        "temperature": sampler.temperature,
        "top_p": sampler.top_p,
        "top_k": sampler.top_k,
        "begin": run.config.rollout.begin,
        "max_new_tokens": run.config.rollout.max_new_tokens,
        "eos": sorted(sampler.eos),
        "ignored": ignored,
    }
    text = (
        f"temperature {sampler.temperature:g}, top-p {sampler.top_p:g}, top-k "
        f"{sampler.top_k or 'off'}"
    )
    if recommends:
        used = run.method.eval_sampler
        text += (
            f"; evaluation, from the student's generation config: temperature "
            f"{used.temperature:g}, top-p {used.top_p:g}, top-k {used.top_k or 'off'}"
        )
    # Users expect the sampling that a model card recommends, so ignored settings are named.
    for role, fields in ignored.items():
        if fields:
            values = ", ".join(f"{key} {value}" for key, value in fields.items())
            text += f"; ignored: {values} from the {role}'s generation config"
    if not sampler.on_policy:
        text += "; these settings make rollouts off-policy; use --temperature 1 --top-p 1 --top-k 0"
        return warned("sampling", text, facts)
    return passed("sampling", text, facts)


def _shaping_fields(model: Model) -> dict:
    """Return what the model's own generation config says about sampling."""
    fields = model.generation_config.to_diff_dict()
    return {key: value for key, value in fields.items() if key in SHAPING}


# the checks of every run, in their order
EXAMINERS: dict[str, Callable[[Run], Check]] = {
    "vocabulary": text_checks.check_vocabulary,
    "data": text_checks.check_data,
    "prompts": text_checks.check_prompts,
    "templates": text_checks.check_templates,
    "end of text": text_checks.check_eos,
    "padding": text_checks.check_padding,
    "head": _check_head,
    "determinism": _check_determinism,
    "shared prompts": _check_shared_prompts,
    "sampling": _check_sampling,
    "context": text_checks.check_context,
    "memory": check_memory,
}
