"""Session: the training loop of on-policy prefix distillation (arXiv 2602.15260)."""

import contextlib
from collections.abc import Iterator

from .. import config as configuration
from ..display import Observer, Reporter
from ..engine.decoder import make_decoder
from ..engine.device import describe_machine
from ..errors import Interrupted, UserError
from ..maths.schedule import learning_rate, warmup_steps
from ..plugins import find_fault, find_unfiled, load_plugins
from ..signals import Interrupt
from . import commits
from .card import make_card
from .faults import describe_non_finite, explain_shortage
from .fingerprints import KEY, check_fingerprints, take_fingerprints
from .folder import RunFolder
from .loss import TokenLosses
from .metrics import UpdateFacts, full_cost, metrics_row, result_document, update_facts
from .monitor import Monitor
from .optimizer import NonFiniteGradient, step_optimizer
from .plugin_record import record_plugins
from .rehearsal import rehearse
from .run import Run, describe_checks
from .samples import print_rollouts
from .search import Search
from .state import State
from .teacher_text import TeacherTexts, load_or_sample
from .trackers import Trackers
from .update import Update


class Session:
    """Trains one run in its run folder, from the start or from its newest checkpoint.

    Every rank has a session and calls its ``report``. ``state``: what changes; ``monitor``:
    evaluations and tail probes; ``search``: EffOPD; ``texts``: what the teacher sampled;
    ``interrupt``: a request to stop.
    """

    def __init__(
        self,
        run: Run,
        folder: RunFolder,
        report: Reporter,
        resume: bool = False,
        interrupt: Interrupt | None = None,
    ):
        self.run = run
        self.folder = folder
        self.report = report
        self.resume = resume
        self.interrupt = interrupt or Interrupt()
        self.state = State(run, folder, report)
        self.monitor = Monitor(self.state)
        self.search = Search(self.state)
        self.texts: TeacherTexts = {}
        self.resumed_from: int | None = None
        self.full_cost = 0.0
        self.selection_was_noted = False

    def train(self) -> dict:
        """Run the remaining steps, save the model and return the result document.

        Interrupted: ``interrupt`` was asked to stop; the step or evaluation in progress is
        finished and the state is saved. Stopped: a number is not finite, or the ranks differ.
        """
        self.begin()
        while self.state.step < self.run.config.train.steps:
            self.stop_if_asked()
            update = Update(self.state, self.state.step, self.texts)
            rollouts = update.select(update.sample())  # marks the tokens to train on
            print_rollouts(update, rollouts)
            losses = update.backward(rollouts)  # gradients of all ranks, divided once
            self.refuse_non_finite(losses)
            facts = update_facts(update, losses)
            self.note_selection(update)
            rate, norm = self.step_optimizer()
            self.complete(update, facts)
            self.extrapolate_if_due()
            self.refresh_copies()
            self.record(update, facts, metrics_row(update, facts, rate=rate, norm=norm))
            self.measure_if_due()
            self.save_if_due()
        return self.finish()

    # Begin

    def begin(self) -> None:
        """Restore a checkpoint, or measure the untrained student and save it."""
        config, place, state = self.run.config, self.run.place, self.state
        restored = self.resume and self.restore()
        if self.resume and place.is_first:
            # The next resume keeps the changes given on this one.
            self.folder.write_config(commits.names_as_given(config, self.folder))
        if restored:
            self.monitor.resume()
        else:
            rehearse(state)
            self.monitor.start()
        self.texts = self.load_teacher_texts()
        if not restored:
            state.save()
        elif state.step < config.train.steps:
            self.monitor.look()  # an evaluation that the interruption prevented
        self.full_cost = full_cost(self.run, state.progress, range(state.step))

    def restore(self) -> bool:
        """Restore the newest checkpoint; return False if the run has none."""
        if self.folder.has_checkpoint:
            self.resumed_from = self.state.restore()
            return True
        self.report.note(
            "the run was interrupted before its first checkpoint: it starts from the beginning"
        )
        if self.run.place.is_first:
            for name in ("scores.jsonl", "samples.jsonl"):
                self.folder.rewind(name, -1, self.report.warn)
        return False

    def load_teacher_texts(self) -> TeacherTexts:
        """Return what the teacher samples for --off-policy, if anything."""
        run = self.run
        if run.method.off_policy is None:
            return {}
        longest = run.method.prefix.longest(run.config.train.steps)
        with self.state.clock.phase("teacher_text"):
            teacher = make_decoder(run.pair.teacher, run.place.dtype)
            return load_or_sample(self.state, teacher, longest)

    # One step

    def stop_if_asked(self) -> None:
        """Save and raise Interrupted on all ranks if any rank was asked to stop."""
        asked = next(filter(None, self.run.place.gather(self.interrupt.received)), None)
        if asked is not None:
            self.state.save()
            raise Interrupted(
                f"interrupted ({asked.name}) after step {self.state.step}; the state is saved; "
                f"continue with prefix-distill run --resume --out {self.folder.path}",
                asked,
            )

    def refuse_non_finite(self, losses: TokenLosses) -> None:
        """Stop the run on all ranks if any rank has a non-finite divergence; name the cause."""
        reason = describe_non_finite(self.run, losses)
        if reason is not None:
            self.state.stop(reason)

    def note_selection(self, update: Update) -> None:
        """Report once if selecting tokens takes an extra forward pass."""
        separate = not update.reused_forward_pass and "selection" in update.meter.ledger.useful
        if separate and not self.selection_was_noted:
            self.report.note(
                "token selection needs an extra forward pass (ledger row `selection`), because the "
                "rollouts do not fit one micro-batch (--micro-batch-size, at most 10% padding)"
            )
            self.selection_was_noted = True

    def step_optimizer(self) -> tuple[float, float]:
        """Take the optimizer step; return its learning rate and the gradient's norm."""
        config, state = self.run.config, self.state
        rate = learning_rate(
            state.step,
            peak=config.schedule.lr,
            schedule=config.schedule.lr_schedule,
            steps=config.train.steps,
            warmup=warmup_steps(config.schedule.warmup, config.train.steps),
        )
        trained = self.run.pair.student.trainable
        with state.clock.phase("optimizer"):
            try:
                with explain_shortage(self.run):
                    norm = step_optimizer(
                        state.optimizer, trained, rate=rate, grad_clip=config.train.grad_clip
                    )
            except NonFiniteGradient as error:
                state.stop(str(error))
        return rate, norm

    def complete(self, update: Update, facts: UpdateFacts) -> None:
        """Count the step: its prefix, tokens, FLOPs and seconds."""
        state = self.state
        state.progress.taught_prefix = update.prefix
        state.progress.step += 1
        state.progress.tokens += facts.tokens
        state.count(update.meter)

    def extrapolate_if_due(self) -> None:
        """Search along the recent displacement (EffOPD), if one is due after this step."""
        if self.search.is_due:
            self.search.run()

    def refresh_copies(self) -> None:
        """Bring the sampling copy, and an averaged teacher, up to date with the student."""
        with self.state.clock.phase("optimizer"):
            self.state.refresh_copies()

    def record(self, update: Update, facts: UpdateFacts, row: dict) -> None:
        """Adapt the prefix schedule, and write the step to the run folder and to ``report``."""
        state, progress = self.state, self.state.progress
        reason = self.run.method.prefix.observe(
            update.step, progress.prefix, signal=facts.newest, reached=facts.filled
        )
        if reason:
            progress.decisions.append({"step": progress.step, "reason": reason})
            self.report.note(reason)
        self.full_cost += full_cost(self.run, progress, range(update.step, update.step + 1))
        if self.run.place.is_first:
            self.folder.append("metrics.jsonl", row)
        self.report.row(row, progress.ledger.total(), self.full_cost)
        every = self.run.config.runtime.check_ranks_every
        if every and progress.step % every == 0:
            state.compare_ranks()

    @property
    def is_last(self) -> bool:
        """Return whether all steps are completed."""
        return self.state.step == self.run.config.train.steps

    def measure_if_due(self) -> None:
        """Evaluate or probe the tail if due; the last evaluation belongs to ``finish``."""
        if not self.is_last:
            self.stop_if_asked()
            self.monitor.look()

    def save_if_due(self) -> None:
        """Write a checkpoint every --save-every steps and after the last one."""
        every = self.run.config.checkpoint.save_every
        if self.is_last or (every and self.state.step % every == 0):
            self.state.save()

    # End

    def finish(self) -> dict:
        """Evaluate and save the trained model; return the result document."""
        run, state, folder = self.run, self.state, self.folder
        after = self.monitor.evaluate()
        if run.place.is_first:
            folder.write_rows("examples-after.jsonl", after.pop("records"))
            folder.write_json("after.json", after)
            self.save_model()
            if run.config.extrapolation.diagnostics:
                self.search.diagnose()
        result = result_document(state, self.resumed_from)
        if run.place.is_first:
            folder.write_json("run.json", {**folder.read_json("run.json"), "result": result})
            folder.remove("displacements")
        run.place.barrier()
        return {"out": str(folder.path), **result}

    def save_model(self) -> None:
        """Save the student in model/, and with --lora-merge the adapter in adapter/.

        Stopped: the files would not hold the trained weights.
        """
        run, progress = self.run, self.state.progress
        cost = full_cost(run, progress, range(progress.step))
        text = make_card(run, progress, progress.evaluations[-1], full=cost)
        student = run.pair.student
        if run.config.adapter.merge:
            notes = self.folder.save_merged_model("model", student, text)
            notes += self.folder.save_model("adapter", student, text)
        else:
            notes = self.folder.save_model("model", student, text)
        for note in notes:
            self.report.note(note)


def train_in(
    run: Run, folder: RunFolder, observer: Observer, resume: bool = False, label: str = ""
) -> dict:
    """Open the run folder, train and return the result document.

    ``observer`` watches the run and may stop it; ``label`` names the run among several.
    """
    config = run.config
    plugins = load_plugins(config.runtime.plugin)
    plugins += find_unfiled(config.divergence.name, config.schedule.prefix)
    interrupt = Interrupt()
    if run.place.is_first:
        watched = observer.watch(config.train.steps, label, interrupt.ask)
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
        "generation_config": configs,
        commits.KEY: commits.find_commits(run.config),
    }
