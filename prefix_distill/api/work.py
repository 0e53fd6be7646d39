"""The functions of the API: a config and an observer in, a result out.

The commands call these functions with an observer that writes to the terminal. The functions in
`notebook` call them with keyword options.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import Config
from ..display import phase
from ..errors import Stopped, UserError
from ..files import make_folder
from . import launch, quiet, settings
from .documents import (
    CheckResult,
    Comparison,
    DryRun,
    EvaluationResult,
    ExportResult,
    PlanResult,
    ProbeResult,
    PushFailed,
    RunResult,
)
from .jobs import Job, Outcome, perform
from .observers import Observer

if TYPE_CHECKING:
    from rich.table import Table


def distil(config: Config, observer: Observer, resume: bool = False) -> RunResult:
    """Train the student, save it, and push it to the hub if the config says so.

    PushFailed: the run has finished, but its model could not be pushed.
    """
    outcome = _start(config, observer, resume=resume, dry_run=False)
    outcome["document"] = {**outcome["document"], "pushed": None}
    result = RunResult.read(outcome)
    if config.export.push is None or not launch.is_first_rank():
        return result
    try:
        outcome["document"]["pushed"] = _push(result.model, config)
    except Stopped as error:
        raise PushFailed(str(error), result) from None
    return RunResult.read(outcome)


def dry_run(config: Config, observer: Observer, resume: bool = False) -> DryRun:
    """Load and check everything that a run needs; write nothing."""
    outcome = _start(config, observer, resume=resume, dry_run=True)
    return DryRun(document=outcome["document"])


def _start(config: Config, observer: Observer, *, resume: bool, dry_run: bool) -> Outcome:
    from ..training.folder import RunFolder

    config = settings.name_run_folder(config)
    if not resume and config.checkpoint.allow_changed:
        raise UserError(
            "--allow-changed: expected with --resume, got a new run, which has nothing that could "
            "have changed; omit it"
        )
    if not resume:
        RunFolder(str(config.checkpoint.out)).check_unused()
    if config.export.push is not None and launch.is_first_rank():
        _check_push(str(config.export.push), observer)
    return _perform("run", config, observer, resume=resume, dry_run=dry_run)


def check(config: Config, observer: Observer) -> CheckResult:
    """Check models, prompts, sampling and device; write nothing.

    UserError: the hub would refuse the upload that the config asks for.
    """
    if config.export.push is not None and launch.is_first_rank():
        _check_push(str(config.export.push), observer)
    return CheckResult.read(_perform("check", config, observer)["document"])


def plan(config: Config, observer: Observer, assumptions: dict[str, Any]) -> PlanResult:
    """Compute what a run needs.

    ``assumptions``: ``prompt_tokens``, ``prefixes`` and ``card`` of `planning.plan.plan`, and the
    fields of its `RateSource`: ``tflops``, ``measure`` and ``from_run``.
    """
    from ..planning.gpus import check_speed, read_cards

    given = dict(assumptions)
    # before libraries load, which takes seconds
    read_cards(given.get("card"))
    check_speed(given.get("tflops"), bool(given.get("measure")), given.get("from_run"))
    with phase("planning"), quiet.guarded():
        with phase(quiet.LOADING):
            from ..planning import plan as planning
            from ..planning.rate import RateSource

        prefixes = given.pop("prefixes", None)
        if prefixes is None:
            prefixes = planning.USUAL_PREFIXES
        document = planning.plan(
            config,
            prompt_tokens=given.pop("prompt_tokens", None),
            prefixes=prefixes,
            card=given.pop("card", None),
            rate_source=RateSource(**given),
        )
        result = PlanResult.read(document)
    for text in result.notes:
        observer.note(text)
    for text in result.warnings:
        observer.warn(text)
    return result


def evaluate(config: Config, observer: Observer) -> EvaluationResult:
    """Measure the model ``config.models.student`` on ``config.data.dataset``."""
    return EvaluationResult.read(_perform("eval", config, observer)["document"])


def probe(config: Config, observer: Observer) -> ProbeResult:
    """Measure where the models disagree and recommend a prefix; write to the config's folder."""
    from ..training.folder import RunFolder

    out = str(config.checkpoint.out)
    RunFolder(out).check_unused()
    return ProbeResult.read(_perform("probe", config, observer)["document"], Path(out))


def compare(arms_file: str, out: Path, observer: Observer) -> Comparison:
    """Run all arms and seeds of a file that have not finished, and report on them."""
    from ..results.compare import read_arms

    arms = read_arms(arms_file)
    with quiet.guarded():
        with phase(quiet.LOADING):
            from ..planning.memory import prepare_fitting
            from ..results.compare import compare as run_all

        run_all(arms, out, observer, prepare_fitting)
    return report([out], out, reference=arms.reference, title=Path(arms_file).stem)


def demonstrate(out: Path, seed: int, observer: Observer) -> tuple["Table", dict[str, Any]]:
    """Run the demonstration in a folder; return its rich table and its document."""
    from ..training.folder import RunFolder

    RunFolder(out).check_unused()
    with quiet.guarded():
        with phase(quiet.LOADING):
            from ..results.demo import demonstrate as run_both

        return run_both(out, seed, observer)


