"""Find answers that repeat themselves, and where the repetition begins."""

from collections.abc import Sequence

GRAM = 4  # tokens
LOOP = 64  # fewest tokens of a loop: tables, rows of dashes and lists of numbers are shorter
ROUNDS = 3  # fewest rounds of a loop


def repeats(ids: Sequence[int]) -> bool:
    """Return whether a response repeats itself.

    Either more than half of its token 4-grams occur earlier, or it ends in a loop (`find_loop`).
    The first test misses a loop after a long text, the second one a loop with changing numbers.
    """
    grams = [tuple(ids[i : i + GRAM]) for i in range(len(ids) - GRAM + 1)]
    if grams and len(set(grams)) < len(grams) / 2:
        return True
    return find_loop(ids) is not None


def find_loop(ids: Sequence[int]) -> int | None:
    """Return the index at which the loop at the end of a response begins; None without a loop.

    A loop is the longest end of the response with ids[t] = ids[t - p] for a period p, if it has at
    least LOOP tokens and ROUNDS periods. Of several periods, the shortest counts.
    """
    matches = _match_with_end(ids)
    for period in range(1, len(ids) // ROUNDS + 1):
        length = period + matches[period]
        if length >= max(LOOP, ROUNDS * period):
            return len(ids) - length
    return None


def _match_with_end(ids: Sequence[int]) -> list[int]:
    """Return for each shift how many tokens at the end equal those that many tokens earlier.

    This is the Z-function of the reversed sequence, in linear time.
    """
    backwards = list(reversed(ids))
    size = len(backwards)
    matches = [0] * size
    left = right = 0  # the stretch that reaches furthest and equals a start of the sequence
    for i in range(1, size):
        if i < right:
            matches[i] = min(right - i, matches[i - left])
        while i + matches[i] < size and backwards[matches[i]] == backwards[i + matches[i]]:
            matches[i] += 1
        if i + matches[i] > right:
            left, right = i, i + matches[i]
    return matches
