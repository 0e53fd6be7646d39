"""Measure the fixed contexts: the KL by token, how answers end, and text beyond the prefix."""

import math
from collections.abc import Sequence

from ..engine.alignment import count_by_unit, token_shares
from ..engine.evaluate import Facts, repeats
from ..engine.rollout import Rollout
from ..maths import intervals

FEW = 0.8  # share of answers that end, below which advice is given
TokenValues = list[list[float | None]]  # rollout by rollout


def divergence_by_token(rollouts: list[Rollout], facts: list[Facts]) -> TokenValues:
    """Return the divergence at each token.

    Across tokenizers only units of one token on each side have one, because every mode has them.
    """
    values = [list(row["divergence"]) for row in facts]
    for r, row in zip(rollouts, values, strict=True):
        for u in r.units or ():
            if not u.exact:
                row[u.start] = None
    return values


def alignment_facts(rollouts: list[Rollout], facts: list[Facts]) -> dict:
    """Return how well the fixed contexts are covered across tokenizers.

    The shares of tokens, the mean probability of both models on the shared tokens where a unit
    begins, and the mean divergence of spans (None without any).
    """
    spans: list[float | None] = []
    for r, row in zip(rollouts, facts, strict=True):
        spans += [row["divergence"][u.start] for u in r.taught_units if not u.exact]
    coverage: dict = token_shares([count_by_unit(rollouts)])
    coverage["kl_spans"] = _mean(intervals.known([spans]))
    for name in ("student_mass", "teacher_mass"):
        coverage[name] = _mean(intervals.known([row[name] for row in facts]))
    return coverage


def _mean(values: Sequence[float]) -> float | None:
    if not values:
        return None
    return math.fsum(values) / len(values)


def mean_probability(logp: list[float | None]) -> float:
    """Return the mean of exp(``logp``) over the known values; 0 without any."""
    known = intervals.known([logp])
    if not known:
        return 0.0
    return math.fsum(map(math.exp, known)) / len(known)


def ending_facts(rollouts: list[Rollout]) -> dict:
    """Return how full answers end: the share that does, and the mean length in tokens."""
    count = len(rollouts)
    return {
        "finish_rate": sum(r.finished for r in rollouts) / count,
        "mean_tokens": sum(len(r.ids) for r in rollouts) / count,
        "repetition_rate": sum(repeats(r.ids) for r in rollouts) / count,
        "answers": count,
    }


def advise_on_length(finish_rate: float, max_new_tokens: int, thinking_flag: str) -> list[str]:
    """Return what to do if --max-new-tokens cuts many answers; an empty list if it does not.

    ``thinking_flag``: the command's flag for the student's thinking switch.
    """
    if finish_rate >= FEW:
        return []
    return [
        f"only {finish_rate:.0%} of the answers end within --max-new-tokens {max_new_tokens}; the "
        "others are cut, mostly before their result; raise --max-new-tokens, or set "
        f"{thinking_flag} off for a model that thinks first"
    ]


def tail_warning(before: dict, measured: dict, prefix: int) -> str | None:
    """Return a warning if training made text beyond the prefix worse; else None.

    It is worse if the KL of the tail on the fixed contexts rose by more than two standard errors,
    paired by rollout. It is also worse if answers end less often, by more than 5 points and two
    standard errors.
    """
    changes = [_describe_kl_rise(before, measured, prefix), _describe_endings(before, measured)]
    reasons = [change for change in changes if change is not None]
    if not reasons:
        return None
    return (
        f"after step {measured['step']}: text beyond the prefix got worse: {' and '.join(reasons)}"
        f"{_describe_exhausted(before, measured, prefix)}; lengthen --prefix, lower --lr, or stop "
        "earlier"
    )


def tail_change(before: TokenValues, now: TokenValues, prefix: int) -> dict[str, float] | None:
    """Return how the KL beyond the prefix changed on the same rollouts, in nats per token.

    {before, value, n, low, high}: the mean before, and the mean change with its 95% interval,
    paired by rollout. None: fewer than two rollouts are longer than the prefix.
    """
    gaps = _tail_gaps(before, now, prefix)
    if len(gaps) < 2:
        return None
    _, tail = intervals.split_mean(before, prefix)
    return {"before": tail or 0.0, **intervals.interval(gaps)}


def _tail_gaps(before: TokenValues, now: TokenValues, prefix: int) -> list[float]:
    """Return the change of every rollout's mean KL beyond the prefix."""
    gaps = []
    for new, old in zip(now, before, strict=True):
        new_tail = intervals.known([new[prefix:]])
        old_tail = intervals.known([old[prefix:]])
        if new_tail:
            gaps.append(math.fsum(new_tail) / len(new_tail) - math.fsum(old_tail) / len(old_tail))
    return gaps


def _describe_kl_rise(before: dict, measured: dict, prefix: int) -> str | None:
    gaps = _tail_gaps(before["kl_by_token"], measured["kl_by_token"], prefix)
    if len(gaps) < 2:
        return None
    mean = math.fsum(gaps) / len(gaps)
    variance = math.fsum((gap - mean) ** 2 for gap in gaps) / (len(gaps) - 1)
    error = math.sqrt(variance / len(gaps))
    if not (mean > 2 * error and mean > 1e-3):  # also if the mean is NaN
        return None
    return f"the KL beyond the prefix rose by {mean:.3g} ± {error:.1g} nats per token"


def _describe_endings(before: dict, measured: dict) -> str | None:
    variance = 0.0
    for side in (before, measured):
        variance += side["finish_rate"] * (1 - side["finish_rate"]) / side["answers"]
    fall = before["finish_rate"] - measured["finish_rate"]
    if fall <= max(0.05, 2 * math.sqrt(variance)):
        return None
    return f"answers end less often ({before['finish_rate']:.0%} → {measured['finish_rate']:.0%})"


def _describe_exhausted(before: dict, measured: dict, prefix: int) -> str:
    """Return an addition to the warning if the KL inside the prefix is nearly zero."""
    head_before, _ = intervals.split_mean(before["kl_by_token"], prefix)
    head_after, _ = intervals.split_mean(measured["kl_by_token"], prefix)
    # Across tokenizers the prefix can lack units of one token; then both means are None.
    if head_before is None or head_after is None or not head_after < 0.1 * head_before:
        return ""
    return f"; the KL inside the prefix is nearly zero ({head_before:.2g} → {head_after:.2g} nats)"