@phase("writing the report")
def report(folders: Sequence[Path], out: Path, reference: str | None, title: str) -> Comparison:
    """Write tables, a plot and a page about runs. UserError: ``out`` is unusable."""
    from ..results import cells, page, plots, summary
    from ..results.evaluations_csv import write_csv
    from ..results.runs import by_arm, collect_runs, find_left_out

    runs = collect_runs(list(folders))
    arms = by_arm(runs)
    if reference is not None and reference not in arms:
        raise UserError(
            f"--reference {reference}: expected one of the arms {', '.join(arms)}; change it"
        )
    _make_folder(out)
    rows = summary.summarize(runs, reference)
    warnings = find_left_out(list(folders), runs) + summary.describe_differing(runs, reference)
    write_csv(runs, out / "report.csv")
    (out / "report.md").write_text(cells.markdown_table(rows), encoding="utf-8")
    html = page.render_page(runs, rows, reference=reference, title=title, warnings=warnings)
    (out / "report.html").write_text(html, encoding="utf-8")
    (out / "report.png").write_bytes(plots.encode_png(plots.draw_report(runs, title)))
    document = {
        "out": str(out),
        "page": str(out / "report.html"),
        "runs": len(runs),
        "reference": reference,
        "arms": rows,
        "warnings": warnings,
    }
    return Comparison.read(document)


def _make_folder(out: Path) -> None:
    # Path.exists raises for a name that is too long
    if os.path.exists(out) and not os.path.isdir(out):
        raise UserError(f"--out {out}: it is a file; name a folder")
    try:
        make_folder(out)
        (out / ".partial").touch()
        (out / ".partial").unlink()
    except OSError as error:
        raise UserError(
            f"--out {out}: cannot be written ({error.strerror}); name another folder"
        ) from None


def export(
    source: str,
    config: Config,
    observer: Observer,
    *,
    out: Path | None,
    choices: dict[str, object],
) -> ExportResult:
    """Write a model to a new folder and push it to the hub if the config says so.

    Without ``out`` and with nothing to convert, the folder ``source`` is only pushed.
    ``choices``: which, dtype and gguf.
    PushFailed: the folder is complete, but could not be pushed.
    """
    which, dtype = str(choices["which"]), str(choices["dtype"])
    gguf = None if choices["gguf"] is None else str(choices["gguf"])
    is_unchanged = dtype == "auto" and gguf is None
    trust_code = config.models.trust_remote_code
    with quiet.guarded(), phase("exporting the model"):
        from ..results.export import Source
        from ..results.export import export as write

        document: dict[str, Any]
        existing = None
        if out is None:
            existing = _find_folder(source, which)
        if existing is not None and config.export.push is not None and is_unchanged:
            folder = existing
            document = {"out": str(folder)}
        else:
            folder = out or Path(settings.default_out("export"))
            document = write(
                Source(name=source, which=which, trust_remote_code=trust_code),
                folder,
                dtype=dtype,
                gguf=gguf,
            )
            for text in document.pop("notes"):
                observer.note(text)
    document["pushed"] = None
    if config.export.push is None:
        return ExportResult.read(document)
    try:
        document["pushed"] = _push(folder, config)
    except Stopped as error:
        raise PushFailed(str(error), ExportResult.read(document)) from None
    return ExportResult.read(document)


def _find_folder(source: str, which: str) -> Path | None:
    """Return the model folder at or inside ``source``; None for a built-in model or a .gguf file.

    UserError: there is no such folder, or it contains no model.
    """
    from ..results.export import folder_of

    folder = folder_of(source, which)
    if folder is not None or source.startswith("lab:") or source.lower().endswith(".gguf"):
        return folder
    if os.path.exists(os.path.expanduser(source)):
        raise UserError(
            f"export {source}: expected a run folder or a model folder, got neither; check the path"
        )
    raise UserError(
        f"export {source}: no such folder; check the path, or add --out to export a model of the "
        "hub"
    )


def _check_push(repository: str, observer: Observer) -> None:
    """Raise UserError if the hub will refuse an upload to ``repository``."""
    with quiet.guarded(), phase("contacting the hub"):
        from ..results.export import check_push

        warning = check_push(repository)
    if warning is not None:
        observer.warn(warning)


def _push(folder: Path, config: Config) -> str:
    """Upload a folder to the config's hub repository and return its address."""
    with quiet.guarded(), phase("uploading to the hub"):
        from ..results.export import push

        return push(folder, str(config.export.push), config.export.public)


def _perform(name: str, config: Config, observer: Observer, **options: bool) -> Outcome:
    """Perform a job in this process, or on ``config.runtime.gpus`` ranks."""
    job: Job = {"name": name, "values": settings.flatten(config), "settings": options}
    if launch.needs_ranks(config.runtime):
        return launch.launch(config.runtime.gpus or 1, job, observer)
    return perform(job, config, observer)
