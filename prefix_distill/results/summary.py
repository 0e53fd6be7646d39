"""Turn run folders into a table: accuracy and cost of each arm."""

import math
from collections.abc import Iterable, Sequence

import numpy
from numpy.typing import NDArray

from ..display import flops_text
from ..maths.intervals import split_mean
from ..maths.seeds import seed_of
from .runs import Finished, by_arm, common_tail

RESAMPLES = 2_000
SHARES = (1.0, 0.95, 0.9, 0.5)  # of the reference's gain, for which the cost is given


Numbers = NDArray[numpy.floating]
# (updates E, mean accuracy [E], its draws [R, E], mean useful FLOPs [E], their draws [R, E])
Curve = tuple[list[int], Numbers, Numbers, Numbers, Numbers]


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

    All arms share the draws, so differences and ratios between arms are paired. Paired arms need
    the same problems and seeds. scipy's bootstrap does not draw seeds × problems in pairs.
    """

    def __init__(self, arms: dict[str, list[Finished]]):
        self.arms = arms
        counts = {
            len(run.right[step]) for runs in arms.values() for run in runs for step in run.right
        }
        seeds = {tuple(run.seed for run in runs) for runs in arms.values()}
        self.paired = len(counts) == 1 and len(seeds) == 1
        if not self.paired:
            return
        self.n, self.k = counts.pop(), len(seeds.pop())
        # torch's generator also uses only the low 32 bits of a seed
        random = numpy.random.RandomState(seed_of("report") & 0xFFFFFFFF)
        self.problems = draw_weights(random, self.n)
        self.seeds = draw_weights(random, self.k)

    def curve(self, arm: str) -> Curve:
        """Return an arm's steps, accuracy with draws, and useful FLOPs with draws."""
        runs = self.arms[arm]
        steps = sorted(set.intersection(*(set(run.right) for run in runs)))
        right = numpy.array(
            [[run.right[step] for step in steps] for run in runs], dtype=numpy.float64
        )  # [K, E, P]
        cost = numpy.array(
            [[run.cost(row)[0] for row in run.evaluations if row["step"] in steps] for run in runs],
            dtype=numpy.float64,
        )  # [K, E]
        return steps, right.mean((0, 2)), self.resample(right), cost.mean(0), self.seeds @ cost

    def resample(self, values: Numbers) -> Numbers:
        """Return the draws [R, E] of the mean over seeds and problems of ``values`` [K, E, P]."""
        draws = numpy.zeros((RESAMPLES, values.shape[1]))
        for weight, of_seed in zip(self.seeds.T, values, strict=True):
            draws += weight[:, None] * (self.problems @ of_seed.T)
        return draws


def interval(draws: Numbers) -> tuple[float, float]:
    """2.5 and 97.5 percentiles of draws."""
    ordered = numpy.sort(draws)
    return ordered[int(0.025 * len(ordered))].item(), ordered[int(0.975 * len(ordered)) - 1].item()


def first_cost(cost: Sequence[float], accuracy: Sequence[float], wanted: float) -> float:
    """Cost at which accuracy first reaches ``wanted``, linear between evaluations; inf where it
    never does."""
    wanted -= 1e-12  # a curve reaches its own end, however that was rounded
    if accuracy[0] >= wanted:
        return cost[0]
    for i in range(1, len(cost)):
        if accuracy[i] >= wanted:
            share = (wanted - accuracy[i - 1]) / (accuracy[i] - accuracy[i - 1])
            return cost[i - 1] + share * (cost[i] - cost[i - 1])
    return math.inf


