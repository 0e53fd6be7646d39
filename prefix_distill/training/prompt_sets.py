"""Load prompt sets: training prompts, held-out prompts, and few-shot examples."""

import dataclasses
import itertools
from dataclasses import dataclass
from fractions import Fraction

from .. import display
from ..config import Config
from ..errors import UserError
from ..prompts import sources
from ..prompts import stream as prompt_stream
from ..prompts.account import describe_gradable
from ..prompts.grading import describe_graded
from ..prompts.load import load_evaluation_prompts, load_prompts
from ..prompts.own_grader import OwnGrader
from ..prompts.prompt import Prompt, PromptSet
from ..prompts.row_format import RowFormat
from ..prompts.stream import count_slots, hold_out, join_sets, take_examples
from .run import Notes, settled


@dataclass(frozen=True, kw_only=True)
class PromptSets:
    """The datasets of a run, before they are rendered.

    ``train``: the training sets; ``weights``: their shares of the prompts; ``held_out``: the
    prompts of evaluations, which are never trained on. ``own_grader``: the user's grader, if any.
    """

    train: list[PromptSet]
    weights: list[Fraction]
    held_out: PromptSet
    own_grader: OwnGrader | None = None


def load_prompt_sets(config: Config, notes: Notes) -> PromptSets:
    """Load the training sets and hold out the prompts of evaluations.

    Every prompt follows the same few-shot examples. UserError: a set cannot be read, or has no row
    left to train on.
    """
    names, weights = _name_sets(settled(config.data.dataset, "--dataset"))
    few_shot = config.data.few_shot
    train = []
    for k, name in enumerate(names):
        keep_solutions = few_shot > 0 and k == 0
        row_settings = dataclasses.replace(row_format(config), keep_solutions=keep_solutions)
        train.append(
            load_prompts(name, row_settings, split=config.data.split, part=(k, len(names)))
        )
    for loaded in train:
        _report(loaded, notes)
    wanted = max(config.evaluate.problems, config.evaluate.kl_prompts)
    if config.evaluate.dataset is not None:
        split = config.evaluate.split
        held_out = _load_evaluated(
            config, config.evaluate.dataset, split=split, limit=wanted, notes=notes
        )
    else:
        parts = []
        for k, count in enumerate(count_slots(weights, wanted)):
            train[k], part = _hold_out(
                config, train[k], count=count, part=(k, len(names)), notes=notes
            )
            parts.append(part)
        held_out = join_sets(parts, weights)
    if few_shot:
        train[0], turns = take_examples(
            train[0], few_shot, seed=config.runtime.seed, evaluated=tuple(held_out.prompts)
        )
        notes.note(
            f"few-shot: every prompt starts with {few_shot} solved rows of {train[0].name}. These "
            "rows are neither trained on nor evaluated."
        )
        train = [prompt_stream.insert_turns(s, turns) for s in train]
        held_out = prompt_stream.insert_turns(held_out, turns)
    evaluated = list(itertools.islice(held_out.prompts, config.evaluate.problems))
    counted = _list_counted(config, train, held_out)
    _report_gradable(held_out.name, config, notes, evaluated=evaluated, counted=counted)
    _warn_about_repeats(train, held_out, notes)
    for loaded in train:
        if not loaded.streamed and not loaded.prompts:
            raise UserError(
                f"dataset {loaded.name}: no row is left to train on; give --eval-dataset, lower "
                "--few-shot, or add rows"
            )
    return PromptSets(train=train, weights=weights, held_out=held_out)


def _list_counted(config: Config, train: list[PromptSet], held_out: PromptSet) -> list[Prompt]:
    """Return the prompts of the datasets that held-out prompts are from; of a stream only those."""
    prompts = list(held_out.prompts)
    if config.evaluate.dataset is None:
        for loaded in train:
            if isinstance(loaded.prompts, tuple):
                prompts.extend(loaded.prompts)
    return prompts


