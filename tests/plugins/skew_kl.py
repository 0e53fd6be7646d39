"""Divergence --divergence skew-kl:α: KL(S‖m) with m = (1−α) T + α S.

It is finite where the teacher has no probability mass. The plugin defines only the value; autograd
computes the gradient in chunks.
"""

import math

import torch

from prefix_distill import register_divergence


@register_divergence("skew-kl")
def skew_kl(student_logp, teacher_logp, alpha=0.1):
    share_T, share_S = math.log(1 - alpha), math.log(alpha)
    mixture_logp = torch.logaddexp(teacher_logp + share_T, student_logp + share_S)
    return (student_logp.exp() * (student_logp - mixture_logp)).sum(-1)
