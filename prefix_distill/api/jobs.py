"""The work of the calls that can run on several ranks. Every rank performs the same job.

A job gets a config, its own settings and an observer. It returns an `Outcome`.
"""

import contextlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from ..config import Config
from ..display import phase
from ..errors import MemoryShortage, PreflightError, ignore
from . import quiet
from .observers import Observer

if TYPE_CHECKING:
    from ..training.run import Run


class Outcome(TypedDict):
    """What a job returns: the JSON document of the command, notes and warnings."""

    document: dict[str, Any]
    notes: list[str]
    warnings: list[str]


class Job(TypedDict):
    """A job as plain values, which a file can pass to the ranks.

    ``name``: a key of JOBS; ``values``: ``section.key`` → value of all options; ``settings``: what
    the job takes besides the config.
    """

    name: str
    values: dict[str, object]
    settings: dict[str, bool]


def perform(job: Job, config: Config, observer: Observer) -> Outcome:
    """Perform a job in this process."""
    with phase(WORK[job["name"]]), quiet.guarded():
        return JOBS[job["name"]](config, job["settings"], observer)


def _run(config: Config, settings: Mapping[str, bool], observer: Observer) -> Outcome:
    """Train; with the setting "dry_run" only check. The setting "resume" continues a run."""
    with phase(quiet.LOADING):
        from ..planning.memory import prepare_fitting
        from ..training.folder import RunFolder
        from ..training.opening import train_in
        from ..training.resumed import check_resume, prepare_resumed

    resume = settings["resume"]
    if resume:
        prepared = prepare_resumed(config, RunFolder(str(config.checkpoint.out)))
    else:
        prepared = prepare_fitting(config)
        _examine(prepared, config.evaluate.check_samples)
    # the default folder is named after the time, which may differ between ranks
    folder = RunFolder(prepared.place.gather(config.checkpoint.out)[0])
    _announce(prepared, observer)
    if not settings["dry_run"]:
        document = train_in(prepared, folder, observer, resume=resume)
        return _outcome(prepared, document)
    if resume:
        notes = check_resume(prepared, folder)
        prepared.notes.note(*notes)
        if prepared.place.is_first:
            for text in notes:
                observer.note(text)
    price = _price(prepared, observer)
    return _outcome(prepared, _describe_dry_run(prepared, price))


def _check(config: Config, settings: Mapping[str, bool], observer: Observer) -> Outcome:
    with phase(quiet.LOADING):
        from ..planning.memory import prepare_fitting
        from ..training.run import describe_checks

    prepared = prepare_fitting(config)
    with contextlib.suppress(PreflightError, MemoryShortage):  # the document holds failed checks
        _examine(prepared, config.evaluate.check_samples, math.inf)
    price = _price(prepared, observer)
    document = {
        **describe_checks(prepared.checks),
        "steps": prepared.config.train.steps,
        "price": price,
        "notes": prepared.notes.lines,
        "warnings": prepared.notes.warnings,
    }
    return _outcome(prepared, document)


def _evaluate(config: Config, settings: Mapping[str, bool], observer: Observer) -> Outcome:
    with phase(quiet.LOADING):
        from ..results.evaluation import evaluate_model

    place, notes, document = evaluate_model(config)
    if place.is_first:
        for text in notes.lines:
            observer.note(text)
        for text in notes.warnings:
            observer.warn(text)
    return {"document": document, "notes": notes.lines, "warnings": notes.warnings}


def _probe(config: Config, settings: Mapping[str, bool], observer: Observer) -> Outcome:
    from .. import config as configuration

    with phase(quiet.LOADING):
        from ..planning.memory import prepare_fitting
        from ..planning.probe import fit_to_data, probe
        from ..results.plots import draw_probe
        from ..training.defaults import fill_in_unused_rate
        from ..training.folder import RunFolder

    config, notes = fit_to_data(fill_in_unused_rate(config))
    prepared = prepare_fitting(config)
    prepared.notes.lines[:0] = notes
    _announce(prepared, observer)
    say: Callable[[str], None] = ignore
    if prepared.place.is_first:
        say = observer.note
    document = probe(prepared, say)
    if prepared.place.is_first:
        folder = RunFolder(Path(str(config.checkpoint.out)))
        folder.create(configuration.as_dict(prepared.config))
        folder.write_json("probe.json", document)
        draw_probe(document, folder.path / "probe.png")
    return _outcome(prepared, document)


JOBS: dict[str, Callable[[Config, Mapping[str, bool], Observer], Outcome]] = {
    "run": _run,
    "check": _check,
    "eval": _evaluate,
    "probe": _probe,
}


# what each job does, for whoever watches
WORK = {"run": "preparing", "check": "checking", "eval": "evaluating", "probe": "probing"}


def _examine(prepared: "Run", samples: int, limit: float | None = None) -> None:
    """Run the checks on both models; add their warnings to the run's.

    PreflightError or MemoryShortage: the first check that failed.
    """
    with phase(quiet.LOADING):
        from ..planning import checks

    limits = [] if limit is None else [limit]
    prepared.checks.extend(checks.examine(prepared, samples, *limits))
    for check in prepared.checks:
        if check.status == "error":
            raise check_error(check.name, check.text)
        reported = ("sampling", "end of text")  # the preparation reports these
        if check.status == "warning" and check.name not in reported:
            prepared.notes.warnings.append(check.text)


def check_error(name: str, result: str) -> PreflightError | MemoryShortage:
    """Return the exception for a failed check."""
    kind = MemoryShortage if name == "memory" else PreflightError
    return kind(f"{name}: {result}")


def _announce(prepared: "Run", observer: Observer) -> None:
    if not prepared.place.is_first:
        return
    for text in prepared.notes.lines:
        if text in prepared.notes.details:
            observer.detail(text)
        else:
            observer.note(text)
    for text in prepared.notes.warnings:
        observer.warn(text)


def _outcome(prepared: "Run", document: dict[str, Any]) -> Outcome:
    return {
        "document": document,
        "notes": prepared.notes.lines,
        "warnings": prepared.notes.warnings,
    }


def _describe_dry_run(prepared: "Run", price: dict[str, Any]) -> dict[str, Any]:
    """Return the resolved config, the price, and the FLOPs of a step with a prefix and in full."""
    from .. import config as configuration
    from ..training.run import describe_checks

    config = prepared.config
    prompts = prepared.problems.train[: config.train.batch_size]
    lengths = {"prefix": prepared.method.prefix.length(0), "full": prepared.max_new_tokens}
    return {
        "dry_run": True,
        "checks": describe_checks(prepared.checks)["checks"],
        "config": configuration.as_dict(config),
        "notes": prepared.notes.lines,
        "warnings": prepared.notes.warnings,
        "flops_per_update": {
            name: prepared.update_cost(prompts, length) for name, length in lengths.items()
        },
        "not_in_flops_per_update": price["not_in_flops"],
        "price": price,
        "disk": price["disk"],
    }


def _price(prepared: "Run", observer: Observer) -> dict[str, Any]:
    """Return what the run costs; add a note on the disk, and a warning if less is free."""
    from ..planning.disk import describe_disk, describe_shortage
    from ..planning.price import describe_price

    price = describe_price(prepared)
    prepared.notes.note(describe_disk(price["disk"]))
    shortage = describe_shortage(price["disk"], prepared.config.checkpoint.out)
    if shortage is not None:
        prepared.notes.warn(shortage)
        if prepared.place.is_first:
            observer.warn(shortage)
    return price
