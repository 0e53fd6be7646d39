"""The commands probe, compare, report and demo."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from .. import config as configuration
from .. import display
from ..display import tell
from ..errors import UserError
from .app import app, finish, say, start_ranks
from .options import with_options
from .quiet import quiet_libraries


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
    from datetime import datetime

    from ..training.folder import RunFolder

    folder = RunFolder(Path(out or f"runs/demo-{datetime.now():%Y%m%d-%H%M%S}"))
    folder.refuse_if_used()
    quiet_libraries()
    from ..results.demo import demonstrate
    from ..training.session import train_in

    table, document = demonstrate(folder.path, seed, train_in)
    display.show(table)
    print(json.dumps(document))


@app.command()
@with_options(
    "models",
    "data",
    "rollout.samples",
    "rollout.max_new_tokens",
    "rollout.eos",
    "rollout.begin",
    "rollout.rows",
    "evaluate.answer_format",
    "runtime",
)
def probe(
    out: Annotated[str, typer.Option(help="Folder for probe.json and probe.png.")],
    problems: Annotated[
        int,
        typer.Option(help="Training prompts that are probed, from the first of the shuffled ones."),
    ] = 100,
    **flags: dict,
) -> None:
    """Before training: where the teacher disagrees, whether a prefix will do, and how long it
    should be."""
    from ..training.folder import RunFolder

    if problems < 1:
        raise UserError(
            f"--problems {problems}: expected at least 1 prompt; some tens give an accuracy worth "
            "looking at"
        )
    config = configuration.build(
        flags["flags"]
        | {
            "train.steps": 1,
            "train.batch_size": problems,
            "evaluate.problems": 0,
            "evaluate.kl_prompts": 1,
            "checkpoint.out": out,
        }
    )
    folder = RunFolder(Path(out))
    folder.refuse_if_used()
    start_ranks(config)
    quiet_libraries()
    from ..planning import probe as probing
    from ..planning.probe_tables import tabulate_probe
    from ..results import plots
    from ..training.prepare import prepare

    config, notes = probing.fit_to_data(config)
    prepared = prepare(config)
    for text in (
        notes + prepared.notes.lines + [f"warning: {text}" for text in prepared.notes.warnings]
    ):
        say(prepared, text)
    document = probing.probe(prepared, lambda text: say(prepared, text))
    if prepared.place.first:
        folder.create(configuration.as_dict(prepared.config))
        folder.write_json("probe.json", document)
        plots.draw_probe(document, Path(out) / "probe.png")
        display.show(*tabulate_probe(document))
        say(prepared, document["reason"])
    finish(prepared, document)


@app.command()
def compare(
    arms_file: Annotated[
        str,
        typer.Argument(
            metavar="ARMS.YAML", help="base, seeds, arms, reference, tune, also: see help recipes."
        ),
    ],
    out: Annotated[
        str, typer.Option(help="Folder of the comparison; a second call goes on in it.")
    ],
) -> None:
    """Run several arms × seeds from one file, one after another, and report accuracy against
    cost."""
    from ..results import compare as comparison
    from ..results.compare import read

    arms = read(arms_file)
    quiet_libraries()
    from ..training.session import train_in

    comparison.compare(arms, Path(out), train_in, tell)
    _report([Path(out)], arms.reference, Path(out), Path(arms_file).stem)


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
    """Tables, picture and one self-contained page from any set of run folders."""
    _report([Path(folder) for folder in folders], reference, Path(out), title)


def _report(folders: list[Path], reference: str | None, out: Path, title: str) -> None:
    from ..results import page, plots
    from ..results import summary as reporting
    from ..results.runs import by_arm, collect, write_csv
    from ..results.summary import HEADINGS

    runs = collect(folders)
    arms = by_arm(runs)
    if reference is not None and reference not in arms:
        raise UserError(f"--reference {reference}: no such arm; there are {', '.join(arms)}")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: it is a file; name a folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".partial").touch()
        (out / ".partial").unlink()
    except OSError as error:
        raise UserError(
            f"--out {out}: cannot be written ({error.strerror}); name another folder"
        ) from None
    rows = reporting.summary(runs, reference)
    write_csv(runs, out / "report.csv")
    (out / "report.md").write_text(reporting.markdown(rows), encoding="utf-8")
    (out / "report.html").write_text(page.page(runs, rows, reference, title), encoding="utf-8")
    (out / "report.png").write_bytes(plots.png(plots.draw_report(runs, title)))
    from rich.table import Table

    table = Table()
    for heading in HEADINGS:
        table.add_column(heading)
    for row in rows:
        table.add_row(*reporting.cells(row))
    display.show(table, width=None if sys.stderr.isatty() else 200)
    print(json.dumps({"out": str(out), "runs": len(runs), "reference": reference, "arms": rows}))
