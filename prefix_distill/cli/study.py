"""The commands probe, compare, report and demo."""

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from .. import display
from ..api import settings
from ..api.arguments import read_folder, read_folders
from .app import Terminal, app, finish, note, show
from .options import with_options


@app.command()
def demo(
    out: Annotated[
        str | None,
        typer.Option(help="Folder for runs and picture.", show_default="runs/demo-<time>"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of prompts, rollouts and evaluation.")] = 0,
) -> None:
    """Three minutes, offline: distil the embedded pair with a prefix and with full rollouts,
    side by side."""
    from ..api import work

    folder = Path(f"runs/demo-{datetime.now():%Y%m%d-%H%M%S}")
    if out is not None:
        folder = read_folder("--out", out)
    table, document = work.demonstrate(folder, seed, Terminal())
    display.print_tables(table)
    finish(document)


@app.command()
@with_options(*settings.PROBE_OPTIONS)
def probe(
    out: Annotated[str, typer.Option(help="Folder for probe.json and probe.png.")],
    problems: Annotated[
        int, typer.Option(help="Training prompts to probe, the first of the shuffled dataset.")
    ] = 100,
    **flags: dict,
) -> None:
    """Before training: measure where the teacher disagrees, and recommend a prefix length."""
    from ..api import work

    result = work.probe(settings.probe_config(flags["flags"], out, problems), Terminal())
    show(result, width=200)
    note(result.reason)
    finish(result.to_dict())


@app.command()
def compare(
    arms_file: Annotated[
        str,
        typer.Argument(
            metavar="ARMS.YAML", help="base, seeds, arms, reference, tune, also: see the README."
        ),
    ],
    out: Annotated[str, typer.Option(help="Folder of the comparison; a second call continues it.")],
) -> None:
    """Run several arms × seeds from one file, one after another, and report accuracy against
    cost."""
    from ..api import work

    result = work.compare(arms_file, read_folder("--out", out), Terminal())
    show(result, width=200)
    finish(result.to_dict())


@app.command()
def report(
    folders: Annotated[
        list[str],
        typer.Argument(metavar="FOLDER...", help="Run folders, or folders that hold them."),
    ],
    out: Annotated[
        str, typer.Option(help="Folder for report.html, report.md, report.csv and report.png.")
    ],
    reference: Annotated[
        str | None, typer.Option(help="Arm whose accuracy the others have to reach.")
    ] = None,
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "Prefix distillation",
) -> None:
    """Write tables, a picture and a self-contained page about any set of run folders."""
    from ..api import work

    result = work.report(
        read_folders("FOLDER", folders), read_folder("--out", out), reference, title
    )
    show(result, width=200)
    finish(result.to_dict())
