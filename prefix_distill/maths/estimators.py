"""Values and gradients of one chunk: entry-wise clip, top-k buckets, realized token.

All functions take tables [N, V] of float32 log-probabilities, which they may overwrite, and return
the values [N] in nats with their gradient [N, V] to the student's logits/temperature.
"""

import math

import torch
from torch import Tensor

from .divergence import Terms, value_and_gradient


def clipped(
    terms: Terms, student_logp: Tensor, teacher_logp: Tensor, work: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return value and gradient of the forward KL clipped entry by entry, and the teacher's mass on
    clipped entries [N].

    value Σ_v min(T_v (log T_v − log S_v), κ), which may be negative; gradient
    S_k·Q_U − T_k·1[k ∈ U] with U the entries that are not clipped and Q_U the teacher's mass on
    them. Source: OPSD, arXiv 2601.18734.
    """
    clip = terms.clip or math.inf
    term = torch.sub(teacher_logp, student_logp, out=work)
    teacher = teacher_logp.exp_()
    free = term.mul_(teacher) <= clip
    value = term.clamp_(max=clip).sum(-1)
    mass = teacher.mul_(free).sum(-1)
    return value, student_logp.exp_().mul_(mass[:, None]).sub_(teacher), 1 - mass


def on_top(
    top_k: int, student_logp: Tensor, teacher_logp: Tensor, work: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the student's and the teacher's log-probabilities [N, k + 1], and k tokens [N, k].

    The k tokens are the teacher's most likely ones. The last column is the tail: all other tokens.
    """
    top_NK = teacher_logp.topk(top_k, -1).indices
    student = _bucketed(student_logp, top_NK, work)
    return student, _bucketed(teacher_logp, top_NK, work), top_NK


def _bucketed(logp_NV: Tensor, top_NK: Tensor, work: Tensor) -> Tensor:
    """Return the log-probabilities [N, k + 1] of the tokens ``top_NK`` and of the tail."""
    others = work.copy_(logp_NV).scatter_(1, top_NK, -torch.inf)
    tail = torch.logsumexp(others, -1, keepdim=True)
    return torch.cat([logp_NV.gather(1, top_NK), tail], -1)


def value_and_gradient_on_top(
    terms: Terms, top_k: int, student_logp: Tensor, teacher_logp: Tensor, work: Tensor
) -> tuple[Tensor, Tensor]:
    """Return value and gradient on the buckets.

    A token in the tail gets a share of the bucket's gradient, equal to its share of the mass.
    """
    student, teacher, top_NK = on_top(top_k, student_logp, teacher_logp, work=work)
    share = student_logp.sub_(student[:, -1:]).exp_()
    spare, spare_too = torch.empty_like(student), torch.empty_like(student)
    value, gradient = value_and_gradient(terms, student, teacher, spare=spare, spare_too=spare_too)
    return value, share.mul_(gradient[:, -1:]).scatter_(1, top_NK, gradient[:, :-1])


def at_token(
    terms: Terms,
    student_logp: Tensor,
    teacher_logp: Tensor,
    token_N: Tensor,
    sampler_logp_N: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return value and gradient from the realized token y alone.

    sampled        value log S(y) − log T(y), an unbiased estimate of KL(S‖T) for y ~ S. The loss
                   of the policy gradient is −ρ·A·log S(y), with the advantage
                   A = log T(y) − log S(y) and ρ = S(y)/q(y) if y was sampled from q (1 if q is
                   unknown). With ρ and A held fixed, its gradient is
                   ρ·(log S(y) − log T(y))·(1[k = y] − S_k). Source: arXiv 2602.15260; MiniLLM,
                   arXiv 2306.08543.
    cross-entropy  value −log S(y), gradient S_k − 1[k = y]. Source: SeqKD, arXiv 1606.07947.
    """
    token_N1 = token_N[:, None]
    token_logp = student_logp.gather(1, token_N1)
    if terms.taught_by == "text":
        value, factor = -token_logp, -torch.ones_like(token_logp)
    else:
        value = factor = token_logp - teacher_logp.gather(1, token_N1)
        if sampler_logp_N is not None:
            factor = value * (token_logp - sampler_logp_N[:, None]).exp()
    gradient = student_logp.exp_().neg_()
    gradient.scatter_add_(1, token_N1, torch.ones_like(token_logp))
    return value[:, 0], gradient.mul_(factor)
