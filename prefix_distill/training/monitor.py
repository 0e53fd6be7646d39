"""What a run looks at beside its loss: evaluations, the tail beyond the prefix, the best student, the cost of full rollouts."""

import dataclasses
import math

from ..display import Reporter
from ..engine import evaluate, scoring
from ..engine.alignment import census, shares
from ..engine.device import Clock, seed_of
from ..engine.models import Model
from ..engine.sampling import Rollout, Unit
from ..errors import Stopped, UserError
from ..maths.flops import Ledger
from ..maths.weights import quadrants
from ..planning.checks import FIRST_TOKEN
from ..prompts import load as data
from .card import card
from .folder import RunFolder
from .prepare import Run

SHARED_MASS = 0.95  # mean probability on the shared tokens, across tokenizers, below which a loss on them misses too much


@dataclasses.dataclass
class Progress:
    """What the checkpoint carries beside tensors; all of it plain numbers."""

    step: int = 0
    ledger: Ledger = dataclasses.field(default_factory=Ledger)
    seconds: dict = dataclasses.field(default_factory=dict)
    tokens: int = 0
    prefix: dict = dataclasses.field(default_factory=dict)  # the state of the prefix schedule
    taught_prefix: int = 0  # prefix length of the last update (before any: of the first)
    decisions: list = dataclasses.field(
        default_factory=list
    )  # {step, reason} of every growth of the prefix
    evaluations: list = dataclasses.field(
        default_factory=list
    )  # a row per evaluation, the untrained student's first
    tail_probes: list = dataclasses.field(default_factory=list)
    extrapolations: list = dataclasses.field(default_factory=list)  # a row per trigger
    warnings: list = dataclasses.field(default_factory=list)  # {step, text}: the tail is being hurt
    best: dict | None = None
    fitted: dict = dataclasses.field(
        default_factory=dict
    )  # micro_batch_size and rows, where memory made them smaller

    def training_seconds(self) -> float:
        """Wall time but for evaluations."""
        return math.fsum(v for phase, v in self.seconds.items() if phase != "evaluation")


