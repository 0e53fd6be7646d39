"""Training prompts, held-out problems and their lengths."""

import dataclasses
import itertools
from fractions import Fraction

from .. import config as configuration
from ..config import Config
from ..engine.models import Model
from ..errors import UserError
from ..prompts import sources, templates
from ..prompts import stream as prompt_stream
from ..prompts.load import load_evaluation_prompts, load_prompts
from ..prompts.prompt import PromptSet, Rendered
from ..prompts.rows import RowFormat
from ..prompts.stream import examples, hold_out, joined, mixed, shares, shuffled
from .run import settled

LONGEST = 2048  # tokens; the default --max-new-tokens where the models' positions allow it


def load_prompt_sets(
    config: Config, notes: list[str]
) -> tuple[list[PromptSet], list[Fraction], PromptSet]:
    """(training sets, their weights, held-out prompts): disjoint, every prompt behind the same
    examples."""
    seed, few_shot, wanted = (
        config.runtime.seed,
        config.data.few_shot,
        max(config.evaluate.problems, config.evaluate.kl_prompts),
    )
    names, weights = _name_sets(settled(config.data.dataset, "--dataset"))
    sets = [
        load_prompts(
            name,
            dataclasses.replace(row_format(config), worked=few_shot > 0 and k == 0),
            split=config.data.split,
            part=(k, len(names)),
        )
        for k, name in enumerate(names)
    ]
    notes.extend(note for s in sets for note in s.notes)
    if config.evaluate.dataset is not None:
        held = _evaluated(config, config.evaluate.dataset, config.evaluate.split, wanted, notes)
    else:
        parts = []
        for k, count in enumerate(shares(weights, wanted)):
            sets[k], part = _held_out(config, sets[k], count, (k, len(names)), notes)
            parts.append(part)
        held = joined(parts, weights)
    if few_shot:
        sets[0], turns = examples(sets[0], few_shot, seed, tuple(held.prompts))
        notes.append(
            f"few-shot: {few_shot} of {sets[0].name} with solutions before every prompt, of "
            "training and evaluation; they are neither taught nor evaluated"
        )
        sets, held = (
            [prompt_stream.behind(s, turns) for s in sets],
            prompt_stream.behind(held, turns),
        )
    if empty := [s for s in sets if not s.streamed and not s.prompts]:
        raise UserError(
            f"dataset {empty[0].name}: no row is left to be taught; give --eval-dataset, lower "
            "--few-shot, or add rows"
        )
    return sets, weights, held


def _name_sets(text: str) -> tuple[list[str], list[Fraction]]:
    """Split ``a:3,b:1`` into data set names and weights."""
    named = sources.sources(text)
    return [name for name, _ in named], [weight for _, weight in named]


def row_format(config: Config) -> RowFormat:
    """Return how the rows of every data set become prompts."""
    data = config.data
    return RowFormat(
        prompt_column=data.prompt_column,
        answer_column=data.answer_column,
        privileged_column=data.privileged_column,
        system=data.system,
        instruction=data.instruction,
        prompt_template=data.prompt_template,
        seed=config.runtime.seed,
        streaming=data.streaming,
    )


def _evaluated(
    config: Config, text: str, split: str | None, limit: int | None, notes: list[str]
) -> PromptSet:
    """The prompts of ``--eval-dataset``: ``limit`` in all (None: every one), spread over several
    sets by weight."""
    names, weights = _name_sets(text)
    counts: list[int | None] = [None] * len(names)
    if limit is not None:
        counts = list(shares(weights, limit))
    sets = [
        load_evaluation_prompts(
            name, row_format(config), split=split, limit=count, part=(k, len(names))
        )
        for k, (name, count) in enumerate(zip(names, counts, strict=True))
        if count != 0
    ]
    notes.extend(note for s in sets for note in s.notes)
    return joined(
        [dataclasses.replace(s, prompts=tuple(s.prompts)) for s in sets],
        [w for w, c in zip(weights, counts, strict=True) if c != 0],
    )


