"""The taught tokens of a rollout, their weights, and the divisor of the step."""

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self, TypedDict, TypeVar

from ..errors import UserError
from .intervals import quantile

WINDOWS = ("first", "middle", "last", "random", "scattered", "highest-kl", "highest-entropy")
SELECTIONS = (
    "soft-or",
    "overconfident",
    "entropy-sample",
    "entropy",
    "divergence",
    "random",
    "bottom",
)
QUADRANTS = (
    "high entropy, high divergence",
    "high entropy, low divergence",
    "low entropy, high divergence",
    "low entropy, low divergence",
)
CLIPPED = 0.98  # quantile of the batch's entropies at which TIP clips them
MODERATE = (0.25, 0.30, 0.10)  # (w_min, τ, s) of PW-OPSD


Facts = dict[tuple[int, int], dict[str, dict[int, float]]]
"""(slot, sample) → statistic → position → nats, as ``Scorer.statistics`` returns."""


class TaughtRollout(Protocol):
    """The part of a ``Rollout`` that this module uses."""

    @property
    def key(self) -> tuple[int, int]: ...

    @property
    def ids(self) -> tuple[int, ...]: ...

    @property
    def taught(self) -> tuple[int, ...]: ...

    @property
    def counted(self) -> int: ...

    def keep(self, positions: tuple[int, ...]) -> Self:
        """Return the rollout with other taught positions."""
        ...


R = TypeVar("R", bound=TaughtRollout)


