"""Draw every plot."""

import contextlib
import io
import math
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from .cells import recommendation_text
from .runs import AXES, StoredRun, as_text, by_arm, common_steps
from .summary import Curve, Resampled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Okabe and Ito's colors, which color-blind readers can tell apart
BLUE = "#0072B2"
ORANGE = "#D55E00"
GREY = "#555555"
COLORS = (BLUE, ORANGE, "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000")
MARKERS = "os^vD<>ph*X"
LINE_STYLES = ("-", "--", "-.", ":")
DEMO_STYLES: dict[str, dict[str, Any]] = {
    "prefix": {"color": BLUE, "marker": "o", "linestyle": "-"},
    "full": {"color": ORANGE, "marker": "s", "linestyle": "--"},
}


# of every picture
STYLE: Any = {
    "figure.dpi": 150,
    "savefig.dpi": 150,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e5e7eb",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "errorbar.capsize": 2,
}
MINUTE, HOUR = 60, 3600  # seconds
LONGEST = 120  # of a unit of time on an axis; more are shown in the next unit


@contextlib.contextmanager
def _style() -> Iterator[None]:
    """Draw in the common style; no display is needed."""
    import matplotlib

    matplotlib.use("Agg")
    with matplotlib.rc_context(STYLE):
        yield


def _save(figure: "Figure", file: Path) -> None:
    """Save a figure as PNG and close it."""
    from matplotlib import pyplot

    figure.tight_layout()
    figure.savefig(file)
    pyplot.close(figure)


def _count(axis: "Axis", unit: str = "") -> None:
    """Write the numbers of an axis with a prefix: 2k, or with a unit 2.5 GFLOP."""
    from matplotlib.ticker import EngFormatter

    axis.set_major_formatter(EngFormatter(unit=unit, sep=" " if unit else ""))


def _time_unit(seconds: float) -> tuple[str, int]:
    """Return the unit of an axis that ends at ``seconds``, and its length in seconds."""
    if seconds > LONGEST * MINUTE:
        return "hours", HOUR
    if seconds > LONGEST:
        return "minutes", MINUTE
    return "seconds", 1


def draw_quadrants(axes: "Axes", quadrants: dict) -> None:
    """Draw the four quadrants with their shares of the tokens and of the divergence."""
    entropy, divergence = quadrants["borders"]
    for name, share in quadrants["quadrants"].items():
        x = 0.5
        y = 0.5
        if "high divergence" in name:
            x = 1.5
        if name.startswith("high"):
            y = 1.5
        text = f"{share['tokens']:.0%} of tokens\n{share['divergence']:.0%} of KL"
        axes.text(x, y, text, ha="center", va="center", fontsize=8)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(
        xlim=(0, 2),
        ylim=(0, 2),
        xticks=(0.5, 1.5),
        yticks=(0.5, 1.5),
        xlabel=f"reverse KL (border {divergence:.2g} nats)",
        ylabel=f"entropy (border {entropy:.2g} nats)",
    )
    axes.set_xticklabels(("low", "high"))
    axes.set_yticklabels(("low", "high"), rotation=90, va="center")
    axes.grid(visible=False)


@_style()
def draw_probe(document: dict, file: Path) -> None:
    """Save a probe as PNG: KL and entropy by position, both accuracy curves, the quadrants.

    KL and entropy have an axis of their own each, because the KL is often far smaller.
    """
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(13, 4.4))
    grid = figure.add_gridspec(2, 3, width_ratios=(5, 5, 3))
    upper = figure.add_subplot(grid[0, 0])
    lower = figure.add_subplot(grid[1, 0], sharex=upper)
    right, corner = figure.add_subplot(grid[:, 1]), figure.add_subplot(grid[:, 2])
    bins = document["by_position"]
    middle = (_column(bins, "from") + _column(bins, "to")) / 2
    upper.plot(middle, _column(bins, "kl"), "o-", color=BLUE)
    upper.set_ylabel("reverse KL\n(nats per token)")
    upper.tick_params(labelbottom=False)
    lower.plot(middle, _column(bins, "entropy"), "s--", color=ORANGE)
    lower.set_ylabel("student's entropy\n(nats per token)")
    lower.set_xlabel("position in the student's answer (tokens)")
    for axes in (upper, lower):
        axes.set_ylim(bottom=0)
    _count(lower.xaxis)
    _draw_accuracies(
        right,
        document["teacher_prefix_curve"],
        {"label": "student, after the teacher's first N tokens", "fmt": "o-", "color": BLUE},
    )
    _draw_accuracies(
        right,
        document["teacher_decay_curve"],
        {"label": "teacher, after the student's first N tokens", "fmt": "s--", "color": ORANGE},
    )
    right.set_xlabel("N, tokens written by the other model")
    right.set_ylabel("accuracy (%)")
    right.set_ylim(0, 105)
    _count(right.xaxis)
    # above the axes, because the curves and their intervals may be anywhere inside
    right.legend(loc="lower left", bbox_to_anchor=(0, 1))
    draw_quadrants(corner, document["quadrants"])
    figure.suptitle(recommendation_text(document["recommended_prefix"]), fontsize=10)
    _save(figure, file)


def _draw_accuracies(axes: "Axes", curve: list[dict | None], style: dict[str, Any]) -> None:
    """Draw one accuracy curve of a probe with its intervals."""
    points = [point for point in curve if point is not None]
    tokens = _column(points, "tokens")
    value = _column(points, "value")
    below = 100 * (value - _column(points, "low"))
    above = 100 * (_column(points, "high") - value)
    axes.errorbar(tokens, 100 * value, (below, above), **style)


def _column(rows: Sequence[dict], key: str) -> numpy.ndarray:
    """Return the numbers under a key, row by row."""
    return numpy.array([row[key] for row in rows], dtype=numpy.float64)


