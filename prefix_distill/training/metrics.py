"""Numbers of an update: metrics row, ledger, result."""

import itertools
import math

from ..engine.alignment import census, shares
from ..engine.device import Clock
from ..engine.rollout import Rollout
from ..maths import intervals
from ..maths.flops import Ledger
from ..prompts import stream
from .folder import RunFolder
from .run import Run
from .state import Progress

HEAD_TOKENS = 64  # the training KL of the first tokens, comparable while a prefix grows


def merge(run: Run, progress: Progress, ledger: Ledger) -> None:
    """Adds every rank's ledger to the run's."""
    for other in run.place.gather(ledger):
        progress.ledger.merge(other)


def divergence_by_token(rollouts: list[Rollout], facts: list[dict]) -> list[list[float | None]]:
    """The divergence at each token; across tokenizers, of the units of one token on each side,
    which every mode knows."""
    values = [list(row["divergence"]) for row in facts]
    for r, row in zip(rollouts, values, strict=True):
        for u in r.units or ():
            if not u.exact:
                row[u.start] = None
    return values


def alignment_facts(rollouts: list[Rollout], facts: list[dict]) -> dict:
    """Coverage of the fixed contexts: shares of tokens, mean mass of both models on the shared
    tokens where a unit begins, and the mean divergence of spans (None without any)."""
    spans = [
        row["divergence"][u.start]
        for r, row in zip(rollouts, facts, strict=True)
        for u in r.taught_units
        if not u.exact
    ]
    return {
        **shares([census(rollouts)]),
        "kl_spans": _plain_mean(spans),
        **{
            name: _plain_mean(intervals.known([row[name] for row in facts]))
            for name in ("student_mass", "teacher_mass")
        },
    }


