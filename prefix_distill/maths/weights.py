"""Which tokens of a rollout are taught, how much each one counts, and the one number the update
is divided by."""

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
QUADRANTS = tuple(f"{h} entropy, {d} divergence" for h in ("high", "low") for d in ("high", "low"))
CLIPPED = 0.98  # quantile of the batch's entropies at which TIP clips them
MODERATE = (0.25, 0.30, 0.10)  # (w_min, τ, s) of PW-OPSD


Facts = dict[tuple[int, int], dict[str, dict[int, float]]]
"""(slot, sample) → statistic → position → nats, as ``Scorer.statistics`` returns."""


class Taught(Protocol):
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


R = TypeVar("R", bound=Taught)


@dataclass(frozen=True)
class Window:
    """K taught tokens of every rollout (all where it has no more): the ablation of the prefix at
    equal K.

    first, middle, last, random: K tokens in a row (random: anywhere); scattered: K anywhere;
    highest-kl, highest-entropy: the K with the largest reverse KL(S‖T), or entropy of S, ties to
    the earlier one. The sampling is not shortened by a window; `--prefix K` is the truncation that
    saves it. Both models read up to the last taught token. After arXiv 2602.15260.
    """

    kind: str
    size: int

    @property
    def statistic(self) -> str | None:
        """The token statistic that ranks (``fused.statistics``), if any."""
        return {"highest-kl": "divergence", "highest-entropy": "entropy"}.get(self.kind)

    def positions(
        self, tokens: int, key: tuple[object, ...], values: Sequence[float] = ()
    ) -> tuple[int, ...]:
        """Taught positions of a rollout of ``tokens`` tokens, ascending; ``key`` seeds the
        random kinds, ``values`` rank."""
        size = min(self.size, tokens)
        if self.statistic:
            return tuple(sorted(sorted(range(tokens), key=lambda t: (-values[t], t))[:size]))
        rng = random.Random("/".join(map(str, ("window", *key))))
        if self.kind == "scattered":
            return tuple(sorted(rng.sample(range(tokens), size)))
        free = tokens - size
        fixed = {"first": 0, "middle": free // 2, "last": free}.get(self.kind)
        start = rng.randint(0, free) if fixed is None else fixed
        return tuple(range(start, start + size))


def parse_window(text: str) -> Window | None:
    """``all`` → None, ``first:24`` → Window. UserError otherwise."""
    kind, _, size = text.partition(":")
    if text == "all":
        return None
    if kind in WINDOWS and re.fullmatch(r"0*[1-9]\d{0,17}", size, re.ASCII):
        return Window(kind, int(size))
    raise UserError(
        f"window '{text}': --window must be all, or one of {', '.join(WINDOWS)} with a number of "
        "at least 1 token, such as first:24"
    )


def keep(
    window: Window | None,
    rollouts: list[R],
    key: tuple[object, ...],
    statistics: Facts | None = None,
) -> list[R]:
    """Return the rollouts with only the window's positions taught; ``statistics``: needed if the
    window ranks tokens."""
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


@dataclass(frozen=True)
class Scale:
    """Ends of a global batch's entropies (the upper one after the clip) and divergences, which
    map them to [0, 1]."""

    entropy: tuple[float, float]
    divergence: tuple[float, float]

    def scaled(self, entropy: float, divergence: float) -> tuple[float, float]:
        """(ĥ, δ̂): min-max over the batch; 0 where all its values are equal."""
        return _scaled(entropy, self.entropy), _scaled(divergence, self.divergence)


def _scaled(value: float, ends: tuple[float, float]) -> float:
    low, high = ends
    return 0.0 if low == high else (min(value, high) - low) / (high - low)


def scale(entropies: list[float], divergences: list[float]) -> Scale:
    """The ``Scale`` of a global batch (all ranks, all micro-batches), whatever its order.

    Entropies are clipped at their 98th percentile, linear between order statistics.
    """
    return Scale(
        (min(entropies), quantile(entropies, CLIPPED)), (min(divergences), max(divergences))
    )


@dataclass(frozen=True)
class Selection:
    """Token selection by importance, TIP (arXiv 2604.14084): ⌊ρm⌋ of a rollout's m tokens are
    taught, at least 1.

    With h the entropy of S, clipped at the 98th percentile of the global batch, ĥ and δ̂ the
    min-max of h and of the reverse KL(S‖T) over it:

        soft-or               the largest s = ĥ + δ̂ − ĥ·δ̂
        overconfident         the largest s = KL(T‖S)·(1 − ĥ)
        entropy-sample        drawn ∝ h without replacement
        entropy, divergence   the largest ĥ, δ̂
        random                drawn evenly
        bottom                the smallest s of soft-or

    Equal scores go to the earlier token. The draws are seeded per rollout. Whole vocabulary,
    temperature 1. ``share`` is ρ.
    """

    kind: str
    share: float

    @property
    def ranks(self) -> bool:
        """Does it need token statistics?"""
        return self.kind != "random"

    def choose(
        self,
        positions: tuple[int, ...],
        key: tuple[object, ...],
        facts: dict[str, dict[int, float]] | None = None,
        at: Scale | None = None,
    ) -> tuple[int, ...]:
        """Return the selected ``positions``, ascending; ``facts``: statistic → position → nats.
        ValueError: the selection ranks tokens, but ``facts`` or ``at`` is None."""
        count = min(len(positions), max(1, math.floor(self.share * len(positions) + 1e-9)))
        rng = random.Random("/".join(map(str, ("select", self.kind, *key))))
        if not self.ranks:
            return tuple(sorted(rng.sample(positions, count)))
        if facts is None or at is None:
            raise ValueError(f"selection {self.kind!r} ranks tokens: pass facts and at")
        scores: dict[int, float] = {}
        for t in positions:
            entropy, divergence = at.scaled(facts["entropy"][t], facts["divergence"][t])
            # ĥ + δ̂ − ĥ·δ̂, exactly 1 where ĥ is: a tie is a tie
            union = 1 - (1 - entropy) * (1 - divergence)
            scores[t] = {
                "soft-or": union,
                "entropy": entropy,
                "divergence": divergence,
                "bottom": -union,
            }.get(self.kind, 0.0)
            if self.kind == "overconfident":
                scores[t] = facts["forward_kl"][t] * (1 - entropy)
            # the largest log(u)/h are a draw ∝ h without replacement
            if self.kind == "entropy-sample":
                weight, draw = min(facts["entropy"][t], at.entropy[1]), math.log(1 - rng.random())
                scores[t] = draw / weight if weight > 0 else -math.inf
        return tuple(sorted(sorted(positions, key=lambda t: (-scores[t], t))[:count]))


def parse_selection(kind: str, share: float) -> Selection | None:
    """``all`` → None, a name of SELECTIONS with its share → Selection. UserError otherwise."""
    if kind == "all":
        return None
    if kind not in SELECTIONS:
        raise UserError(f"select '{kind}': --select must be all or one of {', '.join(SELECTIONS)}")
    if not 0 < share <= 1:
        raise UserError(
            f"keep {share}: --keep must be a share of the tokens above 0 and at most 1, such as 0.5"
        )
    return Selection(kind, share)


def choose(
    selection: Selection | None,
    rollouts: list[R],
    key: tuple[object, ...],
    facts: Facts | None = None,
    at: Scale | None = None,
) -> list[R]:
    """Return the rollouts with only the selected positions taught; ``facts``, ``at``: needed if the
    selection ranks tokens."""
    if selection is None:
        return rollouts
    chosen = []
    for r in rollouts:
        of_rollout = None if facts is None else facts[r.key]
        positions = selection.choose(r.taught, (*key, *r.key), of_rollout, at)
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
    """The four quadrants of TIP: high or low entropy of S × high or low reverse KL.

    → {"borders": [entropy, divergence] (nats; those given, else the medians; above is high),
    "quadrants": name → {"tokens": share of the tokens, "divergence": share of all divergence}};
    "low entropy, high divergence" is the overconfident one.
    """
    borders = borders or (quantile(entropies, 0.5), quantile(divergences, 0.5))
    groups: dict[str, list[float]] = {name: [] for name in QUADRANTS}
    for entropy, divergence in zip(entropies, divergences, strict=True):
        level = [
            "high" if value > border else "low"
            for value, border in zip((entropy, divergence), borders, strict=True)
        ]
        groups[f"{level[0]} entropy, {level[1]} divergence"].append(divergence)
    total = math.fsum(divergences)
    return {
        "borders": list(borders),
        "quadrants": {
            name: {
                "tokens": len(group) / len(divergences),
                "divergence": math.fsum(group) / total if total else 0.0,
            }
            for name, group in groups.items()
        },
    }


@dataclass(frozen=True)
class PositionWeight:
    """How much a token counts by its place in the rollout (PW-OPSD, arXiv 2605.21606): of m tokens,
    token j = 1 … m has

        u = (j − 1/2)/m ,   w = w_min + (1 − w_min)·σ((u − τ)/s)

    ``mirrored`` takes 1 − u for u. Weights are not renormalised: the divisor does not know them.
    """

    least: float
    turn: float
    width: float
    mirrored: bool = False

    def at(self, position: int, tokens: int) -> float:
        """Weight of the 0-based ``position`` in a rollout of ``tokens`` tokens."""
        u = (position + 0.5) / tokens
        x = ((1 - u if self.mirrored else u) - self.turn) / self.width
        sigmoid = 1 / (1 + math.exp(-x)) if x > -500 else 0.0
        return self.least + (1 - self.least) * sigmoid


def parse_position_weight(text: str) -> PositionWeight | None:
    """``uniform`` → None; ``moderate`` (0.25, 0.30, 0.10); ``decreasing``, its mirror image;
    ``sigmoid:w,τ,s``. UserError otherwise."""
    if text == "uniform":
        return None
    if text in ("moderate", "decreasing"):
        return PositionWeight(*MODERATE, mirrored=text == "decreasing")
    kind, _, numbers = text.partition(":")
    try:
        found = [float(number) for number in numbers.split(",")]
    except ValueError:
        found = []
    if (
        kind == "sigmoid"
        and len(found) == 3
        and all(map(math.isfinite, found))
        and 0 <= found[0] <= 1
        and found[2] > 0
    ):
        least, turn, width = found
        return PositionWeight(least, turn, width)
    raise UserError(
        f"position weight '{text}': --position-weight must be uniform, moderate, decreasing or "
        "sigmoid:w,τ,s with a least weight w from 0 to 1, a turning point τ and a width s above 0, "
        "such as sigmoid:0.25,0.3,0.1"
    )


def token_weights(
    rollouts: Sequence[Taught], reduction: str, position: PositionWeight | None = None
) -> tuple[dict[tuple[int, int], list[float]], float]:
    """(prompt, sample) → undivided weight of each taught token, and this rank's share of the
    divisor.

    With m taught tokens in a rollout (``Rollout.counted``): ``token``: weight 1, divisor Σ m;
    ``sequence``: weight 1/m, divisor the number of rollouts; ``sum``: weight 1, divisor the number
    of rollouts (the gradient grows with the prefix); each times the ``position`` weight in the
    whole rollout, if any. The update divides by the sum of shares over all ranks, so neither
    micro-batches nor ranks change it.
    """
    weights = {}
    for r in rollouts:
        each = 1 / r.counted if reduction == "sequence" and r.taught else 1.0
        weights[r.key] = [
            each if position is None else each * position.at(t, len(r.ids)) for t in r.taught
        ]
    share = sum(r.counted for r in rollouts) if reduction == "token" else len(rollouts)
    return weights, float(share)