def _held_out(
    config: Config,
    train: PromptSet,
    count: int,
    part: tuple[int, int],
    notes: list[str],
) -> tuple[PromptSet, PromptSet]:
    """(the training set without them, ``count`` held-out prompts): of its own test split, where
    it has one, else rows of it."""
    if count == 0:
        return train, dataclasses.replace(train, prompts=())
    if "test" in train.elsewhere:
        name, split = train.elsewhere["test"]
        held = load_evaluation_prompts(
            name,
            row_format(config),
            split=config.evaluate.split or split,
            limit=count,
            part=part,
        )
        notes.extend(note for note in held.notes if note not in train.notes)
        return train, dataclasses.replace(held, prompts=tuple(held.prompts))
    of = f" of {train.name}" if part[1] > 1 else ""
    if not isinstance(train.prompts, tuple):  # streamed
        notes.append(
            f"the first {count} rows{of} of the stream held out for evaluation: no --eval-dataset "
            "was given"
        )
        return hold_out(train, count, config.runtime.seed)
    total = len(train.prompts)
    count = min(count, max(1, total // 10))
    if total < 2:
        raise UserError(
            f"dataset {train.name}: one row cannot be both taught and held out; give --eval-dataset"
        )
    notes.append(
        f"{count} of {total} rows{of} held out for evaluation: no --eval-dataset was given"
    )
    return hold_out(train, count, config.runtime.seed)


def load_training_prompts(  # noqa: PLR0913  prepare's values, which `Pair` and `Problems` will hold
    sets: list[PromptSet],
    weights: list[Fraction],
    needed: int,
    fixed: int,
    student: Model,
    teacher: Model,
    config: Config,
    notes: list[str],
) -> tuple[list[Rendered], list[Rendered], list[int]]:
    """(``needed`` prompts of the run's stream, or all there are of one set; the ``fixed`` ones on
    which candidates are scored; how many of each set were dropped)."""
    seed = config.runtime.seed
    kept: list[list[Rendered]] = []
    dropped: list[int] = []
    for s, count in zip(sets, shares(weights, needed + fixed), strict=True):
        order = s.prompts if s.streamed else shuffled(s.prompts, seed, "epoch", 0)
        found = templates.render_all(order, student, teacher, config, count) if count else ([], 0)
        kept.append(found[0])
        dropped.append(found[1])
    stream = kept[0] if len(sets) == 1 else mixed(kept, weights, needed + fixed, seed)
    if len(sets) > 1:
        notes.append(
            "training prompts: "
            + ", ".join(
                f"{count} of {s.name} ({float(weight / sum(weights)):.1%}; {min(count, len(part))} "
                "different ones)"
                for s, part, weight, count in zip(
                    sets, kept, weights, shares(weights, needed), strict=True
                )
            )
        )
    last = list({r.prompt.index: r for r in stream}.values())
    return stream[:needed], last[max(0, len(last) - fixed) :] if fixed else [], dropped


def count_by_set(sets: list[PromptSet], dropped: list[int]) -> str:
    """Of how many sets how many: 3, or 3 (a.jsonl 1, b.jsonl 2)."""
    each = (
        f" ({', '.join(f'{s.name} {n}' for s, n in zip(sets, dropped, strict=True))})"
        if len(sets) > 1
        else ""
    )
    return f"{sum(dropped)}{each}"


def settle_max_new_tokens(  # noqa: PLR0913  `Pair` will hold both models
    config: Config,
    student: Model,
    teacher: Model,
    prompt: int,
    task_limit: int | None,
    notes: list[str],
) -> Config:
    """Settles --max-new-tokens and checks it, with the longest prompt, against both models'
    positions."""
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
            f"{given} response tokens after a prompt of {prompt}: the models have {positions} "
            f"positions; lower {'--prefix' if number == given else '--max-new-tokens'} to "
            f"{max(room, 0)} or --max-prompt-tokens"
        )
    return configuration.replace(config, rollout={"max_new_tokens": given})


def load_eval_problems(config: Config, dataset: str, notes: list[str]) -> PromptSet:
    """The problems of `prefix-distill eval`, behind their examples: rows of the first set's own
    training split, else of the set itself, which are not evaluated then."""
    few_shot, limit, split = (
        config.data.few_shot,
        config.evaluate.problems or None,
        config.data.split,
    )
    if not few_shot:
        return _evaluated(config, dataset, split, limit, notes)
    names = [name for name, _ in sources.sources(dataset)]
    with_solutions = dataclasses.replace(row_format(config), worked=True)
    apart = load_evaluation_prompts(
        names[0], row_format(config), split=split, limit=1
    ).elsewhere.get("examples")
    if apart is not None:
        prompts = _evaluated(config, dataset, split, limit, notes)
        _, turns = examples(
            load_prompts(apart[0], with_solutions, split=apart[1]),
            few_shot,
            config.runtime.seed,
            tuple(prompts.prompts),
        )
    elif len(names) > 1:
        raise UserError(
            f"--few-shot {few_shot}: dataset {names[0]} has no split apart from the one that is "
            "evaluated; evaluate one set at a time"
        )
    else:
        whole = load_evaluation_prompts(names[0], with_solutions, split=split)
        notes.extend(whole.notes)
        prompts, turns = examples(whole, few_shot, config.runtime.seed)
        prompts = dataclasses.replace(
            prompts, prompts=tuple(itertools.islice(prompts.prompts, limit))
        )
        if not prompts.prompts:
            raise UserError(
                f"--few-shot {few_shot}: dataset {names[0]} has no other row to evaluate; lower it"
            )
    notes.append(
        f"few-shot: {few_shot} of {apart[0] + ', split ' + apart[1] if apart else names[0]} with "
        "solutions before every problem; they are not evaluated"
    )
    return prompt_stream.behind(prompts, turns)
