"""Session: the training loop of on-policy prefix distillation (arXiv 2602.15260)."""

import signal
from typing import NoReturn

import torch

from ..display import SAVING, Reporter, phase
from ..engine import stopping
from ..engine.decoder import make_decoder
from ..engine.device import is_out_of_memory
from ..engine.rollout import Rollout
from ..errors import CONTINUE, Interrupted
from ..maths.schedule import learning_rate, warmup_steps
from ..plugins import find_fault
from ..signals import Interrupt
from . import commits
from .card import make_card
from .ending import Ending
from .faults import describe_network_failure, describe_non_finite, explain_shortage
from .folder import RunFolder
from .loss import TokenLosses
from .metrics import UpdateFacts, full_cost, metrics_row, result_document, update_facts
from .monitor import Monitor
from .optimizer import NonFiniteGradient, step_optimizer
from .rehearsal import rehearse
from .rounding import SMALL, describe_rounding, measure_rounding
from .run import Run, settled
from .samples import print_rollouts
from .search import Search
from .state import State
from .teacher_score import gap_closed, is_measured, measure_teacher
from .teacher_text import TeacherTexts, load_or_sample
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
        self.ending = Ending(self.state, self.monitor)
        self.texts: TeacherTexts = {}
        self.resumed_from: int | None = None
        self.full_cost = 0.0
        self.selection_was_noted = False

    def train(self) -> dict:
        """Run the remaining steps, save the model and return the result document.

        Interrupted: ``interrupt`` was asked to stop; the step in progress is finished, an
        evaluation is cut off, and the state is saved. Stopped: a number is not finite, or the
        ranks differ.
        """
        try:
            return self.take_steps()
        except stopping.CutOff as cut_off:
            self.stop(cut_off.number)

    def take_steps(self) -> dict:
        """Run the remaining steps, save the model and return the result document."""
        self.begin()
        while not self.is_last:
            self.stop_if_asked()
            update = Update(self.state, self.state.step, self.texts)
            rollouts = update.select(update.sample())  # marks the tokens to train on
            print_rollouts(update, rollouts)
            losses = self.compute_gradients(update, rollouts)  # of all ranks, divided once
            self.refuse_non_finite(losses)
            facts = update_facts(update, losses)
            self.note_selection(update)
            rate, norm = self.step_optimizer()
            self.complete(update, facts)
            self.extrapolate_if_due()
            self.refresh_copies()
            self.record(update, facts, metrics_row(update, facts, rate=rate, norm=norm))
            self.measure_if_due()
            self.ending.look()
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
            with stopping.cutting_off(self.interrupt):
                self.monitor.start()
        self.texts = self.load_teacher_texts()
        if not restored:
            self.ending.save()
        elif state.step < config.train.steps:
            with stopping.cutting_off(self.interrupt):
                self.monitor.look()  # an evaluation that the interruption prevented
        self.full_cost = full_cost(self.run, state.progress, range(state.step))
        self.ending.begin(restored)

    def restore(self) -> bool:
        """Restore the newest checkpoint; return False if the run has none."""
        if self.folder.has_checkpoint:
            self.resumed_from = self.ending.restore()
            return True
        self.report.note(
            "the run was interrupted before its first checkpoint: it starts from the beginning"
        )
        if self.run.place.is_first:
            for name in ("scores.jsonl", "samples.jsonl"):
                self.folder.rewind(name, -1, self.state.warn)
        return False

    def load_teacher_texts(self) -> TeacherTexts:
        """Return what the teacher samples for --off-policy, if anything."""
        run = self.run
        if run.method.off_policy is None:
            return {}
        longest = run.method.prefix.longest(run.config.train.steps)
        with self.state.clock.phase("teacher_text"), stopping.cutting_off(self.interrupt):
            teacher = make_decoder(run.pair.teacher, run.place.dtype)
            return load_or_sample(self.state, teacher, longest)

    # One step

    def stop_if_asked(self) -> None:
        """Save and raise Interrupted on all ranks if any rank was asked to stop."""
        asked = next(filter(None, self.run.place.gather(self.interrupt.received)), None)
        if asked is not None:
            self.stop(asked)

    def stop(self, asked: signal.Signals) -> NoReturn:
        """Save the state, unless the untrained student is not measured yet; raise Interrupted."""
        where = "before the first step, so training starts from the beginning"
        if self.state.progress.evaluations:
            self.state.save()
            where = f"after step {self.state.step}; the state is saved"
        raise Interrupted(
            f"interrupted ({asked.name}) {where}; {CONTINUE} --out {self.folder.path}",
            asked,
        )

    def compute_gradients(self, update: Update, rollouts: list[Rollout]) -> TokenLosses:
        """Accumulate the gradients of a step. Stopped: the network's code failed; name the place.

        On several ranks the error of a lost rank looks alike, and is told by its own rank.
        """
        try:
            return update.backward(rollouts)
        except RuntimeError as error:
            is_explained = is_out_of_memory(error) or find_fault(error) is not None
            if is_explained or self.run.place.world > 1:
                raise
            self.state.stop(describe_network_failure(self.state.pair, error))

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
            peak=settled(config.schedule.lr, "--lr"),
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
        """Bring the working copy, and an averaged teacher, up to date with the student."""
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
        """Return whether all steps are completed, or the run ends early."""
        is_complete = self.state.step >= self.run.config.train.steps
        return is_complete or self.ending.reason is not None

    def measure_if_due(self) -> None:
        """Evaluate or probe the tail if due; the last evaluation belongs to ``finish``."""
        if not self.is_last:
            self.stop_if_asked()
            with stopping.cutting_off(self.interrupt):
                self.monitor.look()

    def save_if_due(self) -> None:
        """Write a checkpoint every --save-every steps, by the clock, and after the last step."""
        every = self.run.config.checkpoint.save_every
        by_clock = self.ending.is_save_due()  # on all ranks
        if self.is_last or by_clock or (every and self.state.step % every == 0):
            self.ending.save()

    # End

    def finish(self) -> dict:
        """Evaluate and save the trained model; return the result document."""
        run, state, folder = self.run, self.state, self.folder
        with stopping.cutting_off(self.interrupt):
            after = self.monitor.evaluate()
        if run.place.is_first:
            folder.write_rows("examples-after.jsonl", after.pop("records"))
            folder.write_json("after.json", after)
            self.save_model()
            if run.config.extrapolation.diagnostics:
                self.search.diagnose()
        rounding, teacher = self.measure_rounding(), self.measure_teacher()
        result = result_document(state, self.resumed_from)
        closed = gap_closed(result["accuracy_before"], result["accuracy_after"], teacher)
        result |= {"rounding": rounding, "accuracy_teacher": teacher, "gap_closed": closed}
        result["stopped"] = self.ending.describe()
        if run.place.is_first:
            folder.write_json("run.json", {**folder.read_json("run.json"), "result": result})
            folder.remove("displacements")
            folder.finish(run.config.checkpoint.keep)
        run.place.barrier()
        return {"out": str(folder.path), **result}

    @phase(SAVING, at_stop="finishing this save")
    def save_model(self) -> None:
        """Save the student in model/, and with --lora-merge the adapter in adapter/.

        Stopped: the files would not hold the trained weights.
        """
        run, progress = self.run, self.state.progress
        cost = full_cost(run, progress, range(progress.step))
        text = make_card(run, progress, progress.evaluations[-1], full=cost)
        student, dtype = run.pair.student, run.save_dtype
        if run.config.adapter.merge:
            notes = self.folder.save_merged_model("model", student, text, dtype=dtype)
            notes += self.folder.save_model("adapter", student, text)
        else:
            notes = self.folder.save_model("model", student, text, dtype=dtype)
        for note in notes:
            self.report.note(note)

    def measure_teacher(self) -> dict | None:
        """Return the teacher's accuracy on the held-out problems, unless it tells nothing."""
        if not is_measured(self.run):
            return None
        if not self.ending.has_time_for_teacher():
            self.report.note("the teacher is not evaluated, because --max-hours leaves no time")
            return None
        with stopping.cutting_off(self.interrupt):
            score = measure_teacher(self.state)
        if self.run.place.is_first:
            self.folder.write_rows("examples-teacher.jsonl", score.records)
        return score.accuracy

    def measure_rounding(self) -> dict | None:
        """Report what --save-dtype bfloat16 costs, on all ranks; None if nothing was rounded."""
        run = self.run
        dtype = run.save_dtype
        if dtype in (None, torch.float32, run.pair.student.net.dtype):
            return None
        run.place.barrier()  # rank 0 has written the model
        loss = measure_rounding(self.state, self.monitor.contexts)
        text = describe_rounding(loss, self.state.progress.evaluations[-1]["kl"]["value"])
        if loss["kept"] is not None and loss["kept"] < SMALL:
            self.state.warn(f"{text}; save with --save-dtype float32")
        else:
            self.report.note(text)
        return loss
