"""Render prompts for both models, and settle the lengths that depend on them."""

import dataclasses
import datetime
from dataclasses import dataclass

from .. import config as configuration
from ..config import Config
from ..engine.alignment import Alignment, count_by_unit, token_shares
from ..engine.models import Model
from ..engine.pair import Pair
from ..engine.ranks import Place
from ..engine.rollout import rollout_of
from ..engine.scoring import Scorer
from ..errors import PreflightError, UserError
from ..prompts import stream, templates
from ..prompts.grading import Grader
from ..prompts.own_grader import OwnGrader
from ..prompts.prompt import PromptSet, Rendered
from ..prompts.stream import mix, shuffle
from ..prompts.templates import PRIVILEGED
from .pair import describe_tokens
from .prompt_sets import PromptSets
from .run import Notes, Problems

LONGEST = 2048  # tokens; the default --max-new-tokens where the models' positions allow it


def render_problems(
    config: Config, sets: PromptSets, pair: Pair, place: Place, notes: Notes
) -> tuple[Config, Problems]:
    """Render all prompts for both models.

    Return the config with the privileged template and --max-new-tokens set, and the problems.
    UserError: no prompt is left. PreflightError: the models have too few positions.
    """
    config = settle_privileged_template(config, sets)
    config = settle_template_date(config, pair, place, notes=notes)
    train, extrapolation, dropped = _render_for_run(config, sets, pair, notes=notes)
    grader = choose_grader(config, sets.held_out, sets.own_grader)
    _check_extrapolation_prompts(config, extrapolation, grader, notes=notes)
    if config.data.privileged_column is not None:
        _compare_privileged_prompts(pair, train[:4], place, notes=notes)
    held_out, dropped_held_out = templates.render_all(
        sets.held_out.prompts, pair.student, pair.teacher, config=config
    )
    templates.check_kept(sets.held_out.name, held_out, dropped_held_out, config=config)
    if sum(dropped) + dropped_held_out:
        notes.warn(
            f"{_count_by_set(sets.train, dropped)} training and {dropped_held_out} held-out "
            f"prompts exceed --max-prompt-tokens {config.data.max_prompt_tokens} and were dropped"
        )
    notes.note(*templates.describe_changes([r.changes for r in train + held_out]))
    longest = 0
    for r in train + extrapolation + held_out:
        longest = max(longest, len(r.student_ids), len(r.teacher_ids))
    try:
        config = settle_max_new_tokens(
            config,
            [pair.student, pair.teacher],
            longest_prompt=longest,
            task_limit=sets.held_out.max_new_tokens,
            notes=notes,
        )
    except UserError as error:
        advice = ""
        if "--max-prompt-tokens" not in str(error):
            advice = ", or lower --max-prompt-tokens to drop long prompts"
        raise PreflightError(f"{error}{advice}") from None
    teacher_tokens = 1.0
    if pair.alignment is not None:
        teacher_tokens = _measure_coverage(pair.alignment, train, notes)
    else:
        _compare_eos(config, pair, notes)
    problems = Problems(
        train=train,
        held_out=[(r.prompt, r.student_ids) for r in held_out[: config.evaluate.problems]],
        teacher_held_out=[(r.prompt, r.teacher_ids) for r in held_out[: config.evaluate.problems]],
        kl=held_out[: config.evaluate.kl_prompts],
        extrapolation=extrapolation,
        grader=grader,
        teacher_tokens=teacher_tokens,
        loaded=[s.digest() for s in sets.train],
    )
    return config, problems


def choose_grader(config: Config, prompts: PromptSet, own: OwnGrader | None) -> Grader:
    """Return how answers are graded: by the user's function, or by references in a format.

    That is the given format, or the dataset's own for ``auto``.
    """
    answer_format: str = config.evaluate.answer_format
    if answer_format == "auto" and prompts.answer_format:
        answer_format = prompts.answer_format
    return Grader(answer_format=answer_format, own=own)


def settle_privileged_template(config: Config, sets: PromptSets) -> Config:
    """Return the config with a privileged template: the datasets' own if they all agree."""
    if config.data.privileged_column is None or config.data.privileged_template is not None:
        return config
    privileged_templates = {s.privileged_template for s in sets.train}
    template = None
    if len(privileged_templates) == 1:
        template = privileged_templates.pop()
    return configuration.replace(config, data={"privileged_template": template or PRIVILEGED})


def settle_template_date(config: Config, pair: Pair, place: Place, notes: Notes) -> Config:
    """Return the config with the date that chat templates write, if one of them reads the clock.

    The first rank's date counts. A resumed run reads it from its folder.
    """
    renderers = [
        templates.student_renderer(pair.student, config),
        templates.teacher_renderer(pair.teacher, config),
    ]
    if not any(renderer.reads_clock for renderer in renderers):
        return config
    date = config.data.template_date or datetime.date.today().isoformat()
    date = place.gather(date)[0]
    notes.note(f"chat templates write the date {date} (--template-date)")
    return configuration.replace(config, data={"template_date": date})


