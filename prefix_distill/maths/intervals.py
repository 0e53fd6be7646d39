"""Quantiles, means and bootstrap intervals."""

import math
from collections.abc import Sequence

from .seeds import seed_of

RESAMPLES = 2_000


def interval(values: Sequence[float], seed: int = 0) -> dict[str, float]:
    """Return {value, n, low, high}: the mean over problems with a 95% bootstrap interval.

    The interval is the percentile bootstrap of 2,000 seeded resamples. If all values are equal, it
    has no width. Its ends are then Wilson's at z = 1.96 if the values are shares of 0 or 1.
    """
    import torch  # here: report and --help run without torch

    n = len(values)
    data = torch.tensor(values, dtype=torch.float64)
    mean = data.mean().item()
    if data.min() == data.max():
        edge = 0.0
        if mean in (0.0, 1.0):
            edge = 1.96**2 / (n + 1.96**2)
        return _interval(mean, n, low=mean * (1 - edge), high=mean + (1 - mean) * edge)
    generator = torch.Generator().manual_seed(seed)
    means = []
    for _ in range(RESAMPLES):
        means.append(data[torch.randint(n, (n,), generator=generator)].mean().item())
    return _interval(mean, n, *_ends(means))


def _ends(means: list[float]) -> tuple[float, float]:
    """Return the 2.5 % and 97.5 % quantiles of RESAMPLES means."""
    means = sorted(means)
    return means[int(0.025 * RESAMPLES)], means[int(0.975 * RESAMPLES) - 1]


def _interval(value: float, n: int, low: float, high: float) -> dict[str, float]:
    return {"value": value, "n": n, "low": low, "high": high}


def known(values: Sequence[Sequence[float | None]]) -> list[float]:
    """Return all numbers of some rollouts, one after another, without the None."""
    numbers = []
    for row in values:
        numbers += [v for v in row if v is not None]
    return numbers


def token_mean(values: Sequence[Sequence[float | None]], seed: int = 0) -> dict[str, float]:
    """Return {value, n, low, high} of nats per token.

    n counts tokens. The bootstrap resamples whole rollouts, because their tokens are not
    independent. Rollouts without a number are left out.
    """
    import torch  # here: report and --help run without torch

    rollouts = []
    for row in values:
        numbers = known([row])
        if numbers:
            rollouts.append([sum(numbers), len(numbers)])
    sums = torch.tensor(rollouts, dtype=torch.float64)
    value = (sums[:, 0].sum() / sums[:, 1].sum()).item()
    generator = torch.Generator().manual_seed(seed_of(seed, "token_mean"))
    means = []
    for _ in range(RESAMPLES):
        total, count = sums[torch.randint(len(sums), (len(sums),), generator=generator)].sum(0)
        means.append((total / count).item())
    return _interval(value, int(sums[:, 1].sum()), *_ends(means))


def split_mean(
    values: Sequence[Sequence[float | None]], prefix: int
) -> tuple[float | None, float | None]:
    """Return the mean nats per token inside the first ``prefix`` tokens, and beyond them.

    None: there is no token.
    """
    inside = known([row[:prefix] for row in values])
    beyond = known([row[prefix:] for row in values])
    return _mean(inside), _mean(beyond)


def _mean(values: list[float]) -> float | None:
    if not values:
        return None
    return math.fsum(values) / len(values)


def quantile(values: Sequence[float], share: float) -> float:
    """Return the ``share`` quantile, linear between order statistics."""
    ordered = sorted(values)
    rank = share * (len(ordered) - 1)
    below = math.floor(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (rank - below) * (ordered[above] - ordered[below])
