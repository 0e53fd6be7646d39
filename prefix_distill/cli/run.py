"""The commands run, check and plan."""

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .. import config as configuration
from .. import display
from ..display import tell
from ..errors import MemoryShortage, PreflightError
from ..training.resume import resume_settings
from .app import app, finish, note, say, start_ranks
from .model import print_pushed
from .options import Assignments, ConfigFile, with_options
from .quiet import quiet_libraries

if TYPE_CHECKING:
    from ..training.run import Run


@app.command()
@with_options()
def run(
    config_file: ConfigFile = None,
    assignments: Assignments = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --out exactly where it stopped.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Load and check everything, write nothing.")
    ] = False,
    **flags: dict,
) -> None:
    """Distil: the student writes a prefix, the teacher scores it, the student learns from it."""
    from datetime import datetime

    flags = flags["flags"]
    values = configuration.read_yaml(config_file) if config_file else {}
    values |= flags | configuration.read_assignments(assignments or [])
    if resume:
        values, notes = resume_settings(values)
        for text in notes:
            note(text)
    config = configuration.build(values)
    out = config.checkpoint.out
    if out is None:
        out = f"runs/{datetime.now():%Y%m%d-%H%M%S}"
        config = configuration.replace(config, checkpoint={"out": out})

    from ..training.folder import RunFolder

    folder = RunFolder(Path(out))
    if not resume:
        folder.refuse_if_used()
    start_ranks(config)
    quiet_libraries()
    from ..training.prepare import prepare

    prepared = prepare(config)
    if not resume:
        _examine(prepared, config.evaluate.check_samples)
    # the default holds the time, which ranks may not share
    folder = RunFolder(Path(prepared.place.gather(out)[0]))
    for text in prepared.notes.lines:
        say(prepared, text)
    for text in prepared.notes.warnings:
        say(prepared, f"warning: {text}")
    if dry_run:
        finish(prepared, _plan(prepared))
        return
    from ..training.session import train_in

    document = train_in(prepared, folder, resume)
    if prepared.place.first:
        print_pushed(document, folder.model, config.export.push, config.export.public)


@app.command()
@with_options()
def check(config_file: ConfigFile = None, assignments: Assignments = None, **flags: dict) -> None:
    """Before training: do student, teacher, prompts, sampling and this device go together? Takes
    what run takes, writes nothing."""
    values = (
        (configuration.read_yaml(config_file) if config_file else {})
        | flags["flags"]
        | configuration.read_assignments(assignments or [])
    )
    config = configuration.build(values)
    start_ranks(config)
    quiet_libraries()
    from ..training.prepare import prepare
    from ..training.run import describe_checks

    prepared = prepare(config)
    failed = None
    try:
        _examine(prepared, config.evaluate.check_samples, math.inf)
    except (PreflightError, MemoryShortage) as error:
        failed = error
    if prepared.place.first:
        from rich.table import Table

        table = Table("", "check", "what was found")
        for row in prepared.checks:
            table.add_row(
                {"ok": "ok", "warning": "WARNING", "error": "ERROR"}[row.status],
                row.name,
                row.found,
            )
        display.show(table, width=None if sys.stderr.isatty() else 200)
        shown = next(row for row in prepared.checks if row.name == "prompts").facts
        for role in ("student", "teacher"):
            prompt = shown[role]
            last = " ".join(f"{token!r}={i}" for i, token in prompt["last"])
            tell(
                f"the {role}'s prompt, {prompt['ids']} ids, the last ones {last}:\n{prompt['text']}"
            )
        for text in prepared.notes.lines:
            tell(text)
    finish(
        prepared,
        describe_checks(prepared.checks)
        | {"notes": prepared.notes.lines, "warnings": prepared.notes.warnings},
    )
    if failed is not None:
        raise failed


def _examine(prepared: "Run", samples: int, limit: float | None = None) -> None:
    """Asks the models (``checks.examine``). Warnings join the run's; PreflightError, the first
    error."""
    from ..planning import checks

    prepared.checks.extend(checks.examine(prepared, samples, *([] if limit is None else [limit])))
    for check in prepared.checks:
        if check.status == "error":
            raise (MemoryShortage if check.name == "memory" else PreflightError)(
                f"{check.name}: {check.found}"
            )
        known = ("sampling", "end of text")  # these the preparation has said
        if check.status == "warning" and check.name not in known:
            prepared.notes.warnings.append(f"{check.name}: {check.found}")


def _plan(prepared: "Run") -> dict:
    from ..training.run import describe_checks

    config = prepared.config
    prompts = prepared.problems.train[: config.train.batch_size]
    lengths = {"prefix": prepared.method.prefix.length(0), "full": prepared.max_new_tokens}
    beside = [
        flag
        for flag, on in (
            ("--select", prepared.method.selection),
            ("--extrapolate", prepared.problems.extrapolation),
            ("--off-policy", prepared.method.off_policy),
            ("--tail-every", config.evaluate.tail_every),
        )
        if on
    ]
    return {
        "dry_run": True,
        "checks": describe_checks(prepared.checks)["checks"],
        "config": configuration.as_dict(config),
        "notes": prepared.notes.lines,
        "warnings": prepared.notes.warnings,
        "flops_per_update": {
            name: prepared.update_cost(prompts, length) for name, length in lengths.items()
        },
        "not_in_flops_per_update": beside,
    }


@app.command()
@with_options()
def plan(  # noqa: PLR0913  each parameter is a flag
    config_file: ConfigFile = None,
    assignments: Assignments = None,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(help="Length of every prompt (tokens), where no data set is to be read."),
    ] = None,
    prefixes: Annotated[
        str | None,
        typer.Option(
            help="Prefix schedules beside --prefix, by commas: 64,25%,full.",
            show_default="25%,50%,full",
        ),
    ] = None,
    device_tflops: Annotated[
        float | None,
        typer.Option(help="Sustained rate of the device (10^12 FLOP/s), for times."),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Time a matmul of the student's on this machine, for lower bounds of times.",
        ),
    ] = False,
    from_run: Annotated[
        str | None,
        typer.Option(help="Run folder whose measured rates, phase by phase, give the times."),
    ] = None,
    **flags: dict,
) -> None:
    """What a run would need, from config files alone: memory, FLOPs, time, and which cards it
    fits. Nothing is downloaded or written."""
    values = configuration.read_yaml(config_file) if config_file else {}
    config = configuration.build(
        values | flags["flags"] | configuration.read_assignments(assignments or [])
    )
    quiet_libraries()
    from ..planning import plan as planning
    from ..planning.rate import RateSource
    from ..planning.tables import tabulate

    rate_source = RateSource(tflops=device_tflops, measure=measure, from_run=from_run)
    if prefixes is None:
        prefixes = planning.USUAL_PREFIXES
    document = planning.plan(config, prompt_tokens, prefixes, rate_source)
    for text in document["notes"]:
        tell(text)
    display.show(*tabulate(document), width=None if sys.stderr.isatty() else 140)
    print(json.dumps(document))
