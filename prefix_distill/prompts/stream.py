"""The order of prompts: the stream of training prompts, mixtures, the held-out split, few-shot
examples."""

import itertools
import random
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from fractions import Fraction
from functools import partial
from typing import TypeVar

from ..errors import UserError
from .prompt import Message, Prompt, PromptSet, Rendered

T = TypeVar("T")


def shuffle(items: Iterable[T], *key: object) -> list[T]:
    """Return ``items`` in a random order that depends only on ``key``."""
    order = list(items)
    random.Random("/".join(map(str, key))).shuffle(order)
    return order


def prompts_of_step(rendered: list[Rendered], step: int, size: int, seed: int) -> list[Rendered]:
    """Return the ``size`` prompts of ``step``: slots step × size, … of an endless stream.

    Epoch 0 has the order of ``rendered``, which is already shuffled. Every later epoch is a new
    permutation. The result depends only on the arguments, so a resumed run gets the same prompts.
    """
    epochs = {0: rendered}
    prompts = []
    for slot in range(step * size, (step + 1) * size):
        epoch, position = divmod(slot, len(rendered))
        if epoch not in epochs:
            epochs[epoch] = shuffle(rendered, seed, "epoch", epoch)
        prompts.append(epochs[epoch][position])
    return prompts


def assign_slots(weights: list[Fraction]) -> Iterator[int]:
    """Yield the dataset of each slot of an endless stream.

    Each slot goes to the dataset that is furthest below its share: weight / sum(weights) of the
    slots so far. The first one wins a tie. Fractions keep the shares exact.
    """
    total = sum(weights)
    counts = [0] * len(weights)
    for length in itertools.count(1):
        deficits = []
        for weight, count in zip(weights, counts, strict=True):
            deficits.append(weight * length / total - count)
        chosen = deficits.index(max(deficits))
        counts[chosen] += 1
        yield chosen


def count_slots(weights: list[Fraction], count: int) -> list[int]:
    """Return how many of the first ``count`` slots belong to each dataset."""
    counts = [0] * len(weights)
    for chosen in itertools.islice(assign_slots(weights), count):
        counts[chosen] += 1
    return counts


def mix(parts: list[list[T]], weights: list[Fraction], count: int, seed: int) -> list[T]:
    """Return the first ``count`` items of the stream that mixes ``parts`` by ``weights``.

    A part that is used up repeats in a new permutation, as in ``prompts_of_step``.
    """
    streams = [_repeat(part, seed) for part in parts]
    items = []
    for chosen in itertools.islice(assign_slots(weights), count):
        items.append(next(streams[chosen]))
    return items


def _repeat(part: list[T], seed: int) -> Iterator[T]:
    """Yield ``part``, then permutations of it without end."""
    yield from part
    for epoch in itertools.count(1):
        yield from shuffle(part, seed, "epoch", epoch)


def join_sets(sets: list[PromptSet], weights: list[Fraction]) -> PromptSet:
    """Return one set with every prompt of ``sets`` once, mixed by ``weights``.

    A property that differs between the sets becomes None.
    """
    if len(sets) == 1:
        return sets[0]
    remaining = [deque(part.prompts) for part in sets]
    order = []
    for chosen in assign_slots(weights):
        if not any(remaining):
            break
        if remaining[chosen]:
            order.append(remaining[chosen].popleft())
    return PromptSet(
        name=", ".join(part.name for part in sets),
        prompts=tuple(order),
        answer_format=_common_value(part.answer_format for part in sets),
        max_new_tokens=_common_value(part.max_new_tokens for part in sets),
        privileged_template=_common_value(part.privileged_template for part in sets),
    )


def _common_value(values: Iterable[T]) -> T | None:
    """Return the value that all ``values`` equal, or None."""
    distinct = set(values)
    if len(distinct) == 1:
        return distinct.pop()
    return None


def hold_out(prompts: PromptSet, count: int, seed: int) -> tuple[PromptSet, PromptSet]:
    """Split a set into (training set, held-out set of ``count`` prompts).

    The held-out prompts are sampled with ``seed``; those of a streamed set are its first.
    """
    if prompts.streamed:
        return prompts, replace(prompts, prompts=tuple(itertools.islice(prompts.prompts, count)))
    every = tuple(prompts.prompts)
    held_positions = set(shuffle(range(len(every)), seed, "held-out")[:count])
    training = []
    held_out = []
    for position, prompt in enumerate(every):
        if position in held_positions:
            held_out.append(prompt)
        else:
            training.append(prompt)
    return replace(prompts, prompts=tuple(training)), replace(prompts, prompts=tuple(held_out))


def take_examples(
    prompts: PromptSet, count: int, seed: int, evaluated: tuple[Prompt, ...] = ()
) -> tuple[PromptSet, tuple[Message, ...]]:
    """Return (the set without the examples, the turns of ``count`` prompts with their solutions).

    The examples are sampled with ``seed``; those of a streamed set are its first. No example has
    the problem of an ``evaluated`` prompt. Raise UserError if too few prompts have a solution.
    """
    order: Iterable[Prompt] = prompts.prompts
    if not prompts.streamed:
        order = shuffle(prompts.prompts, seed, "few-shot")
    excluded = {prompt.problem for prompt in evaluated}
    # islice: a streamed set must not lose a prompt beyond the last example
    shown = list(itertools.islice(_with_solution(order, excluded), count))
    if len(shown) < count:
        raise UserError(
            f"--few-shot {count}: dataset {prompts.name} has {len(shown)} rows with a solution "
            "outside the evaluation set; lower --few-shot, or name the solution column with "
            "--answer-column"
        )
    if not prompts.streamed:
        shown_indices = {prompt.index for prompt in shown}
        rest = tuple(prompt for prompt in prompts.prompts if prompt.index not in shown_indices)
        prompts = replace(prompts, prompts=rest)
    turns: list[Message] = []
    for prompt in shown:
        assert prompt.worked_solution is not None  # `_with_solution` requires it
        turns += itertools.filterfalse(_is_system, prompt.messages)
        turns.append({"role": "assistant", "content": prompt.worked_solution})
    return prompts, tuple(turns)


def _with_solution(prompts: Iterable[Prompt], excluded: set[str]) -> Iterator[Prompt]:
    """Yield the prompts that have a solution and whose problem is not ``excluded``."""
    for prompt in prompts:
        if prompt.worked_solution is not None and prompt.problem not in excluded:
            yield prompt


def _is_system(message: Message) -> bool:
    return message["role"] in ("system", "developer")


def insert_turns(prompts: PromptSet, turns: tuple[Message, ...]) -> PromptSet:
    """Return the prompts with example turns inserted after their system messages."""
    extended = map(partial(_insert, turns), prompts.prompts)
    if prompts.streamed:
        return replace(prompts, prompts=extended)
    return replace(prompts, prompts=tuple(extended))


def _insert(turns: tuple[Message, ...], prompt: Prompt) -> Prompt:
    start = len(list(itertools.takewhile(_is_system, prompt.messages)))
    messages = (*prompt.messages[:start], *turns, *prompt.messages[start:])
    return replace(prompt, messages=messages)
