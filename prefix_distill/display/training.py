"""The progress of one training run: its columns of the live line, or its lines of a log."""

import time
from collections import deque
from statistics import fmean
from typing import TYPE_CHECKING, Self

from .lines import print_line
from .pace import Outline, Pace
from .phases import Phase, list_phases
from .screen import OF_A_STEP, RUNS, Screen, describe_number, time_or_left
from .texts import (
    accuracy_text,
    find_divergence,
    flops_text,
    number_text,
    share_text,
    time_text,
)

if TYPE_CHECKING:
    from .columns import Column

# phases of a step in its metrics row → the name that is shown
SPEEDS = {"student_decode": "sampling", "teacher_score": "teacher", "student_update": "training"}
PLAIN_LINES = 50  # progress lines of one run without a terminal, about
MEAN_OVER = 10  # steps over which the divergence that is shown is averaged
BAR = 20  # cells
RANKS = {"acc": 5, "saved": 6}  # of the columns beside the divergence


class Display:
    """Shows the progress of one run: a ``Reporter``.

    Without a terminal it prints about 50 lines, however long the run is. A terminal or pipe that
    closes does not stop the run.
    """

    def __init__(self, outline: Outline, screen: Screen | None = None):
        self.outline = outline
        self.screen = screen or Screen()
        self.pace = Pace(outline)
        self.started = time.monotonic()
        self.plain_every = max(1, outline.steps // PLAIN_LINES)
        self.seen = 0  # steps shown
        self.step = 0
        self.divergence = ""
        self.values: deque[float] = deque(maxlen=MEAN_OVER)
        self.accuracy: float | None = None
        self.useful = self.full = 0.0
        self.speeds = ""

    def __enter__(self) -> Self:
        self.screen.__enter__()
        self.screen.run = self
        return self

    def __exit__(self, *_: object) -> None:
        self.screen.run = None
        if self.screen.is_live and self.seen:
            took = time_text(time.monotonic() - self.started)
            self._labelled(" · ".join([*self._facts(), f"took {took}"]))
        self.screen.__exit__()

    # A reporter

    def note(self, text: str) -> None:
        """Show a progress note."""
        print_line(text)

    def warn(self, text: str) -> None:
        """Show a warning that every rank reports."""
        self.note(f"warning: {text}")

    def warn_on_this_rank(self, text: str) -> None:
        """Show a warning that only this rank reports, whichever rank it is."""
        self.note(f"warning: {text}")

    def row(self, row: dict, useful: float, full: float) -> None:
        """Show one step: its metrics row and the useful FLOPs so far.

        ``full``: the useful FLOPs that as many steps with full rollouts would take.
        """
        self.seen += 1
        self.step = row["step"]
        self.pace.end_step(self.step)
        self.divergence, value = find_divergence(row)
        self.values.append(value)
        self.useful, self.full = useful, full
        self.speeds = _speeds(row)
        if self.screen.is_live:
            return
        is_last = self.step == self.outline.steps
        if self.step % self.plain_every == 0 or self.seen == 1 or is_last:
            self._labelled(self._log_line(row))

    def evaluation(self, row: dict) -> None:
        """Show one evaluation: accuracy, finish rate, length, and KL on the fixed contexts."""
        if row["accuracy"] is not None:
            self.accuracy = row["accuracy"]["value"]
        name = "accuracy"
        if row["graded_by"] is not None:
            name = "score"
        text = (
            f"after step {row['step']}: {name} {accuracy_text(row['accuracy'])}, "
            f"{row['finish_rate']:.0%} finished, {row['mean_tokens']:.0f} tokens per answer, "
            f"held-out reverse KL {row['kl']['value']:.4f} nats"
        )
        if row["kl_tail"] is not None:
            text += f" (beyond the prefix {row['kl_tail']:.4f})"
        if row["sampler_kl"] is not None:
            text += f", KL between decoding copy and student {row['sampler_kl']:.2g} nats"
        self._labelled(text)

    def tail(self, row: dict) -> None:
        """Show one tail probe: KL beyond the prefix, and how full answers end."""
        if row["kl_tail"] is None:
            tail = "no token beyond the prefix"
        else:
            tail = f"KL {row['kl_tail']:.4f} nats beyond the prefix"
        self._labelled(
            f"tail probe after step {row['step']}: {tail}, {row['finish_rate']:.0%} of the full "
            f"answers finished, {row['mean_tokens']:.0f} tokens per answer"
        )

    def _labelled(self, text: str) -> None:
        self.note(f"{self.outline.label} {text}".strip())

    def _log_line(self, row: dict) -> str:
        """Return a step as a line of a log."""
        name, value = find_divergence(row)
        text = (
            f"step {self.step}/{self.outline.steps}: {name} {value:.4f}, "
            f"prefix {row['rollout/prefix_tokens']} tokens, "
            f"{row['rollout/finished_share']:.0%} finished, {self.speeds}{self._flops()}"
        )
        left = self.pace.seconds_left
        if left is not None:
            text += f", {time_text(left)} left"
        runs = _find_runs(list_phases())
        if runs is not None:
            text += f"; {describe_number(runs)}, {time_text(self._left_in_all(runs))} left in all"
        return text

    def _flops(self) -> str:
        text = f"{flops_text(self.useful)} useful so far"
        if self.outline.is_full:
            return text
        return f"{text} ({flops_text(self.full)} with full rollouts)"

    # The live line

    def columns(self, phases: list[Phase]) -> list["Column"]:
        """Return the columns of the live line, with the open ``phases``."""
        from .columns import Column

        runs = _find_runs(phases)
        newest = next((p for p in reversed(phases) if p.started >= self.started), None)
        columns = []
        if runs is not None:
            columns.append(Column(texts=(describe_number(runs),), rank=2))
        steps, *facts = self._facts()
        columns.append(Column(texts=(steps,), rank=0))
        if newest is not None and newest.name not in OF_A_STEP:
            columns.append(Column(texts=_describe_measurement(newest), rank=1))
        for text in facts:
            columns.append(Column(texts=(text,), rank=RANKS.get(text.partition(" ")[0], 3)))
        columns += self._times(runs, newest)
        if newest is not None and newest.name in OF_A_STEP:
            columns.append(Column(texts=(newest.name,), rank=7))
        if self.outline.label:
            columns.append(Column(texts=(self.outline.label.rstrip(":"),), rank=8))
        if self.seen:
            filled = round(BAR * self.step / max(1, self.outline.steps))
            columns.append(Column(texts=("━" * filled + "─" * (BAR - filled),), rank=9))
            columns.append(Column(texts=(self.speeds.removesuffix(", "),), rank=10))
            columns.append(Column(texts=(self._flops(),), rank=11))
        return columns

    def _facts(self) -> list[str]:
        """Return steps, mean divergence, accuracy and saving, as far as they are known."""
        facts = [f"{self.step}/{self.outline.steps}"]
        if self.values:
            facts.append(f"{self.divergence} {number_text(fmean(self.values))}")
        if self.accuracy is not None:
            facts.append(f"acc {share_text(self.accuracy)}")
        if self.full > self.useful > 0 and not self.outline.is_full:
            facts.append(f"saved {self.full / self.useful:.1f}×")
        return facts

    def _times(self, runs: Phase | None, newest: Phase | None) -> list["Column"]:
        """Return the columns of the time left, and of the seconds since something has changed."""
        from .columns import Column

        columns = []
        left = self.pace.seconds_left
        if runs is not None:
            in_all = f"{time_text(self._left_in_all(runs))} left"
            if left is not None:
                columns.append(Column(texts=(f"{time_text(left)} left",), rank=8))
            if left is not None or runs.done > runs.skipped:
                columns.append(Column(texts=(f"{in_all} in all", in_all), rank=1))
        elif left is not None:
            columns.append(Column(texts=(f"{time_text(left)} left",), rank=1))
        since = self.pace.mark
        if newest is not None:
            since = max(since, newest.started)
        columns.append(Column(texts=(time_text(time.monotonic() - since),), rank=4))
        return columns

    def _left_in_all(self, runs: Phase) -> float:
        """Return the seconds until the last of several runs ends."""
        own = time.monotonic() - self.started
        trained = runs.done - runs.skipped
        left = self.pace.seconds_left
        typical = own + (left or 0.0)
        if trained > 0:
            typical = (runs.moved - runs.started) / trained
        if left is None:
            left = max(0.0, typical - own)
        waiting = (runs.total or 0) - runs.done - 1
        return left + max(0, waiting) * typical


def _find_runs(phases: list[Phase]) -> Phase | None:
    """Return the phase that trains several runs, if one is open."""
    return next((phase for phase in phases if phase.unit == RUNS), None)


def _describe_measurement(phase: Phase) -> tuple[str, ...]:
    """Return what a run does between two steps: with the time left, and without."""
    if phase.total is None:
        return (phase.name,)
    work = f"{phase.name} {phase.done}/{phase.total}"
    if phase.seconds_left is None:
        return (work,)
    return f"{work} ({time_or_left(phase)})", work


def _speeds(row: dict) -> str:
    """Return the tokens per second of each phase of a step, each followed by a comma."""
    text = ""
    for phase, name in SPEEDS.items():
        speed = row.get(f"time/{phase}_tokens_per_s")
        if speed is not None:
            text += f"{name} {speed:,.0f} tok/s, "
    return text
