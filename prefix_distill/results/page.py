"""One self-contained HTML page from run folders."""

import base64
import math
from importlib.resources import files

from jinja2 import Environment, StrictUndefined

from ..display import flops_text
from ..maths.weights import QUADRANTS
from .plots import draw_report, png
from .runs import AGAINST, Finished, by_arm
from .summary import HEADINGS, cells


def page(runs: list[Finished], summary_rows: list[dict], reference: str | None, title: str) -> str:
    """Return one self-contained HTML page: no script, no network, every text escaped."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    template = files(__package__).joinpath("report.html.jinja").read_text(encoding="utf-8")

    def facts(key: str) -> list[tuple[Finished, dict]]:
        return [(run, fact) for run in runs for fact in run.result.get(key, [])]

    def picture(against: str) -> str:
        return base64.b64encode(png(draw_report(runs, title, against=against))).decode()

    def has_quadrants(group: list[Finished]) -> bool:
        return all("quadrants" in row for run in group for row in run.evaluations)

    return environment.from_string(template).render(
        title=title,
        runs=runs,
        summary=summary_rows,
        reference=reference,
        headings=HEADINGS,
        cells=cells,
        pictures={against: picture(against) for against in AGAINST},
        also=sorted({name for row in summary_rows for name in row["also"]}),
        quadrants={arm: group for arm, group in by_arm(runs).items() if has_quadrants(group)},
        quadrant_names=QUADRANTS,
        quadrant_cells=quadrant_cells,
        extrapolations=facts("extrapolations"),
        growth=facts("prefix_decisions"),
        warnings=facts("warnings"),
        flops_text=flops_text,
        settings=_settings,
    )


def quadrant_cells(group: list[Finished]) -> list[str]:
    """The quadrants of an arm's fixed contexts before and after, means over seeds, under
    QUADRANTS."""

    def mean(place: int, name: str, key: str) -> float:
        return math.fsum(
            run.evaluations[place]["quadrants"]["quadrants"][name][key] for run in group
        ) / len(group)

    return [
        " → ".join(
            f"{mean(place, name, 'tokens'):.0%} / {mean(place, name, 'divergence'):.0%}"
            for place in (0, -1)
        )
        for name in QUADRANTS
    ]


def _settings(run: Finished) -> str:
    """What differs from the defaults."""
    from .. import config as configuration

    defaults = configuration.as_dict(configuration.Config())
    return ", ".join(
        f"{section}.{key}={value}"
        for section, keys in run.config.items()
        for key, value in keys.items()
        if value != defaults.get(section, {}).get(key) and key != "out"
    )
