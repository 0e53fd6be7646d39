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


@pytest.mark.parametrize("rollouts", [8, 32])
def test_the_interval_covers_skewed_rollouts(monkeypatch, rollouts):
    """A percentile bootstrap covers 87% and 91% of these."""
    monkeypatch.setattr(intervals, "RESAMPLES", 500)
    generator = torch.Generator().manual_seed(3)
    covered = 0
    for seed in range(400):
        found = token_mean(draw(generator, rollouts, sigma=0.5), seed)
        covered += found["low"] <= math.exp(0.125) <= found["high"]
    assert 0.93 <= covered / 400 <= 0.99


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
