"""Test how often the 95% interval of nats per token covers the true value."""

import math

import pytest
import torch

from prefix_distill.maths import intervals
from prefix_distill.maths.intervals import token_mean


def draw(generator, rollouts, sigma):
    """Return rollouts of 4 to 32 tokens whose level is log-normal, as that of KLs."""
    values = []
    for count in torch.randint(4, 33, (rollouts,), generator=generator).tolist():
        level = math.exp(sigma * torch.randn(1, generator=generator).item())
        values.append([level] * count)
    return values


@pytest.mark.parametrize(
    "rollouts, sigma, least", [(8, 0.5, 0.93), (32, 0.5, 0.93), (8, 1.0, 0.9), (32, 1.0, 0.9)]
)
def test_the_interval_covers_skewed_rollouts(monkeypatch, rollouts, sigma, least):
    """A percentile bootstrap covers 84% and 92% at 0.5, and 76% and 87% at 1.0."""
    monkeypatch.setattr(intervals, "RESAMPLES", 500)
    generator = torch.Generator().manual_seed(3)
    covered = 0
    for seed in range(1200):
        found = token_mean(draw(generator, rollouts, sigma), seed)
        covered += found["low"] <= math.exp(sigma**2 / 2) <= found["high"]
    assert least <= covered / 1200 <= 0.99


def test_rollouts_without_spread_have_an_interval_without_width():
    for rollouts in (1, 3, 9):
        found = token_mean([[2.0, None, 2.0]] * rollouts)
        assert found == {"value": 2.0, "n": 2 * rollouts, "low": 2.0, "high": 2.0}


def test_the_interval_is_seeded_and_contains_the_value():
    values = draw(torch.Generator().manual_seed(1), 12, sigma=1)
    found = token_mean(values)
    assert found == token_mean(values) and found["low"] < found["value"] < found["high"]
    assert found["high"] - found["value"] > found["value"] - found["low"]  # skewed to the right


@pytest.mark.parametrize("freedom, exact", [(1, 12.706), (4, 2.776), (7, 2.365), (63, 1.998)])
def test_quantiles_of_students_t(freedom, exact):
    assert intervals._student(freedom) == pytest.approx(exact, rel=0.01)
