"""Step → number: how long the prefix is, which rollouts are the teacher's, how high the learning
rate is."""

import math
import random
import re
from dataclasses import dataclass
from typing import Any

from ..errors import UserError

GRAMMAR = (
    "at least 1 token (512), a percentage of --max-new-tokens (25%), 'full', linear:L0:d, "
    "staircase:L0:dH:every or auto[:L0:dH]"
)
PATIENCE = 4  # updates whose mean stands for the signal of a window in `auto`
# share of a window's first signal that it must still lose within PATIENCE updates to count as
# improving
STOPPED = 0.1
REACHED = 0.25  # share of rollouts that must fill the prefix for `auto` to grow it


@dataclass(frozen=True)
class PrefixSchedule:
    """A prefix length L_k for every step k = 0, 1, 2, …, in tokens, clamped to [1, T_max] (T_max is
    ``limit``).

    constant    L_k = L0                                       arXiv 2602.15260; as a fraction
                ρ·T_max, arXiv 2605.31490
    linear      L_k = L0 + d·k                                 arXiv 2602.15260 (L0 = 1, d = 256)
    staircase   L_k = L0 + ΔH·⌊k/Δk⌋                           arXiv 2605.31490
    auto        L doubles (or grows by ΔH) when its newest window has stopped improving; never
                shrinks; after arXiv 2607.29494

    ``rise`` is d or ΔH in tokens (0: `auto` doubles), ``every`` is Δk in updates. Only ``auto`` has
    a state: a plain dictionary that belongs to the run (and its checkpoint), starts as {} and is
    changed by ``observe`` alone.
    """

    text: str
    kind: str
    start: int
    limit: int
    rise: int = 0
    every: int = 1

    def length(self, step: int, state: dict[str, Any] | None = None) -> int:
        """Tokens the student may write at update ``step``."""
        if self.kind == "auto":
            length: int = (state or {}).get("length", self.start)
            return length
        return max(1, min(self.start + self.rise * (step // self.every), self.limit))

    def longest(self, steps: int) -> int:
        """An upper bound of the lengths of updates 0 … ``steps`` − 1."""
        return self.limit if self.kind == "auto" else self.length(max(0, steps - 1))

    def window(self, state: dict[str, Any] | None = None) -> int:
        """First position of the newest window: what the last growth added (0 before any)."""
        window: int = (state or {}).get("window", 0)
        return window

    def observe(
        self, step: int, state: dict[str, Any], signal: float | None, reached: float
    ) -> str | None:
        """`auto` looks at update ``step`` and may grow → its reason, or None; other schedules look
        at nothing.

        ``signal``: mean divergence in the newest window, what the last growth added, of this
        update's rollouts, nats per token (None where no rollout entered it); ``reached``: share of
        rollouts that filled the prefix. With a and b the means of the signal over the last-but-one
        and the last 4 updates and s over the first 4 since the window opened, it has stopped
        improving when a − b ≤ s/10, and L grows if at least a quarter of the last 4 updates'
        rollouts reached L. The numbers are the global update's, so every rank decides alike.
        """
        if self.kind != "auto" or self.length(step, state) >= self.limit:
            return None
        seen: list[list[float | None]] = state.setdefault("seen", [])
        seen.append([signal, reached])
        if len(seen) < 2 * PATIENCE:
            return None
        first, before, last = (
            _mean([s for s, _ in part])
            for part in (seen[:PATIENCE], seen[-2 * PATIENCE : -PATIENCE], seen[-PATIENCE:])
        )
        filled = _mean([r for _, r in seen[-PATIENCE:]])
        if before - last > STOPPED * first or filled < REACHED:
            return None
        opened, old = self.window(state), self.length(step, state)
        state.update(length=min(old + (self.rise or old), self.limit), window=old, seen=[])
        return (
            f"after update {step + 1} the prefix grows from {old} to {state['length']} tokens: "
            f"over means of {PATIENCE} updates the divergence of tokens {opened} to {old} began at "
            f"{first:.3g} nats, was {before:.3g} and is {last:.3g}, and {filled:.0%} of the "
            "rollouts fill the prefix"
        )


def _mean(values: list[float | None]) -> float:
    numbers = [v for v in values if v is not None]
    return math.fsum(numbers) / len(numbers) if numbers else 0.0


def parse_prefix(text: str, limit: int) -> PrefixSchedule:
    """``512`` | ``25%`` | ``full`` | ``linear:L0:d`` | ``staircase:L0:dH:every`` | ``auto[:L0:dH]``
    → PrefixSchedule.

    ``limit``: T_max in tokens. Every length may be a percentage of it. ``auto`` alone starts at 10%
    and doubles. UserError on anything else.
    """
    text = str(text).strip()
    kind, *parts = text.split(":")
    if text == "full":
        return PrefixSchedule(text, "constant", limit, limit)
    if kind == "auto" and len(parts) in (0, 2):
        start, rise = (
            (_tokens(text, part, limit) for part in parts)
            if parts
            else (_tokens(text, "10%", limit), 0)
        )
        return PrefixSchedule(text, kind, start, limit, rise)
    if kind == "linear" and len(parts) == 2:
        return PrefixSchedule(
            text, kind, _tokens(text, parts[0], limit), limit, _tokens(text, parts[1], limit)
        )
    if kind == "staircase" and len(parts) == 3:
        if not re.fullmatch(r"[1-9]\d{0,17}", parts[2], re.ASCII):
            raise UserError(
                f"prefix '{text}': the staircase rises every {parts[2]!r} updates; give a number "
                "of at least 1"
            )
        return PrefixSchedule(
            text,
            kind,
            _tokens(text, parts[0], limit),
            limit,
            _tokens(text, parts[1], limit),
            int(parts[2]),
        )
    if parts:
        raise UserError(f"prefix '{text}': --prefix must be {GRAMMAR}")
    return PrefixSchedule(text, "constant", _tokens(text, text, limit), limit)


def _tokens(text: str, part: str, limit: int) -> int:
    """One length of a schedule: tokens or a percentage of ``limit``."""
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)%", part, re.ASCII):
        percent = float(match[1])
        if not 0 < percent <= 100:
            raise UserError(
                f"prefix {text}: a percentage must be above 0% and at most 100% of --max-new-tokens"
            )
        return max(1, round(limit * percent / 100))
    if not re.fullmatch(r"[+-]?\d{1,18}", part, re.ASCII):
        raise UserError(f"prefix '{text}': --prefix must be {GRAMMAR}")
    if int(part) < 1:
        raise UserError(f"prefix length {part}: --prefix must be {GRAMMAR}")
    if int(part) > limit:
        raise UserError(
            f"prefix length {part}: --max-new-tokens is {limit}, so no response reaches it; "
            "lower --prefix, raise --max-new-tokens or use 'full'"
        )
    return int(part)


@dataclass(frozen=True)
class OffPolicy:
    """A share λ of the rollouts is the teacher's: the loss on them is ``sft`` (cross-entropy;
    SeqKD, arXiv 1606.07947) or the run's ``divergence`` (GKD's mixture, arXiv 2306.13649). They are
    cut at the prefix like all others."""

    loss: str
    share: float

    def rows(self, step: int, rollouts: int, seed: int) -> frozenset[int]:
        """Which of an update's rollouts (numbered over the global batch) are the teacher's: drawn
        by seed, and over all updates as near to the share as whole rollouts allow."""
        before, after = (math.floor(round(self.share * rollouts * k, 9)) for k in (step, step + 1))
        rng = random.Random(f"{seed}/off-policy/{step}")
        return frozenset(rng.sample(range(rollouts), after - before))


def parse_off_policy(text: str) -> OffPolicy | None:
    """``none`` → None; ``sft`` | ``divergence``, with ``:λ`` for a share of the rollouts (1
    without) → OffPolicy."""
    if text == "none":
        return None
    loss, colon, share = text.partition(":")
    try:
        value = float(share) if colon else 1.0
    except ValueError:
        value = math.nan
    if loss in ("sft", "divergence") and 0 < value <= 1:
        return OffPolicy(loss, value)
    raise UserError(
        f"off-policy '{text}': --off-policy must be none, sft or divergence, the last two with an "
        "optional share of the rollouts above 0 and at most 1, such as divergence:0.5"
    )


def warmup_steps(text: str, steps: int) -> int:
    """``20`` (updates) or ``5%`` (of all updates, rounded) → updates of linear warm-up."""
    text = str(text).strip()
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)%", text):
        if float(match[1]) <= 100:
            return round(steps * float(match[1]) / 100)
    elif re.fullmatch(r"\d{1,18}", text):
        return int(text)
    raise UserError(
        f"warmup '{text}': --warmup must be a number of updates (20) or a percentage of them (5%)"
    )


def learning_rate(step: int, *, peak: float, schedule: str, warmup: int, steps: int) -> float:
    """Learning rate of update ``step`` (0-based).

    Warm-up: peak·(step + 1)/(warmup + 1). Then with progress u = (step − warmup)/(steps − warmup):
    ``constant`` peak; ``linear`` peak·(1 − u); ``cosine`` peak·(1 + cos πu)/2. The last update
    still moves (u < 1).
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    if schedule == "constant":
        return peak
    if schedule == "linear":
        return peak * (1 - progress)
    return peak * (1 + math.cos(math.pi * progress)) / 2
