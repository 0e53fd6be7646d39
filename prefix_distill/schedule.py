"""Step → number: how long the prefix is, how high the learning rate is."""

import math
import re
from dataclasses import dataclass

from .errors import UserError

GRAMMAR = "at least 1 token, a percentage of --max-new-tokens such as 25%, or 'full'"


@dataclass(frozen=True)
class PrefixSchedule:
    """A prefix length for every step.

    ``constant``: L_k = L for every step k (arXiv 2602.15260; as a fraction ρ·T_max, arXiv 2605.31490).

    ``limit`` is T_max, the longest response the student may write (tokens); lengths are clamped to [1, T_max].
    """

    text: str
    start: int
    limit: int

    def length(self, step: int) -> int:
        """Tokens the student may write at update ``step`` (0, 1, 2, …)."""
        return max(1, min(self.start, self.limit))


def parse_prefix(text: str, limit: int) -> PrefixSchedule:
    """``512`` | ``25%`` | ``full`` → PrefixSchedule. ``limit``: T_max in tokens.

    Words with colons (``linear:1:256``) are reserved for schedules that grow. UserError on anything else.
    """
    text = str(text).strip()
    if text == "full":
        return PrefixSchedule(text, limit, limit)
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)%", text):
        percent = float(match[1])
        if not 0 < percent <= 100:
            raise UserError(f"prefix {text}: a percentage must be above 0% and at most 100% of --max-new-tokens")
        return PrefixSchedule(text, max(1, round(limit * percent / 100)), limit)
    if re.fullmatch(r"[+-]?\d+", text):
        if int(text) < 1:
            raise UserError(f"prefix length {text}: --prefix must be {GRAMMAR}")
        if int(text) > limit:
            raise UserError(
                f"prefix length {text}: --max-new-tokens is {limit}, so no response reaches it; "
                "lower --prefix, raise --max-new-tokens or use 'full'"
            )
        return PrefixSchedule(text, int(text), limit)
    raise UserError(f"prefix '{text}': --prefix must be {GRAMMAR}")


def warmup_steps(text: str, steps: int) -> int:
    """``20`` (updates) or ``5%`` (of all updates, rounded) → updates of linear warm-up."""
    text = str(text).strip()
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)%", text):
        if float(match[1]) <= 100:
            return round(steps * float(match[1]) / 100)
    elif re.fullmatch(r"\d+", text):
        return int(text)
    raise UserError(f"warmup '{text}': --warmup must be a number of updates (20) or a percentage of them (5%)")


def learning_rate(step: int, *, peak: float, schedule: str, warmup: int, steps: int) -> float:
    """Learning rate of update ``step`` (0-based).

    Warm-up: peak·(step + 1)/(warmup + 1). Then with progress u = (step − warmup)/(steps − warmup):
    ``constant`` peak; ``linear`` peak·(1 − u); ``cosine`` peak·(1 + cos πu)/2. The last update still moves (u < 1).
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    if schedule == "constant":
        return peak
    if schedule == "linear":
        return peak * (1 - progress)
    return peak * (1 + math.cos(math.pi * progress)) / 2
