"""Open a run folder and train in it: its lock, its facts, its plugins, and the observer."""

import contextlib
from collections.abc import Iterator

from .. import config as configuration
from ..config import Config
from ..display import Observer, Outline, Reporter
from ..engine.device import describe_machine
from ..errors import UserError
from ..plugins import find_fault, find_unfiled, load_plugins
from ..signals import Interrupt
from . import commits
from .fingerprints import KEY, check_fingerprints, take_fingerprints
from .folder import RunFolder
from .plugin_record import describe_grader, record_plugins
from .run import Run, describe_checks
from .session import Session
from .trackers import Trackers


def train_in(
    run: Run, folder: RunFolder, observer: Observer, resume: bool = False, label: str = ""
) -> dict:
    """Open the run folder, train and return the result document.

    ``observer`` watches the run and may stop it; ``label`` names the run among several.
    """
    config = run.config
    folder.kept = max(folder.kept, config.checkpoint.keep)
    plugins = load_plugins(config.runtime.plugin)
    plugins += find_unfiled(config.divergence.name, config.schedule.prefix)
    plugins += describe_grader(run.problems.grader)
    interrupt = Interrupt()
    if run.place.is_first:
        watched = observer.watch(describe_outline(config, label), interrupt.ask)
    else:
        watched = observer.watch_other_rank()
    fingerprints = take_fingerprints(run)
    opened = open_folder(run, folder, resume=resume, fingerprints=fingerprints)
    with watched as shown, interrupt, opened:
        if resume:
            for text in check_fingerprints(run, folder, fingerprints):
                shown.note(text)
        reporter: contextlib.AbstractContextManager[Reporter] = contextlib.nullcontext(shown)
        if run.place.is_first:
            reporter = Trackers(shown, folder, config)
        with reporter as report:
            for text in record_plugins(folder, run.place, plugins):
                report.warn(text)
            with naming_saved_state(folder):
                return Session(run, folder, report, resume=resume, interrupt=interrupt).train()


def describe_outline(config: Config, label: str) -> Outline:
    """Return what a run will do, for whoever shows its progress."""
    return Outline(
        steps=config.train.steps,
        label=label,
        eval_every=config.evaluate.every,
        tail_every=config.evaluate.tail_every,
        save_every=config.checkpoint.save_every,
        is_full=config.schedule.prefix == "full",
    )


@contextlib.contextmanager
def naming_saved_state(folder: RunFolder) -> Iterator[None]:
    """Turn a plugin's error into a UserError that names the newest checkpoint."""
    try:
        yield
    except BaseException as error:  # a plugin may also exit
        fault = find_fault(error)
        if fault is None:
            raise
        advice = "correct the plugin and start again with another --out"
        if folder.has_checkpoint:
            advice = "correct the plugin, then continue with --resume"
        raise UserError(f"{fault}; {folder.newest_checkpoint_text}: {advice}") from error


@contextlib.contextmanager
def open_folder(run: Run, folder: RunFolder, resume: bool, fingerprints: dict) -> Iterator[None]:
    """Lock the run folder, and create it with the run's fingerprints unless the run resumes.

    UserError: the folder is used, cannot be written, or is not visible on every rank.
    """
    place = run.place
    lock = folder.lock() if place.is_first else contextlib.nullcontext()
    with lock:
        if place.is_first and not resume:
            facts = {**describe_run(run), KEY: fingerprints | {"earlier": []}}
            checks = None
            if run.checks:
                checks = describe_checks(run.checks)
            folder.create(configuration.as_dict(run.config), facts, checks)
        elif place.is_first:
            folder.recover()
        place.barrier()
        if not folder.is_created:
            raise UserError(
                f"--out {folder.path}: rank {place.rank} cannot find the files that rank 0 wrote; "
                "on several machines, use a folder on a shared file system"
            )
        yield


def describe_run(run: Run) -> dict:
    """Return what run.json records before training: machine, seed, notes, ranks, generation."""
    configs = {}
    for role, model in (("student", run.pair.student), ("teacher", run.pair.teacher)):
        configs[role] = model.generation_config.to_diff_dict()
    return {
        **describe_machine(),
        "seed": run.config.runtime.seed,
        "notes": run.notes.lines,
        "warnings": run.notes.warnings,
        "ranks": run.place.world,
        "shared_prompts": {found.role: found.facts for found in run.shared_prompts},
        "generation_config": configs,
        "stop_ids": sorted(run.method.sampler.eos),
        "eval_sampling": run.method.eval_sampler.describe(),
        commits.KEY: commits.find_commits(run.config),
    }