class Monitor:
    """Measures the student of one run. ``before``: what the untrained student's measurement found, kept in before.json with
    the rollouts it drew from held-out prompts: the fixed contexts of every later comparison."""

    def __init__(
        self,
        run: Run,
        decoding: Model,
        progress: Progress,
        clock: Clock,
        folder: RunFolder,
        report: Reporter,
    ):
        self.run, self.decoding, self.progress, self.clock, self.folder, self.report = (
            run,
            decoding,
            progress,
            clock,
            folder,
            report,
        )
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
                "no token of the student's answers to held-out prompts has a counterpart in the teacher's tokenization; choose another pair"
            )
        merge(self.run, self.progress, ledger)
        found = self._measure(self.fixed)
        self.report.evaluation(self.progress.evaluations[-1])
        first = found["teacher_first_token"]
        (self.report.warn if first < FIRST_TOKEN else self.report.note)(
            f"the teacher gives the first tokens of the student's answers a mean probability of {first:.2g}"
            + (
                "; do both prompts ask for the same form of answer (--template, --student-thinking, --teacher-thinking, --begin)?"
                if first < FIRST_TOKEN
                else ""
            )
        )
        if self.run.alignment is not None:
            self._say_coverage(found["alignment"])
        records = found.pop("records")
        self.before = {**found, "rollouts": [dataclasses.asdict(r) for r in self.fixed]}
        if self.run.place.first:
            self.folder.write_json("before.json", self.before)
            self.folder.write_rows("examples-before.jsonl", records)

    def _say_coverage(self, found: dict) -> None:
        self.report.note(
            f"of the tokens of the student's own answers {found['exact_share']:.1%} align one to one, {found['span_share']:.1%} in spans, "
            f"{found['dropped_share']:.1%} not at all"
        )
        if min(found["student_mass"], found["teacher_mass"]) < SHARED_MASS:
            self.report.warn(
                f"of the student's probability {found['student_mass']:.1%} is on tokens that the teacher has, too, and of the teacher's "
                f"{found['teacher_mass']:.1%} on the student's: choices among the others are not compared; simct compares the spans "
                "that were written, --off-policy sft needs no comparison"
            )

    def resume(self) -> None:
        """Takes the fixed contexts and what was measured on them from before.json."""
        self.before = self.folder.read_json("before.json")
        plain = lambda name, v: (
            tuple(Unit(*u) for u in v)
            if name == "units" and v
            else tuple(v)
            if isinstance(v, list)
            else v
        )
        try:
            self.fixed = [
                Rollout(**{k: plain(k, v) for k, v in row.items()})
                for row in self.before["rollouts"]
            ]
        except (KeyError, TypeError, AttributeError):
            raise UserError(
                f"run folder {self.folder.path}: before.json is not what a run writes; start anew with another --out"
            ) from None

    def evaluate(self) -> dict:
        """Measures the current student and says so when its tail is being hurt."""
        found = self._measure(None)
        self.report.evaluation(self.progress.evaluations[-1])
        self._warn(self.before, found)
        return found

    def look(self) -> None:
        """An evaluation or a tail probe where one is due after this update and has not been made."""
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
        """A small look beyond the prefix: reverse KL on the first few fixed contexts, and how the student's own full answers
        to these prompts end, drawn with the seeds of the untrained student's. A ledger row of its own, inside the totals."""
        run, ledger, count = self.run, Ledger(), self.run.config.evaluate.tail_prompts
        with self.clock.phase("tail_probe"):
            values = _by_token(
                self.fixed[:count], self._facts(self.fixed[:count], ledger, "tail_probe")
            )
            full = self._full_rollouts(run.kl_prompts[:count], ledger, "tail_probe")
        merge(run, self.progress, ledger)
        found = {"step": self.progress.step, "kl_by_token": values, **_endings(full)}
        head, tail = evaluate.split_mean(values, self.progress.taught_prefix)
        row = {
            "step": self.progress.step,
            "kl": evaluate.token_mean(values)["value"],
            "kl_prefix": head,
            "kl_tail": tail,
            "finish_rate": found["finish_rate"],
            "mean_tokens": found["mean_tokens"],
        }
        self.progress.tail_probes.append(row)
        self.report.tail(row)
        self._warn(
            {"kl_by_token": self.before["kl_by_token"][:count], **_endings(self.fixed[:count])},
            found,
        )
        self._keep_best(row["step"], None, values)
        return row

    def _warn(self, before: dict, found: dict) -> None:
        if text := tail_warning(before, found, self.progress.taught_prefix):
            self.progress.warnings.append({"step": found["step"], "text": text})
            self.report.warn(text)

    def _measure(self, full: list[Rollout] | None) -> dict:
        """Accuracy on the held-out problems and reverse KL on the fixed contexts, now; keeps the best student.

        Where no problem is evaluated, the length and endings of full answers come from ``full``, drawn now if None.
        """
        run, progress, ledger = self.run, self.progress, Ledger()
        with self.clock.phase("evaluation"):
            facts = self._facts(self.fixed, ledger, "evaluation")
            values = _by_token(self.fixed, facts)
            gap = self._sampler_gap(ledger)
            score = None
            if run.problems:
                score = run.fit(
                    "rows",
                    ledger,
                    lambda spent: evaluate.evaluate(
                        self.decoding,
                        run.problems,
                        run.eval_sampler,
                        samples=run.config.evaluate.rollouts,
                        place=run.place,
                        max_new_tokens=run.config.rollout.max_new_tokens,
                        answer_format=run.answer_format,
                        spent=_spent_on(run, spent, "evaluation"),
                    ),
                )
                endings = {
                    "finish_rate": score.finish_rate,
                    "mean_tokens": score.mean_tokens,
                    "answers": len(run.problems) * run.config.evaluate.rollouts,
                }
            else:
                endings = _endings(
                    full or self._full_rollouts(run.kl_prompts, ledger, "evaluation")
                )
        merge(run, progress, ledger)
        head, tail = evaluate.split_mean(values, progress.taught_prefix)
        borders = progress.evaluations[0]["quadrants"]["borders"] if progress.evaluations else None
        row = {
            "step": progress.step,
            "accuracy": score and score.accuracy,
            "kl": evaluate.token_mean(values),
            "kl_prefix": head,
            "kl_tail": tail,
            "sampler_kl": gap,
            **endings,
            "quadrants": quadrants(
                *(
                    evaluate.known([row[name] for row in facts])
                    for name in ("entropy", "divergence")
                ),
                borders,
            ),
            "teacher_first_token": _mean_probability([row["teacher_logp"][0] for row in facts]),
            "flops_useful": progress.ledger.total(),
            "flops_executed": progress.ledger.total("executed"),
            "seconds": progress.training_seconds(),
        }
        if run.alignment is not None:
            row["alignment"] = _alignment(self.fixed, facts)
        if not progress.evaluations or progress.evaluations[-1]["step"] != progress.step:
            progress.evaluations.append(row)
            if run.place.first and score and score.accuracy:
                self.folder.append("scores.jsonl", {"step": progress.step, "right": score.right()})
        self._keep_best(progress.step, row["accuracy"], values)
        return {**row, "kl_by_token": values, "records": score.records if score else []}

    def _facts(
        self, contexts: list[Rollout], ledger: Ledger, phase: str
    ) -> list[dict[str, list[float]]]:
        run = self.run
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

    def _sampler_gap(self, ledger: Ledger) -> float | None:
        """KL(sampler‖student) in nats per token on the fixed contexts, where rollouts come from a copy in another dtype: how
        far from on-policy that makes them. None where the student itself samples."""
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
                    passes=2,
                ),
            ),
        )
        return evaluate.token_mean([facts["divergence"] for facts in found])["value"]

    def _full_rollouts(
        self, prompts: list[data.Rendered], ledger: Ledger, phase: str
    ) -> list[Rollout]:
        run = self.run
        return run.fit(
            "rows",
            ledger,
            lambda spent: evaluate.fixed_rollouts(
                self.decoding,
                prompts,
                run.eval_sampler,
                run.config.rollout.max_new_tokens,
                run.place,
                _spent_on(run, spent, phase),
            ),
        )

    def _keep_best(self, step: int, accuracy: dict | None, values: list[list[float]]) -> None:
        """Keeps the best student seen so far in best/: by accuracy where it is evaluated during the run, else by the reverse
        KL on the fixed contexts of the tail probe."""
        settings, progress = self.run.config.evaluate, self.progress
        if not settings.every and not settings.tail_every:
            return
        if settings.every and accuracy:
            merit = accuracy["value"]
        else:
            merit = -evaluate.token_mean(values[: settings.tail_prompts])["value"]
        if progress.best is None or merit > progress.best["merit"]:
            progress.best = {
                "step": step,
                "merit": merit,
                "accuracy": accuracy,
                "kl": evaluate.token_mean(values),
            }
            if self.run.place.first:
                self.folder.save_model(
                    "best", self.run.student, card(self.run, progress, progress.best)
                )


