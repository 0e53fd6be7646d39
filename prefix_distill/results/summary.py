"""Summarize run folders: accuracy and cost of each arm."""

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy
from numpy.typing import NDArray

from ..maths.intervals import equal_ends, split_mean
from ..maths.seeds import seed_of
from .runs import StoredRun, by_arm, common_steps, common_tail

RESAMPLES = 2_000
SAME = 1e-9  # draws that differ by less are equal but for rounding
SHARES = (1.0, 0.95, 0.9, 0.5)  # of the reference's gain; the report gives the cost to reach each


Numbers = NDArray[numpy.floating]


class Line(NamedTuple):
    """Cost and accuracy at every evaluation of an arm."""

    cost: list[float]
    accuracy: list[float]


class Curve(NamedTuple):
    """Means of an arm over its seeds at E evaluations, with R bootstrap draws of them."""

    steps: list[int]  # [E]
    accuracy: Numbers  # [E]
    accuracy_draws: Numbers  # [R, E]
    flops: Numbers  # [E] useful FLOPs
    flops_draws: Numbers  # [R, E]
    problems: int

    def line(self) -> Line:
        """Return the means."""
        return Line(self.flops.tolist(), self.accuracy.tolist())

    def interval(self, evaluation: int) -> tuple[float, float]:
        """Return the 95% interval of the accuracy at an evaluation; -1 is the last one."""
        draws = self.accuracy_draws[:, evaluation]
        if numpy.ptp(draws) < SAME:
            return equal_ends(round(self.accuracy[evaluation].item(), 12), self.problems)
        return interval(draws)

    def draws(self) -> Iterator[Line]:
        """Yield the draws, one by one."""
        return map(Line, self.flops_draws.tolist(), self.accuracy_draws.tolist())


def draw_weights(random: numpy.random.RandomState, count: int) -> Numbers:
    """Draw ``count`` items with replacement, RESAMPLES times; return each item's share of a draw
    [R, count].

    The draws equal ``torch.randint(count, (count,), generator=...)`` on the CPU with the same seed:
    both take a 32-bit word of MT19937 modulo ``count``. Reports computed with torch keep their
    numbers.
    """
    shares = numpy.empty((RESAMPLES, count))
    for draw in shares:
        words = random.randint(1 << 32, size=count, dtype=numpy.uint32)
        draw[:] = numpy.bincount(words % count, minlength=count)
    shares /= count
    return shares


@functools.cache
def draw_both(problems: int, seeds: int) -> tuple[Numbers, Numbers]:
    """Return the draws of problems and of seeds; equal numbers have equal draws."""
    # torch's generator also uses only the low 32 bits of a seed
    random = numpy.random.RandomState(seed_of("report") & 0xFFFFFFFF)
    return draw_weights(random, problems), draw_weights(random, seeds)


class Sample(NamedTuple):
    """What an arm was evaluated on: its problems and seeds.

    ``problems``: a digest of the prompts, "" if the runs have not stored one.
    """

    number: int
    problems: str
    seeds: tuple[int, ...]


def sample_of(runs: list[StoredRun]) -> Sample | None:
    """Return what all runs of an arm were evaluated on; None if they differ, or without answers."""
    found = set()
    for run in runs:
        if not run.right:
            return None
        for right in run.right.values():
            found.add((len(right), run.problems))
    if len(found) > 1:
        return None
    count, problems = found.pop()
    return Sample(count, problems, tuple(run.seed for run in runs))


def describe_differing(runs: list[StoredRun], reference: str | None) -> list[str]:
    """Return warnings that name the arms that cannot be compared with each other, and why.

    ``reference``: the arm that the others are compared with; None for the first arm.
    """
    arms = by_arm(runs)
    if not any(run.right for run in runs):
        return []
    if reference is None:
        reference = next(iter(arms))
    base = sample_of(arms[reference])
    by_sample: dict[Sample | None, list[str]] = {}
    for arm, group in arms.items():
        by_sample.setdefault(sample_of(group), []).append(arm)
    warnings = []
    for sample, names in by_sample.items():
        named = f"arms {', '.join(names)}"
        if sample is None:
            warnings.append(
                f"{named}: runs of an arm differ in their held-out problems or have no graded "
                "answers, so it has no interval; evaluate all runs of an arm on the same problems"
            )
        elif base is not None and sample != base:
            what = "problems"
            if sample[:2] == base[:2]:
                what = "seeds"
            warnings.append(
                f"{named}: the held-out {what} differ from those of arm {reference} "
                f"({_describe_sample(sample)}; {_describe_sample(base)}), so they are not compared "
                "with it; each arm has its own interval"
            )
    return warnings