@dataclass(frozen=True, kw_only=True)
class Window:
    """K taught tokens of every rollout, or all if it has fewer: a control for the prefix.

    first, middle, last: K tokens in a row; random: K in a row, anywhere; scattered: K anywhere;
    highest-kl, highest-entropy: the K with the largest reverse KL(S‖T), or entropy of S. Of equal
    values the earlier token counts. A window does not shorten rollouts; `--prefix K` does. The
    forward passes end at the last taught token. After arXiv 2602.15260.
    """

    kind: str
    size: int

    @property
    def statistic(self) -> str | None:
        """Return the token statistic that ranks (``fused.statistics``); None if none does."""
        return {"highest-kl": "divergence", "highest-entropy": "entropy"}.get(self.kind)

    def positions(
        self, tokens: int, key: tuple[object, ...], values: Sequence[float] = ()
    ) -> tuple[int, ...]:
        """Return the taught positions of a rollout of ``tokens`` tokens, ascending.

        ``key`` seeds the random kinds; ``values`` rank the tokens.
        """
        size = min(self.size, tokens)
        if self.statistic:
            return _largest(range(tokens), values, size)
        rng = random.Random("/".join(map(str, ("window", *key))))
        if self.kind == "scattered":
            return tuple(sorted(rng.sample(range(tokens), size)))
        free = tokens - size
        start = {"first": 0, "middle": free // 2, "last": free}.get(self.kind)
        if start is None:
            start = rng.randint(0, free)
        return tuple(range(start, start + size))


def _largest(
    positions: Sequence[int], values: Sequence[float] | dict[int, float], count: int
) -> tuple[int, ...]:
    """Return the ``count`` positions with the largest values, ascending; the earlier of equals."""
    ranked = sorted(positions, key=lambda t: (-values[t], t))
    return tuple(sorted(ranked[:count]))


def parse_window(text: str) -> Window | None:
    """Parse ``all`` → None, or ``first:24`` → Window. UserError otherwise."""
    kind, _, size = text.partition(":")
    if text == "all":
        return None
    if kind in WINDOWS and re.fullmatch(r"0*[1-9]\d{0,17}", size, re.ASCII):
        return Window(kind=kind, size=int(size))
    raise UserError(
        f"--window {text}: expected all, or one of {', '.join(WINDOWS)} with a number of tokens, "
        "such as first:24"
    )


def keep_window(
    window: Window | None,
    rollouts: list[R],
    key: tuple[object, ...],
    statistics: Facts | None = None,
) -> list[R]:
    """Return the rollouts with only the window taught; a ranking window needs ``statistics``."""
    if window is None:
        return rollouts
    kept = []
    for r in rollouts:
        values: list[float] = []
        if window.statistic:
            of_rollout = (statistics or {})[r.key][window.statistic]
            values = [of_rollout[t] for t in r.taught]
        chosen = window.positions(len(r.taught), (*key, *r.key), values)
        kept.append(r.keep(tuple(r.taught[i] for i in chosen)))
    return kept


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The smallest and largest entropy (after the clip) and divergence of a global batch.

    They scale both to [0, 1].
    """

    entropy: tuple[float, float]
    divergence: tuple[float, float]

    def scaled(self, entropy: float, divergence: float) -> tuple[float, float]:
        """Return (ĥ, δ̂), min-max over the batch; 0 if all its values are equal."""
        return _scaled(entropy, self.entropy), _scaled(divergence, self.divergence)


def _scaled(value: float, ends: tuple[float, float]) -> float:
    low, high = ends
    if low == high:
        return 0.0
    return (min(value, high) - low) / (high - low)


def batch_scale(entropies: list[float], divergences: list[float]) -> Scale:
    """Return the ``Scale`` of a global batch: of all ranks and micro-batches, in any order.

    Entropies are clipped at their 98th percentile, linear between order statistics.
    """
    largest_entropy = quantile(entropies, CLIPPED)
    return Scale(
        entropy=(min(entropies), largest_entropy), divergence=(min(divergences), max(divergences))
    )


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Token selection by importance, TIP (arXiv 2604.14084).

    ⌊ρm⌋ of a rollout's m tokens are taught, at least 1; ρ is ``share``. h is the entropy of S,
    clipped at the 98th percentile of the global batch. ĥ and δ̂ are h and the reverse KL(S‖T),
    scaled by their smallest and largest value in the batch:

        soft-or               the largest s = ĥ + δ̂ − ĥ·δ̂
        overconfident         the largest s = KL(T‖S)·(1 − ĥ)
        entropy-sample        sampled ∝ h without replacement
        entropy, divergence   the largest ĥ, δ̂
        random                sampled uniformly
        bottom                the smallest s of soft-or

    Of equal scores the earlier token is selected. Sampling is seeded per rollout. Entropy and
    divergence are of the whole vocabulary at temperature 1.
    """

    kind: str
    share: float

    @property
    def ranks(self) -> bool:
        """Return whether the selection needs token statistics."""
        return self.kind != "random"

    def choose(
        self,
        positions: tuple[int, ...],
        key: tuple[object, ...],
        facts: dict[str, dict[int, float]] | None = None,
        at: Scale | None = None,
    ) -> tuple[int, ...]:
        """Return the selected ``positions``, ascending.

        ``facts``: statistic → position → nats. ValueError: the selection ranks tokens, but
        ``facts`` or ``at`` is None.
        """
        count = min(len(positions), max(1, math.floor(self.share * len(positions) + 1e-9)))
        rng = random.Random("/".join(map(str, ("select", self.kind, *key))))
        if not self.ranks:
            return tuple(sorted(rng.sample(positions, count)))
        if facts is None or at is None:
            raise ValueError(f"selection {self.kind!r} ranks tokens: pass facts and at")
        scores = {}
        for t in positions:
            of_token = {name: values[t] for name, values in facts.items()}
            scores[t] = self._score(of_token, at, rng)
        return _largest(positions, scores, count)

    def _score(self, facts: dict[str, float], at: Scale, rng: random.Random) -> float:
        """Return the score of a token; ``facts``: statistic → nats."""
        if self.kind == "entropy-sample":
            # the largest log(u)/h are a sample ∝ h without replacement
            weight = min(facts["entropy"], at.entropy[1])
            log_u = math.log(1 - rng.random())
            if weight <= 0:
                return -math.inf
            return log_u / weight
        entropy, divergence = at.scaled(facts["entropy"], facts["divergence"])
        if self.kind == "overconfident":
            return facts["forward_kl"] * (1 - entropy)
        # ĥ + δ̂ − ĥ·δ̂ in a form that is exactly 1 if ĥ is 1, so that ties stay ties
        union = 1 - (1 - entropy) * (1 - divergence)
        return {
            "soft-or": union,
            "entropy": entropy,
            "divergence": divergence,
            "bottom": -union,
        }[self.kind]


def parse_selection(kind: str, share: float) -> Selection | None:
    """Parse ``all`` → None, or a name of SELECTIONS with its share → Selection.

    UserError: the name is unknown, or the share is not above 0 and at most 1.
    """
    if kind == "all":
        return None
    if kind not in SELECTIONS:
        raise UserError(f"--select {kind}: expected all or one of {', '.join(SELECTIONS)}")
    if not 0 < share <= 1:
        raise UserError(
            f"--keep {share}: expected a share of the tokens above 0 and at most 1, such as 0.5"
        )
    return Selection(kind=kind, share=share)


def keep_selection(
    selection: Selection | None,
    rollouts: list[R],
    key: tuple[object, ...],
    facts: Facts | None = None,
    at: Scale | None = None,
) -> list[R]:
    """Return the rollouts with the selection taught; a ranking one needs ``facts`` and ``at``."""
    if selection is None:
        return rollouts
    chosen = []
    for r in rollouts:
        of_rollout = None
        if facts is not None:
            of_rollout = facts[r.key]
        positions = selection.choose(r.taught, (*key, *r.key), facts=of_rollout, at=at)
        chosen.append(r.keep(positions))
    return chosen


class Quadrant(TypedDict):
    """One quadrant's share of all tokens and of the total divergence."""

    tokens: float
    divergence: float


class Quadrants(TypedDict):
    """The result of ``quadrants``."""

    borders: list[float]
    quadrants: dict[str, Quadrant]


def quadrants(
    entropies: Sequence[float],
    divergences: Sequence[float],
    borders: Sequence[float] | None = None,
) -> Quadrants:
    """Return the four quadrants of TIP: high or low entropy of S × high or low reverse KL.

    ``borders``: [entropy, divergence] in nats, above which a token is high; None: the medians. Per
    quadrant the shares of all tokens and of the total divergence. Tokens of low entropy and high
    divergence are overconfident.
    """
    if borders is None:
        borders = quantile(entropies, 0.5), quantile(divergences, 0.5)
    levels = ("low", "high")
    groups: dict[str, list[float]] = {name: [] for name in QUADRANTS}
    for entropy, divergence in zip(entropies, divergences, strict=True):
        level = levels[entropy > borders[0]]
        groups[f"{level} entropy, {levels[divergence > borders[1]]} divergence"].append(divergence)
    total = math.fsum(divergences)
    shares: dict[str, Quadrant] = {}
    for name, group in groups.items():
        share = 0.0
        if total:
            share = math.fsum(group) / total
        shares[name] = {"tokens": len(group) / len(divergences), "divergence": share}
    return {"borders": list(borders), "quadrants": shares}


@dataclass(frozen=True, kw_only=True)
class PositionWeight:
    """The weight of a token by its position in the rollout (PW-OPSD, arXiv 2605.21606).

    Of m tokens, token j = 1 … m has

        u = (j − 1/2)/m ,   w = w_min + (1 − w_min)·σ((u − τ)/s)

    ``mirrored``: 1 − u in place of u. Weights are not renormalized: the divisor ignores them.
    """

    least: float
    turn: float
    width: float
    mirrored: bool = False

    def at(self, position: int, tokens: int) -> float:
        """Return the weight of the 0-based ``position`` in a rollout of ``tokens`` tokens."""
        u = (position + 0.5) / tokens
        if self.mirrored:
            u = 1 - u
        x = (u - self.turn) / self.width
        sigmoid = 0.0
        if x > -500:  # exp overflows beyond
            sigmoid = 1 / (1 + math.exp(-x))
        return self.least + (1 - self.least) * sigmoid


def parse_position_weight(text: str) -> PositionWeight | None:
    """Parse ``uniform`` → None, or a name or ``sigmoid:w,τ,s`` → PositionWeight.

    ``moderate`` is (0.25, 0.30, 0.10), and ``decreasing`` its mirror image. UserError otherwise.
    """
    if text == "uniform":
        return None
    if text in ("moderate", "decreasing"):
        least, turn, width = MODERATE
        return PositionWeight(least=least, turn=turn, width=width, mirrored=text == "decreasing")
    kind, _, numbers = text.partition(":")
    try:
        least, turn, width = map(float, numbers.split(","))
    except ValueError:
        least = turn = width = math.nan
    if kind == "sigmoid" and 0 <= least <= 1 and math.isfinite(turn) and 0 < width < math.inf:
        return PositionWeight(least=least, turn=turn, width=width)
    raise UserError(
        f"--position-weight {text}: expected uniform, moderate, decreasing or sigmoid:w,τ,s with "
        "0 ≤ w ≤ 1 and s > 0, such as sigmoid:0.25,0.3,0.1"
    )


def token_weights(
    rollouts: Sequence[TaughtRollout], reduction: str, position: PositionWeight | None = None
) -> tuple[dict[tuple[int, int], list[float]], float]:
    """Return the weights of taught tokens before division, and this rank's share of the divisor.

    The weights are by (slot, sample). With m taught tokens in a rollout (``Rollout.counted``):

        token      weight 1,   divisor Σ m
        sequence   weight 1/m, divisor the number of rollouts
        sum        weight 1,   divisor the number of rollouts: the gradient grows with the prefix

    ``position`` multiplies each weight by that of the token's position in the whole rollout. The
    step divides by the sum of shares over all ranks, so neither micro-batches nor ranks change it.
    """
    weights = {}
    for r in rollouts:
        each = 1.0
        if reduction == "sequence" and r.taught:
            each = 1 / r.counted
        of_rollout = [each] * len(r.taught)
        if position is not None:
            of_rollout = [each * position.at(t, len(r.ids)) for t in r.taught]
        weights[r.key] = of_rollout
    share = len(rollouts)
    if reduction == "token":
        share = sum(r.counted for r in rollouts)
    return weights, float(share)
