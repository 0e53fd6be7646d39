"""Test the divergence of a token and its gradient: closed forms and finite differences."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import NAMES_AND_PARAMETERS

from prefix_distill.maths.divergence import Terms, per_token, value_and_gradient


def logp(*probabilities):
    return torch.tensor([probabilities], dtype=torch.float64).log()


def test_closed_forms_on_three_tokens_in_both_directions():
    student, teacher = (0.7, 0.2, 0.1), (0.25, 0.25, 0.5)

    def kl(p, q):
        return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))

    assert per_token(
        Terms(name="reverse-kl"), logp(*student), logp(*teacher)
    ).item() == pytest.approx(kl(student, teacher), 1e-12)
    assert per_token(
        Terms(name="forward-kl"), logp(*student), logp(*teacher)
    ).item() == pytest.approx(kl(teacher, student), 1e-12)
    mixture = [0.3 * t + 0.7 * s for s, t in zip(student, teacher, strict=True)]
    assert per_token(
        Terms(name="jsd", parameters=(0.3,)), logp(*student), logp(*teacher)
    ).item() == pytest.approx(0.3 * kl(teacher, mixture) + 0.7 * kl(student, mixture), 1e-12)


def test_jsd_tends_to_forward_kl_at_0_and_to_reverse_kl_at_1():
    student, teacher = logp(0.7, 0.2, 0.1), logp(0.25, 0.25, 0.5)
    low, high = (
        per_token(Terms(name="jsd", parameters=(b,)), student, teacher).item()
        for b in (1e-6, 1 - 1e-6)
    )
    assert low / 1e-6 == pytest.approx(
        per_token(Terms(name="forward-kl"), student, teacher).item(), rel=1e-4
    )
    assert high / 1e-6 == pytest.approx(
        per_token(Terms(name="reverse-kl"), student, teacher).item(), rel=1e-4
    )


@pytest.mark.parametrize("name, parameters", NAMES_AND_PARAMETERS)
def test_gradient_matches_finite_differences(name, parameters):
    """Compare the analytic gradient by the logits with central differences in float64."""
    torch.manual_seed(2)
    student, teacher = (
        torch.randn(4, 6, dtype=torch.float64),
        F.log_softmax(torch.randn(4, 6, dtype=torch.float64), -1),
    )

    terms = Terms(name=name, parameters=parameters)

    def value(logits):
        return per_token(terms, F.log_softmax(logits, -1), teacher)

    values, by_hand = value_and_gradient(
        terms,
        F.log_softmax(student, -1),
        teacher.clone(),
        torch.empty_like(teacher),
        torch.empty_like(teacher),
    )
    torch.testing.assert_close(values, value(student))
    for k in range(6):
        step = torch.zeros(6, dtype=torch.float64)
        step[k] = 1e-5
        difference = (value(student + step) - value(student - step)) / 2e-5
        torch.testing.assert_close(by_hand[:, k], difference, rtol=1e-7, atol=1e-9)