@_style()
def draw_demo(arms: list[dict], teacher: float, title: str, file: Path) -> None:
    """Save the demo's picture as PNG: accuracy against useful FLOPs, a line per arm.

    The bands are 95% intervals; a dotted line is the teacher's accuracy.
    """
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    level = 100 * teacher
    right_edge = axes.get_yaxis_transform()  # x from 0 to 1, y as data
    axes.axhline(level, color=GREY, linestyle=":", linewidth=1)
    axes.text(1, level + 1, "teacher", transform=right_edge, ha="right", va="bottom", color=GREY)
    for arm in arms:
        style = DEMO_STYLES[arm["name"]]
        label = f"prefix of {arm['prefix']} tokens"
        if arm["name"] == "full":
            label = "full rollouts"
        flops = _column(arm["evaluations"], "flops_useful")
        accuracies = [row["accuracy"] for row in arm["evaluations"]]
        value = 100 * _column(accuracies, "value")
        low = 100 * _column(accuracies, "low")
        high = 100 * _column(accuracies, "high")
        axes.fill_between(flops, low, high, color=style["color"], alpha=0.15, linewidth=0)
        axes.plot(flops, value, label=label, **style)
    axes.set_xlabel("useful training FLOPs")
    _count(axes.xaxis, "FLOP")
    axes.set_ylabel("accuracy on held-out problems (%)")
    axes.set_title(title)
    axes.set_ylim(0, 106)
    axes.legend(loc="lower right")
    _save(figure, file)


@_style()
def draw_report(
    runs: list[StoredRun],
    title: str = "",
    only: Container[str] | None = None,
    against: str = AXES[0],
) -> "Figure":
    """Return a matplotlib figure: accuracy against a cost, a line per arm, means over its seeds.

    ``only``: the arms to draw (default: all). Bands are 95% intervals; they need the same problems
    in all runs of an arm. Without graded answers the figure shows held-out KL.
    """
    from matplotlib import pyplot

    if only is not None:
        runs = [run for run in runs if run.arm in only]
    arms = by_arm(runs)
    graded = all(run.right for run in runs)
    heights = _divergences
    label = "held-out reverse KL (nats per token)"
    if graded:
        heights = _accuracies
        label = "accuracy on held-out problems (%)"
    figure, axes = pyplot.subplots(figsize=(8, 4.8))
    for i, (arm, group) in enumerate(arms.items()):
        steps = common_steps(group)
        x = _means(steps, [run.spent(against) for run in group])
        y = _means(steps, [heights(run) for run in group])
        color = COLORS[i % len(COLORS)]
        resampled = Resampled({arm: group})
        if graded and resampled.paired:
            curve = resampled.curve(arm)
            y = (100 * curve.accuracy).tolist()
            _draw_band(axes, x, curve, color=color)
        axes.plot(
            x,
            y,
            color=color,
            marker=MARKERS[i % len(MARKERS)],
            linestyle=LINE_STYLES[i % len(LINE_STYLES)],
        )
    _name_cost(axes, against)
    axes.set_ylabel(label)
    axes.set_title(_escape(title))
    # the names are given, because matplotlib hides a label that starts with "_"
    axes.legend(axes.get_lines(), map(_escape, arms), fontsize=7, ncol=2)
    figure.tight_layout()
    return figure


def _name_cost(axes: "Axes", against: str) -> None:
    """Name the horizontal axis of a cost, and write its numbers with readable units."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_xlabel(against)
    if "FLOPs" in against:
        _count(axes.xaxis, "FLOP")
    elif "time" in against:
        unit, size = _time_unit(axes.get_xlim()[1])
        axes.set_xlabel(f"training time ({unit})")

        def in_unit(seconds: float, _: object) -> str:
            return f"{seconds / size:.4g}"

        steps = [1, 2, 5, 10] if size == 1 else [1, 1.2, 1.8, 3, 6, 10]  # multiples of 60
        axes.xaxis.set_major_locator(MaxNLocator(steps=steps))
        axes.xaxis.set_major_formatter(FuncFormatter(in_unit))
    else:
        _count(axes.xaxis)


def _accuracies(run: StoredRun) -> dict[int, float]:
    """Return the accuracy in percent of every evaluation, by its step."""
    accuracies = {}
    for row in run.evaluations:
        accuracy = row["accuracy"]
        if accuracy is not None:
            accuracies[row["step"]] = 100 * accuracy["value"]
    return accuracies


def _divergences(run: StoredRun) -> dict[int, float]:
    """Return the held-out KL of every evaluation, by its step."""
    divergences = {}
    for row in run.evaluations:
        divergences[row["step"]] = row["kl"]["value"]
    return divergences


def _means(steps: list[int], seeds: list[dict[int, float]]) -> list[float]:
    """Return the mean over seeds at each of ``steps``."""
    means = []
    for step in steps:
        total = math.fsum(values[step] for values in seeds)
        means.append(total / len(seeds))
    return means


def _draw_band(axes: "Axes", x: list[float], curve: Curve, color: str) -> None:
    """Draw the 95% interval of an accuracy around its line."""
    low = []
    high = []
    for evaluation in range(len(curve.steps)):
        lower, upper = curve.interval(evaluation)
        low.append(100 * lower)
        high.append(100 * upper)
    axes.fill_between(x, low, high, color=color, alpha=0.12, linewidth=0)


def _escape(text: str) -> str:
    """Escape $ signs, because matplotlib draws text between two of them as a formula."""
    return as_text(text).replace("$", r"\$")


def encode_png(figure: "Figure") -> bytes:
    """Return a figure as PNG and close it."""
    from matplotlib import pyplot

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    pyplot.close(figure)
    return buffer.getvalue()
