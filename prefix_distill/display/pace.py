"""Estimate how long a run still takes: its steps, evaluations, tail probes and saves."""

import bisect
import dataclasses
import statistics
import time
from collections import deque

# names of the phases around a run's steps, of which the last duration is the estimate
EVALUATION, TAIL_PROBE, SAVING = "evaluation", "tail probe", "saving"
RECENT = 20  # steps whose mean duration is expected of the others


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outline:
    """What a run will do, as far as it is known before.

    ``label`` names the run among several. ``eval_every``, ``tail_every``, ``save_every``: steps
    between evaluations, tail probes and checkpoints; 0 is never. ``is_full``: rollouts are full, so
    that nothing is saved.
    """

    steps: int
    label: str = ""
    eval_every: int = 0
    tail_every: int = 0
    save_every: int = 0
    is_full: bool = False


def list_measurements(outline: Outline) -> tuple[list[int], list[int]]:
    """Return the steps after which a run evaluates, and those after which it probes the tail.

    The last evaluation follows the last step. A tail probe follows ``tail_every`` steps without an
    evaluation or a probe.
    """
    evaluations, probes = [], []
    last = 0
    for step in range(1, outline.steps):
        if outline.eval_every and step % outline.eval_every == 0:
            evaluations.append(step)
            last = step
        elif outline.tail_every and step - last >= outline.tail_every:
            probes.append(step)
            last = step
    return [*evaluations, outline.steps], probes


def list_saves(outline: Outline) -> list[int]:
    """Return the steps after which a run writes a checkpoint or, after the last one, its model."""
    saves = [outline.steps, outline.steps]
    if outline.save_every:
        saves += range(outline.save_every, outline.steps, outline.save_every)
    return sorted(saves)


class Pace:
    """How fast a run advances. ``step``: the steps that are done."""

    def __init__(self, outline: Outline):
        self.outline = outline
        self.step = 0
        self.recent: deque[float] = deque(maxlen=RECENT)
        self.lasted: dict[str, float] = {}
        self.mark = time.monotonic()  # when the last step, evaluation, probe or save ended
        evaluations, probes = list_measurements(outline)
        self.due = {EVALUATION: evaluations, TAIL_PROBE: probes, SAVING: list_saves(outline)}
        self.done_at = dict.fromkeys(self.due, -1)  # the step after which each was last done

    def end_step(self, step: int) -> None:
        """Count the steps up to ``step`` as done."""
        now = time.monotonic()
        self.recent.append(now - self.mark)
        self.step, self.mark = step, now

    def end_phase(self, name: str, seconds: float) -> None:
        """Remember how long an evaluation, a tail probe or a save lasted."""
        if name in self.due:
            self.lasted[name] = seconds
            self.done_at[name] = self.step
            self.mark = time.monotonic()

    @property
    def seconds_left(self) -> float | None:
        """Return the seconds until the run ends; None before the first step of this process."""
        if not self.recent:
            return None
        left = (self.outline.steps - self.step) * statistics.fmean(self.recent)
        for name, steps in self.due.items():
            # what follows the newest step is still to come unless it is done
            last = max(self.step - 1, self.done_at[name])
            rest = len(steps) - bisect.bisect_right(steps, last)
            left += rest * self.lasted.get(name, 0.0)
        return max(0.0, left - (time.monotonic() - self.mark))