def candidate_score(run: Run, decoding: Model, prefix: int, ledger: Ledger) -> float:
    """How good the student is on the fixed prompts, higher is better: the share of right full answers, or minus the mean
    reverse KL (nats per token) of fresh rollouts of ``prefix`` tokens. The seeds are the same for every candidate and trigger."""
    prompts, phase = run.extrapolation_prompts, "extrapolation"
    sampler = lambda: dataclasses.replace(
        run.eval_sampler, seed=seed_of(run.config.runtime.seed, phase)
    )
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
                spent=_spent_on(run, spent, phase),
                max_new_tokens=run.config.rollout.max_new_tokens,
                answer_format=run.answer_format,
            ),
        ).right()
        return sum(right) / len(right)
    rollouts = run.aligned(
        run.fit(
            "rows",
            ledger,
            lambda spent: evaluate.fixed_rollouts(
                decoding, prompts, sampler(), prefix, run.place, _spent_on(run, spent, phase)
            ),
        )
    )
    facts = run.fit(
        "micro_batch_size",
        ledger,
        lambda spent: evaluate.held_out_facts(
            run.student,
            run.teacher,
            run.shared,
            rollouts,
            run.place,
            run.config.train.micro_batch_size,
            run.counts_both(spent, phase),
        ),
    )
    values = evaluate.known([row["divergence"] for row in facts])
    return -math.fsum(values) / len(values)


def merge(run: Run, progress: Progress, ledger: Ledger) -> None:
    """Adds every rank's ledger to the run's."""
    for other in run.place.gather(ledger):
        progress.ledger.merge(other)


