"""Numbers that depend on the step: the prefix length, the teacher's rollouts, the learning rate."""

import math
import random
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import UserError
from .registry import BUILT_IN, Registry, registering

GRAMMAR = (
    "at least 1 token (512), a percentage of --max-new-tokens (25%), 'full', linear:L0:d, "
    "staircase:L0:dH:every or auto[:L0:dH]"
)
PATIENCE = 4  # steps whose mean is the signal of a window in `auto`
# share of a window's first signal that it must still lose within PATIENCE steps to count as
# improving
STOPPED = 0.1
REACHED = 0.25  # share of rollouts that must fill the prefix before `auto` grows it

State = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class PrefixSchedule:
    """A prefix length L_k for every step k = 0, 1, 2, …, in tokens, from 1 to T_max (``limit``).

    ``text``: the schedule as given. A schedule may have a state: a dictionary of JSON values that
    belongs to the run and its checkpoint, starts as {} and is changed by ``observe`` alone.
    """

    text: str
    limit: int

    def length(self, step: int, state: State | None = None) -> int:
        """Return L_k at ``step``: the tokens that the student may sample."""
        raise NotImplementedError

    def longest(self, steps: int) -> int:
        """Return an upper bound of the lengths at steps 0 … ``steps`` − 1."""
        return self.limit

    def window(self, state: State | None = None) -> int:
        """Return the first position of the newest window, which the last growth added; else 0."""
        if state is None:
            return 0
        window: int = state.get("window", 0)
        return window

    def observe(self, step: int, state: State, signal: float | None, reached: float) -> str | None:
        """Change ``state`` after ``step``; return the reason if the prefix changes.

        ``signal``: mean divergence of this step's rollouts in the newest window, nats per token;
        None if no rollout reaches it. ``reached``: share of the rollouts that fill the prefix. Both
        are of the global batch, so all ranks decide alike.
        """
        return None


