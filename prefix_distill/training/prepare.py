"""Turn a Config into a Run; reject what cannot work before anything is written."""

import dataclasses
import time

import torch

from .. import config as configuration
from ..config import Config
from ..display import phase
from ..engine.decoder import describe_linears
from ..engine.memory import MemoryLimits, read_batch_sizes
from ..engine.models import Model
from ..engine.pair import Pair
from ..engine.ranks import Place
from ..engine.recommended import read_recommended
from ..engine.sampling import Sampler
from ..errors import UserError
from ..maths import simct
from ..maths.divergence import Terms
from ..maths.schedule import parse_off_policy, parse_prefix
from ..maths.seeds import seed_of
from ..maths.weights import parse_position_weight, parse_selection, parse_window
from ..prompts.grading import load_grader
from . import trackers
from .defaults import fill_in
from .epochs import settle_steps
from .pair import load_pair
from .problems import render_problems
from .prompt_sets import load_prompt_sets
from .rope import check_rope
from .run import Method, Notes, Problems, Run, settled
from .sharing import settle_sharing


def prepare(config: Config) -> Run:
    """Load everything that a run needs.

    UserError, one line: an option, a file or a model would make the run wrong or impossible.
    """
    started = time.monotonic()
    trackers.check_packages(config)
    notes = Notes()
    config = fill_in(config, notes)
    own_grader = load_grader(config.evaluate.grader, config.evaluate.grader_timeout)
    with phase("reading data"):
        sets = dataclasses.replace(load_prompt_sets(config, notes), own_grader=own_grader)
    config = settle_steps(config, sets.train, notes)
    config, place, pair = load_pair(config, notes)
    with phase("rendering prompts"):
        config, problems = render_problems(config, sets, pair, place=place, notes=notes)
    notes.detail(*describe_linears(place.device, place.dtype))
    shared_prompts = settle_sharing(config, pair, problems, place=place, notes=notes)
    method = read_method(config, pair, place, notes=notes)
    _check_references(config, problems)
    for text in check_rope(config, pair, problems, method=method):
        notes.warn(text)
    pair.student.stop_ids = method.sampler.eos
    limits = MemoryLimits(place, config)
    return Run(
        config=config,
        place=place,
        pair=pair,
        problems=problems,
        method=method,
        notes=notes,
        limits=limits,
        shared_prompts=shared_prompts,
        started=started,
    )


def _check_references(config: Config, problems: Problems) -> None:
    """Raise UserError if --stop-when needs an accuracy, but no problem can be graded."""
    patience = configuration.parse_stop_when(config.train.stop_when).patience
    if patience is None or any(problems.grader.can_grade(p) for p, _ in problems.held_out):
        return
    raise UserError(
        f"--stop-when {config.train.stop_when}: no held-out problem has a reference answer that "
        "can be graded, so there is no accuracy; name the column with --answer-column, or use "
        "collapse"
    )


def read_method(config: Config, pair: Pair, place: Place, notes: Notes) -> Method:
    """Return how rollouts are sampled, and how the loss is computed on them."""
    sampler = _student_sampler(config, pair)
    if not sampler.on_policy:
        notes.warn(
            f"temperature {sampler.temperature:g}, top-p {sampler.top_p:g}, top-k {sampler.top_k}: "
            "these settings make rollouts off-policy; use --temperature 1 --top-p 1 --top-k 0"
        )
    if place.world > config.train.batch_size:
        raise UserError(
            f"--batch-size {config.train.batch_size}: expected at least {place.world}, one prompt "
            "per rank; raise --batch-size"
        )
    terms = read_loss(config, place.head_dtype)
    off_policy = parse_off_policy(config.rollout.off_policy)
    text_terms = terms
    if off_policy is not None and off_policy.loss == "sft":
        text_terms = Terms(name="cross-entropy", dtype=terms.dtype, memory_bytes=terms.memory_bytes)
    notes.detail(_describe_chunks(config, pair, terms))
    # The sampled estimator divides by the probability of a token when it was sampled. That is the
    # student's own probability, and needs no record, only if the student itself sampled on-policy.
    same_dtype = place.dtype == pair.student.net.dtype
    exact = sampler.on_policy and same_dtype
    return Method(
        prefix=parse_prefix(
            config.schedule.prefix, settled(config.rollout.max_new_tokens, "--max-new-tokens")
        ),
        window=parse_window(config.weights.window),
        selection=parse_selection(config.weights.select, configuration.selected(config)),
        position=parse_position_weight(config.weights.position),
        off_policy=off_policy,
        terms=terms,
        text_terms=text_terms,
        sampler=dataclasses.replace(sampler, record=terms.sampled and not exact),
        text_sampler=_text_sampler(config, pair, sampler),
        eval_sampler=eval_sampler(config, sampler, pair.student, notes=notes),
    )


