"""Divergences my-kl, reverse KL with its own gradient, and my-kl-auto, with autograd's."""

from prefix_distill import register_divergence


def gradient(student_logp, teacher_logp):
    gap = student_logp - teacher_logp
    return student_logp.exp() * (gap - (student_logp.exp() * gap).sum(-1, keepdim=True))


@register_divergence("my-kl", gradient=gradient)
@register_divergence("my-kl-auto")
def reverse_kl(student_logp, teacher_logp):
    return (student_logp.exp() * (student_logp - teacher_logp)).sum(-1)