@dataclass(frozen=True, kw_only=True)
class Steady(PrefixSchedule):
    """A length that depends on the step alone: L_k = L0 + rise·⌊k/every⌋.

    constant    rise = 0             arXiv 2602.15260; as a fraction ρ·T_max, arXiv 2605.31490
    linear      rise = d, every = 1  arXiv 2602.15260 (L0 = 1, d = 256)
    staircase   rise = ΔH            arXiv 2605.31490
    """

    start: int
    rise: int = 0
    every: int = 1

    def length(self, step: int, state: State | None = None) -> int:
        return max(1, min(self.start + self.rise * (step // self.every), self.limit))

    def longest(self, steps: int) -> int:
        return self.length(max(0, steps - 1))


@dataclass(frozen=True, kw_only=True)
class Auto(PrefixSchedule):
    """A length that doubles, or grows by ``rise``, when its newest window stops improving.

    Let s be the mean of the signal over the first 4 steps since the window opened. Let b be its
    mean over the last 4 steps, and a its mean over the 4 steps before these. The window has stopped
    improving when a − b ≤ s/10. The length then grows if at least a quarter of the rollouts of the
    last 4 steps fill the prefix. It never shrinks. After arXiv 2607.29494.
    """

    start: int
    rise: int = 0

    def length(self, step: int, state: State | None = None) -> int:
        if state is None:
            return self.start
        length: int = state.get("length", self.start)
        return length

    def observe(self, step: int, state: State, signal: float | None, reached: float) -> str | None:
        old = self.length(step, state)
        if old >= self.limit:
            return None
        seen: list[list[float | None]] = state.setdefault("seen", [])
        seen.append([signal, reached])
        if len(seen) < 2 * PATIENCE:
            return None
        signals = [row[0] for row in seen]
        first = _mean(signals[:PATIENCE])
        before = _mean(signals[-2 * PATIENCE : -PATIENCE])
        last = _mean(signals[-PATIENCE:])
        filled = _mean([row[1] for row in seen[-PATIENCE:]])
        if before - last > STOPPED * first or filled < REACHED:
            return None
        opened = self.window(state)
        new = min(old + (self.rise or old), self.limit)
        state.update(length=new, window=old, seen=[])
        return (
            f"after step {step + 1} the prefix grows from {old} to {new} tokens: the divergence of "
            f"tokens {opened} to {old} stopped falling ({first:.3g} → {before:.3g} → {last:.3g} "
            f"nats, means of {PATIENCE} steps); {filled:.0%} of the rollouts fill the prefix"
        )


def _mean(values: list[float | None]) -> float:
    numbers = [v for v in values if v is not None]
    if not numbers:
        return 0.0
    return math.fsum(numbers) / len(numbers)


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request for a schedule: its text, the parts after its name, and T_max."""

    text: str
    parts: tuple[str, ...]
    limit: int

    def tokens(self, part: str) -> int:
        """Return one length: a number of tokens, or a percentage of T_max."""
        return _tokens(self.text, part, self.limit)


# `full` and plain lengths are not in this registry
SCHEDULES: Registry[Callable[[Request], PrefixSchedule]] = Registry(
    "prefix schedule", reserved=("full", "constant")
)


def _linear(request: Request) -> PrefixSchedule:
    if len(request.parts) != 2:
        raise _unknown(request.text)
    start, rise = map(request.tokens, request.parts)
    return Steady(text=request.text, limit=request.limit, start=start, rise=rise)


def _staircase(request: Request) -> PrefixSchedule:
    if len(request.parts) != 3:
        raise _unknown(request.text)
    start, rise, every = request.parts
    if not re.fullmatch(r"[1-9]\d{0,17}", every, re.ASCII):
        raise UserError(
            f"--prefix {request.text}: expected a whole number of steps of at least 1 after the "
            f"last colon, got {every!r}"
        )
    return Steady(
        text=request.text,
        limit=request.limit,
        start=request.tokens(start),
        rise=request.tokens(rise),
        every=int(every),
    )


def _auto(request: Request) -> PrefixSchedule:
    if len(request.parts) not in (0, 2):
        raise _unknown(request.text)
    start, rise = request.tokens("10%"), 0
    if request.parts:
        start, rise = map(request.tokens, request.parts)
    return Auto(text=request.text, limit=request.limit, start=start, rise=rise)


with registering(BUILT_IN):
    SCHEDULES.add("linear", _linear)
    SCHEDULES.add("staircase", _staircase)
    SCHEDULES.add("auto", _auto)


def parse_prefix(text: str, limit: int) -> PrefixSchedule:
    """Parse ``512``, ``25%``, ``full``, ``linear:L0:d``, ``staircase:L0:dH:every``,
    ``auto[:L0:dH]`` or a registered ``NAME[:…]`` → PrefixSchedule.

    ``limit``: T_max in tokens. Every length may be a percentage of it. ``auto`` alone starts at 10%
    and doubles. UserError: anything else.
    """
    text = str(text).strip()
    name, *parts = text.split(":")
    if text == "full":
        return Steady(text=text, limit=limit, start=limit)
    build = SCHEDULES.find(name)
    if build is not None:
        return build(Request(text=text, parts=tuple(parts), limit=limit))
    if parts:
        raise _unknown(text)
    return Steady(text=text, limit=limit, start=_tokens(text, text, limit))


def check_prefix(text: str, limit: int | None) -> None:
    """Raise UserError if ``text`` is no prefix schedule; ``limit`` None: T_max is not known yet."""
    name = text.strip().partition(":")[0]
    # a user's schedule is built when T_max is known, because it may take it for any purpose
    if limit is None and name in SCHEDULES.names():
        return
    parse_prefix(text, limit or sys.maxsize)


def _unknown(text: str) -> UserError:
    others = ", ".join(SCHEDULES.names())
    if others:
        others = f", or one of {others} (--plugin)"
    return UserError(f"--prefix {text}: expected {GRAMMAR}{others}")


def _tokens(text: str, part: str, limit: int) -> int:
    """Return one length of a schedule: tokens, or a percentage of ``limit``."""
    percentage = re.fullmatch(r"(\d+(?:\.\d+)?)%", part, re.ASCII)
    if percentage:
        percent = float(percentage[1])
        if not 0 < percent <= 100:
            raise UserError(
                f"--prefix {text}: expected a percentage above 0% and at most 100%, got {part}"
            )
        return max(1, round(limit * percent / 100))
    if not re.fullmatch(r"[+-]?\d{1,18}", part, re.ASCII):
        raise _unknown(text)
    tokens = int(part)
    if tokens < 1:
        raise UserError(f"--prefix {text}: expected {GRAMMAR}")
    if tokens > limit:
        raise UserError(
            f"--prefix {text}: expected lengths of at most {limit} (--max-new-tokens), got {part}; "
            "lower --prefix, raise --max-new-tokens or use 'full'"
        )
    return tokens


@dataclass(frozen=True, kw_only=True)
class OffPolicy:
    """Rollouts that the teacher samples: a share λ of all.

    ``loss`` on them: ``sft``, the cross-entropy (SeqKD, arXiv 1606.07947), or ``divergence``, that
    of the run (GKD's mixture, arXiv 2306.13649). They are cut at the prefix like all others.
    """

    loss: str
    share: float

    def rows(self, step: int, rollouts: int, seed: int) -> frozenset[int]:
        """Return which rollouts of a step, numbered over the global batch, are the teacher's.

        They are sampled by ``seed``. Over all steps their number is as near to the share as whole
        rollouts allow.
        """
        before = math.floor(round(self.share * rollouts * step, 9))
        after = math.floor(round(self.share * rollouts * (step + 1), 9))
        rng = random.Random(f"{seed}/off-policy/{step}")
        return frozenset(rng.sample(range(rollouts), after - before))


def parse_off_policy(text: str) -> OffPolicy | None:
    """Parse ``none`` → None; ``sft`` or ``divergence``, with ``:λ`` for a share → OffPolicy.

    UserError: anything else.
    """
    if text == "none":
        return None
    loss, colon, share = text.partition(":")
    if not colon:
        share = "1"
    try:
        value = float(share)
    except ValueError:
        value = math.nan
    if loss in ("sft", "divergence") and 0 < value <= 1:
        return OffPolicy(loss=loss, share=value)
    raise UserError(
        f"--off-policy {text}: expected none, sft or divergence, with an optional share such as "
        "divergence:0.5"
    )


def warmup_steps(text: str, steps: int) -> int:
    """Parse ``20`` (steps) or ``5%`` (of all steps, rounded) → steps of linear warm-up.

    UserError: anything else.
    """
    text = str(text).strip()
    percentage = re.fullmatch(r"(\d+(?:\.\d+)?)%", text)
    if percentage:
        percent = float(percentage[1])
        if percent <= 100:
            return round(steps * percent / 100)
    elif re.fullmatch(r"\d{1,18}", text):
        return int(text)
    raise UserError(
        f"--warmup {text}: expected a number of steps (20), or a percentage of all steps (5%) of "
        "at most 100%"
    )


def learning_rate(step: int, *, peak: float, schedule: str, warmup: int, steps: int) -> float:
    """Return the learning rate of ``step`` (0-based).

    Warm-up: peak·(step + 1)/(warmup + 1). Then with progress u = (step − warmup)/(steps − warmup):
    ``constant`` peak; ``linear`` peak·(1 − u); ``cosine`` peak·(1 + cos πu)/2. The last
    learning rate is above 0, because u < 1.
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    if schedule == "constant":
        return peak
    if schedule == "linear":
        return peak * (1 - progress)
    return peak * (1 + math.cos(math.pi * progress)) / 2
