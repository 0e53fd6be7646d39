"""What a run looks at beside its loss: evaluations, the tail beyond the prefix, the best
student, the cost of full rollouts."""

import dataclasses
import math
from typing import Any

from ..display import Reporter
from ..engine import evaluate, scoring
from ..engine.device import Clock
from ..engine.evaluate import Score
from ..engine.models import Model
from ..engine.rollout import Rollout, Unit
from ..engine.sampling import Sampler
from ..engine.scoring import FIRST_TOKEN
from ..errors import Stopped, UserError
from ..maths import intervals
from ..maths.flops import Ledger, Passes
from ..maths.seeds import seed_of
from ..maths.weights import quadrants
from ..prompts.prompt import Rendered
from .card import card
from .folder import RunFolder
from .metrics import (
    alignment_facts,
    divergence_by_token,
    ending_facts,
    mean_probability,
    merge,
    tail_warning,
)
from .run import Run
from .state import Progress

# mean probability on the shared tokens, across tokenizers, below which a loss on them misses too
# much
SHARED_MASS = 0.95

TokenValues = list[list[float | None]]  # rollout by rollout
Facts = dict[str, list[float | None]]  # one fixed rollout: statistic → one number per token


class Monitor:
    """Measures the student of one run. ``before``: what the untrained student's measurement found,
    kept in before.json with the rollouts it drew from held-out prompts: the fixed contexts of every
    later comparison."""

    def __init__(  # noqa: PLR0913  `Session` will own these
        self,
        run: Run,
        decoding: Model,
        progress: Progress,
        clock: Clock,
        folder: RunFolder,
        report: Reporter,
    ):
        self.run = run
        self.decoding = decoding
        self.progress = progress
        self.clock = clock
        self.folder = folder
        self.report = report
        self.before: dict = {}
        self.fixed: list[Rollout] = []

    def start(self) -> None:
        """Draws the fixed contexts and measures the untrained student."""
        ledger = Ledger()
        with self.clock.phase("evaluation"):
            drawn = self._full_rollouts(self.run.kl_prompts, ledger, "evaluation")
        self.fixed = [dataclasses.replace(r, spans=True) for r in self.run.aligned(drawn)]
        if not any(
            u.exact
            for r in self.fixed[: self.run.config.evaluate.tail_prompts]
            for u in r.taught_units
        ):
            raise Stopped(
                "no token of the student's answers to held-out prompts has a counterpart in the "
                "teacher's tokenization; choose another pair"
            )
        merge(self.run, self.progress, ledger)
        found = self._measure(self.fixed)
        self.report.evaluation(self.progress.evaluations[-1])
        first = found["teacher_first_token"]
        text = (
            "the teacher gives the first tokens of the student's answers a mean probability of "
            f"{first:.2g}"
        )
        if first < FIRST_TOKEN:
            self.report.warn(
                f"{text}; do both prompts ask for the same form of answer (--template, "
                "--student-thinking, --teacher-thinking, --begin)?"
            )
        else:
            self.report.note(text)
        if self.run.alignment is not None:
            self._say_coverage(found["alignment"])
        records = found.pop("records")
        self.before = {**found, "rollouts": [dataclasses.asdict(r) for r in self.fixed]}
        if self.run.place.first:
            self.folder.write_json("before.json", self.before)
            self.folder.write_rows("examples-before.jsonl", records)

    def _say_coverage(self, found: dict) -> None:
        self.report.note(
            f"of the tokens of the student's own answers {found['exact_share']:.1%} align one to "
            f"one, {found['span_share']:.1%} in spans, {found['dropped_share']:.1%} not at all"
        )
        if min(found["student_mass"], found["teacher_mass"]) < SHARED_MASS:
            self.report.warn(
                f"of the student's probability {found['student_mass']:.1%} is on tokens that the "
                f"teacher has, too, and of the teacher's {found['teacher_mass']:.1%} on the "
                "student's: choices among the others are not compared; simct compares the spans "
                "that were written, --off-policy sft needs no comparison"
            )

    def resume(self) -> None:
        """Takes the fixed contexts and what was measured on them from before.json."""
        self.before = self.folder.read_json("before.json")
        try:
            self.fixed = [_read_rollout(row) for row in self.before["rollouts"]]
        except (KeyError, TypeError, AttributeError):
            raise UserError(
                f"run folder {self.folder.path}: before.json is not what a run writes; start anew "
                "with another --out"
            ) from None

    def evaluate(self) -> dict:
        """Measures the current student and says so when its tail is being hurt."""
        found = self._measure(None)
        self.report.evaluation(self.progress.evaluations[-1])
        self._warn(self.before, found)
        return found

    def look(self) -> None:
        """An evaluation or a tail probe where one is due after this update and has not been
        made."""
        settings, step = self.run.config.evaluate, self.progress.step
        evaluated = self.progress.evaluations[-1]["step"]
        if settings.every and step % settings.every == 0:
            if evaluated < step:
                self.evaluate()
        elif (
            settings.tail_every
            and step - max([evaluated, *(row["step"] for row in self.progress.tail_probes)])
            >= settings.tail_every
        ):
            self.probe_tail()

    def probe_tail(self) -> dict:
        """A small look beyond the prefix: reverse KL on the first few fixed contexts, and how the
        student's own full answers to these prompts end, drawn with the seeds of the untrained
        student's. A ledger row of its own, inside the totals."""
        run, ledger, count = self.run, Ledger(), self.run.config.evaluate.tail_prompts
        with self.clock.phase("tail_probe"):
            contexts = self.fixed[:count]
            facts = _measure_contexts(run, contexts, ledger, "tail_probe")
            values = divergence_by_token(contexts, facts)
            full = self._full_rollouts(run.kl_prompts[:count], ledger, "tail_probe")
        merge(run, self.progress, ledger)
        found = {"step": self.progress.step, "kl_by_token": values, **ending_facts(full)}
        head, tail = intervals.split_mean(values, self.progress.taught_prefix)
        row = {
            "step": self.progress.step,
            "kl": intervals.token_mean(values)["value"],
            "kl_prefix": head,
            "kl_tail": tail,
            "finish_rate": found["finish_rate"],
            "mean_tokens": found["mean_tokens"],
        }
        self.progress.tail_probes.append(row)
        self.report.tail(row)
        self._warn(
            {"kl_by_token": self.before["kl_by_token"][:count], **ending_facts(contexts)},
            found,
        )
        self._keep_best(row["step"], None, values)
        return row

    def _warn(self, before: dict, found: dict) -> None:
        if text := tail_warning(before, found, self.progress.taught_prefix):
            self.progress.warnings.append({"step": found["step"], "text": text})
            self.report.warn(text)

    def _measure(self, full: list[Rollout] | None) -> dict:
        """Accuracy on the held-out problems and reverse KL on the fixed contexts, now; keeps the
        best student.

        Where no problem is evaluated, the length and endings of full answers come from ``full``,
        drawn now if None.
        """
        run, progress, ledger = self.run, self.progress, Ledger()
        with self.clock.phase("evaluation"):
            facts = _measure_contexts(self.run, self.fixed, ledger, "evaluation")
            values = divergence_by_token(self.fixed, facts)
            gap = self._sampler_gap(ledger)
            score = None
            if run.problems:
                score = self._score(ledger)
                endings = {
                    "finish_rate": score.finish_rate,
                    "mean_tokens": score.mean_tokens,
                    "answers": len(run.problems) * run.config.evaluate.rollouts,
                }
            else:
                drawn = full or self._full_rollouts(run.kl_prompts, ledger, "evaluation")
                endings = ending_facts(drawn)
        merge(run, progress, ledger)
        accuracy = None if score is None else score.accuracy
        row = self._evaluation_row(facts, values, accuracy, gap, endings)
        if not progress.evaluations or progress.evaluations[-1]["step"] != progress.step:
            progress.evaluations.append(row)
            if run.place.first and score is not None and score.accuracy:
                self.folder.append("scores.jsonl", {"step": progress.step, "right": score.right()})
        self._keep_best(progress.step, accuracy, values)
        return {**row, "kl_by_token": values, "records": score.records if score else []}

    def _score(self, ledger: Ledger) -> Score:
        """Sample and grade full answers to the held-out problems."""
        run = self.run
        return run.fit(
            "rows",
            ledger,
            lambda spent: evaluate.evaluate(
                self.decoding,
                run.problems,
                run.eval_sampler,
                samples=run.config.evaluate.rollouts,
                place=run.place,
                max_new_tokens=run.max_new_tokens,
                answer_format=run.answer_format,
                spent=run.counts_generation(spent, "evaluation"),
            ),
        )

    def _evaluation_row(
        self,
        facts: list[Facts],
        values: TokenValues,
        accuracy: dict | None,
        gap: float | None,
        endings: dict,
    ) -> dict:
        """Return the row of an evaluation for ``Progress.evaluations``."""
        progress = self.progress
        head, tail = intervals.split_mean(values, progress.taught_prefix)
        borders = progress.evaluations[0]["quadrants"]["borders"] if progress.evaluations else None
        entropies = intervals.known([row["entropy"] for row in facts])
        divergences = intervals.known([row["divergence"] for row in facts])
        row = {
            "step": progress.step,
            "accuracy": accuracy,
            "kl": intervals.token_mean(values),
            "kl_prefix": head,
            "kl_tail": tail,
            "sampler_kl": gap,
            **endings,
            "quadrants": quadrants(entropies, divergences, borders),
            "teacher_first_token": mean_probability([row["teacher_logp"][0] for row in facts]),
            "flops_useful": progress.ledger.total(),
            "flops_executed": progress.ledger.total("executed"),
            "seconds": progress.training_seconds(),
        }
        if self.run.alignment is not None:
            row["alignment"] = alignment_facts(self.fixed, facts)
        return row

    def _sampler_gap(self, ledger: Ledger) -> float | None:
        """KL(sampler‖student) in nats per token on the fixed contexts, where rollouts come from a
        copy in another dtype: how far from on-policy that makes them. None where the student itself
        samples."""
        run = self.run
        if self.decoding.net.dtype == run.student.net.dtype:
            return None
        own = [
            dataclasses.replace(r, teacher_prompt=r.student_prompt, teacher_ids=r.ids, units=None)
            for r in self.fixed
        ]
        found = run.fit(
            "micro_batch_size",
            ledger,
            lambda spent: evaluate.held_out_facts(
                self.decoding,
                run.student,
                None,
                own,
                run.place,
                run.config.train.micro_batch_size,
                lambda group: spent.forward(
                    "evaluation",
                    run.student_shape,
                    scoring.reads(group, run.student.reads_once),
                    passes=Passes(count=2),
                ),
            ),
        )
        return intervals.token_mean([facts["divergence"] for facts in found])["value"]

    def _full_rollouts(self, prompts: list[Rendered], ledger: Ledger, phase: str) -> list[Rollout]:
        run = self.run
        return run.fit(
            "rows",
            ledger,
            lambda spent: evaluate.fixed_rollouts(
                self.decoding,
                prompts,
                run.eval_sampler,
                run.max_new_tokens,
                run.place,
                run.counts_generation(spent, phase),
            ),
        )

    def _keep_best(self, step: int, accuracy: dict | None, values: TokenValues) -> None:
        """Keeps the best student seen so far in best/: by accuracy where it is evaluated during the
        run, else by the reverse KL on the fixed contexts of the tail probe."""
        settings, progress = self.run.config.evaluate, self.progress
        if not settings.every and not settings.tail_every:
            return
        if settings.every and accuracy:
            merit = accuracy["value"]
        else:
            merit = -intervals.token_mean(values[: settings.tail_prompts])["value"]
        if progress.best is None or merit > progress.best["merit"]:
            progress.best = {
                "step": step,
                "merit": merit,
                "accuracy": accuracy,
                "kl": intervals.token_mean(values),
            }
            if self.run.place.first:
                self.folder.save_model(
                    "best", self.run.student, card(self.run, progress, progress.best)
                )


