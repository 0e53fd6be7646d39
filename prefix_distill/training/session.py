"""The training loop of on-policy prefix distillation (arXiv 2602.15260): one update per turn."""

import contextlib
import dataclasses
import inspect
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from .. import config as configuration
from ..display import Display, Reporter, flops_text
from ..engine.device import Clock, description
from ..engine.models import Model, average, decoder, moved, refresh
from ..engine.ranks import Interrupt
from ..errors import UserError
from ..maths import extrapolation
from ..maths.flops import Ledger
from ..maths.schedule import learning_rate, warmup_steps
from ..maths.weights import token_weights
from ..prompts import stream
from . import teacher_text
from .card import card
from .folder import RunFolder
from .metrics import full_cost, merge, metrics_row, result_document, update_facts
from .monitor import Monitor, candidate_score
from .run import Run, describe_checks
from .state import (
    Progress,
    Tensors,
    compare_ranks,
    refuse_non_finite,
    restore_checkpoint,
    save_checkpoint,
    stop_if_asked,
)
from .teacher_text import TeacherText
from .trackers import Trackers
from .update import (
    StudentLoss,
    accumulate_gradients,
    apply_update,
    make_optimizer,
    sample,
    select,
)


def train(
    run: Run,
    folder: RunFolder,
    report: Reporter,
    resume: bool,
    interrupt: Interrupt | None = None,
) -> dict:
    """Run the remaining updates with evaluations, save the model and return the result document.

    Every rank calls its ``report``. Interrupted: ``interrupt`` was asked to stop; the current
    update or evaluation is finished and the state is saved.
    """
    config, place = run.config, run.place
    interrupt = interrupt or Interrupt()
    run.say = report.own
    student = run.student.net
    if run.student.adapter is None:
        student.requires_grad_(True)
    optimizer = make_optimizer(run.student.trained.values(), config)
    progress = Progress(taught_prefix=run.prefix.length(0))
    further = config.extrapolation
    moving = (
        moved(student, further.modules) if further.kind != "none" or further.diagnostics else {}
    )
    anchor, initial = (
        extrapolation.snapshot(moving),
        extrapolation.snapshot(moving if further.diagnostics else {}),
    )
    resumed_from, said, continued = None, False, resume
    if resume and not folder.started:
        report.note(
            "the run was interrupted before its first checkpoint: it starts from the beginning"
        )
        resume = False
        if place.first:
            folder.rewind("scores.jsonl", -1, report.warn)
    if resume:
        resumed_from = restore_checkpoint(run, folder, optimizer, anchor, progress, report)
    if (
        continued and place.first
    ):  # what was given to lengthen or respread it holds for the next resume, too
        folder.write_config(dataclasses.asdict(config))
    clock = Clock(place.device, progress.seconds)
    decoding = decoder(run.student, place.dtype)
    monitor = Monitor(run, decoding, progress, clock, folder, report)
    if resume:
        monitor.resume()
    else:
        monitor.start()
    texts = _teacher_texts(run, folder, progress, clock)
    loss_module: torch.nn.Module = StudentLoss(run)
    if place.world > 1:
        known = inspect.signature(DistributedDataParallel).parameters  # torch renamed it
        buffers = (
            "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        )  # they never change
        options: dict[str, Any] = {"gradient_as_bucket_view": True, buffers: False}
        loss_module = DistributedDataParallel(loss_module, **options)
    if not resume:
        save_checkpoint(run, folder, optimizer, anchor, progress)
    if resume and progress.step < config.train.steps:
        monitor.look()  # an evaluation that the interruption left out

    full = full_cost(run, progress, range(progress.step))
    while progress.step < config.train.steps:
        stop_if_asked(run, folder, optimizer, anchor, progress, interrupt)
        step = progress.step
        spent_before = dict(clock.seconds)
        ledger = Ledger()
        prefix = progress.taught_prefix = run.prefix.length(step, progress.prefix)
        prompts = stream.batch(
            run.train_prompts, step, config.train.batch_size, config.runtime.seed
        )
        rollouts = sample(run, decoding, prompts, step, prefix, ledger, clock, texts)
        rollouts, reading = select(run, rollouts, step, ledger, clock)
        weights, share = token_weights(rollouts, config.divergence.reduction, run.position)
        divisor = place.total(share)
        values, clipped = accumulate_gradients(
            run, loss_module, rollouts, weights, divisor, ledger, clock, reading
        )
        refuse_non_finite(run, folder, optimizer, anchor, progress, rollouts, values)
        facts = update_facts(
            run, rollouts, values, clipped, weights, divisor, run.prefix.window(progress.prefix)
        )
        if reading is None and "selection" in ledger.useful and not said:
            report.note(
                "tokens are selected from a reading of their own, which the ledger counts as "
                "`selection`: the rollouts do not fit one micro-batch (--micro-batch-size, and at "
                "most a tenth of padding)"
            )
            said = True
        rate = learning_rate(
            step,
            peak=config.schedule.lr,
            schedule=config.schedule.lr_schedule,
            steps=config.train.steps,
            warmup=warmup_steps(config.schedule.warmup, config.train.steps),
        )
        with clock.phase("optimizer"):
            norm = apply_update(run, folder, optimizer, anchor, progress, rate)
        progress.step += 1
        progress.tokens += int(facts["tokens"])
        merge(run, progress, ledger)
        if moving and extrapolation.due(progress.step):
            _extrapolate(run, folder, decoding, optimizer, moving, anchor, progress, clock, report)
        with clock.phase("optimizer"):
            refresh(decoding, run.student)
            if config.models.teacher_ema is not None:
                average(run.teacher, run.student, config.models.teacher_ema)
        if reason := run.prefix.observe(step, progress.prefix, facts["newest"], facts["filled"]):
            progress.decisions.append({"step": progress.step, "reason": reason})
            report.note(reason)
        row = metrics_row(run, progress, facts, prefix, rate, norm, clock, spent_before)
        full += full_cost(run, progress, range(step, step + 1))
        if place.first:
            folder.append("metrics.jsonl", row)
        report.row(row, progress.ledger.total(), full)
        if (
            config.runtime.check_ranks_every
            and progress.step % config.runtime.check_ranks_every == 0
        ):
            compare_ranks(run, folder, progress)
        last = progress.step == config.train.steps
        if not last:
            stop_if_asked(run, folder, optimizer, anchor, progress, interrupt)
            monitor.look()
        if (
            config.checkpoint.save_every and progress.step % config.checkpoint.save_every == 0
        ) or last:
            save_checkpoint(run, folder, optimizer, anchor, progress)

    after = monitor.evaluate()
    if place.first:
        folder.write_rows("examples-after.jsonl", after.pop("records"))
        folder.write_json("after.json", after)
        told = card(
            run, progress, progress.evaluations[-1], full_cost(run, progress, range(progress.step))
        )
        folder.save_model("model", run.student, told, config.adapter.merge)
        if config.adapter.merge:
            folder.save_model("adapter", run.student, told)
        if further.diagnostics:
            _diagnose(folder, moving, initial)
    result = result_document(run, folder, progress, resumed_from, clock)
    if place.first:
        folder.write_json("run.json", {**folder.read_json("run.json"), "result": result})
    place.wait()
    return {"out": str(folder.path), **result}


def _teacher_texts(
    run: Run, folder: RunFolder, progress: Progress, clock: Clock
) -> dict[tuple[int, int], TeacherText] | None:
    """What the teacher writes for the updates that are left, if it writes at all."""
    if run.off_policy is None:
        return None
    config = run.config
    size, samples, seed = config.train.batch_size, config.rollout.samples, config.runtime.seed
    wanted = {}
    for step in range(config.train.steps):
        prompts = stream.batch(run.train_prompts, step, size, seed)
        for row in sorted(run.off_policy.rows(step, size * samples, seed)):
            rendered, sample = prompts[row // samples], row % samples
            wanted[rendered.prompt.index, sample] = (rendered, sample)
    with clock.phase("teacher_text"):
        return teacher_text.teacher_texts(
            run,
            list(wanted.values()),
            run.prefix.longest(config.train.steps),
            decoder(run.teacher, run.place.dtype),
            folder,
            progress.ledger,
        )


def _extrapolate(  # noqa: PLR0913  becomes a method of `Session`, which will own these
    run: Run,
    folder: RunFolder,
    decoding: Model,
    optimizer: torch.optim.Optimizer,
    moving: dict[str, torch.nn.Parameter],
    anchor: Tensors,
    progress: Progress,
    clock: Clock,
    report: Reporter,
) -> None:
    """The search after an update at which one is due; a row in ``progress.extrapolations``, a
    ledger row of its own."""
    settings, ledger = run.config.extrapolation, Ledger()
    before = progress.ledger.useful.get("extrapolation", 0.0)
    seconds = clock.seconds.get("extrapolation", 0.0)
    if settings.diagnostics and run.place.first:
        folder.write_tensors(
            f"displacements/step-{progress.step:08d}.safetensors",
            {name: p.detach() - anchor[name].to(p.device) for name, p in moving.items()},
        )

    def score() -> float:
        refresh(decoding, run.student)
        return candidate_score(run, decoding, progress.taught_prefix, ledger)

    with clock.phase("extrapolation"):
        found = extrapolation.extrapolate(
            moving, anchor, settings.kind, score, (run.config.runtime.seed, progress.step)
        )
    merge(run, progress, ledger)
    if settings.reset:
        for p in moving.values():
            optimizer.state.pop(p, None)
    cost = progress.ledger.useful.get("extrapolation", 0.0) - before
    progress.extrapolations.append(
        {"step": progress.step, "k": found.k, "scores": found.scores, "flops": cost}
    )
    if settings.kind != "none":
        scores = (
            f", {settings.score} " + " → ".join(f"{s:.4g}" for s in found.scores)
            if found.scores
            else ""
        )
        report.note(
            f"after update {progress.step}: W + {2 * found.k}Δ is taken (k = {found.k}{scores}; "
            f"{flops_text(cost)}, {clock.seconds['extrapolation'] - seconds:.1f} s)"
        )


def _diagnose(folder: RunFolder, moving: dict[str, torch.nn.Parameter], initial: Tensors) -> None:
    """displacement.json from the displacements that were kept; they go."""
    final = {name: p.detach().cpu() - initial[name] for name, p in moving.items()}
    rows = [
        {
            "step": int(file.stem.removeprefix("step-")),
            "modules": extrapolation.diagnose(tensors, final),
        }
        for file, tensors in folder.read_tensors("displacements")
    ]
    folder.write_json("displacement.json", rows)
    folder.remove("displacements")


@dataclasses.dataclass(frozen=True)
class Watch:
    """The caller's reporter of a run, and its means to stop the run."""

    reporter: Reporter
    interrupt: Interrupt


def train_in(
    prepared: Run,
    folder: RunFolder,
    resume: bool = False,
    label: str = "",
    watch: Watch | None = None,
) -> dict:
    """Opens the run folder, trains; the result document. Without ``watch``, progress is shown on
    stderr after ``label``."""
    place = prepared.place
    shown: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if watch is None:
        display = Display(prepared.config.train.steps, label, place.first)
        watch = Watch(display, Interrupt())
        shown = display
    with (
        folder.alone() if place.first else contextlib.nullcontext(),
        watch.interrupt as interrupt,
    ):
        if place.first and not resume:
            folder.create(
                configuration.as_dict(prepared.config),
                {
                    **description(),
                    "seed": prepared.config.runtime.seed,
                    "notes": prepared.notes,
                    "warnings": prepared.warnings,
                    "ranks": place.world,
                    "generation_config": {
                        name: model.generation_config.to_diff_dict()
                        for name, model in (
                            ("student", prepared.student),
                            ("teacher", prepared.teacher),
                        )
                    },
                },
            )
        if place.first and prepared.checks:
            folder.write_json("preflight.json", describe_checks(prepared.checks))
        place.wait()
        if not folder.made:
            raise UserError(
                f"--out {folder.path}: rank {place.rank} does not see what rank 0 wrote there; on "
                "several machines it must be on a file system that they share"
            )
        reporter: contextlib.AbstractContextManager[Reporter]
        reporter = contextlib.nullcontext(watch.reporter)
        if place.first:
            reporter = Trackers(watch.reporter, folder, prepared.config)
        with reporter as report, shown:
            return train(prepared, folder, report, resume, interrupt)