def _describe_sample(sample: Sample) -> str:
    seeds = ", ".join(map(str, sample.seeds))
    return f"{sample.number} problems with the seeds {seeds}"


class Resampled:
    """Two-level bootstrap: 2,000 seeded draws of seeds and of problems; with one seed, of problems
    only.

    All arms use the same draws, so differences and ratios between arms are paired. Paired arms need
    the same problems and seeds. scipy's bootstrap cannot draw seeds × problems in pairs.
    """

    def __init__(self, arms: dict[str, list[StoredRun]]):
        self.arms = arms
        samples = {sample_of(runs) for runs in arms.values()}
        first = samples.pop()
        self.paired = not samples and first is not None
        if first is None or samples:
            return
        self.problems, self.seeds = draw_both(first.number, len(first.seeds))

    def curve(self, arm: str) -> Curve:
        """Return an arm's accuracy and useful FLOPs at its ``common_steps``, with their draws."""
        runs = self.arms[arm]
        steps = common_steps(runs)
        right_of_seeds = []
        flops_of_seeds = []
        for run in runs:
            flops = {row["step"]: run.cost(row).useful for row in run.evaluations}
            right_of_seeds.append([run.right[step] for step in steps])
            flops_of_seeds.append([flops[step] for step in steps])
        right = numpy.array(right_of_seeds, dtype=numpy.float64)  # [K seeds, E, P problems]
        cost = numpy.array(flops_of_seeds, dtype=numpy.float64)  # [K, E]
        return Curve(
            steps=steps,
            accuracy=right.mean((0, 2)),
            accuracy_draws=self.resample(right),
            flops=cost.mean(0),
            flops_draws=self.seeds @ cost,
            problems=right.shape[2],
        )

    def resample(self, values: Numbers) -> Numbers:
        """Return the draws [R, E] of the mean over seeds and problems of ``values`` [K, E, P]."""
        draws = numpy.zeros((RESAMPLES, values.shape[1]))
        for weight, of_seed in zip(self.seeds.T, values, strict=True):
            draws += weight[:, None] * (self.problems @ of_seed.T)
        return draws


def interval(draws: Numbers) -> tuple[float, float]:
    """Return the 2.5 and 97.5 percentiles of draws."""
    ordered = numpy.sort(draws)
    low = int(0.025 * len(ordered))
    high = int(0.975 * len(ordered)) - 1
    return ordered[low].item(), ordered[high].item()


def first_cost(cost: Sequence[float], accuracy: Sequence[float], wanted: float) -> float:
    """Return the cost at which accuracy first reaches ``wanted``; inf if it never does.

    Between evaluations both are linear.
    """
    wanted -= 1e-12  # an arm reaches its own last accuracy, in spite of rounding
    if accuracy[0] >= wanted:
        return cost[0]
    for i in range(1, len(cost)):
        if accuracy[i] >= wanted:
            before = accuracy[i - 1]
            spent = cost[i - 1]
            share = (wanted - before) / (accuracy[i] - before)
            return spent + share * (cost[i] - spent)
    return math.inf


def summarize(runs: list[StoredRun], reference: str | None) -> list[dict]:
    """Return a row per arm, with means over its seeds.

    ``low`` and ``high``: the interval of the accuracy, over problems and seeds; None if the runs of
    an arm differ in their problems. Arms are compared with the reference where both have the same
    problems and seeds (``describe_differing``).

    ``cost_ratios``: for each of SHARES, the useful FLOPs with which the reference reaches that
    share of its own gain, divided by those with which the arm reaches the same accuracy; with the
    paired interval, and the share of draws in which the arm reaches it (else the ratio is 0).
    """
    arms = by_arm(runs)
    tail = common_tail(runs)
    samples = {arm: sample_of(group) for arm, group in arms.items()}
    curves = {}
    for arm, group in arms.items():
        resampled = Resampled({arm: group})
        if resampled.paired:
            curves[arm] = resampled.curve(arm)
    rows = []
    for arm, group in arms.items():
        row = _means(arm, group, tail)
        if arm in curves:
            row["low"], row["high"] = curves[arm].interval(-1)
            if reference is not None and samples[arm] == samples[reference]:
                row |= _compare(curves[arm], curves[reference])
        rows.append(row)
    return rows