def _spent_on(run: Run, ledger: Ledger, phase: str):
    return lambda reads: ledger.generation(run.student_shape, reads, phase, phase)


def _by_token(rollouts: list[Rollout], facts: list[dict]) -> list[list[float | None]]:
    """The divergence at each token; across tokenizers, of the units of one token on each side, which every mode knows."""
    values = [list(row["divergence"]) for row in facts]
    for r, row in zip(rollouts, values):
        for u in r.units or ():
            if not u.exact:
                row[u.start] = None
    return values


def _alignment(rollouts: list[Rollout], facts: list[dict]) -> dict:
    """Coverage of the fixed contexts: shares of tokens, mean mass of both models on the shared tokens where a unit begins, and the
    mean divergence of spans (None without any)."""
    mean = lambda values: math.fsum(values) / len(values) if values else None
    spans = [
        row["divergence"][u.start]
        for r, row in zip(rollouts, facts)
        for u in r.taught_units
        if not u.exact
    ]
    return {
        **shares([census(rollouts)]),
        "kl_spans": mean(spans),
        **{
            name: mean(evaluate.known([row[name] for row in facts]))
            for name in ("student_mass", "teacher_mass")
        },
    }


def _mean_probability(logp: list[float | None]) -> float:
    found = evaluate.known([logp])
    return math.fsum(map(math.exp, found)) / len(found) if found else 0.0


def _endings(rollouts: list[Rollout]) -> dict:
    count = len(rollouts)
    return {
        "finish_rate": sum(r.finished for r in rollouts) / count,
        "mean_tokens": sum(len(r.ids) for r in rollouts) / count,
        "answers": count,
    }


def tail_warning(before: dict, found: dict, prefix: int) -> str | None:
    """One line when training has hurt what lies beyond the prefix: its KL on the fixed contexts rose by more than two
    standard errors (paired by rollout), or answers end less often (by more than 5 points and two standard errors); else
    None."""
    tails = [
        [evaluate.known([row[prefix:]]) for row in pair]
        for pair in zip(found["kl_by_token"], before["kl_by_token"])
    ]
    gaps = [math.fsum(new) / len(new) - math.fsum(old) / len(old) for new, old in tails if new]
    said = []
    if len(gaps) > 1:
        mean = math.fsum(gaps) / len(gaps)
        error = math.sqrt(math.fsum((g - mean) ** 2 for g in gaps) / (len(gaps) - 1) / len(gaps))
        if mean > 2 * error and mean > 1e-3:
            said.append(f"the KL beyond the prefix rose by {mean:.3g} ± {error:.1g} nats per token")
    noise = math.sqrt(
        sum(
            side["finish_rate"] * (1 - side["finish_rate"]) / side["answers"]
            for side in (before, found)
        )
    )
    if before["finish_rate"] - found["finish_rate"] > max(0.05, 2 * noise):
        said.append(
            f"answers end less often ({before['finish_rate']:.0%} → {found['finish_rate']:.0%})"
        )
    if not said:
        return None
    head_before, _ = evaluate.split_mean(before["kl_by_token"], prefix)
    head_after, _ = evaluate.split_mean(found["kl_by_token"], prefix)
    exhausted = (
        f"; the prefix has little left to teach ({head_before:.2g} → {head_after:.2g} nats)"
        if (head_after < 0.1 * head_before)
        else ""
    )
    return (
        f"after update {found['step']} the tail is being hurt: {' and '.join(said)}{exhausted}; "
        "lengthen --prefix, lower --lr or stop earlier"
    )


def full_cost(run: Run, progress: Progress, steps: range) -> float:
    """Useful FLOPs the updates in ``steps`` would have cost with full rollouts of the then-current student.

    Its full length is measured at every evaluation and taken as linear in between; after the last, as constant.
    """
    config, total = run.config, 0.0
    for step in steps:
        prompts = data.batch(run.train_prompts, step, config.train.batch_size, config.runtime.seed)
        total += run.update_cost(prompts, _length_at(progress.evaluations, step))
    return total


def _length_at(evaluations: list[dict], step: int) -> float:
    points = [(row["step"], row["mean_tokens"]) for row in evaluations]
    for (left, low), (right, high) in zip(points, points[1:]):
        if left <= step < right:
            return low + (high - low) * (step - left) / (right - left)
    return points[-1][1]
