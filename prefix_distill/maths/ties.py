"""Treat numbers that only rounding separates as equal, before they are ranked."""

import itertools
import math
from collections.abc import Mapping, Sequence

# Relative to the larger of 1 and the number. float32 computes nats to about 1e-7 of that, in an
# order that depends on how rollouts are batched and on the number of ranks. Nats that differ by
# less than ten times as much are equal; those of different tokens are seldom that close.
TIE = 1e-6


def are_tied(one: float, other: float) -> bool:
    """Return whether only rounding separates two numbers."""
    if math.isinf(one) or math.isinf(other):
        return one == other
    return abs(one - other) <= TIE * max(1.0, abs(one), abs(other))


def merge_ties(values: Sequence[float]) -> list[float]:
    """Return the values, each replaced by the smallest value that is tied with it.

    A group of ties is at most TIE wide. Rounding to a grid would instead separate two equal numbers
    wherever a border of the grid lies between them.
    """
    merged = list(values)
    order = sorted(range(len(merged)), key=merged.__getitem__)
    for before, i in itertools.pairwise(order):
        if are_tied(merged[before], merged[i]):
            merged[i] = merged[before]
    return merged


def merge_at(
    positions: Sequence[int], values: Sequence[float] | Mapping[int, float]
) -> dict[int, float]:
    """Return position → value, with ties merged."""
    merged = merge_ties([values[t] for t in positions])
    return dict(zip(positions, merged, strict=True))


def choose_largest(
    positions: Sequence[int], values: Sequence[float] | Mapping[int, float], count: int
) -> tuple[int, ...]:
    """Return the ``count`` positions with the largest values, ascending; the earlier of ties."""
    merged = merge_at(positions, values)
    ranked = sorted(positions, key=lambda t: (-merged[t], t))
    return tuple(sorted(ranked[:count]))