def _plain_mean(values: list[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def mean_probability(logp: list[float | None]) -> float:
    found = intervals.known([logp])
    return math.fsum(map(math.exp, found)) / len(found) if found else 0.0


def ending_facts(rollouts: list[Rollout]) -> dict:
    count = len(rollouts)
    return {
        "finish_rate": sum(r.finished for r in rollouts) / count,
        "mean_tokens": sum(len(r.ids) for r in rollouts) / count,
        "answers": count,
    }


def tail_warning(before: dict, found: dict, prefix: int) -> str | None:
    """One line when training has hurt what lies beyond the prefix: its KL on the fixed contexts
    rose by more than two standard errors (paired by rollout), or answers end less often (by more
    than 5 points and two standard errors); else None."""
    tails = [
        [intervals.known([row[prefix:]]) for row in pair]
        for pair in zip(found["kl_by_token"], before["kl_by_token"], strict=True)
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
    head_before, _ = intervals.split_mean(before["kl_by_token"], prefix)
    head_after, _ = intervals.split_mean(found["kl_by_token"], prefix)
    exhausted = ""
    # Across tokenizers the prefix can lack units of one token; then both means are None.
    if head_before is not None and head_after is not None and head_after < 0.1 * head_before:
        exhausted = (
            f"; the prefix has little left to teach ({head_before:.2g} → {head_after:.2g} nats)"
        )
    return (
        f"after update {found['step']} the tail is being hurt: {' and '.join(said)}{exhausted}; "
        "lengthen --prefix, lower --lr or stop earlier"
    )


def full_cost(run: Run, progress: Progress, steps: range) -> float:
    """Useful FLOPs the updates in ``steps`` would have cost with full rollouts of the then-current
    student.

    Its full length is measured at every evaluation and taken as linear in between; after the last,
    as constant.
    """
    config, total = run.config, 0.0
    for step in steps:
        prompts = stream.batch(
            run.train_prompts, step, config.train.batch_size, config.runtime.seed
        )
        total += run.update_cost(prompts, _length_at(progress.evaluations, step))
    return total


def _length_at(evaluations: list[dict], step: int) -> float:
    points = [(row["step"], row["mean_tokens"]) for row in evaluations]
    for (left, low), (right, high) in itertools.pairwise(points):
        if left <= step < right:
            return low + (high - low) * (step - left) / (right - left)
    return points[-1][1]


def update_facts(  # noqa: PLR0913  the numbers of one update, which `Update` will hold
    run: Run,
    rollouts: list[Rollout],
    values: dict[tuple[int, int], list[float]],
    clipped: dict[tuple[int, int], list[float]],
    weights: dict[tuple[int, int], list[float]],
    divisor: float,
    newest: int,
) -> dict:
    """The update's numbers over all ranks, summed in (prompt, sample) order so that ranks cannot
    change them.

    Means of the loss's values per token (None where there is none): over all taught tokens (those
    of the teacher's text apart when their loss is another one), over the first tokens, over those
    from position ``newest`` on; and of the clipped mass.
    """
    apart = run.text_terms is not run.terms

    def sums(r: Rollout) -> tuple:
        """A rollout's place, its weighted sum, then (sum, count) of each mean."""
        value, text = values[r.prompt, r.sample], apart and r.off_policy
        own = [] if text else list(zip(r.taught, value, strict=True))
        parts = (
            [v for _, v in own],
            value if text else [],
            [v for t, v in own if t < HEAD_TOKENS],
            [v for t, v in own if t >= newest],
            clipped.get((r.prompt, r.sample), []),
        )
        return (
            (r.prompt, r.sample),
            math.fsum(w * v for w, v in zip(weights[r.prompt, r.sample], value, strict=True)),
            r.finished,
            len(r.rows()),
            *((math.fsum(part), len(part)) for part in parts),
        )

    rows = sorted(row for part in run.place.gather([sums(r) for r in rollouts]) for row in part)
    columns = list(zip(*rows, strict=True))
    names = ("divergence", "text", "head", "newest", "clipped")
    mean = {name: _mean(column) for name, column in zip(names, columns[4:], strict=True)}
    finished = sum(columns[2]) / len(rows)
    counts = run.place.gather(census(rollouts)) if run.alignment is not None else []
    return {
        **mean,
        "loss": math.fsum(columns[1]) / divisor,
        "finished": finished,
        "filled": 1 - finished,
        "tokens": sum(columns[3]),
        "alignment": shares(counts) if any(c["tokens"] for c in counts) else {},
    }


def _mean(column: tuple[tuple[float, int], ...]) -> float | None:
    count = sum(n for _, n in column)
    return math.fsum(total for total, _ in column) / count if count else None


def metrics_row(  # noqa: PLR0913  the numbers of one update, which `Update` will hold
    run: Run,
    progress: Progress,
    facts: dict,
    prefix: int,
    rate: float,
    norm: float,
    clock: Clock,
    spent_before: dict[str, float],
) -> dict:
    seconds = {
        k: v - spent_before.get(k, 0.0) for k, v in clock.seconds.items() if k != "evaluation"
    }
    row = {
        "step": progress.step,
        f"loss/{run.terms.name.replace('-', '_')}_nats": facts["divergence"],
        f"loss/first_{HEAD_TOKENS}_tokens_nats": facts["head"],
        "loss/objective": facts["loss"],
        "rollout/prefix_tokens": prefix,
        "rollout/taught_tokens": facts["tokens"],
        "rollout/finished_share": facts["finished"],
        "optimizer/learning_rate": rate,
        "optimizer/gradient_norm": norm,
    }
    if facts["text"] is not None:
        row["loss/teacher_text_nats"] = facts["text"]
    row |= {f"alignment/{name}": value for name, value in facts["alignment"].items()}
    if facts["clipped"] is not None:
        row["loss/clipped_share"] = facts["clipped"]
    if found := [x for x in progress.extrapolations if x["step"] == progress.step]:
        row |= {"extrapolation/accepted_k": found[0]["k"], "extrapolation/flops": found[0]["flops"]}
    row |= {
        f"flops/{phase}": value
        for phase, value in progress.ledger.useful.items()
        if phase != "evaluation"
    }
    row["flops/useful_total"], row["flops/executed_total"] = (
        progress.ledger.total(),
        progress.ledger.total("executed"),
    )
    row |= {f"time/{phase}_s": value for phase, value in seconds.items()}
    row |= {
        f"time/{phase}_tokens_per_s": facts["tokens"] / value
        for phase, value in seconds.items()
        if value
    }
    return row


def result_document(
    run: Run, folder: RunFolder, progress: Progress, resumed_from: int | None, clock: Clock
) -> dict:
    first, last = progress.evaluations[0], progress.evaluations[-1]
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
        "flops": progress.ledger.summary(),
        "full_rollout_cost": full_cost(run, progress, range(progress.step)),
        "seconds": {"total": math.fsum(clock.seconds.values()), "by_phase": clock.seconds},
        "evaluations": progress.evaluations,
        "best": progress.best and {k: v for k, v in progress.best.items() if k != "merit"},
    }
