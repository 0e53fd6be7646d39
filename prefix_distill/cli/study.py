"""The commands probe, compare, report and demo."""

from typing import Annotated

import typer

from ..api import settings
from ..api.arguments import read_folders
from .app import Terminal, app, finish, show, show_tables
from .options import Wording, read_number, repeat_options, with_options

# help of probe that differs from that of run
PROBE_WORDING: dict[str, Wording] = {
    "rollout.samples": {
        "help": "Rollouts per prompt of the run that is planned; the FLOPs saved depend on it. The "
        "probe samples one answer of each model."
    },
    "data.few_shot": {
        "help": "Number of solved rows shown before every prompt, chosen by --seed and not probed."
    },
    "rollout.begin": {"help": "Text forced at the start of every answer, such as a think tag."},
    "runtime.dtype": {"help": "Compute dtype: auto, float32 or bfloat16."},
    "runtime.head_memory_mb": {"help": "Memory for one chunk of logits, in MiB."},
}


@app.command()
def demo(
    out: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder for the runs and the plot.",
            show_default="runs/demo-<time>",
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            parser=read_number("--seed", int, 0),
            metavar="INT",
            help="Seed of prompts, rollouts and evaluation.",
            show_default="0",
        ),
    ] = 0,
) -> None:
    """Train the built-in student with a prefix and with full rollouts, and compare them.

    It takes about three minutes and needs no network.
    """
    from ..api import work

    with Terminal() as terminal:
        table, document = work.demonstrate(settings.read_out("--out", out, "demo"), seed, terminal)
    from ..results.demo import summarize

    show_tables(table)
    finish(document, summarize(document))


@app.command()
@with_options(*settings.PROBE_OPTIONS, reworded=PROBE_WORDING)
def probe(
    out: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder for probe.json and probe.png.",
            show_default="runs/probe-<time>",
        ),
    ] = None,
    problems: Annotated[
        int,
        typer.Option(
            parser=read_number("--problems", int, 100),
            metavar="INT",
            help="Training prompts to probe, the first of the shuffled dataset.",
        ),
    ] = 100,
    **flags: dict,
) -> None:
    """Measure where teacher and student disagree, and recommend a prefix length.

    It trains nothing.
    """
    from ..api import work
    from ..api.prospects import summarize_probe

    config = settings.probe_config(flags["flags"], out, problems)
    with Terminal() as terminal:
        result = work.probe(config, terminal)
    show(result, width=200)
    finish(result.to_dict(), summarize_probe(result, repeat_options(flags["flags"])))


@app.command()
def compare(
    arms_file: Annotated[
        str,
        typer.Argument(
            metavar="ARMS.YAML",
            help="YAML file with the keys base, seeds, arms, reference, tune and also; see the "
            "example in prefix-distill help recipes.",
        ),
    ],
    out: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder of the comparison; a second call continues it.",
            show_default="runs/compare-<time>",
        ),
    ] = None,
) -> None:
    """Train every arm of a file with every seed, one after another; compare accuracy and cost."""
    from ..api import work
    from ..api.summaries import summarize

    with Terminal() as terminal:
        result = work.compare(arms_file, settings.read_out("--out", out, "compare"), terminal)
    show(result, width=200)
    finish(result.to_dict(), summarize(result))


@app.command()
def report(
    folders: Annotated[
        list[str],
        typer.Argument(metavar="FOLDER", help="Run folders, or folders that contain them."),
    ],
    out: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder for report.html, report.md, report.csv and report.png.",
            show_default="runs/report-<time>",
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="ARM",
            help="Arm whose accuracy the others should reach; the cost to reach it is compared.",
            show_default="none",
        ),
    ] = None,
    title: Annotated[
        str, typer.Option(metavar="TEXT", help="Heading of the page.")
    ] = "Prefix distillation",
) -> None:
    """Write tables, a plot and a self-contained HTML page for any run folders."""
    from ..api import work
    from ..api.summaries import summarize

    paths, folder = read_folders("FOLDER", folders), settings.read_out("--out", out, "report")
    with Terminal():
        result = work.report(paths, folder, reference=reference, title=title)
    show(result, width=200)
    finish(result.to_dict(), summarize(result))
