"""Config to Run: load what a run needs and refuse what cannot work, before anything is written."""

import contextlib
import dataclasses
import itertools
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..config import sections as configuration
from ..config.sections import Config
from ..engine import device as runtime
from ..engine import models, scoring
from ..engine.alignment import Alignment, census, match, shares
from ..engine.device import Place, place, seed_of
from ..engine.models import LAB, Model
from ..engine.sampling import Rollout, Sampler
from ..errors import MemoryShortage, PreflightError, UserError
from ..maths import flops, simct
from ..maths.divergence import Terms
from ..maths.schedule import OffPolicy, PrefixSchedule, parse_off_policy, parse_prefix
from ..maths.weights import (
    PositionWeight,
    Selection,
    Window,
    parse_position_weight,
    parse_selection,
    parse_window,
)
from ..prompts import load as data
from . import trackers

TASK = "choice"  # the embedded default: lab:choice and its pair
LONGEST = 2048  # tokens; the default --max-new-tokens where the models' positions allow it


@dataclass
class Run:
    """Everything the loop works with. ``notes``: automatic choices with their reasons; ``warnings``: what may go wrong.
    ``text_terms`` and ``text_sampler``: the loss on, and the sampling of, responses that the teacher writes.
    ``say``: where ``halve`` is told. ``fitted``: what it has set, for the checkpoint.
    ``extrapolation_prompts``: the fixed ones on which candidates are scored ([] where none is). ``alignment`` and ``shared``: where
    the tokenizers differ, how texts are aligned and which tokens both models share; ``teacher_tokens``: how many of the teacher's
    make one of the student's, in the prompts' text. ``tokenizers``: how the vocabularies compare; ``checks``: what the models answered
    (``checks.Check``), if they were asked."""

    config: Config
    place: Place
    student: Model
    teacher: Model
    alignment: Alignment | None
    shared: simct.Support | None
    prefix: PrefixSchedule
    window: Window | None
    selection: Selection | None
    position: PositionWeight | None
    off_policy: OffPolicy | None
    terms: Terms
    text_terms: Terms
    sampler: Sampler
    text_sampler: Sampler
    eval_sampler: Sampler
    train_prompts: list[data.Rendered]
    kl_prompts: list[data.Rendered]
    extrapolation_prompts: list[data.Rendered]
    problems: list[tuple]
    answer_format: str
    student_shape: flops.Shape
    teacher_shape: flops.Shape
    notes: list[str]
    warnings: list[str]
    tokenizers: str = ""
    teacher_tokens: float = 1.0
    checks: list = dataclasses.field(default_factory=list)
    say: Callable[[str], None] = lambda text: None
    fitted: dict[str, int] = dataclasses.field(default_factory=dict)

    def fit(self, what: str, ledger: flops.Ledger, work):
        """``work(ledger)`` of this rank; where memory runs out, again with half of ``what`` (see ``halve``) until it fits."""
        while True:
            spent = flops.Ledger()
            try:
                found = work(spent)
            except Exception as error:
                if not runtime.out_of_memory(error):
                    raise
            else:
                ledger.merge(spent)
                return found
            ledger.waste(spent)
            self.halve(what)

    def attempt(self, ledger: flops.Ledger, work):
        """``work(ledger)`` of every rank. Where one runs out of memory: None, and half the micro-batch for all from now on."""
        spent, found, enough = flops.Ledger(), None, True
        try:
            found = work(spent)
        except Exception as error:
            if not runtime.out_of_memory(error):
                raise
            enough = False
        if all(self.place.gather(enough)):
            ledger.merge(spent)
            return found
        del found
        ledger.waste(spent)
        self.halve("micro_batch_size")

    def halve(self, what: str) -> None:
        """Half as many rollouts at once from now on, in training (``micro_batch_size``) or in generation (``rows``). The mathematics
        stays. MemoryShortage when it was one."""
        section, flag = {
            "micro_batch_size": ("train", "--micro-batch-size"),
            "rows": ("rollout", "--generation-rows"),
        }[what]
        place = self.place.device
        size = getattr(getattr(self.config, section), what)
        if size == 1:
            raise MemoryShortage(
                f"rank {self.place.rank}: {place} has no memory for one rollout at a time; use --gradient-checkpointing, a lower "
                "--head-memory-mb, shorter answers (--prefix, --max-new-tokens) or a smaller model"
            )
        self.use(**{what: size // 2})
        self.say(
            f"rank {self.place.rank}: {place} ran out of memory; {flag} {size} becomes {size // 2}, the mathematics stays the same"
        )
        if place.type in ("cuda", "mps"):
            getattr(torch, place.type).empty_cache()

    def use(self, **sizes: int) -> None:
        """Sets ``micro_batch_size`` and ``rows``; kept in ``fitted``."""
        self.fitted |= sizes
        for what, size in sizes.items():
            self.config = configuration.replace(
                self.config, **{"rollout" if what == "rows" else "train": {what: size}}
            )
        self.sampler, self.text_sampler, self.eval_sampler = (
            dataclasses.replace(sampler, rows=self.config.rollout.rows)
            for sampler in (self.sampler, self.text_sampler, self.eval_sampler)
        )

    def counts_both(self, ledger: flops.Ledger, phase: str):
        """A function that adds one reading of a group of rollouts by student and teacher, heads included, to ``phase``."""

        def spent(group: list[Rollout]) -> None:
            for model, shape, teacher in (
                (self.student, self.student_shape, False),
                (self.teacher, self.teacher_shape, True),
            ):
                ledger.forward(
                    phase,
                    shape,
                    scoring.reads(group, model.reads_once, teacher=teacher),
                    taught=scoring.head_rows(model, group, self.shared, teacher, whole=True),
                )

        return spent

    def aligned(self, rollouts: list[Rollout]) -> list[Rollout]:
        """The same rollouts with the teacher's tokens of their texts and the units, where the tokenizers differ."""
        return rollouts if self.alignment is None else [self.alignment.rollout(r) for r in rollouts]

    def update_cost(self, prompts: list[data.Rendered], response: float) -> float:
        """Useful FLOPs of an update on these prompts with responses of ``response`` tokens."""
        samples, micro = self.config.rollout.samples, self.config.train.micro_batch_size
        behind = (
            samples if self.student.shares_prompts else 1,
            micro if self.teacher.reads_once else 1,
            micro if self.student.reads_once else 1,
        )
        return flops.update_cost(
            self.student_shape,
            self.teacher_shape,
            [(len(p.student_ids), len(p.teacher_ids)) for p in prompts],
            samples,
            response,
            behind,
            self.teacher_tokens,
            (1.0, 1.0)
            if self.shared is None
            else tuple(
                len(ids) / model.support
                for ids, model in (
                    (self.shared.student, self.student),
                    (self.shared.teacher, self.teacher),
                )
            ),
        )


def fill_in(config: Config) -> tuple[Config, list[str]]:
    """Puts the embedded pair and its task where no student, teacher or data set is given, and says so."""
    notes = []
    own = config.models.teacher == configuration.SELF
    for section, key, value in (
        ("models", "student", f"{LAB}{TASK}/student{'-told' if own else ''}"),
        ("models", "teacher", f"{LAB}{TASK}/teacher"),
        ("data", "dataset", LAB + TASK),
    ):
        if getattr(getattr(config, section), key) is None:
            config = configuration.replace(config, **{section: {key: value}})
            notes.append(f"{key} {value}: none was given, so it comes from the embedded laboratory")
    return config, notes


def prepare(config: Config) -> Run:
    """Config → Run. UserError, one line, on anything that would make the run wrong or impossible."""
    trackers.check(config)
    config, notes = fill_in(config)
    warnings = []
    train_sets, weights, held_out = _prompt_sets(config, notes)

    trust = config.models.trust_remote_code
    adapted = config.adapter.rank is not None
    if adapted:
        where = place(config.runtime, lambda: models.count(config.models.student, trust))
        student = models.load(
            config.models.student,
            device=where.device,
            dtype=where.dtype,
            trust_remote_code=trust,
            quantize=config.models.student_quantize,
        )
    else:
        student = models.load(
            config.models.student,
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
        student = models.with_adapter(student, config.adapter, config.runtime.seed)
        count = sum(p.numel() for p in student.trained.values())
        notes.append(
            f"LoRA of rank {config.adapter.rank} on {config.adapter.targets}: {count:,} parameters train, {student.parameters - count:,} "
            f"stay as they are, in {str(where.dtype)[6:]}"
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
        teacher = models.load(
            config.models.student if own else config.models.teacher,
            device=where.teacher_device,
            dtype=torch.float32 if averaged else where.dtype,
            trust_remote_code=trust,
            quantize=few,
            spread=_teacher_memory(config, where, notes),
        )
    if own:
        teacher.name = f"{teacher.name} (itself)"
        notes.append(
            "teacher self: the student without its adapter, no second copy of the weights"
            if teacher.adapter_off
            else "teacher self: a copy of the student's initial weights, "
            + (
                f"in float32, that follows the student by 1 − {config.models.teacher_ema:g} an update"
                if averaged
                else "frozen"
            )
        )
    with _together():
        alignment, tokenizers = match(student, teacher, config.models.cross_tokenizer)
    notes.append(tokenizers)
    shared = None
    if alignment is not None:
        config = _check_alignment(config, notes)
        shared = simct.support(alignment.shared, alignment.mode, where.device, where.teacher_device)
    for role, model in (("student", student), ("teacher", teacher)):
        with _together():
            models.check_head(model)
        reason = scoring.check_sharing(model)
        model.shares_prompts = reason is None
        if reason:
            notes.append(f"the {role} reads a prompt again for each of its samples: {reason}")
    if config.train.gradient_checkpointing:
        student = models.recompute(student)
        if student.shares_prompts and config.rollout.samples > 1:
            notes.append(
                "in training the student reads a prompt again for each of its samples: --gradient-checkpointing"
            )

    if config.data.privileged_column is not None and config.data.privileged_template is None:
        forms = {s.privileged_template for s in train_sets}
        config = configuration.replace(
            config,
            data={
                "privileged_template": (forms.pop() if len(forms) == 1 else None) or data.PRIVILEGED
            },
        )
    needed = config.train.steps * config.train.batch_size or 1
    fixed = config.extrapolation.problems if config.extrapolation.kind == "effopd" else 0
    train_prompts, extrapolation_prompts, dropped = _training_prompts(
        train_sets, weights, needed, fixed, student, teacher, config, notes
    )
    if (
        fixed
        and config.extrapolation.score == "accuracy"
        and any(p.prompt.answer is None for p in extrapolation_prompts)
    ):
        raise UserError(
            f"dataset {config.data.dataset}: a prompt has no reference answer, so candidates cannot be graded; name the "
            "column with --answer-column, or use --extrapolate-score heldout-kl"
        )
    if len(extrapolation_prompts) < fixed:
        warnings.append(
            f"--extrapolate-problems {fixed}: only {len(extrapolation_prompts)} training prompts are there to be scored"
        )
    if config.data.privileged_column is not None:
        notes.append(_privileged_note(teacher, train_prompts[:4], where, warnings))
    problems, dropped_held = data.render_all(held_out.prompts, student, teacher, config)
    if sum(dropped) + dropped_held:
        warnings.append(
            f"{_by_set(train_sets, dropped)} training and {dropped_held} held-out prompts exceed --max-prompt-tokens "
            f"{config.data.max_prompt_tokens} and were dropped"
        )
    longest = max(
        max(len(r.student_ids), len(r.teacher_ids))
        for r in train_prompts + extrapolation_prompts + problems
    )
    with _together():
        config = _max_new_tokens(config, student, teacher, longest, held_out.max_new_tokens, notes)
    prefix = parse_prefix(config.schedule.prefix, config.rollout.max_new_tokens)

    rollout, divergence = config.rollout, config.divergence
    eos = {"student": student.eos, "teacher": teacher.eos, "union": student.eos | teacher.eos}[
        rollout.eos
    ]
    teacher_tokens = 1.0
    if alignment is not None:
        eos = student.eos
        teacher_tokens = _coverage(alignment, train_prompts, notes, warnings)
    elif student.eos != teacher.eos:
        warnings.append(
            f"end-of-sequence ids differ: student {named(student, student.eos)}, teacher {named(teacher, teacher.eos)}; "
            f"rollouts stop at the {rollout.eos}'s (--eos student|teacher|union)"
        )
    pad = student.tokenizer.pad_token_id
    sampler = Sampler(
        eos,
        min(eos) if pad is None else pad,
        student.support,
        config.runtime.seed,
        rollout.temperature,
        rollout.top_p,
        rollout.top_k,
        rollout.rows,
    )
    if not sampler.on_policy:
        warnings.append(
            f"sampling at temperature {rollout.temperature:g}, top-p {rollout.top_p:g}, top-k {rollout.top_k} "
            "is off-policy for the divergence: contexts come from another distribution than the student's"
        )
    eval_sampler = Sampler(
        eos,
        sampler.pad,
        student.support,
        seed_of(config.runtime.seed, "evaluation"),
        config.evaluate.temperature,
        rows=rollout.rows,
    )
    if where.world > config.train.batch_size:
        raise UserError(
            f"--batch-size {config.train.batch_size}: {where.world} ranks need at least one prompt each; raise it"
        )
    name, beta = configuration.parse_divergence(divergence.name)
    estimator, top_k = configuration.parse_estimator(divergence.estimator)
    budget = config.runtime.head_memory_mb << 20
    terms = Terms(
        name,
        beta,
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
    columns = student.support if shared is None else shared.columns
    rows = (
        terms.chunk(columns, student.head().softcap is not None)
        if shared is None
        else simct.chunk(terms, columns)
    )
    notes.append(
        f"loss in chunks of {rows:,} rows: what --head-memory-mb {config.runtime.head_memory_mb} holds of its float32 "
        f"tables of {columns:,} columns"
    )
    answer_format = config.evaluate.answer_format
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
        flops.shape(student, student.support),
        flops.shape(teacher, teacher.support),
        notes,
        warnings,
        tokenizers,
        teacher_tokens,
    )


@contextlib.contextmanager
def _together():
    """What is wrong here is no setting or file by itself: the parts do not go together."""
    try:
        yield
    except UserError as error:
        raise PreflightError(str(error)) from None


def _teacher_memory(config: Config, where: Place, notes: list[str]) -> int | None:
    """Bytes of each device that --teacher-device auto may fill; None where the teacher is in one place."""
    if config.runtime.teacher_device != "auto":
        return None
    if where.world > 1:
        raise UserError(
            f"--teacher-device auto with {where.world} ranks: it spreads one teacher over all GPUs; start one rank, or leave it out"
        )
    if config.runtime.teacher_memory is not None:
        limit = int(config.runtime.teacher_memory * 2**30)
    else:
        limit = (runtime.memory_free(where.device) or 8 << 30) // 2
    notes.append(
        f"teacher's layers spread over {'all GPUs' if where.device.type == 'cuda' else where.device.type}, up to {limit / 2**30:.3g} GiB of each, "
        "then main memory, then disk"
    )
    return limit


def _check_alignment(config: Config, notes: list[str]) -> Config:
    """What a loss on units does not know is refused."""
    estimator, _ = configuration.parse_estimator(config.divergence.estimator)
    off_policy, window = (
        parse_off_policy(config.rollout.off_policy),
        parse_window(config.weights.window),
    )
    ranked = config.weights.select not in ("all", "random") or (
        window is not None and window.statistic is not None
    )
    for wrong, got, instead in (
        (
            estimator != "full",
            f"--estimator {config.divergence.estimator}",
            "units are compared on all shared tokens: use full",
        ),
        (
            config.divergence.clip is not None,
            "--clip",
            "the clip is of one vocabulary: leave it out",
        ),
        (
            config.rollout.eos == "teacher",
            "--eos teacher",
            "its ids are not the student's: leave it out",
        ),
        (
            off_policy is not None and off_policy.loss == "sft" and ranked,
            "--off-policy sft with a ranked selection",
            "text without units cannot be ranked: use random, a window by position, or --off-policy divergence",
        ),
    ):
        if wrong:
            raise UserError(f"{got} with different tokenizers: {instead}")
    notes.append("rollouts stop at the student's end-of-sequence ids: the teacher's are its own")
    return configuration.replace(config, rollout={"eos": "student"})


def _coverage(
    alignment: Alignment, rendered: list[data.Rendered], notes: list[str], warnings: list[str]
) -> float:
    """Says how the text of some prompts aligns → the teacher's tokens per token of the student's in it."""
    contents = [r.prompt.messages[-1]["content"] for r in rendered[:64]]
    texts = [alignment.student.encode(content) for content in contents]
    share = shares(
        [
            census(
                alignment.rollout(Rollout(i, 0, (), (), ids, (), False))
                for i, ids in enumerate(texts)
                if ids
            )
        ]
    )
    if share["exact_share"] < 0.5:
        warnings.append(
            f"only {share['exact_share']:.0%} of the student's tokens have a counterpart of the same bytes in the teacher's tokenization: "
            "little can be taught by --cross-tokenizer strict"
        )
    notes.append(
        f"in the text of {len(texts)} prompts {share['exact_share']:.1%} of the student's tokens align one to one, "
        f"{share['span_share']:.1%} in spans, {share['dropped_share']:.1%} not at all (the end of each text counts as cut)"
    )
    return sum(len(alignment.teacher.encode(content)) for content in contents) / max(
        1, sum(map(len, texts))
    )


def _text_sampler(
    sampler: Sampler, teacher: Model, alignment: Alignment | None, seed: int
) -> Sampler:
    """How the teacher writes: as the student does, with ids of its own where the tokenizers differ."""
    sampler = dataclasses.replace(sampler, seed=seed_of(seed, "teacher-text"))
    if alignment is None:
        return sampler
    pad = teacher.tokenizer.pad_token_id
    return dataclasses.replace(
        sampler,
        eos=teacher.eos,
        support=teacher.support,
        pad=min(teacher.eos) if pad is None else pad,
    )


def _privileged_note(
    teacher: Model, rendered: list[data.Rendered], where: Place, warnings: list[str]
) -> str:
    """Does what the teacher alone sees help it? Its log-probability of that very text as the answer, behind its own prompt and
    behind the student's, nats per token."""
    found = []
    for ids in ("teacher_ids", "student_ids"):
        reads = []
        for i, r in enumerate(rendered):
            prompt, text = (
                getattr(r, ids),
                tuple(teacher.tokenizer(r.prompt.privileged, add_special_tokens=False).input_ids),
            )
            text = text[: max(1, (teacher.positions or len(prompt) + len(text)) - len(prompt))]
            reads.append(Rollout(i, 0, prompt, prompt, text, text, False))
        facts = scoring.token_statistics(
            Terms("reverse-kl", dtype=where.head_dtype), teacher, teacher, None, reads, where, 1
        )
        values = [v for row in facts.values() for v in row["teacher_logp"].values()]
        found.append(sum(values) / len(values))
    if found[0] <= found[1]:
        warnings.append(
            "the teacher makes no use of what --privileged-column shows it: it finds that text no more likely for having it "
            f"in its prompt ({found[0]:.3g} nats per token against {found[1]:.3g})"
        )
    return (
        f"privileged prompt: of what it is shown, the teacher's log-probability is {found[0]:.3g} nats per token behind its own prompt, "
        f"{found[1]:.3g} behind the student's"
    )


def _prompt_sets(config: Config, notes: list[str]):
    """(training sets, their weights, held-out prompts): disjoint, every prompt behind the same examples."""
    seed, few_shot, wanted = (
        config.runtime.seed,
        config.data.few_shot,
        max(config.evaluate.problems, config.evaluate.kl_prompts),
    )
    names, weights = zip(*data.sources(config.data.dataset))
    sets = [
        data.load(
            name,
            split=config.data.split,
            worked=few_shot > 0 and k == 0,
            part=(k, len(names)),
            **_form(config),
        )
        for k, name in enumerate(names)
    ]
    notes.extend(note for s in sets for note in s.notes)
    if config.evaluate.dataset is not None:
        held = _evaluated(config, config.evaluate.dataset, config.evaluate.split, wanted, notes)
    else:
        parts = []
        for k, count in enumerate(data.shares(weights, wanted)):
            sets[k], part = _held_out(
                config, sets[k], count, (k, len(names)), len(names) > 1, notes
            )
            parts.append(part)
        held = data.joined(parts, weights)
    if few_shot:
        sets[0], turns = data.examples(sets[0], few_shot, seed, held.prompts)
        notes.append(
            f"few-shot: {few_shot} of {sets[0].name} with solutions before every prompt, of training and evaluation; they are neither taught nor "
            "evaluated"
        )
        sets, held = [data.behind(s, turns) for s in sets], data.behind(held, turns)
    if empty := [s for s in sets if not s.streamed and not s.prompts]:
        raise UserError(
            f"dataset {empty[0].name}: no row is left to be taught; give --eval-dataset, lower --few-shot, or add rows"
        )
    return sets, weights, held


def _form(config: Config) -> dict:
    """How rows become prompts, for ``data.load``."""
    return {
        k: getattr(config.data, k)
        for k in (
            "prompt_column",
            "answer_column",
            "system",
            "instruction",
            "privileged_column",
            "prompt_template",
            "streaming",
        )
    } | {"seed": config.runtime.seed}


def _evaluated(
    config: Config, text: str, split: str | None, limit: int | None, notes: list[str], **further
) -> data.PromptSet:
    """The prompts of ``--eval-dataset``: ``limit`` in all (None: every one), spread over several sets by weight."""
    names, weights = zip(*data.sources(text))
    counts = [None] * len(names) if limit is None else data.shares(weights, limit)
    sets = [
        data.load(
            name,
            split=split,
            limit=count,
            evaluated=True,
            part=(k, len(names)),
            **_form(config),
            **further,
        )
        for k, (name, count) in enumerate(zip(names, counts))
        if count != 0
    ]
    notes.extend(note for s in sets for note in s.notes)
    return data.joined(
        [dataclasses.replace(s, prompts=tuple(s.prompts)) for s in sets],
        [w for w, c in zip(weights, counts) if c != 0],
    )


def _held_out(
    config: Config,
    train: data.PromptSet,
    count: int,
    part: tuple[int, int],
    several: bool,
    notes: list[str],
):
    """(the training set without them, ``count`` held-out prompts): of its own test split, where it has one, else rows of it."""
    if count == 0:
        return train, dataclasses.replace(train, prompts=())
    if "test" in train.elsewhere:
        name, split = train.elsewhere["test"]
        held = data.load(
            name,
            split=config.evaluate.split or split,
            limit=count,
            evaluated=True,
            part=part,
            **_form(config),
        )
        notes.extend(note for note in held.notes if note not in train.notes)
        return train, dataclasses.replace(held, prompts=tuple(held.prompts))
    of = f" of {train.name}" if several else ""
    if train.streamed:
        notes.append(
            f"the first {count} rows{of} of the stream held out for evaluation: no --eval-dataset was given"
        )
        return data.hold_out(train, count, config.runtime.seed)
    total = len(train.prompts)
    count = min(count, max(1, total // 10))
    if total < 2:
        raise UserError(
            f"dataset {train.name}: one row cannot be both taught and held out; give --eval-dataset"
        )
    notes.append(
        f"{count} of {total} rows{of} held out for evaluation: no --eval-dataset was given"
    )
    return data.hold_out(train, count, config.runtime.seed)


def _training_prompts(
    sets,
    weights,
    needed: int,
    fixed: int,
    student: Model,
    teacher: Model,
    config: Config,
    notes: list[str],
):
    """(``needed`` prompts of the run's stream, or all there are of one set; the ``fixed`` ones on which candidates are scored; how many
    of each set were dropped)."""
    seed, kept, dropped = config.runtime.seed, [], []
    for s, count in zip(sets, data.shares(weights, needed + fixed)):
        order = s.prompts if s.streamed else data.shuffled(s.prompts, seed, "epoch", 0)
        found = data.render_all(order, student, teacher, config, count) if count else ([], 0)
        kept.append(found[0])
        dropped.append(found[1])
    stream = kept[0] if len(sets) == 1 else data.mixed(kept, weights, needed + fixed, seed)
    if len(sets) > 1:
        notes.append(
            "training prompts: "
            + ", ".join(
                f"{count} of {s.name} ({float(weight / sum(weights)):.1%}; {min(count, len(part))} different ones)"
                for s, part, weight, count in zip(sets, kept, weights, data.shares(weights, needed))
            )
        )
    last = list({r.prompt.index: r for r in stream}.values())
    return stream[:needed], last[max(0, len(last) - fixed) :] if fixed else [], dropped


def _by_set(sets, dropped: list[int]) -> str:
    """Of how many sets how many: 3, or 3 (a.jsonl 1, b.jsonl 2)."""
    each = (
        f" ({', '.join(f'{s.name} {n}' for s, n in zip(sets, dropped))})" if len(sets) > 1 else ""
    )
    return f"{sum(dropped)}{each}"


def _max_new_tokens(
    config: Config, student: Model, teacher: Model, prompt: int, task_limit, notes
) -> Config:
    """Settles --max-new-tokens and checks it, with the longest prompt, against both models' positions."""
    positions = min((m.positions for m in (student, teacher) if m.positions), default=None)
    room = None if positions is None else positions - prompt
    given = config.rollout.max_new_tokens
    number = int(config.schedule.prefix) if config.schedule.prefix.isdecimal() else 1
    if given is None:
        given = max(task_limit or min(LONGEST, room or LONGEST), number)
        why = (
            "what the embedded task needs"
            if task_limit
            else "the default, as far as the models' positions allow"
        )
        notes.append(f"max-new-tokens {given}: {why}")
    if room is not None and given > room:
        raise UserError(
            f"{given} response tokens after a prompt of {prompt}: the models have {positions} positions; lower "
            f"{'--prefix' if number == given else '--max-new-tokens'} to {max(room, 0)} or --max-prompt-tokens"
        )
    return configuration.replace(config, rollout={"max_new_tokens": given})


def named(model: Model, ids) -> str:
    """Ids with their tokens: ``<|end|> (1)``."""
    return ", ".join(f"{model.tokenizer.convert_ids_to_tokens(i)} ({i})" for i in sorted(ids))


def _shown(config: Config, dataset: str, notes: list[str]) -> data.PromptSet:
    """The problems of `prefix-distill eval`, behind their examples: rows of the first set's own training split, else of the set itself,
    which are not evaluated then."""
    few_shot, limit, split = (
        config.data.few_shot,
        config.evaluate.problems or None,
        config.data.split,
    )
    if not few_shot:
        return _evaluated(config, dataset, split, limit, notes)
    names = [name for name, _ in data.sources(dataset)]
    apart = data.load(
        names[0], split=split, limit=1, evaluated=True, **_form(config)
    ).elsewhere.get("examples")
    if apart is not None:
        prompts = _evaluated(config, dataset, split, limit, notes)
        _, turns = data.examples(
            data.load(apart[0], split=apart[1], worked=True, **_form(config)),
            few_shot,
            config.runtime.seed,
            prompts.prompts,
        )
    elif len(names) > 1:
        raise UserError(
            f"--few-shot {few_shot}: dataset {names[0]} has no split apart from the one that is evaluated; evaluate one set at a time"
        )
    else:
        whole = data.load(names[0], split=split, evaluated=True, worked=True, **_form(config))
        notes.extend(whole.notes)
        prompts, turns = data.examples(whole, few_shot, config.runtime.seed)
        prompts = dataclasses.replace(
            prompts, prompts=tuple(itertools.islice(prompts.prompts, limit))
        )
        if not prompts.prompts:
            raise UserError(
                f"--few-shot {few_shot}: dataset {names[0]} has no other row to evaluate; lower it"
            )
    notes.append(
        f"few-shot: {few_shot} of {apart[0] + ', split ' + apart[1] if apart else names[0]} with solutions before every problem; they are not "
        "evaluated"
    )
    return data.behind(prompts, turns)


def evaluate_model(config: Config) -> tuple[Place, list[str], dict]:
    """One model on one data set, as `prefix-distill eval` → (place, notes, result document); writes the examples file."""
    from pathlib import Path

    from ..engine.evaluate import evaluate
    from . import folder as checkpoint

    name, notes = config.models.student, []
    if name is None:
        name = f"{LAB}{TASK}/student"
        notes.append(f"model {name}: none was given, so it comes from the embedded laboratory")
    dataset = config.data.dataset
    if dataset is None:
        dataset = LAB + TASK
        notes.append(f"dataset {dataset}: none was given, so it comes from the embedded laboratory")
    out = Path(config.checkpoint.out)
    if os.path.exists(out):
        raise UserError(f"--out {out}: the file exists; name another")
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: its folder does not exist; make it first")
    try:
        with contextlib.suppress(FileNotFoundError):
            out.lstat()
        tempfile.TemporaryFile(dir=out.absolute().parent).close()
    except (OSError, ValueError) as error:
        raise UserError(
            f"--out {out}: cannot be written ({getattr(error, 'strerror', error)}); name another file"
        ) from None
    prompts = _shown(config, dataset, notes)
    model = models.load(
        name,
        device=torch.device("cpu"),
        dtype=torch.float32,
        trust_remote_code=config.models.trust_remote_code,
    )
    models.check_rows(model)
    where = place(config.runtime, lambda: model.parameters)
    notes.extend(where.reasons)
    model.net.to(where.device, where.dtype)
    begin = data.begin_ids(model, config.rollout.begin)
    form = config.data.template, config.data.student_thinking
    problems = [
        (p, tuple(data.render(model, p.messages, *form, p.index, data.glue(config.data))) + begin)
        for p in prompts.prompts
    ]
    config = _max_new_tokens(
        config, model, model, max(len(ids) for _, ids in problems), prompts.max_new_tokens, notes
    )
    pad = model.tokenizer.pad_token_id
    sampler = Sampler(
        model.eos,
        min(model.eos) if pad is None else pad,
        max(model.tokenizer.get_vocab().values()) + 1,
        seed_of(config.runtime.seed, "evaluation"),
        config.evaluate.temperature,
        config.rollout.top_p,
        config.rollout.top_k,
        config.rollout.rows,
    )
    answer_format = config.evaluate.answer_format
    if answer_format == "auto" and prompts.answer_format:
        answer_format = prompts.answer_format
    clock = runtime.Clock(where.device)
    with clock.phase("evaluation"):
        score = evaluate(
            models.decoder(model, where.dtype),
            problems,
            sampler,
            samples=config.evaluate.rollouts,
            max_new_tokens=config.rollout.max_new_tokens,
            answer_format=answer_format,
            place=where,
        )
    if where.first:
        checkpoint.write_rows(out, score.records)
    return (
        where,
        notes,
        {
            "model": name,
            "dataset": dataset,
            **score.summary(),
            "samples": config.evaluate.rollouts,
            "seconds": clock.seconds["evaluation"],
            "examples": str(out),
        },
    )
