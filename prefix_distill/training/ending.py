"""Decide when a run ends before its last step, and when the clock asks for a checkpoint."""

import time

from ..config import StopWhen, parse_stop_when
from ..maths.intervals import wilson
from .monitor import Monitor
from .state import Progress, State

POINTS = 0.1  # the least change of a rate that counts as a collapse
RISE = 0.2  # the least relative rise of the KL beyond the prefix that counts as a collapse
NATS = 0.01  # the least absolute rise of it, per token
MARGIN = 1.25  # on the measured times that --max-hours reserves
FIRST_SAVE = 3  # a checkpoint after a step has AdamW's two moments besides the weights


class Ending:
    """Knows the rules of --stop-when and the clocks of --max-hours and --save-minutes.

    The measurements of a run and rank 0's clock decide, so all ranks decide alike. The rules read
    nothing but ``progress``, so a resumed run stops where an uninterrupted one does. ``reason``:
    why the run ends, None while it goes on.
    """

    def __init__(self, state: State, monitor: Monitor):
        self.state = state
        self.monitor = monitor
        self.rule = parse_stop_when(state.run.config.train.stop_when)
        self.reason: str | None = None
        self.saved_at = time.monotonic()
        self.step_began = self.saved_at
        self.longest_step = 0.0
        self.longest_save = 0.0
        self.longest_evaluation = 0.0
        self.evaluating = 0.0  # seconds in evaluations at the last look

    def begin(self, restored: bool) -> None:
        """Take the first times: those of the evaluation and the save before the first step."""
        seconds, evaluations = self.state.clock.seconds, self.state.progress.evaluations
        self.evaluating = seconds.get("evaluation", 0.0)
        self.longest_evaluation = self.evaluating / max(1, len(evaluations))
        if not restored:
            self.longest_save *= FIRST_SAVE
        self.step_began = time.monotonic()
        self.look()

    def look(self) -> None:
        """Set ``reason`` if the run ends after this step; note it."""
        now = time.monotonic()
        evaluated = self.state.clock.seconds.get("evaluation", 0.0)
        self.longest_evaluation = max(self.longest_evaluation, evaluated - self.evaluating)
        self.evaluating = evaluated
        if self.state.step:
            self.longest_step = max(self.longest_step, now - self.step_began)
        self.step_began = now
        if self.rule == StopWhen() and self.state.run.config.train.max_hours is None:
            return
        reason = find_reason(self.rule, self.state.progress) or self._check_time(now)
        self.reason = self.state.run.place.gather(reason)[0]
        if self.reason is not None:
            self.state.report.note(f"the run ends after step {self.state.step}: {self.reason}")

    def _check_time(self, now: float) -> str | None:
        """Return why another step would end too late for --max-hours, or None."""
        run = self.state.run
        hours = run.config.train.max_hours
        if hours is None or self.state.step >= run.config.train.steps:
            return None
        evaluations = 2.0 if self.monitor.is_due(self.state.step + 1) else 1.0
        # one checkpoint, and the model itself
        after = evaluations * self.longest_evaluation + 2 * self.longest_save
        left = 3600 * hours - (now - run.started)
        if left > MARGIN * (self.longest_step + after):
            return None
        return (
            f"--max-hours {hours:g}: {left:.0f} s are left; a step takes {self.longest_step:.1f} "
            f"s, evaluating and saving {after:.1f} s"
        )

    def has_time_for_teacher(self) -> bool:
        """Return whether an evaluation of the teacher would end within --max-hours.

        It is taken to last as long as the student's, times the ratio of the parameters.
        """
        run = self.state.run
        hours = run.config.train.max_hours
        if hours is None:
            return True
        scale = max(1.0, run.pair.teacher.parameters / run.pair.student.parameters)
        left = 3600 * hours - (time.monotonic() - run.started)
        has_time = left > MARGIN * scale * self.longest_evaluation
        return bool(run.place.gather(has_time)[0])

    def is_save_due(self) -> bool:
        """Return whether --save-minutes have passed since the last checkpoint."""
        minutes = self.state.run.config.checkpoint.save_minutes
        if not minutes:
            return False
        is_due = time.monotonic() - self.saved_at >= 60 * minutes
        return bool(self.state.run.place.gather(is_due)[0])

    def save(self) -> None:
        """Write a checkpoint, and measure how long it takes."""
        began = time.monotonic()
        self.state.save()
        self.saved_at = time.monotonic()
        self.longest_save = max(self.longest_save, self.saved_at - began)

    def restore(self) -> int:
        """Restore the newest checkpoint and return its step; writing one takes about as long."""
        began = time.monotonic()
        step = self.state.restore()
        self.longest_save = time.monotonic() - began
        return step

    def describe(self) -> dict | None:
        """Return the step and the reason of an early end for the result; None without one."""
        if self.reason is None:
            return None
        return {"step": self.state.step, "reason": self.reason}


