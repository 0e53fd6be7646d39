"""Turn a Config into a Run: load what it needs and reject what cannot work, before any write."""

import dataclasses

import torch

from .. import config as configuration
from ..config import Config
from ..engine import loading, models, scoring
from ..engine.alignment import Alignment, match
from ..engine.models import Model, recompute
from ..engine.ranks import place
from ..engine.sampling import Sampler
from ..errors import UserError
from ..maths import simct
from ..maths.divergence import Terms
from ..maths.schedule import parse_off_policy, parse_prefix
from ..maths.seeds import seed_of
from ..maths.weights import parse_position_weight, parse_selection, parse_window
from ..prompts import templates
from ..prompts.templates import PRIVILEGED
from . import trackers
from .pair import (
    as_preflight_error,
    check_alignment,
    describe_privileged_text,
    fill_in,
    measure_coverage,
    named,
    spread_limit,
)
from .problems import count_by_set, load_prompt_sets, load_training_prompts, settle_max_new_tokens
from .run import Run, settled


def prepare(config: Config) -> Run:
    """Config → Run. UserError, one line, on anything that would make the run wrong or
    impossible."""
    trackers.check(config)
    config, notes = fill_in(config)
    student_name = settled(config.models.student, "--student")
    teacher_name = settled(config.models.teacher, "--teacher")
    warnings: list[str] = []
    train_sets, weights, held_out = load_prompt_sets(config, notes)

    trust = config.models.trust_remote_code
    adapted = config.adapter.rank is not None
    if adapted:
        where = place(config.runtime, lambda: loading.count(student_name, trust))
        student = loading.load_model(
            student_name,
            device=where.device,
            dtype=where.dtype,
            trust_remote_code=trust,
            quantize=config.models.student_quantize,
        )
    else:
        student = loading.load_model(
            student_name,
            device=torch.device("cpu"),
            dtype=torch.float32,
            trust_remote_code=trust,
        )
        where = place(config.runtime, lambda: student.parameters)
        student.net.to(where.device)
    notes.extend(where.reasons)
    own, averaged = (
        config.models.teacher == configuration.SELF,
        config.models.teacher_ema is not None,
    )
    if adapted:
        student = loading.with_adapter(student, config.adapter, config.runtime.seed)
        count = sum(p.numel() for p in student.trained.values())
        notes.append(
            f"LoRA of rank {config.adapter.rank} on {config.adapter.targets}: {count:,} parameters "
            f"train, {student.parameters - count:,} stay as they are, in {str(where.dtype)[6:]}"
        )
    few = config.models.teacher_quantize
    if (
        own
        and adapted
        and where.device == where.teacher_device
        and few in ("none", config.models.student_quantize)
    ):
        teacher = dataclasses.replace(student, adapter_off=True)
    else:
        teacher = loading.load_model(
            student_name if own else teacher_name,
            device=where.teacher_device,
            dtype=torch.float32 if averaged else where.dtype,
            trust_remote_code=trust,
            quantize=few,
            spread=spread_limit(config, where, notes),
        )
    if own:
        teacher.name = f"{teacher.name} (itself)"
        notes.append(
            "teacher self: the student without its adapter, no second copy of the weights"
            if teacher.adapter_off
            else "teacher self: a copy of the student's initial weights, "
            + (
                f"in float32, that follows the student by 1 − {config.models.teacher_ema:g} an "
                "update"
                if averaged
                else "frozen"
            )
        )
    with as_preflight_error():
        alignment, tokenizers = match(student, teacher, config.models.cross_tokenizer)
    notes.append(tokenizers)
    shared = None
    if alignment is not None:
        config = check_alignment(config, notes)
        shared = scoring.shared_support(
            alignment.shared, alignment.mode, where.device, where.teacher_device
        )
    for role, model in (("student", student), ("teacher", teacher)):
        with as_preflight_error():
            loading.check_head(model)
        reason = scoring.check_sharing(model)
        model.shares_prompts = reason is None
        if reason:
            notes.append(f"the {role} reads a prompt again for each of its samples: {reason}")
    if config.train.gradient_checkpointing:
        student = recompute(student)
        if student.shares_prompts and config.rollout.samples > 1:
            notes.append(
                "in training the student reads a prompt again for each of its samples: "
                "--gradient-checkpointing"
            )

    if config.data.privileged_column is not None and config.data.privileged_template is None:
        forms = {s.privileged_template for s in train_sets}
        config = configuration.replace(
            config,
            data={"privileged_template": (forms.pop() if len(forms) == 1 else None) or PRIVILEGED},
        )
    needed = config.train.steps * config.train.batch_size or 1
    fixed = config.extrapolation.problems if config.extrapolation.kind == "effopd" else 0
    train_prompts, extrapolation_prompts, dropped = load_training_prompts(
        train_sets, weights, needed, fixed, student, teacher, config, notes
    )
    if (
        fixed
        and config.extrapolation.score == "accuracy"
        and any(p.prompt.answer is None for p in extrapolation_prompts)
    ):
        raise UserError(
            f"dataset {config.data.dataset}: a prompt has no reference answer, so candidates "
            "cannot be graded; name the column with --answer-column, or use --extrapolate-score "
            "heldout-kl"
        )
    if len(extrapolation_prompts) < fixed:
        warnings.append(
            f"--extrapolate-problems {fixed}: only {len(extrapolation_prompts)} training prompts "
            "are there to be scored"
        )
    if config.data.privileged_column is not None:
        notes.append(describe_privileged_text(teacher, train_prompts[:4], where, warnings))
    problems, dropped_held = templates.render_all(held_out.prompts, student, teacher, config)
    if sum(dropped) + dropped_held:
        warnings.append(
            f"{count_by_set(train_sets, dropped)} training and {dropped_held} held-out prompts "
            f"exceed --max-prompt-tokens {config.data.max_prompt_tokens} and were dropped"
        )
    longest = max(
        max(len(r.student_ids), len(r.teacher_ids))
        for r in train_prompts + extrapolation_prompts + problems
    )
    with as_preflight_error():
        config = settle_max_new_tokens(
            config, student, teacher, longest, held_out.max_new_tokens, notes
        )
    longest_response = settled(config.rollout.max_new_tokens, "--max-new-tokens")
    prefix = parse_prefix(config.schedule.prefix, longest_response)

    rollout, divergence = config.rollout, config.divergence
    eos = {"student": student.eos, "teacher": teacher.eos, "union": student.eos | teacher.eos}[
        rollout.eos
    ]
    teacher_tokens = 1.0
    if alignment is not None:
        eos = student.eos
        teacher_tokens = measure_coverage(alignment, train_prompts, notes, warnings)
    elif student.eos != teacher.eos:
        warnings.append(
            f"end-of-sequence ids differ: student {named(student, student.eos)}, teacher "
            f"{named(teacher, teacher.eos)}; rollouts stop at the {rollout.eos}'s (--eos "
            "student|teacher|union)"
        )
    pad = student.tokenizer.pad_token_id
    support = settled(student.support, "the student's support")
    sampler = Sampler(
        eos,
        min(eos) if pad is None else pad,
        support,
        config.runtime.seed,
        rollout.temperature,
        rollout.top_p,
        rollout.top_k,
        rollout.rows,
    )
    if not sampler.on_policy:
        warnings.append(
            f"sampling at temperature {rollout.temperature:g}, top-p {rollout.top_p:g}, top-k "
            f"{rollout.top_k} is off-policy for the divergence: contexts come from another "
            "distribution than the student's"
        )
    eval_sampler = Sampler(
        eos,
        sampler.pad,
        support,
        seed_of(config.runtime.seed, "evaluation"),
        config.evaluate.temperature,
        rows=rollout.rows,
    )
    if where.world > config.train.batch_size:
        raise UserError(
            f"--batch-size {config.train.batch_size}: {where.world} ranks need at least one prompt "
            "each; raise it"
        )
    name, parameters = configuration.parse_divergence(divergence.name)
    estimator, top_k = configuration.parse_estimator(divergence.estimator)
    budget = config.runtime.head_memory_mb << 20
    terms = Terms(
        name,
        parameters,
        divergence.temperature,
        where.head_dtype,
        budget,
        top_k,
        estimator == "sampled",
        divergence.clip,
    )
    off_policy = parse_off_policy(rollout.off_policy)
    text_terms = terms
    if off_policy is not None and off_policy.loss == "sft":
        text_terms = Terms("cross-entropy", dtype=where.head_dtype, memory_bytes=budget)
    same = (
        where.dtype == student.net.dtype
    )  # rollouts come from the student itself, not from a copy in another dtype
    columns = support if shared is None else shared.columns
    rows = (
        terms.chunk(columns, student.head().softcap is not None)
        if shared is None
        else simct.chunk(terms, columns)
    )
    notes.append(
        f"loss in chunks of {rows:,} rows: what --head-memory-mb {config.runtime.head_memory_mb} "
        f"holds of its float32 tables of {columns:,} columns"
    )
    answer_format: str = config.evaluate.answer_format
    if answer_format == "auto" and held_out.answer_format:
        answer_format = held_out.answer_format
    return Run(
        config,
        where,
        student,
        teacher,
        alignment,
        shared,
        prefix,
        parse_window(config.weights.window),
        parse_selection(config.weights.select, configuration.selected(config)),
        parse_position_weight(config.weights.position),
        off_policy,
        terms,
        text_terms,
        dataclasses.replace(
            sampler, record=estimator == "sampled" and not (sampler.on_policy and same)
        ),
        _text_sampler(sampler, teacher, alignment, config.runtime.seed),
        eval_sampler,
        train_prompts,
        problems[: config.evaluate.kl_prompts],
        extrapolation_prompts,
        [(r.prompt, r.student_ids) for r in problems[: config.evaluate.problems]],
        answer_format,
        models.shape(student, support),
        models.shape(teacher, teacher.support),
        notes,
        warnings,
        tokenizers,
        teacher_tokens,
    )


def _text_sampler(
    sampler: Sampler, teacher: Model, alignment: Alignment | None, seed: int
) -> Sampler:
    """How the teacher writes: as the student does, with ids of its own where the tokenizers
    differ."""
    sampler = dataclasses.replace(sampler, seed=seed_of(seed, "teacher-text"))
    if alignment is None:
        return sampler
    pad = teacher.tokenizer.pad_token_id
    return dataclasses.replace(
        sampler,
        eos=teacher.eos,
        support=settled(teacher.support, "the teacher's support"),
        pad=min(teacher.eos) if pad is None else pad,
    )
