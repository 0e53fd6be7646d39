"""Lay out the curves of report.html as inline SVG: a panel per measure, with hover values."""

import dataclasses
import math
from collections.abc import Callable, Iterable

from .runs import StoredRun, by_arm

WIDTH, HEIGHT = 420, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 14, 34  # margins
POINTS = 80  # of a line; more steps are averaged in groups
TICKS = 4
SHOWN_ARMS = 8  # in a hover value
STYLES = 7  # line styles of the page
PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))

Values = dict[int, float]  # step → value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tick:
    at: float
    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """A line: its arm, the number of its style, its points as SVG, and dots for a short one."""

    arm: str
    style: int
    points: str
    dots: list[tuple[float, float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hover:
    """What a pointer at some steps shows: a strip, and the values of the arms there."""

    left: float
    width: float
    x: float
    title: str
    values: list[tuple[int, str]]  # style, text
    box: tuple[float, float, float]  # x, width, height of the box of the values


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
    """One picture. Lengths are in the units of its view box."""

    title: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[Line]
    hovers: list[Hover]


def short(value: float) -> str:
    """Return a number with three digits and a prefix: 1.25k, 340, 0.0123."""
    for size, prefix in PREFIXES:
        if abs(value) >= size:
            return f"{value / size:.3g}{prefix}"
    return f"{value:.3g}"


def make_panels(runs: list[StoredRun]) -> list[Panel]:
    """Return the panels of KL, gradient norm, length and accuracy; one without values is left out.

    Lines are means over the seeds of an arm, at the steps that all of its runs have.
    """
    measures: dict[str, Callable[[StoredRun], Values]] = {
        "training divergence (nats per token)": _training_divergence,
        "held-out reverse KL (nats per token)": _held_out_kl,
        "gradient norm": _gradient_norm,
        "length of full answers (tokens)": _lengths,
        "accuracy on held-out problems (%)": _accuracies,
    }
    panels = []
    for title, measure in measures.items():
        lines = {}
        for arm, group in by_arm(runs).items():
            lines[arm] = _mean_of([measure(run) for run in group])
        if any(lines.values()):
            panels.append(_panel(title, lines))
    return panels


def _training_divergence(run: StoredRun) -> Values:
    values = {}
    for row in run.metrics:
        for name, value in row.items():
            if name.startswith("loss/") and name.endswith("_nats") and value is not None:
                values[row["step"]] = value
                break
    return values


def _gradient_norm(run: StoredRun) -> Values:
    return {row["step"]: row["optimizer/gradient_norm"] for row in run.metrics}


def _held_out_kl(run: StoredRun) -> Values:
    return {row["step"]: row["kl"]["value"] for row in run.evaluations}


def _lengths(run: StoredRun) -> Values:
    return {row["step"]: row["mean_tokens"] for row in run.evaluations}


def _accuracies(run: StoredRun) -> Values:
    values = {}
    for row in run.evaluations:
        if row["accuracy"] is not None:
            values[row["step"]] = 100 * row["accuracy"]["value"]
    return values


def _mean_of(seeds: list[Values]) -> Values:
    """Return the mean at the steps that all seeds have, in groups of steps if they are many."""
    steps = sorted(set(seeds[0]).intersection(*seeds))
    size = max(1, math.ceil(len(steps) / POINTS))
    means = {}
    for start in range(0, len(steps), size):
        group = steps[start : start + size]
        numbers = [values[step] for step in group for values in seeds]
        if all(map(math.isfinite, numbers)):
            means[group[-1]] = math.fsum(numbers) / len(numbers)
    return means


def _ticks(low: float, high: float) -> list[float]:
    """Return about TICKS round numbers from ``low`` to ``high``."""
    rough = (high - low) / TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((1, 2, 2.5, 5, 10), key=lambda factor: abs(factor * power - rough)) * power
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def _range(values: Iterable[float]) -> tuple[float, float]:
    """Return a range with a width that holds the values; it starts at 0 if they are near it."""
    values = list(values)
    low, high = min(values), max(values)
    if low >= 0 and (low < high / 2 or high - low < high / 1000):
        low = 0.0
    if high <= low:
        high = low + 1
    return low, high + (high - low) / 25


def _panel(title: str, lines: dict[str, Values]) -> Panel:
    steps = sorted({step for values in lines.values() for step in values})
    low, high = _range(v for values in lines.values() for v in values.values())
    first, last = steps[0], max(steps[-1], steps[0] + 1)

    def x(step: float) -> float:
        return round(LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    drawn = []
    for i, (arm, values) in enumerate(lines.items()):
        points = [(x(step), y(value)) for step, value in values.items()]
        dots = points if len(points) <= POINTS // 4 else []
        text = " ".join(f"{a},{b}" for a, b in points)
        drawn.append(Line(arm=arm, style=i % STYLES, points=text, dots=dots))
    whole = [step for step in _ticks(first, last) if step == int(step)]
    return Panel(
        title=title,
        x_ticks=[Tick(at=x(step), text=short(step)) for step in whole],
        y_ticks=[Tick(at=y(value), text=short(value)) for value in _ticks(low, high)],
        lines=drawn,
        hovers=_hovers(lines, steps, x),
    )


def _hovers(lines: dict[str, Values], steps: list[int], x: Callable[[float], float]) -> list[Hover]:
    """Return a strip around every step with a value, each up to the middle between two steps."""
    hovers = []
    places = [x(step) for step in steps]
    for i, (step, at) in enumerate(zip(steps, places, strict=True)):
        left = LEFT if i == 0 else (places[i - 1] + at) / 2
        right = WIDTH - RIGHT if i == len(steps) - 1 else (at + places[i + 1]) / 2
        values: list[tuple[int, str]] = []
        for number, (arm, of_arm) in enumerate(lines.items()):
            if step in of_arm and len(values) < SHOWN_ARMS:
                values.append((number % STYLES, f"{short(of_arm[step])}  {arm[:18]}"))
        title = f"step {step:,}"
        longest = max(len(title), *(len(text) for _, text in values))
        width = 6.4 * longest + 28
        box = at + 8 if at + 8 + width < WIDTH else max(0.0, at - 8 - width)
        hovers.append(
            Hover(
                left=round(left, 1),
                width=round(right - left, 1),
                x=at,
                title=title,
                values=values,
                box=(round(box, 1), round(width, 1), 22 + 14 * len(values)),
            )
        )
    return hovers