def summary(runs: list[Finished], reference: str | None) -> list[dict]:
    """A row per arm: means over its seeds; accuracy with an interval over problems and seeds (over
    problems, where arms do not share both and an arm has one seed; None otherwise); and, for shares
    of the reference's gain, reference's useful FLOPs ÷ the arm's to reach it: the ratio, its paired
    interval, and the share of draws that reach it (a draw that does not counts as a ratio of 0)."""
    arms, tail = by_arm(runs), common_tail(runs)
    drawn = Resampled(arms) if all(run.right for run in runs) else None
    curves = {arm: drawn.curve(arm) for arm in arms} if drawn and drawn.paired else {}
    found = []
    for arm, group in arms.items():
        last = [run.evaluations[-1] for run in group]
        costs = [run.cost(row) for run, row in zip(group, last, strict=True)]
        row = {
            "arm": arm,
            "seeds": len(group),
            "updates": last[0]["step"],
            "prefix": mean(run.result["prefix"] for run in group),
            "accuracy": mean(e["accuracy"] and e["accuracy"]["value"] for e in last),
            "low": None,
            "high": None,
            "answers": sum(e["accuracy"]["n"] for e in last) if last[0]["accuracy"] else 0,
            "before": mean(
                run.evaluations[0]["accuracy"] and run.evaluations[0]["accuracy"]["value"]
                for run in group
            ),
            "kl": mean(e["kl"]["value"] for e in last),
            "kl_tail_before": mean(
                split_mean(run.kl_before, run.result["prefix"])[1] for run in group
            ),
            "kl_tail": mean(split_mean(run.kl_after, run.result["prefix"])[1] for run in group),
            "kl_beyond": mean(split_mean(run.kl_after, tail)[1] for run in group),
            "finish_rate": mean(e["finish_rate"] for e in last),
            "mean_tokens": mean(e["mean_tokens"] for e in last),
            "flops_useful": mean(c[0] for c in costs),
            "flops_executed": mean(c[1] for c in costs),
            "seconds": mean(c[2] for c in costs),
            "full_rollout_cost": mean(run.result["full_rollout_cost"] for run in group),
            "also": {
                name: mean(run.also[name]["accuracy"]["value"] for run in group)
                for name in group[0].also
            },
            "cost_ratios": {},
        }
        if arm not in curves and len(group) == 1 and last[0]["accuracy"]:
            row["low"], row["high"] = (last[0]["accuracy"][end] for end in ("low", "high"))
        if arm in curves:
            row["low"], row["high"] = interval(curves[arm][2][:, -1])
            if reference is not None:
                row["cost_ratios"] = {
                    share: _ratio(curves[reference], curves[arm], share) for share in SHARES
                }
                row["difference"] = row["accuracy"] - curves[reference][1][-1].item()
                row["difference_low"], row["difference_high"] = interval(
                    curves[arm][2][:, -1] - curves[reference][2][:, -1]
                )
        found.append(row)
    return found


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean, or None if a value is missing."""
    known: list[float] = []
    for value in values:
        if value is None:
            return None
        known.append(value)
    return math.fsum(known) / len(known)


def _ratio(reference: Curve, arm: Curve, share: float) -> dict:
    def one(
        ref_accuracy: list[float], ref_cost: list[float], accuracy: list[float], cost: list[float]
    ) -> float:
        wanted = ref_accuracy[0] + share * (ref_accuracy[-1] - ref_accuracy[0])
        own = first_cost(cost, accuracy, wanted)
        return first_cost(ref_cost, ref_accuracy, wanted) / own if 0 < own < math.inf else 0.0

    _, ref, ref_draws, ref_cost, ref_cost_draws = reference
    _, own, own_draws, own_cost, own_cost_draws = arm
    paired = zip(
        ref_draws.tolist(),
        ref_cost_draws.tolist(),
        own_draws.tolist(),
        own_cost_draws.tolist(),
        strict=True,
    )
    # float32 reproduces the numbers of earlier reports
    draws = numpy.array([one(*lists) for lists in paired], dtype=numpy.float32)
    low, high = interval(draws)
    return {
        "value": one(ref.tolist(), ref_cost.tolist(), own.tolist(), own_cost.tolist()) or None,
        "low": low,
        "high": high,
        "reached": (draws > 0).mean().item(),
    }


HEADINGS = (
    "arm",
    "accuracy [95 %]",
    "useful FLOPs",
    "executed",
    "training time",
    "KL beyond its prefix, before → after",
    "end",
    "tokens",
    "useful FLOPs of the reference ÷ its own to reach half of the reference's gain",
    "90 % of it",
    "all of it",
)


def cells(row: dict) -> list[str]:
    """A summary row as text, under HEADINGS."""
    accuracy = (
        "–"
        if row["accuracy"] is None
        else f"{row['accuracy']:.1%}"
        + (f" [{row['low']:.1%}, {row['high']:.1%}]" if row["low"] is not None else "")
        + f" of {row['answers']:,}"
    )
    tail = (
        "–"
        if row["kl_tail"] is None or row["kl_tail_before"] is None
        else f"{row['kl_tail_before']:.3g} → {row['kl_tail']:.3g}"
    )
    return [
        row["arm"],
        accuracy,
        flops_text(row["flops_useful"]),
        flops_text(row["flops_executed"]),
        f"{row['seconds']:.0f} s",
        tail,
        f"{row['finish_rate']:.0%}",
        f"{row['mean_tokens']:.0f}",
        *(ratio_text(row["cost_ratios"].get(share)) for share in (0.5, 0.9, 1.0)),
    ]


def ratio_text(ratio: dict | None) -> str:
    """A cost ratio with its interval; what share of the draws reaches the accuracy at all where
    not every one does."""
    if ratio is None:
        return "–"
    reached = "" if ratio["reached"] == 1 else f", reached in {ratio['reached']:.0%} of draws"
    if ratio["value"] is None:
        return f"not reached ({ratio['reached']:.0%} of draws)"
    return f"{ratio['value']:.1f} × [{ratio['low']:.1f}, {ratio['high']:.1f}]{reached}"


def markdown(summary_rows: list[dict]) -> str:
    """The summary as a Markdown table."""

    def clean(text: str) -> str:
        return text.replace("|", "\\|").replace("\n", " ")

    lines = ["| " + " | ".join(HEADINGS) + " |", "|---|" + "--:|" * (len(HEADINGS) - 1)]
    return (
        "\n".join(
            lines + ["| " + " | ".join(map(clean, cells(row))) + " |" for row in summary_rows]
        )
        + "\n"
    )
