"""Monitor: what a run measures beside its loss.

Evaluations, the tail beyond the prefix, and the best student so far.
"""

import dataclasses
from typing import Any

from ..display import EVALUATION, TAIL_PROBE, phase
from ..engine import evaluate
from ..engine.evaluate import Facts, Score
from ..engine.meter import Meter
from ..engine.pair import Pair
from ..engine.rollout import Rollout, Unit, copy_as_student
from ..engine.sampling import GenerationCost
from ..engine.scoring import LOW_FIRST_TOKEN_PROBABILITY, Scorer
from ..errors import Stopped, UserError
from ..maths import intervals
from ..maths.weights import quadrants
from ..prompts.grading import describe_timeouts
from ..prompts.prompt import Rendered
from .card import make_card
from .samples import store_evaluation
from .state import State
from .tails import (
    TokenValues,
    advise_on_length,
    alignment_facts,
    divergence_by_token,
    ending_facts,
    mean_probability,
    tail_change,
    tail_warning,
)

# mean probability on the shared tokens, across tokenizers, below which a loss on them misses too
# much
SHARED_MASS = 0.95


class Monitor:
    """Measures the student of one run.

    ``before``: the measurement of the untrained student, stored in before.json; ``contexts``: its
    rollouts of held-out prompts, the fixed contexts of all measurements.
    """

    def __init__(self, state: State):
        self.state = state
        self.run = state.run
        self.progress = state.progress
        self.report = state.report
        self.before: dict = {}
        self.contexts: list[Rollout] = []

    @phase(EVALUATION, at_stop="leaving this evaluation unfinished; no step was trained")
    def start(self) -> None:
        """Sample the fixed contexts and measure the untrained student.

        Stopped: no token of the contexts has a counterpart in the teacher's tokenization.
        """
        meter = self.state.meter()
        with meter.phase("evaluation"):
            sampled = self._full_rollouts(self.run.problems.kl, meter, "evaluation")
        aligned = self.run.pair.align(sampled)
        self.contexts = [dataclasses.replace(r, spans=True) for r in aligned]
        probed = self.contexts[: self.run.config.evaluate.tail_prompts]
        if not any(u.exact for r in probed for u in r.taught_units):
            raise Stopped(
                "no token of the student's answers to held-out prompts has a counterpart in the "
                "teacher's tokenization; choose another pair"
            )
        self.state.count(meter)
        measured = self._measure(sampled=self.contexts)
        self.report.evaluation(self.progress.evaluations[-1])
        limit = self.run.max_new_tokens
        for advice in advise_on_length(measured["finish_rate"], limit, "--student-thinking"):
            self.state.warn(advice)
        self._report_first_token(measured["teacher_first_token"])
        if self.run.pair.alignment is not None:
            self._report_coverage(measured["alignment"])
        records = measured.pop("records")
        rows = [_describe_rollout(r) for r in self.contexts]
        self.before = {**measured, "rollouts": rows}
        if self.run.place.is_first:
            self.state.folder.write_json("before.json", self.before)
            self.state.folder.write_rows("examples-before.jsonl", records)

    def _report_first_token(self, probability: float) -> None:
        text = (
            "the teacher gives the first tokens of the student's answers a mean probability of "
            f"{probability:.2g}"
        )
        if probability < LOW_FIRST_TOKEN_PROBABILITY:
            self.state.warn(
                f"{text}; check that both prompts ask for the same form of answer (--template, "
                "--student-thinking, --teacher-thinking, --begin)"
            )
        else:
            self.report.detail(text)

    def _report_coverage(self, coverage: dict) -> None:
        self.report.note(
            f"alignment of the student's answers: {coverage['exact_share']:.1%} of student tokens "
            f"map to one teacher token, {coverage['span_share']:.1%} lie in spans, "
            f"{coverage['dropped_share']:.1%} are unaligned"
        )
        student, teacher = coverage["student_mass"], coverage["teacher_mass"]
        if min(student, teacher) < SHARED_MASS:
            self.state.warn(
                f"only {student:.1%} of the student's and {teacher:.1%} of the teacher's "
                "probability is on shared tokens; the loss ignores the rest; try "
                "--cross-tokenizer simct or --off-policy sft"
            )

    def resume(self) -> None:
        """Read the fixed contexts and their measurement. UserError: before.json is damaged."""
        folder = self.state.folder
        self.before = folder.read_json("before.json")
        try:
            self.contexts = [_read_rollout(row) for row in self.before["rollouts"]]
        except (KeyError, TypeError, AttributeError):
            raise UserError(
                f"run folder {folder.path}: before.json: expected the rollouts of a run, got other "
                "content; start again with another --out"
            ) from None

    @phase(EVALUATION, at_stop="leaving this evaluation unfinished, then saving")
    def evaluate(self) -> dict:
        """Measure the current student, and warn if text beyond the prefix got worse."""
        measured = self._measure()
        self.report.evaluation(self.progress.evaluations[-1])
        self._warn_about_tail(self.before, measured)
        return measured

    def look(self) -> None:
        """Evaluate or probe the tail if that is due after this step and not yet done."""
        step = self.progress.step
        if not self.is_due(step):
            return
        if self.is_evaluation(step):
            self.evaluate()
        else:
            self.probe_tail()

    def is_evaluation(self, step: int) -> bool:
        """Return whether --eval-every asks for an evaluation after ``step``."""
        every = self.run.config.evaluate.every
        return bool(every) and step % every == 0

    def is_due(self, step: int) -> bool:
        """Return whether an evaluation or a tail probe is due after ``step`` and not yet done."""
        evaluated = self.progress.evaluations[-1]["step"]
        if self.is_evaluation(step):
            return bool(evaluated < step)
        every = self.run.config.evaluate.tail_every
        probed = [row["step"] for row in self.progress.tail_probes]
        return bool(every) and step - max([evaluated, *probed]) >= every

    @phase(TAIL_PROBE, at_stop="leaving this tail probe unfinished, then saving")
    def probe_tail(self) -> dict:
        """Measure the student beyond the prefix, on a few fixed contexts.

        Measured: the reverse KL on them, and how full answers to their prompts end. The answers are
        sampled with the seeds of the untrained student. The FLOPs are a separate row of the ledger,
        included in the totals.
        """
        run, progress = self.run, self.progress
        count = run.config.evaluate.tail_prompts
        contexts = self.contexts[:count]
        meter = self.state.meter()
        with meter.phase("tail_probe"):
            facts = self._measure_contexts(contexts, meter, "tail_probe")
            values = divergence_by_token(contexts, facts)
            full = self._full_rollouts(run.problems.kl[:count], meter, "tail_probe")
        self.state.count(meter)
        endings = ending_facts(full)
        head, tail = intervals.split_mean(values, progress.taught_prefix)
        row = {
            "step": progress.step,
            "kl": intervals.token_mean(values)["value"],
            "kl_prefix": head,
            "kl_tail": tail,
            **endings,
            "kl_tail_change": self._tail_change(values, count),
        }
        progress.tail_probes.append(row)
        self.report.tail(row)
        before = {"kl_by_token": self.before["kl_by_token"][:count], **ending_facts(contexts)}
        self._warn_about_tail(before, {"step": progress.step, "kl_by_token": values, **endings})
        self._keep_best(progress.step, None, values)
        return row

    def _tail_change(self, values: TokenValues, count: int | None = None) -> dict | None:
        """Return how the KL beyond the prefix changed on the first ``count`` fixed contexts."""
        if not self.before:
            return None  # this is the untrained student
        before = self.before["kl_by_token"][:count]
        return tail_change(before, values, self.progress.taught_prefix)

    def _warn_about_tail(self, before: dict, measured: dict) -> None:
        text = tail_warning(before, measured, self.progress.taught_prefix)
        if text:
            self.state.warn(text)

    def _measure(self, sampled: list[Rollout] | None = None) -> dict:
        """Measure accuracy on the held-out problems and the reverse KL on the fixed contexts.

        It also saves the best student. If no problem is evaluated, the endings are those of the
        full answers ``sampled``, or of a new sample.
        """
        run, progress = self.run, self.progress
        meter = self.state.meter()
        score: Score | None = None
        with meter.phase("evaluation"):
            facts = self._measure_contexts(self.contexts, meter, "evaluation")
            values = divergence_by_token(self.contexts, facts)
            gap = self._sampler_gap(meter)
            if run.problems.held_out:
                score = self._score(meter)
                endings = {
                    "finish_rate": score.finish_rate,
                    "mean_tokens": score.mean_tokens,
                    "repetition_rate": score.repetition_rate,
                    "answers": len(run.problems.held_out) * run.config.evaluate.rollouts,
                }
            else:
                if not sampled:
                    sampled = self._full_rollouts(run.problems.kl, meter, "evaluation")
                endings = ending_facts(sampled)
        self.state.count(meter)
        row = self._evaluation_row(facts, values, endings)
        row["graded_by"] = run.problems.grader.name
        if score is not None:
            row["accuracy"] = score.accuracy
            row["finished_accuracy"] = score.finished_accuracy
        row["sampler_kl"] = gap
        row["kl_tail_change"] = self._tail_change(values)
        if not progress.evaluations or progress.evaluations[-1]["step"] != progress.step:
            progress.evaluations.append(row)
            if run.place.is_first and score is not None and score.accuracy:
                right = {"step": progress.step, "right": score.right()}
                self.state.folder.append("scores.jsonl", right)
            if run.place.is_first:
                records = [] if score is None else score.records
                store_evaluation(self.state, row, records, contexts=self.contexts, values=values)
        self._keep_best(progress.step, row["accuracy"], values)
        records = [] if score is None else score.records
        return {**row, "kl_by_token": values, "records": records}

    def _score(self, meter: Meter) -> Score:
        """Sample and grade full answers to the held-out problems."""
        run = self.run
        score = evaluate.evaluate(
            self.state.decoding,
            run.problems.held_out,
            dataclasses.replace(run.evaluation, prefix=self.progress.taught_prefix),
            limits=run.limits,
            cost=GenerationCost.in_phase(meter, run.pair.student_shape, "evaluation"),
        )
        if score.timeouts:
            self.state.warn(describe_timeouts(run.problems.grader, score.timeouts))
        return score

    def _evaluation_row(self, facts: list[Facts], values: TokenValues, endings: dict) -> dict:
        """Return the row of an evaluation for ``Progress.evaluations``, but for its accuracy."""
        progress = self.progress
        head, tail = intervals.split_mean(values, progress.taught_prefix)
        borders = None
        if progress.evaluations:
            borders = progress.evaluations[0]["quadrants"]["borders"]
        entropies = intervals.known([row["entropy"] for row in facts])
        divergences = intervals.known([row["divergence"] for row in facts])
        row: dict[str, Any] = {
            "step": progress.step,
            "accuracy": None,
            "finished_accuracy": None,
            "kl": intervals.token_mean(values),
            "kl_prefix": head,
            "kl_tail": tail,
            "sampler_kl": None,
            **endings,
            "quadrants": quadrants(entropies, divergences, borders),
            "teacher_first_token": mean_probability([row["teacher_logp"][0] for row in facts]),
            "flops_useful": progress.ledger.total(),
            "flops_executed": progress.ledger.total("executed"),
            "seconds": progress.training_seconds(),
        }
        if self.run.pair.alignment is not None:
            row["alignment"] = alignment_facts(self.contexts, facts)
        return row

    def _sampler_gap(self, meter: Meter) -> float | None:
        """Return KL(sampler‖student) on the fixed contexts, in nats per token.

        It measures how far a sampling copy in another dtype is from on-policy. None: the student
        itself samples.
        """
        masters, pair = self.state.masters, self.state.pair
        if masters.sampler is masters.student:
            return None
        copies = Pair(
            student=self.state.decoding,
            teacher=pair.student,
            student_shape=pair.student_shape,
            teacher_shape=pair.student_shape,
        )
        facts = evaluate.held_out_facts(
            Scorer.reverse_kl(copies, self.run.place, self.run.method.terms.memory_bytes),
            copy_as_student(self.contexts),
            self.run.limits,
            meter=meter,
            phase="evaluation",
        )
        return intervals.token_mean([row["divergence"] for row in facts])["value"]

    def _full_rollouts(self, prompts: list[Rendered], meter: Meter, phase: str) -> list[Rollout]:
        """Sample a full answer of the current student to every prompt."""
        run = self.run
        cost = GenerationCost.in_phase(meter, run.pair.student_shape, phase)
        return evaluate.fixed_rollouts(
            self.state.decoding, prompts, run.evaluation, limits=run.limits, cost=cost
        )

    def _measure_contexts(self, contexts: list[Rollout], meter: Meter, phase: str) -> list[Facts]:
        return measure_contexts(self.state, contexts, meter, phase=phase)

    def _keep_best(self, step: int, accuracy: dict | None, values: TokenValues) -> None:
        """Save the student in best/ if it is the best so far.

        Best is the highest accuracy if the run evaluates it, else the lowest reverse KL on the
        contexts of the tail probe.
        """
        settings, progress = self.run.config.evaluate, self.progress
        if not settings.every and not settings.tail_every:
            return
        if settings.every and accuracy:
            merit = accuracy["value"]
        else:
            merit = -intervals.token_mean(values[: settings.tail_prompts])["value"]
        # "not better", rather than "worse or equal": a merit that is NaN is never better.
        if progress.best is not None and not merit > progress.best["merit"]:
            return
        progress.best = {
            "step": step,
            "merit": merit,
            "accuracy": accuracy,
            "kl": intervals.token_mean(values),
        }
        if self.run.place.is_first:
            text = make_card(self.run, progress, progress.best)
            student, dtype = self.run.pair.student, self.run.save_dtype
            for note in self.state.folder.save_model("best", student, text, dtype=dtype):
                self.report.note(note)


def measure_contexts(
    state: State, contexts: list[Rollout], meter: Meter, phase: str
) -> list[Facts]:
    """Return both models' token statistics on the rollouts ``contexts``."""
    run = state.run
    scorer = Scorer.reverse_kl(state.pair, run.place, run.method.terms.memory_bytes)
    return evaluate.held_out_facts(scorer, contexts, run.limits, meter=meter, phase=phase)


def _describe_rollout(r: Rollout) -> dict[str, Any]:
    """Return a fixed context as JSON values for before.json (run folder format 1)."""
    row = dataclasses.asdict(r)
    return {"prompt": row.pop("slot"), **row}


def _read_rollout(row: dict[str, Any]) -> Rollout:
    """Return a fixed context from its row in before.json, which stores tuples as lists."""
    fields: dict[str, Any] = {}
    for name, value in row.items():
        fields[name] = tuple(value) if isinstance(value, list) else value
    fields["slot"] = fields.pop("prompt")
    if fields.get("units"):
        fields["units"] = tuple(Unit(*u) for u in fields["units"])
    return Rollout(**fields)
