"""Draw every plot."""

import io
import math
from collections.abc import Container
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .runs import AGAINST, Finished, by_arm
from .summary import Resampled, interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DEMO_COLOURS = {"prefix": "#0072B2", "full": "#D55E00"}  # Okabe and Ito's, distinct to every eye
# likewise
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000")


def draw_quadrants(axes: "Axes", found: dict) -> None:
    """The four quadrants as shares of the tokens and of the divergence."""
    borders = found["borders"]
    for name, share in found["quadrants"].items():
        x, y = ("high divergence" in name), name.startswith("high")
        axes.text(
            x + 0.5,
            y + 0.5,
            f"{share['tokens']:.0%} of tokens\n{share['divergence']:.0%} of KL",
            ha="center",
            va="center",
            fontsize=8,
        )
    axes.axhline(1, color="black", linewidth=0.8)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(
        xlim=(0, 2),
        ylim=(0, 2),
        xticks=(0.5, 1.5),
        yticks=(0.5, 1.5),
        xlabel=f"reverse KL (border {borders[1]:.2g} nats)",
        ylabel=f"entropy (border {borders[0]:.2g} nats)",
    )
    axes.set_xticklabels(("low", "high"))
    axes.set_yticklabels(("low", "high"), rotation=90, va="center")


def draw_probe(document: dict, file: Path) -> None:
    """KL and entropy by position, and both curves, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right, corner) = pyplot.subplots(
        1, 3, figsize=(13, 4), dpi=150, width_ratios=(5, 5, 3)
    )
    bins = document["by_position"]
    middle = [(b["from"] + b["to"]) / 2 for b in bins]
    left.plot(
        middle, [b["kl"] for b in bins], "o-", markersize=3, color="#0072B2", label="reverse KL"
    )
    left.plot(
        middle,
        [b["entropy"] for b in bins],
        "s--",
        markersize=3,
        color="#D55E00",
        label="student's entropy",
    )
    left.set_xlabel("position in the student's answer (tokens)")
    left.set_ylabel("nats per token")
    for curve, label, style, colour in (
        ("teacher_prefix_curve", "student, after the teacher's first N tokens", "o-", "#0072B2"),
        ("teacher_decay_curve", "teacher, after the student's first N tokens", "s--", "#D55E00"),
    ):
        rows = [row for row in document[curve] if row is not None]
        x, y = [row["tokens"] for row in rows], [100 * row["value"] for row in rows]
        right.errorbar(
            x,
            y,
            [
                [100 * (row["value"] - row["low"]) for row in rows],
                [100 * (row["high"] - row["value"]) for row in rows],
            ],
            fmt=style,
            color=colour,
            markersize=4,
            capsize=2,
            label=label,
        )
    right.set_xlabel("N, tokens the other model writes first")
    right.set_ylabel("accuracy (%)")
    right.set_ylim(0, 105)
    draw_quadrants(corner, document["quadrants"])
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle(f"recommended prefix: {document['recommended_prefix']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(file)
    pyplot.close(figure)


def draw_demo(arms: list[dict], teacher: float, title: str, file: Path) -> None:
    """Accuracy against useful FLOPs, one line per arm with 95 % intervals, the teacher as a
    level."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), dpi=150)
    axes.axhline(100 * teacher, color="#555555", linestyle=":", linewidth=1)
    axes.text(
        1,
        100 * teacher + 1,
        "teacher",
        transform=axes.get_yaxis_transform(),
        ha="right",
        va="bottom",
        color="#555555",
    )
    for arm in arms:
        colour = DEMO_COLOURS[arm["name"]]
        x = [row["flops_useful"] / 1e9 for row in arm["evaluations"]]
        y, low, high = (
            [100 * row["accuracy"][key] for row in arm["evaluations"]]
            for key in ("value", "low", "high")
        )
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(
            x,
            y,
            marker="o" if arm["name"] == "prefix" else "s",
            color=colour,
            linestyle="-" if arm["name"] == "prefix" else "--",
            label=f"{arm['name']} rollouts"
            if arm["name"] == "full"
            else f"prefix of {arm['prefix']} tokens",
        )
    axes.set_xlabel("useful training FLOPs (billions)")
    axes.set_ylabel("accuracy on held-out problems (%)")
    axes.set_title(title, fontsize=10)
    axes.set_ylim(0, 106)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False)
    figure.tight_layout()
    figure.savefig(file)
    pyplot.close(figure)


def _means(rows: list[list[float]]) -> list[float]:
    """Return the mean of each column, over seeds."""
    # strict=False: a resumed run may be longer than the other seeds; use the common length
    return [math.fsum(column) / len(column) for column in zip(*rows, strict=False)]


def draw_report(
    runs: list[Finished],
    title: str = "",
    only: Container[str] | None = None,
    against: str = AGAINST[0],
) -> "Figure":
    """Accuracy (or, without answers, held-out KL) against a cost: a matplotlib figure, a line an
    arm, means over seeds with 95 % intervals where they can be drawn."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    arms = {arm: group for arm, group in by_arm(runs).items() if only is None or arm in only}
    graded = all(run.right for group in arms.values() for run in group)
    drawn = Resampled(arms) if graded else None
    figure, axes = pyplot.subplots(figsize=(8, 4.8), dpi=150)
    for i, (arm, group) in enumerate(arms.items()):
        style: dict[str, Any] = {
            "color": COLOURS[i % len(COLOURS)],
            "marker": "os^vD<>ph*X"[i % 11],
            "linestyle": ("-", "--", "-.", ":")[i % 4],
            "markersize": 4,
            "linewidth": 1.3,
        }
        x = _means([run.spent(against) for run in group])
        if drawn is not None and drawn.paired:
            _, mean, draws, _, _ = drawn.curve(arm)
            ends = [interval(draws[:, e]) for e in range(draws.shape[1])]
            axes.fill_between(
                x,
                [100 * low for low, _ in ends],
                [100 * high for _, high in ends],
                color=style["color"],
                alpha=0.12,
                linewidth=0,
            )
            axes.plot(x, 100 * mean, label=arm, **style)
            continue
        if graded:
            y = [[100 * e["accuracy"]["value"] for e in run.evaluations] for run in group]
        else:
            y = [[e["kl"]["value"] for e in run.evaluations] for run in group]
        axes.plot(x, _means(y), label=arm, **style)
    axes.set_xlabel(against)
    axes.set_ylabel(
        "accuracy on held-out problems (%)" if graded else "held-out reverse KL (nats per token)"
    )
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=7, ncol=2)
    figure.tight_layout()
    return figure


def png(figure: "Figure") -> bytes:
    """A figure as PNG; the figure is closed."""
    from matplotlib import pyplot

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    pyplot.close(figure)
    return buffer.getvalue()