def read_loss(config: Config, head_dtype: torch.dtype) -> Terms:
    """Return the loss that a config asks for; ``head_dtype``: that of its matmuls."""
    name, parameters = configuration.parse_divergence(config.divergence.name)
    estimator, top_k = configuration.parse_estimator(config.divergence.estimator)
    return Terms(
        name=name,
        parameters=parameters,
        temperature=config.divergence.temperature,
        dtype=head_dtype,
        memory_bytes=config.runtime.head_memory_mb << 20,
        top_k=top_k,
        sampled=estimator == "sampled",
        clip=config.divergence.clip,
    )


def _describe_chunks(config: Config, pair: Pair, terms: Terms) -> str:
    """Describe how many tokens the loss handles at once."""
    if pair.shared_support is None:
        columns = settled(pair.student.support, "the student's support")
        rows = terms.rows_per_chunk(columns, pair.student.head().softcap is not None)
    else:
        columns = pair.shared_support.columns
        rows = simct.rows_per_chunk(terms, columns)
    return (
        f"the loss uses chunks of up to {rows:,} tokens "
        f"(--head-memory-mb {config.runtime.head_memory_mb})"
    )


def _student_sampler(config: Config, pair: Pair) -> Sampler:
    """Return how the student samples its rollouts."""
    student, teacher, rollout = pair.student, pair.teacher, config.rollout
    eos = student.eos
    if pair.alignment is None and rollout.eos == "teacher":
        eos = teacher.eos
    elif pair.alignment is None and rollout.eos == "union":
        eos = student.eos | teacher.eos
    return Sampler(
        eos=eos,
        pad=choose_pad(student, eos),
        support=settled(student.support, "the student's support"),
        seed=config.runtime.seed,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        rows=read_batch_sizes(config).rows,
    )


def choose_pad(model: Model, eos: frozenset[int]) -> int:
    """Return the padding id: the tokenizer's own, or an EOS id if the model has none."""
    pad = model.tokenizer.pad_token_id
    if pad is None or pad >= model.id_limit:
        return min(eos)
    return pad


def eval_sampler(config: Config, sampler: Sampler, student: Model, notes: Notes) -> Sampler:
    """Return how evaluations sample: with a seed and settings of their own.

    The settings are the options, or what the student's generation config recommends.
    """
    settings = config.evaluate
    sampler = dataclasses.replace(
        sampler,
        seed=seed_of(config.runtime.seed, "evaluation"),
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
    )
    if settings.sampling == "options":
        return sampler
    recommended = read_recommended(student)
    notes.note(f"evaluation samples as the model recommends: {recommended.describe()}")
    return recommended.applied_to(sampler)


def _text_sampler(config: Config, pair: Pair, sampler: Sampler) -> Sampler:
    """Return how the teacher samples text: as the student does, with the teacher's token ids."""
    sampler = dataclasses.replace(sampler, seed=seed_of(config.runtime.seed, "teacher-text"))
    if pair.alignment is None:
        return sampler
    teacher = pair.teacher
    return dataclasses.replace(
        sampler,
        eos=teacher.eos,
        support=settled(teacher.support, "the teacher's support"),
        pad=choose_pad(teacher, teacher.eos),
    )
