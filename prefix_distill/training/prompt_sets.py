"""Load prompt sets: what is taught, what is held out, and the examples before every prompt."""

import dataclasses
import itertools
from dataclasses import dataclass
from fractions import Fraction

from ..config import Config
from ..errors import UserError
from ..prompts import sources
from ..prompts import stream as prompt_stream
from ..prompts.load import load_prompts
from ..prompts.prompt import PromptSet
from ..prompts.stream import examples, hold_out, joined, shares
from .run import Notes, settled


@dataclass(frozen=True)
class PromptSets:
    """The data sets of a run, before they are rendered.

    ``train``: the training sets; ``weights``: their shares of the prompts; ``held_out``: the
    prompts of evaluations, none of which is taught.
    """

    train: list[PromptSet]
    weights: list[Fraction]
    held_out: PromptSet


def load_prompt_sets(config: Config, notes: Notes) -> PromptSets:
    """Load the training sets and hold out the prompts of evaluations.

    Every prompt follows the same few-shot examples. UserError: a set cannot be read, or has no row
    left to be taught.
    """
    names, weights = _name_sets(settled(config.data.dataset, "--dataset"))
    few_shot = config.data.few_shot
    train = []
    for k, name in enumerate(names):
        worked = few_shot > 0 and k == 0
        part = (k, len(names))
        loaded = load_prompts(
            name, split=config.data.split, worked=worked, part=part, **_form(config)
        )
        train.append(loaded)
    for loaded in train:
        notes.note(*loaded.notes)
    wanted = max(config.evaluate.problems, config.evaluate.kl_prompts)
    if config.evaluate.dataset is not None:
        split = config.evaluate.split
        held_out = _evaluated(config, config.evaluate.dataset, split, wanted, notes)
    else:
        parts = []
        for k, count in enumerate(shares(weights, wanted)):
            train[k], held = _held_out(config, train[k], count, (k, len(names)), notes)
            parts.append(held)
        held_out = joined(parts, weights)
    if few_shot:
        train[0], turns = examples(train[0], few_shot, config.runtime.seed, tuple(held_out.prompts))
        notes.note(
            f"few-shot: {few_shot} rows of {train[0].name} with solutions stand before every "
            "prompt of training and evaluation; they are neither taught nor evaluated"
        )
        train = [prompt_stream.behind(s, turns) for s in train]
        held_out = prompt_stream.behind(held_out, turns)
    for loaded in train:
        if not loaded.streamed and not loaded.prompts:
            raise UserError(
                f"dataset {loaded.name}: no row is left to be taught; give --eval-dataset, lower "
                "--few-shot, or add rows"
            )
    return PromptSets(train, weights, held_out)


def _name_sets(text: str) -> tuple[list[str], list[Fraction]]:
    """Split ``a:3,b:1`` into data set names and weights."""
    named = sources.sources(text)
    return [name for name, _ in named], [weight for _, weight in named]


def _form(config: Config) -> dict:
    """Return the options of ``load_prompts`` that turn rows into prompts."""
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
    config: Config, text: str, split: str | None, limit: int | None, notes: Notes, **further
) -> PromptSet:
    """The prompts of ``--eval-dataset``: ``limit`` in all (None: every one), spread over several
    sets by weight."""
    names, weights = _name_sets(text)
    counts: list[int | None] = [None] * len(names)
    if limit is not None:
        counts = list(shares(weights, limit))
    sets = [
        load_prompts(
            name,
            split=split,
            limit=count,
            evaluated=True,
            part=(k, len(names)),
            **_form(config),
            **further,
        )
        for k, (name, count) in enumerate(zip(names, counts, strict=True))
        if count != 0
    ]
    for loaded in sets:
        notes.note(*loaded.notes)
    return joined(
        [dataclasses.replace(s, prompts=tuple(s.prompts)) for s in sets],
        [w for w, c in zip(weights, counts, strict=True) if c != 0],
    )


def _held_out(
    config: Config,
    train: PromptSet,
    count: int,
    part: tuple[int, int],
    notes: Notes,
) -> tuple[PromptSet, PromptSet]:
    """(the training set without them, ``count`` held-out prompts): of its own test split, where
    it has one, else rows of it."""
    if count == 0:
        return train, dataclasses.replace(train, prompts=())
    if "test" in train.elsewhere:
        name, split = train.elsewhere["test"]
        held = load_prompts(
            name,
            split=config.evaluate.split or split,
            limit=count,
            evaluated=True,
            part=part,
            **_form(config),
        )
        notes.note(*[line for line in held.notes if line not in train.notes])
        return train, dataclasses.replace(held, prompts=tuple(held.prompts))
    of = f" of {train.name}" if part[1] > 1 else ""
    if not isinstance(train.prompts, tuple):  # streamed
        notes.note(
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
    notes.note(f"{count} of {total} rows{of} held out for evaluation: no --eval-dataset was given")
    return hold_out(train, count, config.runtime.seed)


def load_eval_problems(config: Config, dataset: str, notes: Notes) -> PromptSet:
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
    apart = load_prompts(
        names[0], split=split, limit=1, evaluated=True, **_form(config)
    ).elsewhere.get("examples")
    if apart is not None:
        prompts = _evaluated(config, dataset, split, limit, notes)
        _, turns = examples(
            load_prompts(apart[0], split=apart[1], worked=True, **_form(config)),
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
        whole = load_prompts(names[0], split=split, evaluated=True, worked=True, **_form(config))
        notes.note(*whole.notes)
        prompts, turns = examples(whole, few_shot, config.runtime.seed)
        prompts = dataclasses.replace(
            prompts, prompts=tuple(itertools.islice(prompts.prompts, limit))
        )
        if not prompts.prompts:
            raise UserError(
                f"--few-shot {few_shot}: dataset {names[0]} has no other row to evaluate; lower it"
            )
    notes.note(
        f"few-shot: {few_shot} of {apart[0] + ', split ' + apart[1] if apart else names[0]} with "
        "solutions before every problem; they are not evaluated"
    )
    return prompt_stream.behind(prompts, turns)