def _warn_about_repeats(train: list[PromptSet], held_out: PromptSet, notes: Notes) -> None:
    """Warn if held-out problems are in the training rows as well; streamed rows are not known."""
    trained: set[tuple[str, ...]] = set()
    for loaded in train:
        if isinstance(loaded.prompts, tuple):
            trained.update(map(_read_texts, loaded.prompts))
    evaluated = [_read_texts(prompt) for prompt in held_out.prompts]
    repeated = sum(texts in trained for texts in evaluated)
    if repeated:
        notes.warn(
            f"{repeated:,} of {len(evaluated):,} held-out problems are also in the training rows, "
            "so the accuracy does not measure new problems; remove the repeated rows, or give "
            "another --eval-dataset"
        )


def _read_texts(prompt: Prompt) -> tuple[str, ...]:
    """Return the texts of a prompt's turns, without space around them."""
    return tuple(str(message["content"]).strip() for message in prompt.messages)


def _report(loaded: PromptSet, notes: Notes, known: PromptSet | None = None) -> None:
    """Note how a set was read, except the lines of the set ``known``."""
    lines, account = list(loaded.notes), list(loaded.account)
    if known is not None:
        lines = [line for line in lines if line not in known.notes]
        account = [line for line in account if line not in known.account]
    notes.note(*lines)
    notes.account.extend(account)
    if display.is_verbose():
        notes.note(*account)


def _report_gradable(
    name: str, config: Config, notes: Notes, *, evaluated: list[Prompt], counted: list[Prompt]
) -> None:
    """Note who grades, or how many of the ``evaluated`` prompts cannot be graded, if any.

    ``counted``: the prompts whose references the datasets' own notes count; if none of them can be
    graded, these notes say so.
    """
    if config.evaluate.grader is not None:
        notes.note(describe_graded(name, config.evaluate.grader))
        return
    if all(prompt.answer is None for prompt in counted):
        return
    text = describe_gradable(name, [prompt.answer for prompt in evaluated])
    if text is not None:
        notes.note(text)


def _name_sets(text: str) -> tuple[list[str], list[Fraction]]:
    """Split ``a:3,b:1`` into dataset names and weights."""
    named = sources.split_sources(text)
    return [name for name, _ in named], [weight for _, weight in named]


def row_format(config: Config) -> RowFormat:
    """Return how the rows of every dataset become prompts."""
    data = config.data
    return RowFormat(
        prompt_column=data.prompt_column,
        answer_column=data.answer_column,
        privileged_column=data.privileged_column,
        system=data.system,
        instruction=data.instruction,
        prompt_template=data.prompt_template,
        answer_format=config.evaluate.answer_format,
        seed=config.runtime.seed,
        streaming=data.streaming,
        keep_rows=config.evaluate.grader is not None,
    )


def _load_evaluated(
    config: Config, text: str, split: str | None, limit: int | None, notes: Notes
) -> PromptSet:
    """Load ``limit`` prompts of the datasets ``text``, divided by weight.

    ``limit`` None: all prompts.
    """
    names, weights = _name_sets(text)
    counts: list[int | None] = [None] * len(names)
    if limit is not None:
        counts = list(count_slots(weights, limit))
    sets, kept_weights = [], []
    for k, (name, count) in enumerate(zip(names, counts, strict=True)):
        if count == 0:
            continue
        part = (k, len(names))
        loaded = load_evaluation_prompts(
            name, row_format(config), split=split, limit=count, part=part
        )
        _report(loaded, notes)
        sets.append(dataclasses.replace(loaded, prompts=tuple(loaded.prompts)))
        kept_weights.append(weights[k])
    return join_sets(sets, kept_weights)


