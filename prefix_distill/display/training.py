"""The progress of one training run: its columns of the live line, or its lines of a log."""

import time
from collections import deque
from statistics import fmean
from typing import Self

from .columns import EXTRA, Column
from .lines import is_verbose, print_line
from .pace import Outline, Pace
from .phases import Phase, list_phases
from .screen import (
    OF_A_STEP,
    RUNS,
    Screen,
    describe_count,
    describe_number,
    describe_work,
    time_or_left,
)
from .texts import (
    accuracy_text,
    elapsed_text,
    find_divergence,
    flops_text,
    number_text,
    share_text,
    time_text,
)

# phases of a step in its metrics row → the name that is shown
SPEEDS = {"student_decode": "sampling", "teacher_score": "teacher", "student_update": "training"}
PLAIN_LINES = 50  # progress lines of one run without a terminal, about
MEAN_OVER = 10  # steps over which the divergence that is shown is averaged
BAR = 20  # cells
# The two divergences of a run: of the rollouts of its steps, and of its fixed rollouts.
TRAIN, HELD_OUT = "train", "held-out"
# ranks of the columns: where there is no room for all, those of the highest rank are left out
STEP, MEASUREMENT, SECONDS_OF_IT, LEFT, RUN, DIVERGENCE, SECONDS, ACCURACY, SAVED = range(9)
NAME, LABEL, GAUGE, SPEED, FLOPS = range(EXTRA, EXTRA + 5)


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
        self.screen.show(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.screen.hide()
        if self.screen.is_live and self.seen:
            took = time_text(time.monotonic() - self.started)
            # The saving so far is an estimate; the closing summary has the final one.
            known = [column for column in self._facts() if column.rank != SAVED]
            facts = [self._steps(), *(column.texts[0] for column in known)]
            self._labelled(" · ".join([*facts, f"took {took}"]))
        self.screen.__exit__()

    # A reporter

    def note(self, text: str) -> None:
        """Show a progress note."""
        print_line(text)

    def detail(self, text: str) -> None:
        """Show a note for developers, with --verbose."""
        if is_verbose():
            self.note(text)

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
        if self.screen.is_live:
            self._labelled(_describe_evaluation(row, name))
            return
        text = (
            f"after step {row['step']}: {name} {accuracy_text(row['accuracy'])}, "
            f"{row['finish_rate']:.0%} finished, {row['mean_tokens']:.0f} tokens per answer, "
            f"{HELD_OUT} reverse KL {row['kl']['value']:.4f} nats"
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
            f"step {self.step}/{self.outline.steps}: {TRAIN} {name} {value:.4f}, "
            f"prefix {row['rollout/prefix_tokens']} tokens, "
            f"{row['rollout/finished_share']:.0%} finished, {self.speeds}{self._flops()}"
        )
        left = self.pace.seconds_left
        if left is not None:
            text += f", {time_text(left)} left"
        runs = _find_runs(list_phases())
        if runs is None:
            return text
        text += f"; {describe_number(runs)}"
        if _waiting(runs):
            text += f", {time_text(self._left_in_all(runs))} left in all"
        return text

    def _flops(self) -> str:
        text = f"{flops_text(self.useful)} useful so far"
        if self.outline.is_full:
            return text
        return f"{text} ({flops_text(self.full)} with full rollouts)"

    # The live line

    def columns(self, phases: list[Phase]) -> list[Column]:
        """Return the columns of the live line, with the open ``phases``."""
        runs = _find_runs(phases)
        newest = next((p for p in reversed(phases) if p.started >= self.started), None)
        columns = []
        if runs is not None:
            columns.append(Column(texts=(describe_number(runs),), rank=RUN))
        columns.append(Column(texts=(self._steps(),), rank=STEP))
        is_measuring = newest is not None and newest.name not in OF_A_STEP
        if newest is not None and is_measuring:
            columns.append(Column(texts=_describe_measurement(newest), rank=MEASUREMENT))
        columns += self._facts()
        columns += self._times_left(runs)
        since = self.pace.mark
        if newest is not None:
            since = max(since, newest.started)
        seconds = elapsed_text(time.monotonic() - since)
        rank = SECONDS_OF_IT if is_measuring else SECONDS
        columns.append(Column(texts=(seconds,), rank=rank))
        if newest is not None and not is_measuring:
            columns.append(Column(texts=(newest.name,), rank=NAME))
        return columns + self._extras()

    def _steps(self) -> str:
        return f"{self.step}/{self.outline.steps}"

    def _facts(self) -> list[Column]:
        """Return mean divergence, accuracy and saving, as far as they are known."""
        columns = []
        if self.values:
            value = number_text(fmean(self.values))
            short = self.divergence.rpartition(" ")[2]
            names = (f"{TRAIN} {self.divergence}", f"{TRAIN} {short}", short)
            texts = tuple(f"{name} {value}" for name in names)
            columns.append(Column(texts=texts, rank=DIVERGENCE))
        if self.accuracy is not None:
            texts = (f"acc {share_text(self.accuracy)}", f"acc {self.accuracy:.0%}")
            columns.append(Column(texts=texts, rank=ACCURACY))
        if self.full > self.useful > 0 and not self.outline.is_full:
            columns.append(Column(texts=(f"saved {self.full / self.useful:.1f}×",), rank=SAVED))
        return columns

    def _times_left(self, runs: Phase | None) -> list[Column]:
        left = self.pace.seconds_left
        columns = []
        is_last = runs is None or not _waiting(runs)
        if left is not None:
            rank = LEFT if is_last else LABEL
            columns.append(Column(texts=(f"{time_text(left)} left",), rank=rank))
        if runs is None or (is_last and left is not None):
            return columns
        if left is not None or runs.done > runs.skipped:
            in_all = f"{time_text(self._left_in_all(runs))} left"
            columns.append(Column(texts=(f"{in_all} in all", in_all), rank=LEFT))
        return columns

    def _extras(self) -> list[Column]:
        """Return label, bar, speeds and FLOPs, for wide terminals."""
        columns = []
        if self.outline.label:
            columns.append(Column(texts=(self.outline.label.rstrip(":"),), rank=LABEL))
        if self.seen:
            filled = round(BAR * self.step / max(1, self.outline.steps))
            columns.append(Column(texts=("━" * filled + "─" * (BAR - filled),), rank=GAUGE))
            columns.append(Column(texts=(self.speeds.removesuffix(", "),), rank=SPEED))
            columns.append(Column(texts=(self._flops(),), rank=FLOPS))
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
        return left + _waiting(runs) * typical


def _describe_evaluation(row: dict, name: str) -> str:
    """Return an evaluation as a line of a terminal; ``name``: what its answers are graded by."""
    parts = [f"step {row['step']}"]
    if row["accuracy"] is not None:
        value, low, high = (row["accuracy"][key] for key in ("value", "low", "high"))
        parts.append(f"{name} {value:.1%} [{low:.1%}, {high:.1%}]")
    parts.append(f"{HELD_OUT} KL {row['kl']['value']:.3g}")
    parts.append(f"{row['finish_rate']:.0%} finished")
    parts.append(f"{row['mean_tokens']:.0f} tokens")
    return " · ".join(parts)


def _find_runs(phases: list[Phase]) -> Phase | None:
    """Return the phase that trains several runs, if one is open."""
    return next((phase for phase in phases if phase.unit == RUNS), None)


def _waiting(runs: Phase) -> int:
    """Return how many runs follow the one in progress."""
    return max(0, (runs.total or 0) - runs.done - 1)


def _describe_measurement(phase: Phase) -> tuple[str, ...]:
    """Return what a run does between two steps: with the time left, and without."""
    if phase.total is None:
        return (phase.name,)
    work, short = describe_work(phase), describe_count(phase)
    if phase.seconds_left is None:
        return work, short
    return f"{work}, {time_or_left(phase)}", f"{short} ({time_or_left(phase)})", short


def _speeds(row: dict) -> str:
    """Return the tokens per second of each phase of a step, each followed by a comma."""
    text = ""
    for phase, name in SPEEDS.items():
        speed = row.get(f"time/{phase}_tokens_per_s")
        if speed is not None:
            text += f"{name} {speed:,.0f} tok/s, "
    return text
