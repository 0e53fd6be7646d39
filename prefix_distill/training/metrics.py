"""Numbers of a step and of a run: metrics rows, the cost of full rollouts, the result."""

import itertools
import math
from dataclasses import dataclass

from ..engine.alignment import count_by_unit, token_shares
from ..engine.rollout import Rollout
from ..prompts import stream
from .loss import TokenLosses
from .run import Run
from .state import Progress, State
from .update import Update

HEAD_TOKENS = 64  # the training KL of the first tokens, comparable while a prefix grows


def full_cost(run: Run, progress: Progress, steps: range) -> float:
    """Return the useful FLOPs that ``steps`` would take with full rollouts.

    The length of full rollouts is measured at every evaluation. It is taken as linear in between
    and as constant after the last one.
    """
    config, total = run.config, 0.0
    for step in steps:
        prompts = stream.prompts_of_step(
            run.problems.train, step, size=config.train.batch_size, seed=config.runtime.seed
        )
        total += run.update_cost(prompts, _length_at(progress.evaluations, step))
    return total


def _length_at(evaluations: list[dict], step: int) -> float:
    """Return the mean length of full rollouts at ``step``, in tokens."""
    points = [(row["step"], row["mean_tokens"]) for row in evaluations]
    for (left, low), (right, high) in itertools.pairwise(points):
        if left <= step < right:
            return low + (high - low) * (step - left) / (right - left)
    return points[-1][1]


@dataclass(frozen=True, kw_only=True)
class UpdateFacts:
    """The numbers of one step over all ranks.

    Means of the loss per token, in nats, None without a token: ``divergence`` over all taught
    tokens, ``head`` over the first ``HEAD_TOKENS``, ``newest`` over the newest window of the
    prefix, ``text`` over the teacher's text if that has another loss. ``clipped``: the mean clipped
    mass. ``objective``: the loss itself; ``finished``: the share of rollouts that end
    within the prefix; ``tokens``: taught tokens; ``alignment``: shares across tokenizers.
    """

    divergence: float | None
    text: float | None
    head: float | None
    newest: float | None
    clipped: float | None
    objective: float
    finished: float
    tokens: int
    alignment: dict[str, float]

    @property
    def filled(self) -> float:
        """Return the share of rollouts that fill the prefix."""
        return 1 - self.finished


# a sum and the number of its terms
_Sum = tuple[float, int]


@dataclass(frozen=True, kw_only=True)
class _RolloutSums:
    """The sums of one rollout, which ranks exchange."""

    key: tuple[int, int]
    weighted: float
    finished: bool
    tokens: int
    divergence: _Sum
    text: _Sum
    head: _Sum
    newest: _Sum
    clipped: _Sum


def _sum(values: list[float]) -> _Sum:
    return math.fsum(values), len(values)


def _rollout_sums(run: Run, losses: TokenLosses, r: Rollout, newest: int) -> _RolloutSums:
    """Return the sums of a rollout; ``newest``: first position of the newest window."""
    values = losses.values[r.key]
    # The teacher's text is summed separately if it has another loss.
    is_text = r.off_policy and run.method.text_terms is not run.method.terms
    by_position = [] if is_text else list(zip(r.taught, values, strict=True))
    weights = losses.weights[r.key]
    return _RolloutSums(
        key=r.key,
        weighted=math.fsum(w * v for w, v in zip(weights, values, strict=True)),
        finished=r.finished,
        tokens=len(r.student.rows),
        divergence=_sum([v for _, v in by_position]),
        text=_sum(values if is_text else []),
        head=_sum([v for t, v in by_position if t < HEAD_TOKENS]),
        newest=_sum([v for t, v in by_position if t >= newest]),
        clipped=_sum(losses.clipped.get(r.key, [])),
    )