def _read_rollout(row: dict[str, Any]) -> Rollout:
    """Return a fixed context from its row in before.json, which stores tuples as lists."""
    fields: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in row.items()
    }
    if fields.get("units"):
        fields["units"] = tuple(Unit(*u) for u in fields["units"])
    return Rollout(**fields)


def candidate_score(run: Run, decoding: Model, prefix: int, ledger: Ledger) -> float:
    """How good the student is on the fixed prompts, higher is better: the share of right full
    answers, or minus the mean reverse KL (nats per token) of fresh rollouts of ``prefix`` tokens.
    The seeds are the same for every candidate and trigger."""
    prompts, phase = run.extrapolation_prompts, "extrapolation"

    def sampler() -> Sampler:  # running out of memory lowers its rows
        return dataclasses.replace(run.eval_sampler, seed=seed_of(run.config.runtime.seed, phase))

    if run.config.extrapolation.score == "accuracy":
        right = run.fit(
            "rows",
            ledger,
            lambda spent: evaluate.evaluate(
                decoding,
                [(p.prompt, p.student_ids) for p in prompts],
                sampler(),
                samples=1,
                place=run.place,
                spent=run.counts_generation(spent, phase),
                max_new_tokens=run.max_new_tokens,
                answer_format=run.answer_format,
            ),
        ).right()
        return sum(right) / len(right)
    rollouts = run.aligned(
        run.fit(
            "rows",
            ledger,
            lambda spent: evaluate.fixed_rollouts(
                decoding, prompts, sampler(), prefix, run.place, run.counts_generation(spent, phase)
            ),
        )
    )
    facts = _measure_contexts(run, rollouts, ledger, phase)
    values = intervals.known([row["divergence"] for row in facts])
    return -math.fsum(values) / len(values)


def _measure_contexts(run: Run, contexts: list[Rollout], ledger: Ledger, phase: str) -> list[Facts]:
    """Return both models' token statistics on the rollouts ``contexts``."""
    return run.fit(
        "micro_batch_size",
        ledger,
        lambda spent: evaluate.held_out_facts(
            run.student,
            run.teacher,
            run.shared,
            contexts,
            run.place,
            run.config.train.micro_batch_size,
            run.counts_both(spent, phase),
        ),
    )
