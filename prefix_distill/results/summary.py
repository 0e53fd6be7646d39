"""Summarize run folders: accuracy and cost of each arm."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy
from numpy.typing import NDArray

from ..display import flops_text
from ..maths.intervals import split_mean
from ..maths.seeds import seed_of
from .runs import Finished, by_arm, common_steps, common_tail

RESAMPLES = 2_000
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

    def line(self) -> Line:
        """Return the means."""
        return Line(self.flops.tolist(), self.accuracy.tolist())

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


class Resampled:
    """Two-level bootstrap: 2,000 seeded draws of seeds and of problems; with one seed, of problems
    only.

    All arms use the same draws, so differences and ratios between arms are paired. Paired arms need
    the same problems and seeds. scipy's bootstrap cannot draw seeds × problems in pairs.
    """

    def __init__(self, arms: dict[str, list[Finished]]):
        self.arms = arms
        problem_counts: set[int] = set()
        seeds: set[tuple[int, ...]] = set()
        for runs in arms.values():
            seeds.add(tuple(run.seed for run in runs))
            for run in runs:
                problem_counts.update(map(len, run.right.values()))
        self.paired = len(problem_counts) == 1 and len(seeds) == 1
        if not self.paired:
            return
        # torch's generator also uses only the low 32 bits of a seed
        random = numpy.random.RandomState(seed_of("report") & 0xFFFFFFFF)
        self.problems = draw_weights(random, problem_counts.pop())
        self.seeds = draw_weights(random, len(seeds.pop()))

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


def summarize(runs: list[Finished], reference: str | None) -> list[dict]:
    """Return a row per arm, with means over its seeds.

    ``low`` and ``high``: the interval of the accuracy, over problems and seeds. If the arms differ
    in problems or seeds, an arm with one seed has its interval over problems; other arms have None.

    ``cost_ratios``: for each of SHARES, the useful FLOPs with which the reference reaches that
    share of its own gain, divided by those with which the arm reaches the same accuracy; with the
    paired interval, and the share of draws in which the arm reaches it (else the ratio is 0).
    """
    arms = by_arm(runs)
    tail = common_tail(runs)
    curves = {}
    if all(run.right for run in runs):
        resampled = Resampled(arms)
        if resampled.paired:
            curves = {arm: resampled.curve(arm) for arm in arms}
    rows = []
    for arm, group in arms.items():
        row = _means(arm, group, tail)
        if arm in curves:
            last = curves[arm].accuracy_draws[:, -1]
            row["low"], row["high"] = interval(last)
            if reference is not None:
                row |= _compare(curves[arm], curves[reference])
        elif len(group) == 1:
            accuracy = group[0].evaluations[-1]["accuracy"]
            if accuracy is not None:
                row["low"] = accuracy["low"]
                row["high"] = accuracy["high"]
        rows.append(row)
    return rows


def _means(arm: str, group: list[Finished], tail: int) -> dict:
    """Return an arm's row, without intervals and ratios. ``tail``: the ``common_tail``."""
    row: dict = {
        "arm": arm,
        "seeds": len(group),
        "updates": group[0].evaluations[-1]["step"],
        "low": None,
        "high": None,
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


def _facts(run: Finished, tail: int) -> dict[str, float | None]:
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
        "full_rollout_cost": run.result["full_rollout_cost"],
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


HEADINGS = (
    "arm",
    "accuracy [95%]",
    "useful FLOPs",
    "executed FLOPs",
    "training time",
    "KL beyond the prefix, before → after",
    "finished",
    "accuracy of finished answers",
    "tokens",
    "cost saving (×) to reach 50% of the reference's gain",
    "to reach 90%",
    "to reach 100%",
)


def cells(row: dict) -> list[str]:
    """Return a summary row as text, under HEADINGS."""
    ratios = row["cost_ratios"]
    return [
        row["arm"],
        _accuracy_text(row),
        flops_text(row["flops_useful"]),
        flops_text(row["flops_executed"]),
        f"{row['seconds']:.0f} s",
        _tail_text(row),
        f"{row['finish_rate']:.0%}",
        share_text(row["finished_accuracy"]),
        f"{row['mean_tokens']:.0f}",
        ratio_text(ratios.get(0.5)),
        ratio_text(ratios.get(0.9)),
        ratio_text(ratios.get(1.0)),
    ]


def share_text(share: float | None) -> str:
    """Return a share in percent; "–" without one."""
    return "–" if share is None else f"{share:.1%}"


def _accuracy_text(row: dict) -> str:
    """Return an accuracy with its interval and its number of answers."""
    accuracy = row["accuracy"]
    low = row["low"]
    high = row["high"]
    answers = row["answers"]
    if accuracy is None:
        return "–"
    if low is None:
        return f"{accuracy:.1%} of {answers:,}"
    return f"{accuracy:.1%} [{low:.1%}, {high:.1%}] of {answers:,}"


def _tail_text(row: dict) -> str:
    """Return the KL beyond the arm's own prefix, before → after training."""
    before = row["kl_tail_before"]
    after = row["kl_tail"]
    if before is None or after is None:
        return "–"
    return f"{before:.3g} → {after:.3g}"


def ratio_text(ratio: dict | None) -> str:
    """Return a cost ratio with its interval, and the share of draws that reach the accuracy.

    The share is omitted if it is 100%.
    """
    if ratio is None:
        return "–"
    value = ratio["value"]
    reached = ratio["reached"]
    if value is None:
        return f"not reached ({reached:.0%} of bootstrap samples)"
    text = f"{value:.1f} × [{ratio['low']:.1f}, {ratio['high']:.1f}]"
    if reached < 1:
        text += f", reached in {reached:.0%} of bootstrap samples"
    return text


def markdown_table(summary_rows: list[dict]) -> str:
    """Return the summary as a Markdown table."""
    text = _markdown_line(HEADINGS)
    text += "|---|" + "--:|" * (len(HEADINGS) - 1) + "\n"
    for row in summary_rows:
        text += _markdown_line(cells(row))
    return text


def _markdown_line(texts: Iterable[str]) -> str:
    """Return a row of a Markdown table."""
    line = "|"
    for text in texts:
        clean = text.replace("|", "\\|").replace("\n", " ")
        line += f" {clean} |"
    return line + "\n"