def update_facts(update: Update, losses: TokenLosses) -> UpdateFacts:
    """Return the numbers of a step over all ranks.

    Sums run in (slot, sample) order, so that the number of ranks cannot change them.
    """
    run = update.run
    newest = run.method.prefix.window(update.state.progress.prefix)
    sums = [_rollout_sums(run, losses, r, newest=newest) for r in losses.rollouts]
    gathered = itertools.chain.from_iterable(run.place.gather(sums))
    everything = sorted(gathered, key=lambda row: row.key)
    alignment: dict[str, float] = {}
    if run.pair.alignment is not None:
        counts = run.place.gather(count_by_unit(losses.rollouts))
        if any(count["tokens"] for count in counts):
            alignment = token_shares(counts)
    return UpdateFacts(
        divergence=_mean([row.divergence for row in everything]),
        text=_mean([row.text for row in everything]),
        head=_mean([row.head for row in everything]),
        newest=_mean([row.newest for row in everything]),
        clipped=_mean([row.clipped for row in everything]),
        objective=math.fsum(row.weighted for row in everything) / losses.divisor,
        finished=sum(row.finished for row in everything) / len(everything),
        tokens=sum(row.tokens for row in everything),
        alignment=alignment,
    )


def _mean(sums: list[_Sum]) -> float | None:
    count = sum(n for _, n in sums)
    if not count:
        return None
    return math.fsum(total for total, _ in sums) / count


def metrics_row(update: Update, facts: UpdateFacts, rate: float, norm: float) -> dict:
    """Return the row of a step for metrics.jsonl.

    ``rate``: its learning rate; ``norm``: the norm of its gradient before clipping.
    """
    run, progress = update.run, update.state.progress
    row = {
        "step": progress.step,
        f"loss/{run.method.terms.name.replace('-', '_')}_nats": facts.divergence,
        f"loss/first_{HEAD_TOKENS}_tokens_nats": facts.head,
        "loss/objective": facts.objective,
        "rollout/prefix_tokens": update.prefix,
        "rollout/taught_tokens": facts.tokens,
        "rollout/finished_share": facts.finished,
        "optimizer/learning_rate": rate,
        "optimizer/gradient_norm": norm,
    }
    if facts.text is not None:
        row["loss/teacher_text_nats"] = facts.text
    for name, value in facts.alignment.items():
        row[f"alignment/{name}"] = value
    if facts.clipped is not None:
        row["loss/clipped_share"] = facts.clipped
    for search in progress.extrapolations:
        if search["step"] == progress.step:
            row["extrapolation/accepted_k"] = search["k"]
            row["extrapolation/flops"] = search["flops"]
    for phase, value in progress.ledger.useful.items():
        if phase != "evaluation":
            row[f"flops/{phase}"] = value
    row["flops/useful_total"] = progress.ledger.total()
    row["flops/executed_total"] = progress.ledger.total("executed")
    row.update(_speeds(update, facts.tokens))
    return row


def _speeds(update: Update, tokens: int) -> dict[str, float]:
    """Return the seconds of each phase since the step began, and tokens per second."""
    seconds = {}
    for phase, total in update.state.clock.seconds.items():
        if phase != "evaluation":
            seconds[phase] = total - update.seconds_before.get(phase, 0.0)
    row = {f"time/{phase}_s": value for phase, value in seconds.items()}
    for phase, value in seconds.items():
        if value:
            row[f"time/{phase}_tokens_per_s"] = tokens / value
    return row


def result_document(state: State, resumed_from: int | None) -> dict:
    """Return the result of a finished run as JSON values.

    ``resumed_from``: the step of the checkpoint that it was resumed from, if any. Its ``warnings``
    are those of training; run.json lists those of the preparation.
    """
    progress, seconds = state.progress, state.clock.seconds
    first, last = progress.evaluations[0], progress.evaluations[-1]
    best = None
    if progress.best is not None:
        best = {k: v for k, v in progress.best.items() if k != "merit"}
    return {
        "steps": progress.step,
        "resumed_from": resumed_from,
        "accuracy_before": first["accuracy"],
        "accuracy_after": last["accuracy"],
        "kl_before": first["kl"],
        "kl_after": last["kl"],
        "prefix": progress.taught_prefix,
        "prefix_decisions": progress.decisions,
        "tail_probes": progress.tail_probes,
        "extrapolations": progress.extrapolations,
        "warnings": progress.warnings,
        "sampler_kl": last["sampler_kl"],
        "tokens": progress.tokens,
        "flops": progress.ledger.summary() | {"not_counted": state.run.pair.not_counted},
        "full_rollouts": state.run.config.schedule.prefix == "full",
        "full_rollout_cost": full_cost(state.run, progress, range(progress.step)),
        "seconds": {"total": math.fsum(seconds.values()), "by_phase": seconds},
        "evaluations": progress.evaluations,
        "best": best,
    }
