"""Make one self-contained HTML page from run folders."""

import base64
import dataclasses
import math
from collections.abc import Sequence
from importlib.resources import files

from jinja2 import Environment, StrictUndefined

from .. import config as configuration
from ..display import flops_text
from ..errors import UserError
from ..maths.weights import QUADRANTS
from .cells import HEADINGS, cells
from .curves import HEIGHT, LEFT, POINTS, WIDTH, make_panels
from .plots import draw_report, encode_png
from .runs import AXES, StoredRun, as_text, by_arm
from .show import verdict
from .texts import Answer, read_texts

SAMPLES = 5  # problems of an arm whose answers are shown
SHOWN = 3_000  # characters of a text


def render_page(
    runs: list[StoredRun],
    summary_rows: list[dict],
    reference: str | None,
    title: str,
    warnings: Sequence[str] = (),
) -> str:
    """Return one self-contained HTML page: no scripts, no network access, all text escaped.

    ``warnings``: of the report, shown at the top.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    template = files(__package__).joinpath("report.html.jinja").read_text(encoding="utf-8")
    pictures = {}
    for against in AXES:
        picture = encode_png(draw_report(runs, against=against))
        pictures[against] = base64.b64encode(picture).decode()
    other_sets: set[str] = set()
    for row in summary_rows:
        other_sets.update(row["also"])
    measure = "Held-out KL"
    if all(run.right for run in runs):
        measure = "Accuracy"
    text = environment.from_string(template).render(
        title=title,
        measure=measure,
        runs=runs,
        summary=summary_rows,
        reference=reference,
        headings=HEADINGS,
        cells=cells,
        pictures=pictures,
        panels=make_panels(runs),
        width=WIDTH,
        height=HEIGHT,
        left=LEFT,
        most_points=POINTS,
        samples=_samples(runs),
        most_samples=SAMPLES,
        verdict=verdict,
        notices=[*_states(runs), *warnings],
        also=sorted(other_sets),
        quadrants=_quadrant_rows(runs),
        quadrant_names=QUADRANTS,
        extrapolations=_entries(runs, "extrapolations"),
        growth=_entries(runs, "prefix_decisions"),
        warnings=_entries(runs, "warnings"),
        flops_text=flops_text,
        settings=_settings,
    )
    return as_text(text)


def _states(runs: list[StoredRun]) -> list[str]:
    """Return a notice for every run that has not finished."""
    notices = []
    for run in runs:
        if run.state != "finished":
            step = run.evaluations[-1]["step"]
            notices.append(f"{run.path} is {run.state}: its numbers end after step {step}")
    return notices


def _samples(runs: list[StoredRun]) -> dict[str, list[dict]]:
    """Return the first and the newest answer to SAMPLES problems, of the first run of each arm."""
    samples = {}
    for arm, group in by_arm(runs).items():
        try:
            problems = read_texts(group[0].path).problems[:SAMPLES]
        except UserError:
            continue  # a run of an earlier version stores no texts
        rows = []
        for problem in problems:
            first = problem.answers[min(problem.answers)]
            row = {"prompt": problem.prompt[:SHOWN], "reference": problem.gold}
            rows.append(row | {"before": _shorten(first), "after": _shorten(problem.last)})
        if rows:
            samples[arm] = rows
    return samples


def _shorten(answer: Answer) -> Answer:
    """Return an answer of at most SHOWN characters."""
    if len(answer.text) <= SHOWN:
        return answer
    return dataclasses.replace(answer, text=f"{answer.text[:SHOWN]} …")


def _entries(runs: list[StoredRun], key: str) -> list[tuple[StoredRun, dict]]:
    """Return the entries of a list in the runs' results, each with its run."""
    entries = []
    for run in runs:
        for entry in run.result.get(key, []):
            entries.append((run, entry))
    return entries


def _quadrant_rows(runs: list[StoredRun]) -> dict[str, list[str]]:
    """Return the cells of each arm whose evaluations all have quadrants."""
    rows = {}
    for arm, group in by_arm(runs).items():
        if all(map(_has_quadrants, group)):
            rows[arm] = [_quadrant_cell(group, name) for name in QUADRANTS]
    return rows


def _has_quadrants(run: StoredRun) -> bool:
    return all("quadrants" in row for row in run.evaluations)


def _quadrant_cell(group: list[StoredRun], name: str) -> str:
    """Return a quadrant's shares of the tokens and of the divergence, before → after."""
    texts = []
    for evaluation in (0, -1):
        tokens = []
        divergences = []
        for run in group:
            share = run.evaluations[evaluation]["quadrants"]["quadrants"][name]
            tokens.append(share["tokens"])
            divergences.append(share["divergence"])
        texts.append(f"{_mean(tokens):.0%} / {_mean(divergences):.0%}")
    return " → ".join(texts)


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def _settings(run: StoredRun) -> str:
    """Return the settings of a run that differ from the defaults."""
    defaults = configuration.as_dict(configuration.Config())
    texts = []
    for section, values in run.config.items():
        for key, value in values.items():
            if value != defaults.get(section, {}).get(key) and key != "out":
                texts.append(f"{section}.{key}={value}")
    return ", ".join(texts)