def _means(arm: str, group: list[StoredRun], tail: int) -> dict:
    """Return an arm's row, without intervals and ratios. ``tail``: the ``common_tail``."""
    row: dict = {
        "arm": arm,
        "seeds": len(group),
        "updates": group[0].evaluations[-1]["step"],
        "state": _state_of(group),
        "low": None,
        "high": None,
        "folders": [str(run.path) for run in group],
        "answers": 0,
        "also": {},
        "cost_ratios": {},
    }
    facts = [_facts(run, tail) for run in group]
    for name in facts[0]:
        row[name] = mean(fact[name] for fact in facts)
    for name in group[0].also:
        row["also"][name] = mean(run.also.get(name) for run in group)
    for run in group:
        accuracy = run.evaluations[-1]["accuracy"]
        if accuracy is not None:
            row["answers"] += accuracy["n"]
    return row


def _state_of(group: list[StoredRun]) -> str:
    """Return the state of an arm: finished if all its runs are."""
    for run in group:
        if run.state != "finished":
            return run.state
    return "finished"


def _facts(run: StoredRun, tail: int) -> dict[str, float | None]:
    """Return the numbers of a run that a summary averages over seeds."""
    first = run.evaluations[0]
    last = run.evaluations[-1]
    cost = run.cost(last)
    prefix = run.result["prefix"]
    finished = last.get("finished_accuracy")
    return {
        "prefix": prefix,
        "accuracy": last["accuracy"] and last["accuracy"]["value"],
        "before": first["accuracy"] and first["accuracy"]["value"],
        "kl": last["kl"]["value"],
        "kl_tail_before": split_mean(run.kl_before, prefix)[1],
        "kl_tail": split_mean(run.kl_after, prefix)[1],
        "kl_beyond": split_mean(run.kl_after, tail)[1],
        "finish_rate": last["finish_rate"],
        "finished_accuracy": finished and finished["value"],
        "mean_tokens": last["mean_tokens"],
        "flops_useful": cost.useful,
        "flops_executed": cost.executed,
        "seconds": cost.seconds,
        "full_rollout_cost": run.result.get("full_rollout_cost"),
        "full_rollouts": run.result.get("full_rollouts"),
    }


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean, or None if a value is missing."""
    known: list[float] = []
    for value in values:
        if value is None:
            return None
        known.append(value)
    return math.fsum(known) / len(known)


def _compare(arm: Curve, reference: Curve) -> dict:
    """Return an arm's cost ratios, and its accuracy minus the reference's with the interval."""
    # arms can differ in the number of their evaluations, so only the last ones are compared
    difference = arm.accuracy[-1] - reference.accuracy[-1]
    difference_draws = arm.accuracy_draws[:, -1] - reference.accuracy_draws[:, -1]
    low, high = interval(difference_draws)
    if numpy.ptp(difference_draws) < SAME:
        low, high = equal_ends(difference.item(), arm.problems, lowest=-1)
    ratios = {}
    for share in SHARES:
        ratios[share] = _cost_ratio(reference, arm, share)
    return {
        "cost_ratios": ratios,
        "difference": difference.item(),
        "difference_low": low,
        "difference_high": high,
    }


def _cost_ratio(reference: Curve, arm: Curve, share: float) -> dict:
    """Return the ratio of costs to reach ``share`` of the gain: value, interval, share of draws."""
    # float32 reproduces the numbers of earlier reports
    ratios = numpy.zeros(RESAMPLES, dtype=numpy.float32)
    draws = zip(reference.draws(), arm.draws(), strict=True)
    for i, (reference_draw, arm_draw) in enumerate(draws):
        ratios[i] = _ratio_of_lines(reference_draw, arm_draw, share)
    low, high = interval(ratios)
    return {
        "value": _ratio_of_lines(reference.line(), arm.line(), share) or None,
        "low": low,
        "high": high,
        "reached": (ratios > 0).mean().item(),
    }


def _ratio_of_lines(reference: Line, arm: Line, share: float) -> float:
    """Return the reference's cost to reach ``share`` of its gain ÷ the arm's cost to reach that.

    0: the arm never reaches this accuracy, or had reached it before its first step.
    """
    start = reference.accuracy[0]
    wanted = start + share * (reference.accuracy[-1] - start)
    cost = first_cost(arm.cost, arm.accuracy, wanted)
    if not 0 < cost < math.inf:
        return 0.0
    return first_cost(reference.cost, reference.accuracy, wanted) / cost
