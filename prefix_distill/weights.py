"""Which tokens of a rollout are taught, how much each one counts, and the one number the update is divided by."""

import random
from dataclasses import dataclass, replace

from .errors import UserError

WINDOWS = ("first", "middle", "last", "random", "scattered", "highest-kl", "highest-entropy")


@dataclass(frozen=True)
class Window:
    """K taught tokens of every rollout (all where it has no more): the ablation of the prefix at equal K.

    first, middle, last, random: K tokens in a row (random: anywhere); scattered: K anywhere; highest-kl, highest-entropy: the
    K with the largest reverse KL(S‖T), or entropy of S, ties to the earlier one. The sampling is not shortened by a window;
    `--prefix K` is the truncation that saves it. Both models read up to the last taught token. After arXiv 2602.15260.
    """

    kind: str
    size: int

    @property
    def statistic(self) -> str | None:
        """The token statistic that ranks (``divergence.statistics``), if any."""
        return {"highest-kl": "divergence", "highest-entropy": "entropy"}.get(self.kind)

    def positions(self, tokens: int, key: tuple, values: list[float] | None = None) -> tuple[int, ...]:
        """Taught positions of a rollout of ``tokens`` tokens, ascending; ``key`` seeds the random kinds, ``values`` rank."""
        size = min(self.size, tokens)
        if self.statistic:
            return tuple(sorted(sorted(range(tokens), key=lambda t: (-values[t], t))[:size]))
        rng = random.Random("/".join(map(str, ("window", *key))))
        if self.kind == "scattered":
            return tuple(sorted(rng.sample(range(tokens), size)))
        free = tokens - size
        start = {"first": 0, "middle": free // 2, "last": free}.get(self.kind)
        start = rng.randint(0, free) if start is None else start
        return tuple(range(start, start + size))


def parse_window(text: str) -> Window | None:
    """``all`` → None, ``first:24`` → Window. UserError otherwise."""
    kind, _, size = text.partition(":")
    if text == "all":
        return None
    if kind in WINDOWS and size.isascii() and size.isdigit() and int(size) > 0:
        return Window(kind, int(size))
    raise UserError(f"window '{text}': --window must be all, or one of {', '.join(WINDOWS)} with a number of at least 1 token, "
                    "such as first:24")


def keep(window: Window | None, rollouts: list, key: tuple, statistics: dict | None = None) -> list:
    """The same ``Rollout``s with the positions that are taught; ``statistics`` as ``scoring.token_statistics`` gives them."""
    if window is None:
        return rollouts
    kept = []
    for r in rollouts:
        values = statistics[r.prompt, r.sample][window.statistic] if window.statistic else None
        kept.append(replace(r, kept=window.positions(len(r.ids), (*key, r.prompt, r.sample), values)))
    return kept


def token_weights(rollouts: list, reduction: str) -> tuple[dict[tuple[int, int], list[float]], float]:
    """(prompt, sample) → undivided weight of each taught token, and this rank's share of the divisor.

    With m taught tokens in a rollout: ``token``: weight 1, divisor Σ m; ``sequence``: weight 1/m, divisor the number of
    rollouts; ``sum``: weight 1, divisor the number of rollouts (the gradient grows with the prefix). The update divides by
    the sum of shares over all ranks, so neither micro-batches nor ranks change it.
    """
    if reduction == "sequence":
        weights = {(r.prompt, r.sample): [1 / len(r.taught)] * len(r.taught) for r in rollouts}
    else:
        weights = {(r.prompt, r.sample): [1.0] * len(r.taught) for r in rollouts}
    share = sum(len(r.taught) for r in rollouts) if reduction == "token" else len(rollouts)
    return weights, float(share)