def find_reason(rule: StopWhen, progress: Progress) -> str | None:
    """Return why --stop-when ends a run after the measurements so far, or None."""
    if rule.patience is not None:
        reason = _describe_plateau(progress.evaluations, rule.patience)
        if reason is not None:
            return reason
    if rule.collapse:
        return _describe_collapse(progress)
    return None


def _describe_plateau(evaluations: list[dict], patience: int) -> str | None:
    """Return that the accuracy has not improved in the last ``patience`` evaluations, or None."""
    values = [row["accuracy"]["value"] for row in evaluations if row["accuracy"]]
    if len(values) <= patience:
        return None
    best = max(values[:-patience])
    last = values[-patience:]
    if max(last) > best:
        return None
    after = ", ".join(f"{value:.1%}" for value in last)
    return (
        f"--stop-when accuracy {patience}: the accuracy did not improve on {best:.1%} "
        f"in {patience} evaluations ({after})"
    )


def _describe_collapse(progress: Progress) -> str | None:
    """Return how the newest measurement shows a collapse, or None."""
    rows = sorted([*progress.evaluations, *progress.tail_probes], key=_step_of)
    newest, earlier = rows[-1], rows[:-1]
    signs = [
        _describe_fall(newest, earlier),
        _describe_repetition(newest, earlier),
        _describe_tail(newest),
    ]
    found = [sign for sign in signs if sign is not None]
    if not found:
        return None
    return f"--stop-when collapse: {'; '.join(found)}"


def _step_of(row: dict) -> int:
    step: int = row["step"]
    return step


def _rate(row: dict, name: str) -> tuple[float, float, float] | None:
    """Return a rate with its 95% interval (Wilson); None if a row of an older version lacks it."""
    if name not in row or "answers" not in row:
        return None
    low, high = wilson(row[name], row["answers"])
    return row[name], low, high


def _describe_fall(newest: dict, earlier: list[dict]) -> str | None:
    """Return that answers end less often than in the best earlier measurement."""
    now = _rate(newest, "finish_rate")
    before = [rate for row in earlier if (rate := _rate(row, "finish_rate"))]
    if now is None or not before:
        return None
    value, low, high = max(before, key=_low)
    if now[2] >= low or now[0] > value - POINTS:
        return None
    return f"{_show(now)} of the answers end, {_show((value, low, high))} did before"


def _describe_repetition(newest: dict, earlier: list[dict]) -> str | None:
    """Return that answers repeat more often than in the best earlier measurement."""
    now = _rate(newest, "repetition_rate")
    before = [rate for row in earlier if (rate := _rate(row, "repetition_rate"))]
    if now is None or not before:
        return None
    value, low, high = min(before, key=_high)
    if now[1] <= high or now[0] < value + POINTS:
        return None
    return f"{_show(now)} of the answers repeat themselves, {_show((value, low, high))} did before"


def _describe_tail(newest: dict) -> str | None:
    """Return that the KL beyond the prefix rose on the fixed contexts."""
    change = newest.get("kl_tail_change")
    if change is None or change["low"] <= max(NATS, RISE * change["before"]):
        return None
    return (
        f"the KL beyond the prefix rose from {change['before']:.3g} by {change['value']:.3g} "
        f"[{change['low']:.3g}, {change['high']:.3g}] nats per token"
    )


def _low(rate: tuple[float, float, float]) -> float:
    return rate[1]


def _high(rate: tuple[float, float, float]) -> float:
    return rate[2]


def _show(rate: tuple[float, float, float]) -> str:
    value, low, high = rate
    return f"{value:.0%} [{low:.0%}, {high:.0%}]"