def _render_for_run(
    config: Config, sets: PromptSets, pair: Pair, notes: Notes
) -> tuple[list[Rendered], list[Rendered], list[int]]:
    """Return (training prompts, extrapolation prompts, how many of each set were dropped).

    The training prompts are as many as the steps need, or all prompts of a single smaller set.
    The last distinct ones also serve extrapolation, if it needs any.
    """
    needed = config.train.steps * config.train.batch_size or 1
    fixed = _count_extrapolation_prompts(config)
    rendered = render_training_prompts(
        config, sets, (pair.student, pair.teacher), count=needed + fixed
    )
    if len(sets.train) > 1:
        notes.note(_describe_mixture(sets, rendered.by_set, needed))
    prompts = rendered.stream
    if not fixed:
        return prompts[:needed], [], rendered.dropped
    last = list({r.prompt.index: r for r in prompts}.values())
    return prompts[:needed], last[max(0, len(last) - fixed) :], rendered.dropped


@dataclass(frozen=True, kw_only=True)
class RenderedSets:
    """Training prompts, rendered for both models.

    ``stream``: in the order of the run; ``by_set``: those of each set; ``dropped``: how many of
    each set are too long.
    """

    stream: list[Rendered]
    by_set: list[list[Rendered]]
    dropped: list[int]


def render_training_prompts(
    config: Config, sets: PromptSets, models: tuple[Model, Model], count: int
) -> RenderedSets:
    """Render the first ``count`` prompts of the run's stream for (student, teacher).

    A single set with fewer prompts yields all of them. UserError: no prompt is left.
    """
    seed = config.runtime.seed
    by_set: list[list[Rendered]] = []
    dropped: list[int] = []
    for s, share in zip(sets.train, stream.count_slots(sets.weights, count), strict=True):
        rendered: list[Rendered] = []
        dropped_of_set = 0
        if share:
            order = s.prompts if s.streamed else shuffle(s.prompts, seed, "epoch", 0)
            rendered, dropped_of_set = templates.render_all(
                order, *models, config=config, limit=share
            )
            templates.check_kept(s.name, rendered, dropped_of_set, config=config)
        by_set.append(rendered)
        dropped.append(dropped_of_set)
    prompts = by_set[0]
    if len(sets.train) > 1:
        prompts = mix(by_set, sets.weights, count=count, seed=seed)
    return RenderedSets(stream=prompts, by_set=by_set, dropped=dropped)


def _count_extrapolation_prompts(config: Config) -> int:
    if config.extrapolation.kind != "effopd":
        return 0
    return config.extrapolation.problems


def _describe_mixture(sets: PromptSets, kept: list[list[Rendered]], needed: int) -> str:
    """Describe how many training prompts come from each set."""
    total = sum(sets.weights)
    counts = stream.count_slots(sets.weights, needed)
    parts = []
    for s, prompts, weight, count in zip(sets.train, kept, sets.weights, counts, strict=True):
        distinct = min(count, len(prompts))
        share = float(weight / total)
        parts.append(f"{count} of {s.name} ({share:.1%}; {distinct} different ones)")
    return "training prompts: " + ", ".join(parts)


def _check_extrapolation_prompts(
    config: Config, prompts: list[Rendered], grader: Grader, *, notes: Notes
) -> None:
    """Raise UserError if candidates are scored by accuracy and a prompt cannot be graded.

    Too few prompts give a warning.
    """
    fixed = _count_extrapolation_prompts(config)
    needs_grades = config.extrapolation.score == "accuracy"
    if needs_grades and not all(grader.can_grade(r.prompt) for r in prompts):
        raise UserError(
            f"dataset {config.data.dataset}: a prompt has no reference answer that can be graded, "
            "so candidates have no accuracy; name the column with --answer-column, or use "
            "--extrapolate-score heldout-kl"
        )
    if len(prompts) < fixed:
        notes.warn(
            f"--extrapolate-problems {fixed}: only {len(prompts)} training prompts are left to "
            "score candidates on"
        )


def _count_by_set(sets: list[PromptSet], dropped: list[int]) -> str:
    """Describe how many prompts were dropped: 3, or 3 (a.jsonl 1, b.jsonl 2)."""
    if len(sets) == 1:
        return str(sum(dropped))
    parts = [f"{s.name} {n}" for s, n in zip(sets, dropped, strict=True)]
    return f"{sum(dropped)} ({', '.join(parts)})"


