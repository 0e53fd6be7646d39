"""--divergence skew-kl:α is KL(S‖m) with m = (1−α) T + α S: finite where the teacher has no mass.

Only the value is given; autograd computes the gradient, chunk by chunk.
"""

import math

import torch

from prefix_distill import register_divergence


@register_divergence("skew-kl")
def skew_kl(student_logp, teacher_logp, alpha=0.1):
    share_T, share_S = math.log(1 - alpha), math.log(alpha)
    mixture_logp = torch.logaddexp(teacher_logp + share_T, student_logp + share_S)
    return (student_logp.exp() * (student_logp - mixture_logp)).sum(-1)
