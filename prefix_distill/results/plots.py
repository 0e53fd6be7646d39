"""Draw every plot."""

import io
import math
from collections.abc import Container, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from .runs import AXES, Finished, as_text, by_arm, common_steps
from .summary import Numbers, Resampled, interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers can tell apart
BLUE = "#0072B2"
ORANGE = "#D55E00"
GREY = "#555555"
COLOURS = (BLUE, ORANGE, "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000")
MARKERS = "os^vD<>ph*X"
LINE_STYLES = ("-", "--", "-.", ":")
DEMO_STYLES: dict[str, dict[str, Any]] = {
    "prefix": {"color": BLUE, "marker": "o", "linestyle": "-"},
    "full": {"color": ORANGE, "marker": "s", "linestyle": "--"},
}


def _subplots(width: float, height: float, **layout: Any) -> tuple["Figure", Any]:
    """Return a figure of so many inches and its axes; no display is needed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(width, height), dpi=150, **layout)


def _open_frame(axes: "Axes") -> None:
    """Remove the top and the right line of the frame."""
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: "Figure", file: Path) -> None:
    """Save a figure as PNG and close it."""
    from matplotlib import pyplot

    figure.tight_layout()
    figure.savefig(file)
    pyplot.close(figure)


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


def draw_probe(document: dict, file: Path) -> None:
    """Save a probe as PNG: KL and entropy by position, both accuracy curves, the quadrants."""
    figure, (left, right, corner) = _subplots(13, 4, ncols=3, width_ratios=(5, 5, 3))
    bins = document["by_position"]
    middle = (_column(bins, "from") + _column(bins, "to")) / 2
    divergence = _column(bins, "kl")
    entropy = _column(bins, "entropy")
    left.plot(middle, divergence, "o-", color=BLUE, markersize=3, label="reverse KL")
    left.plot(middle, entropy, "s--", color=ORANGE, markersize=3, label="student's entropy")
    left.set_xlabel("position in the student's answer (tokens)")
    left.set_ylabel("nats per token")
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
    draw_quadrants(corner, document["quadrants"])
    for axes in (left, right):
        _open_frame(axes)
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle(f"recommended prefix: {document['recommended_prefix']}", fontsize=10)
    _save(figure, file)


def _draw_accuracies(axes: "Axes", curve: list[dict | None], style: dict[str, Any]) -> None:
    """Draw one accuracy curve of a probe with its intervals."""
    points = [point for point in curve if point is not None]
    tokens = _column(points, "tokens")
    value = _column(points, "value")
    below = 100 * (value - _column(points, "low"))
    above = 100 * (_column(points, "high") - value)
    axes.errorbar(tokens, 100 * value, (below, above), markersize=4, capsize=2, **style)


def _column(rows: Sequence[dict], key: str) -> numpy.ndarray:
    """Return the numbers under a key, row by row."""
    return numpy.array([row[key] for row in rows], dtype=numpy.float64)


def draw_demo(arms: list[dict], teacher: float, title: str, file: Path) -> None:
    """Save the demo's picture as PNG: accuracy against useful FLOPs, a line per arm.

    The bands are 95% intervals; a dotted line is the teacher's accuracy.
    """
    figure, axes = _subplots(7, 4.2)
    level = 100 * teacher
    right_edge = axes.get_yaxis_transform()  # x from 0 to 1, y as data
    axes.axhline(level, color=GREY, linestyle=":", linewidth=1)
    axes.text(1, level + 1, "teacher", transform=right_edge, ha="right", va="bottom", color=GREY)
    for arm in arms:
        style = DEMO_STYLES[arm["name"]]
        label = f"prefix of {arm['prefix']} tokens"
        if arm["name"] == "full":
            label = "full rollouts"
        flops = _column(arm["evaluations"], "flops_useful") / 1e9
        accuracies = [row["accuracy"] for row in arm["evaluations"]]
        value = 100 * _column(accuracies, "value")
        low = 100 * _column(accuracies, "low")
        high = 100 * _column(accuracies, "high")
        axes.fill_between(flops, low, high, color=style["color"], alpha=0.15, linewidth=0)
        axes.plot(flops, value, label=label, **style)
    axes.set_xlabel("useful training FLOPs (billions)")
    axes.set_ylabel("accuracy on held-out problems (%)")
    axes.set_title(title, fontsize=10)
    axes.set_ylim(0, 106)
    _open_frame(axes)
    axes.legend(loc="lower right", frameon=False)
    _save(figure, file)


def draw_report(
    runs: list[Finished],
    title: str = "",
    only: Container[str] | None = None,
    against: str = AXES[0],
) -> "Figure":
    """Return a matplotlib figure: accuracy against a cost, a line per arm, means over its seeds.

    ``only``: the arms to draw (default: all). Bands are 95% intervals; they need the same problems
    and seeds in all arms. Without graded answers the figure shows held-out KL.
    """
    if only is not None:
        runs = [run for run in runs if run.arm in only]
    arms = by_arm(runs)
    graded = all(run.right for run in runs)
    resampled = None
    heights = _divergences
    label = "held-out reverse KL (nats per token)"
    if graded:
        resampled = Resampled(arms)
        heights = _accuracies
        label = "accuracy on held-out problems (%)"
    figure, axes = _subplots(8, 4.8)
    for i, (arm, group) in enumerate(arms.items()):
        steps = common_steps(group)
        x = _means(steps, [run.spent(against) for run in group])
        y = _means(steps, [heights(run) for run in group])
        colour = COLOURS[i % len(COLOURS)]
        if resampled is not None and resampled.paired:
            curve = resampled.curve(arm)
            y = (100 * curve.accuracy).tolist()
            _draw_band(axes, x, curve.accuracy_draws, colour=colour)
        axes.plot(
            x,
            y,
            color=colour,
            marker=MARKERS[i % len(MARKERS)],
            linestyle=LINE_STYLES[i % len(LINE_STYLES)],
            markersize=4,
            linewidth=1.3,
        )
    axes.set_xlabel(against)
    axes.set_ylabel(label)
    axes.set_title(_escape(title), fontsize=10)
    _open_frame(axes)
    # the names are given, because matplotlib hides a label that starts with "_"
    axes.legend(axes.get_lines(), map(_escape, arms), frameon=False, fontsize=7, ncol=2)
    figure.tight_layout()
    return figure


def _accuracies(run: Finished) -> dict[int, float]:
    """Return the accuracy in percent of every evaluation, by its step."""
    accuracies = {}
    for row in run.evaluations:
        accuracy = row["accuracy"]
        if accuracy is not None:
            accuracies[row["step"]] = 100 * accuracy["value"]
    return accuracies


def _divergences(run: Finished) -> dict[int, float]:
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


def _draw_band(axes: "Axes", x: list[float], accuracy_draws: Numbers, colour: str) -> None:
    """Draw the 95% interval of an accuracy around its line."""
    low = []
    high = []
    for draws in accuracy_draws.T:
        lower, upper = interval(draws)
        low.append(100 * lower)
        high.append(100 * upper)
    axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)


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