def settle_max_new_tokens(
    config: Config,
    readers: list[Model],
    longest_prompt: int,
    task_limit: int | None,
    notes: Notes,
) -> Config:
    """Return the config with --max-new-tokens set.

    ``task_limit``: the length of the dataset's answers, if known. UserError: the longest prompt
    and the longest response exceed a model's positions.
    """
    limits = [model.positions for model in readers if model.positions]
    positions = min(limits, default=None)
    room = None if positions is None else positions - longest_prompt
    if room is not None and room < 1:
        raise UserError(
            f"the longest prompt has {longest_prompt} tokens, but the models have {positions} "
            "positions, and a response needs one; shorten the prompts, or leave long ones out with "
            f"--max-prompt-tokens {max(1, (positions or 1) - 1)}"
        )
    given = config.rollout.max_new_tokens
    prefix = None  # a fixed length in tokens
    if config.schedule.prefix.isdecimal():
        prefix = int(config.schedule.prefix)
    if given is None:
        why = "the default, limited by the models' positions"
        given = min(LONGEST, room or LONGEST)
        if task_limit:
            why = "the built-in task's length"
            given = task_limit
        given = max(given, prefix or 1)
        notes.note(f"max-new-tokens {given}: {why}")
    if room is not None and given > room:
        flag = "--max-new-tokens"
        if prefix == given:
            flag = "--prefix"
        raise UserError(
            f"{flag} {given}: expected at most {room} tokens, because the models have "
            f"{positions} positions and the longest prompt has {longest_prompt}; lower {flag}"
        )
    return configuration.replace(config, rollout={"max_new_tokens": given})


def _compare_eos(config: Config, pair: Pair, notes: Notes) -> None:
    """Warn if the models end their answers with different tokens."""
    student, teacher = pair.student, pair.teacher
    if student.eos != teacher.eos:
        notes.warn(
            f"end-of-sequence (EOS) ids differ: student {describe_tokens(student, student.eos)}, "
            f"teacher {describe_tokens(teacher, teacher.eos)}; rollouts stop at those of "
            f"--eos {config.rollout.eos}; choose with --eos student|teacher|union"
        )


def _measure_coverage(alignment: Alignment, prompts: list[Rendered], notes: Notes) -> float:
    """Report how the text of some prompts aligns.

    Return the number of the teacher's tokens per token of the student's.
    """
    contents = [r.prompt.messages[-1]["content"] for r in prompts[:64]]
    texts = [alignment.student.encode(content) for content in contents]
    aligned = []
    for i, ids in enumerate(texts):
        if ids:
            aligned.append(alignment.align_rollout(rollout_of(i, (), ids)))
    share = token_shares([count_by_unit(aligned)])
    if share["exact_share"] < 0.5:
        notes.warn(
            f"only {share['exact_share']:.0%} of the student's tokens have a counterpart of the "
            "same bytes in the teacher's tokenization: --cross-tokenizer strict trains on few of "
            "them; use --cross-tokenizer simct"
        )
    notes.note(
        f"alignment on {len(texts)} prompts: {share['exact_share']:.1%} of student tokens map to "
        f"one teacher token, {share['span_share']:.1%} lie in spans, {share['dropped_share']:.1%} "
        "are unaligned (the last unit of a prompt is never aligned)"
    )
    teacher_tokens = sum(len(alignment.teacher.encode(content)) for content in contents)
    return teacher_tokens / max(1, sum(map(len, texts)))


def _compare_privileged_prompts(
    pair: Pair, prompts: list[Rendered], place: Place, notes: Notes
) -> None:
    """Report whether the privileged text helps the teacher.

    Measured: the teacher's log-probability of that text as an answer, after its own prompt and
    after the student's, in nats per token.
    """
    teacher_logp = _privileged_logp(pair, [(r.teacher_ids, r) for r in prompts], place)
    student_logp = _privileged_logp(pair, [(r.student_ids, r) for r in prompts], place)
    if teacher_logp <= student_logp:
        notes.warn(
            "--privileged-column does not help the teacher: its log-probability of that text is "
            f"{teacher_logp:.3g} nats per token with the text in the prompt and {student_logp:.3g} "
            "without; choose another column or --privileged-template"
        )
    notes.note(
        f"privileged text: its log-probability under the teacher is {teacher_logp:.3g} nats per "
        f"token after the teacher's prompt and {student_logp:.3g} after the student's"
    )


def _privileged_logp(
    pair: Pair, prompts: list[tuple[tuple[int, ...], Rendered]], place: Place
) -> float:
    """Return the teacher's mean log-probability of the privileged texts after the given ids."""
    teacher = pair.teacher
    rollouts = []
    for i, (ids, rendered) in enumerate(prompts):
        text = rendered.prompt.privileged
        answer = tuple(teacher.tokenizer(text, add_special_tokens=False).input_ids)
        if teacher.positions is not None:
            answer = answer[: max(1, teacher.positions - len(ids))]
        rollouts.append(rollout_of(i, ids, answer))
    itself = dataclasses.replace(
        pair, student=teacher, student_shape=pair.teacher_shape, shared_support=None
    )
    facts = Scorer.reverse_kl(itself, place).measure(rollouts, 1)
    values = [v for row in facts.values() for v in row["teacher_logp"].values()]
    return sum(values) / len(values)
