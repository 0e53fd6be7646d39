"""Quantiles, means and bootstrap intervals."""

import math
from collections.abc import Sequence

from .seeds import seed_of

RESAMPLES = 2_000


def interval(values: Sequence[float], seed: int = 0) -> dict[str, float]:
    """{value, n, low, high}: mean over problems with a 95 % percentile-bootstrap interval (2,000
    seeded resamples).

    When all values are equal the bootstrap has no width; the ends then are Wilson's, at z = 1.96,
    for shares (0 or 1).
    """
    import torch  # here: report and --help run without torch

    n = len(values)
    data = torch.tensor(values, dtype=torch.float64)
    mean = data.mean().item()
    if data.min() == data.max():
        if mean in (0.0, 1.0):
            edge = 1.96**2 / (n + 1.96**2)
            return {
                "value": mean,
                "n": n,
                "low": mean * (1 - edge),
                "high": mean + (1 - mean) * edge,
            }
        return {"value": mean, "n": n, "low": mean, "high": mean}
    generator = torch.Generator().manual_seed(seed)
    means = (
        torch.stack(
            [data[torch.randint(n, (n,), generator=generator)].mean() for _ in range(RESAMPLES)]
        )
        .sort()
        .values
    )
    return {
        "value": mean,
        "n": n,
        "low": means[int(0.025 * RESAMPLES)].item(),
        "high": means[int(0.975 * RESAMPLES) - 1].item(),
    }


def known(values: Sequence[Sequence[float | None]]) -> list[float]:
    """All numbers of some rollouts, one after another."""
    return [v for row in values for v in row if v is not None]


def token_mean(values: Sequence[Sequence[float | None]], seed: int = 0) -> dict[str, float]:
    """{value, n, low, high} of nats per token; n counts tokens, the bootstrap draws whole rollouts
    (their tokens are not independent). Rollouts without a number are left out."""
    import torch  # here: report and --help run without torch

    rows = [row for row in (known([row]) for row in values) if row]
    sums = torch.tensor([[sum(row), len(row)] for row in rows], dtype=torch.float64)
    value = (sums[:, 0].sum() / sums[:, 1].sum()).item()
    generator = torch.Generator().manual_seed(seed_of(seed, "token_mean"))
    draws = []
    for _ in range(RESAMPLES):
        drawn = sums[torch.randint(len(sums), (len(sums),), generator=generator)].sum(0)
        draws.append((drawn[0] / drawn[1]).item())
    draws.sort()
    return {
        "value": value,
        "n": int(sums[:, 1].sum()),
        "low": draws[int(0.025 * RESAMPLES)],
        "high": draws[int(0.975 * RESAMPLES) - 1],
    }


def split_mean(
    values: Sequence[Sequence[float | None]], prefix: int
) -> tuple[float | None, float | None]:
    """Mean nats per token (inside the first ``prefix`` tokens, beyond them); None where there is
    none."""
    head, tail = known([row[:prefix] for row in values]), known([row[prefix:] for row in values])
    return _mean(head), _mean(tail)


def _mean(values: list[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def quantile(values: Sequence[float], share: float) -> float:
    """The ``share`` quantile, linear between order statistics."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