def _hold_out(
    config: Config,
    train: PromptSet,
    count: int,
    part: tuple[int, int],
    notes: Notes,
) -> tuple[PromptSet, PromptSet]:
    """Return (the remaining training set, ``count`` held-out prompts).

    The held-out prompts come from the set's own test split, if it has one, or from its rows.
    ``part``: (k, n) if it is set k of n. UserError: the set has one row.
    """
    if count == 0:
        return train, dataclasses.replace(train, prompts=())
    if "test" in train.other_splits:
        name, split = train.other_splits["test"]
        split = config.evaluate.split or split
        held = load_evaluation_prompts(
            name, row_format(config), split=split, limit=count, part=part
        )
        _report(held, notes, known=train)
        return train, dataclasses.replace(held, prompts=tuple(held.prompts))
    of = f" of {train.name}" if part[1] > 1 else ""
    if not isinstance(train.prompts, tuple):  # streamed
        notes.note(
            f"the first {count} rows{of} of the stream are held out for evaluation, because no "
            "--eval-dataset was given"
        )
        return hold_out(train, count, config.runtime.seed)
    total = len(train.prompts)
    count = min(count, max(1, total // 10))
    if total < 2:
        raise UserError(
            f"dataset {train.name}: one row cannot be both trained on and held out; give "
            "--eval-dataset"
        )
    notes.note(
        f"{count} of {total} rows{of} are held out for evaluation, because no --eval-dataset was "
        "given"
    )
    return hold_out(train, count, config.runtime.seed)


def load_eval_problems(config: Config, dataset: str, notes: Notes) -> PromptSet:
    """Load the problems of `prefix-distill eval`, after their few-shot examples.

    The examples are rows of the first set's training split. If it has none, they are rows of the
    set itself, and these are not evaluated.
    """
    prompts = _load_eval_problems(config, dataset, notes)
    evaluated = list(prompts.prompts)
    _report_gradable(prompts.name, config, notes, evaluated=evaluated, counted=evaluated)
    return prompts


def _load_eval_problems(config: Config, dataset: str, notes: Notes) -> PromptSet:
    limit = config.evaluate.problems or None
    split = config.data.split
    if not config.data.few_shot:
        return _load_evaluated(config, dataset, split=split, limit=limit, notes=notes)
    first, *others = [name for name, _ in sources.split_sources(dataset)]
    peek = load_evaluation_prompts(first, row_format(config), split=split, limit=1)
    if "examples" in peek.other_splits:
        return _with_train_examples(config, dataset, peek.other_splits["examples"], notes=notes)
    if others:
        raise UserError(
            f"--few-shot {config.data.few_shot}: dataset {first} has no split other than the one "
            "that is evaluated; evaluate one set at a time"
        )
    return _with_own_examples(config, first, limit, notes=notes)


def _with_train_examples(
    config: Config, dataset: str, source: tuple[str, str], notes: Notes
) -> PromptSet:
    """Return the problems after examples from another split, ``source`` (dataset, split)."""
    few_shot = config.data.few_shot
    limit = config.evaluate.problems or None
    prompts = _load_evaluated(config, dataset, split=config.data.split, limit=limit, notes=notes)
    name, split = source
    with_solutions = dataclasses.replace(row_format(config), keep_solutions=True)
    rows = load_prompts(name, with_solutions, split=split)
    _, turns = take_examples(
        rows, few_shot, seed=config.runtime.seed, evaluated=tuple(prompts.prompts)
    )
    _note_examples(few_shot, f"{name}, split {split}", notes)
    return prompt_stream.insert_turns(prompts, turns)


def _with_own_examples(config: Config, name: str, limit: int | None, notes: Notes) -> PromptSet:
    """Return the problems after examples from the same rows."""
    few_shot = config.data.few_shot
    with_solutions = dataclasses.replace(row_format(config), keep_solutions=True)
    rows = load_evaluation_prompts(name, with_solutions, split=config.data.split)
    _report(rows, notes)
    prompts, turns = take_examples(rows, few_shot, config.runtime.seed)
    prompts = dataclasses.replace(prompts, prompts=tuple(itertools.islice(prompts.prompts, limit)))
    if not prompts.prompts:
        raise UserError(
            f"--few-shot {few_shot}: dataset {name} has no other row to evaluate; lower --few-shot"
        )
    _note_examples(few_shot, name, notes)
    return prompt_stream.insert_turns(prompts, turns)


def _note_examples(few_shot: int, source: str, notes: Notes) -> None:
    notes.note(
        f"few-shot: every prompt starts with {few_shot} solved rows of {source}. These rows are "
        "not evaluated."
    )
