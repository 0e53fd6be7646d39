"""How much each taught token counts, and the one number the update is divided by."""

from .rollout import Rollout


def token_weights(rollouts: list[Rollout], reduction: str) -> tuple[dict[tuple[int, int], list[float]], float]:
    """(prompt, sample) → undivided weight of each taught token, and this rank's share of the divisor.

    With m taught tokens in a rollout: ``token``: weight 1, divisor Σ m; ``sequence``: weight 1/m, divisor the number of
    rollouts; ``sum``: weight 1, divisor the number of rollouts (the gradient grows with the prefix). The update divides by
    the sum of shares over all ranks, so neither micro-batches nor ranks change it.
    """
    if reduction == "sequence":
        weights = {(r.prompt, r.sample): [1 / len(r.taught)] * len(r.taught) for r in rollouts}
    else:
        weights = {(r.prompt, r.sample): [1.0] * len(r.taught) for r in rollouts}
    share = sum(len(r.taught) for r in rollouts) if reduction == "token" else len(rollouts)
    return weights, float(share)
