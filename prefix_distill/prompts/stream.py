"""The prompts of each step, and the held-out split."""

import itertools
import random
from collections.abc import Iterable, Iterator
from dataclasses import replace
from fractions import Fraction
from typing import TypeVar

from ..errors import UserError
from .prompt import Prompt, PromptSet, Rendered

T = TypeVar("T")


def shuffled(items: Iterable[T], *key: object) -> list[T]:
    """A seeded permutation of ``items``."""
    order = list(items)
    random.Random("/".join(map(str, key))).shuffle(order)
    return order


def batch(rendered: list[Rendered], step: int, size: int, seed: int) -> list[Rendered]:
    """The prompts of update ``step``: ``size`` slots of an endless stream, by arithmetic alone.

    Epoch 0 takes ``rendered`` as it stands (already shuffled); every later epoch is a permutation
    of its own.
    """
    first, last = step * size // len(rendered), ((step + 1) * size - 1) // len(rendered)
    epochs = {0: rendered} | {
        e: shuffled(rendered, seed, "epoch", e) for e in range(max(1, first), last + 1)
    }
    slots = (divmod(slot, len(rendered)) for slot in range(step * size, (step + 1) * size))
    return [epochs[epoch][position] for epoch, position in slots]


def slots(weights: list[Fraction]) -> Iterator[int]:
    """Which set each slot of an endless stream belongs to: the one that is furthest behind its
    share, the first of equals."""
    given, total = [0] * len(weights), sum(weights)
    while True:
        behind = [
            weight * (sum(given) + 1) / total - count
            for weight, count in zip(weights, given, strict=True)
        ]
        given[behind.index(max(behind))] += 1
        yield behind.index(max(behind))


def shares(weights: list[Fraction], count: int) -> list[int]:
    """How many of ``count`` slots belong to each set."""
    taken = list(itertools.islice(slots(weights), count))
    return [taken.count(k) for k in range(len(weights))]


def mixed(parts: list[list], weights: list[Fraction], count: int, seed: int) -> list:
    """``count`` slots of the stream; what is used up comes again, in a permutation of its own,
    as in ``batch``."""

    def endless(part: list):
        yield from part
        for epoch in itertools.count(1):
            yield from shuffled(part, seed, "epoch", epoch)

    streams = [endless(part) for part in parts]
    return [next(streams[k]) for k in itertools.islice(slots(weights), count)]


def joined(sets: list[PromptSet], weights: list[Fraction]) -> PromptSet:
    """Every prompt of ``sets`` once, in the stream's order as far as they last. What they do not
    agree on is None."""
    if len(sets) == 1:
        return sets[0]
    left = [list(s.prompts)[::-1] for s in sets]
    order: list[Prompt] = []
    for k in slots(weights):
        if not any(left):
            break
        order += [left[k].pop()] if left[k] else []
    return PromptSet(
        ", ".join(s.name for s in sets),
        tuple(order),
        answer_format=_agreed(s.answer_format for s in sets),
        max_new_tokens=_agreed(s.max_new_tokens for s in sets),
        privileged_template=_agreed(s.privileged_template for s in sets),
    )


def _agreed(values: Iterable[T]) -> T | None:
    """Return the value that all ``values`` share, or None."""
    different = set(values)
    return different.pop() if len(different) == 1 else None


def hold_out(prompts: PromptSet, count: int, seed: int) -> tuple[PromptSet, PromptSet]:
    """(training set, held-out set of ``count`` prompts), disjoint, drawn by seed; of a streamed
    set the first ``count``."""
    if prompts.streamed:
        return prompts, replace(prompts, prompts=tuple(itertools.islice(prompts.prompts, count)))
    every = tuple(prompts.prompts)
    held = set(shuffled(range(len(every)), seed, "held-out")[:count])
    taught = tuple(p for i, p in enumerate(every) if i not in held)
    apart = tuple(p for i, p in enumerate(every) if i in held)
    return replace(prompts, prompts=taught), replace(prompts, prompts=apart)


def examples(
    prompts: PromptSet, count: int, seed: int, evaluated: tuple[Prompt, ...] = ()
) -> tuple[PromptSet, tuple[dict, ...]]:
    """(the set without them, the turns of ``count`` of its prompts with their solutions), drawn by
    seed; of a streamed set the first. None has the problem of an ``evaluated`` one. UserError where
    too few have a solution."""
    unseen = {p.messages[-1]["content"] for p in evaluated}
    drawn = (
        prompts.prompts if prompts.streamed else iter(shuffled(prompts.prompts, seed, "few-shot"))
    )
    shown = list(
        itertools.islice(
            (p for p in drawn if p.worked is not None and p.messages[-1]["content"] not in unseen),
            count,
        )
    )
    if len(shown) < count:
        raise UserError(
            f"--few-shot {count}: dataset {prompts.name} has {len(shown)} rows with a solution "
            "that are not evaluated; lower it, or name the solutions with --answer-column"
        )
    if not prompts.streamed:
        taken = {p.index for p in shown}
        prompts = replace(
            prompts, prompts=tuple(p for p in prompts.prompts if p.index not in taken)
        )
    return prompts, tuple(
        turn
        for p in shown
        for turn in (
            *(m for m in p.messages if m["role"] not in ("system", "developer")),
            {"role": "assistant", "content": p.worked},
        )
    )


def behind(prompts: PromptSet, turns: tuple[dict, ...]) -> PromptSet:
    """The same prompts with example turns before them, after a system message."""

    def put(prompt: Prompt) -> Prompt:
        first = sum(
            1
            for _ in itertools.takewhile(
                lambda m: m["role"] in ("system", "developer"), prompt.messages
            )
        )
        return replace(
            prompt, messages=(*prompt.messages[:first], *turns, *prompt.messages[first:])
        )

    return replace(
        prompts,
        prompts=map(put, prompts.prompts) if prompts.streamed else tuple(map(put, prompts.prompts)),
    )
