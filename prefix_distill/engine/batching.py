"""Split rollouts into micro-batches, and describe the lengths of a forward pass."""

from ..maths.flops import linear_tokens
from .rollout import Rollout, Side, student_sides

PADDING = 0.1  # largest share of padding among the tokens that a micro-batch runs

# tokens: the length of a prompt, the lengths of the responses after it
Reads = tuple[int, list[int]]


def reads(sides: list[Side], encodes_prompt_once: bool) -> list[Reads]:
    """Return (prompt length, lengths of its responses) for every prompt that runs, in tokens.

    A response counts up to its last compared token. With ``encodes_prompt_once`` each distinct
    prompt runs once, otherwise once per rollout. The FLOP ledger counts these lengths.
    """
    lengths: dict[object, Reads] = {}
    for i, side in enumerate(sides):
        key: object = side.prompt if encodes_prompt_once else i
        _, responses = lengths.setdefault(key, (len(side.prompt), []))
        responses.append(side.extent)
    return list(lengths.values())


def micro_batches(
    rollouts: list[Rollout], size: int, encodes_prompt_once: bool
) -> list[list[Rollout]]:
    """Return groups of at most ``size`` rollouts with at most a tenth of padding.

    Padding is measured in the student's linear layers. Two orders are tried, and the one that runs
    fewer tokens is used: by prompt, which helps if a prompt runs once for all its samples
    (``encodes_prompt_once``), or by length. The groups depend on the rollouts alone.
    """
    plans = []
    for order in (_prompt_order, _length_order):
        plans.append(_split(sorted(rollouts, key=order), size, encodes_prompt_once))

    def executed_tokens(groups: list[list[Rollout]]) -> int:
        return sum(linear_tokens(reads(student_sides(g), encodes_prompt_once))[1] for g in groups)

    return min(plans, key=executed_tokens)


def _prompt_order(r: Rollout) -> tuple[int, ...]:
    return -len(r.student_prompt), r.slot, -r.student.extent, r.sample


def _length_order(r: Rollout) -> tuple[int, ...]:
    return -len(r.student_prompt) - r.student.extent, r.slot, r.sample


def _split(order: list[Rollout], size: int, encodes_prompt_once: bool) -> list[list[Rollout]]:
    groups: list[list[Rollout]] = []
    for rollout in order:
        if groups and len(groups[-1]) < size:
            sides = student_sides([*groups[-1], rollout])
            useful, executed = linear_tokens(reads(sides, encodes_prompt_once))
            if useful >= (1 - PADDING) * executed:
                groups[-1].append(rollout)
                continue
        groups.append([rollout])
    return groups
