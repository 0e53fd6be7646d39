"""The weighted divergence, fused with both output heads and computed in chunks of rows."""

import math

import torch

from .divergence import Head, Terms, per_token, value_and_gradient


def weighted(
    terms: Terms,
    student_ND: torch.Tensor,
    student_head: Head,
    teacher_NE: torch.Tensor | None,
    teacher_head: Head,
    weight_N: torch.Tensor,
    token_N: torch.Tensor | None = None,
    sampler_logp_N: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Σ_n weight_n · D(S_n, T_n) with its gradient, the detached values D_n [N] (nats), and with a
    clip the teacher's mass on clipped entries [N].

    S = softmax(student logits / temperature), T likewise; ``weight_N`` is already divided (by the
    taught tokens of the whole update, say) and is not renormalised. The gradient to the hidden
    rows, the head's weight and its bias is computed in the same pass from closed forms, so no [N,
    V] table outlives its chunk and nothing is projected again. No gradient reaches the teacher. A
    frozen head gets none computed. ``token_N``: the realised tokens, for the sampled estimator and
    the cross-entropy; ``sampler_logp_N``: their log-probability where they were drawn, for the
    former's ratio.

    Source: losses of arXiv 2306.13649 and 2602.15260; the fusion is ours.
    """
    return _Weighted.apply(
        student_ND,
        student_head.weight_VD,
        student_head.bias_V,
        weight_N,
        None if teacher_NE is None else teacher_NE.detach(),
        student_head,
        teacher_head,
        terms,
        token_N,
        sampler_logp_N,
    )


class _Weighted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        student_ND,
        weight_VD,
        bias_V,
        weight_N,
        teacher_NE,
        student_head,
        teacher_head,
        terms,
        token_N,
        sampler_logp_N,
    ):
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        device, support, cap = student_ND.device, len(weight_VD), student_head.softcap
        grad_hidden = torch.zeros_like(student_ND) if need_hidden else None
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if need_weight else None
        grad_bias = torch.zeros_like(bias_V, dtype=torch.float32) if need_bias else None
        student_head, teacher_head = student_head.to(terms.dtype), teacher_head.to(terms.dtype)
        row_weight = weight_N[:, None].to(device, torch.float32) * (
            student_head.scale / terms.temperature
        )
        value_N = torch.empty(len(student_ND), dtype=torch.float32, device=device)
        clipped_N = None if terms.clip is None else torch.empty_like(value_N)
        size = max(1, min(terms.chunk(support, cap is not None), len(student_ND)))
        table = lambda wanted=True: torch.empty(size, support, device=device) if wanted else None
        buffers = table(), table(), table(), table(terms.name == "jsd"), table(cap is not None)
        for start in range(0, len(student_ND), size):
            rows = slice(start, start + size)
            hidden = student_ND[rows].to(terms.dtype)
            work, student_logp, teacher_logp, spare, slope = (
                b if b is None else b[: len(hidden)] for b in buffers
            )
            logits = student_head.logits(hidden, work)
            if cap is not None:
                torch.div(logits, cap, out=slope).square_().neg_().add_(
                    1
                )  # d softcap·tanh(z/softcap) / dz
            _log_softmax(logits, terms.temperature, student_logp)
            if (
                teacher_NE is not None
            ):  # it may sit on another device with its head: its rows come over as logits
                there = teacher_NE.device == device
                logits = teacher_head.logits(teacher_NE[rows], work if there else None)
                _log_softmax(
                    logits if there else work.copy_(logits), terms.temperature, teacher_logp
                )
            if terms.sampled or terms.taught_by == "text":
                drawn = (
                    sampler_logp_N if sampler_logp_N is None else sampler_logp_N[rows].to(device)
                )
                value_N[rows], grad = _at_token(
                    terms, student_logp, teacher_logp, token_N[rows].to(device), drawn
                )
            elif terms.clip is not None:
                value_N[rows], grad, clipped_N[rows] = _clipped(
                    terms.clip, student_logp, teacher_logp, work
                )
            elif terms.partial(support):
                value_N[rows], grad = _value_and_gradient_on_top(
                    terms, student_logp, teacher_logp, work
                )
            else:
                value_N[rows], grad = value_and_gradient(
                    terms.name, terms.beta, student_logp, teacher_logp, work, spare
                )
            if not (need_hidden or need_weight or need_bias):
                continue
            if cap is not None:
                grad *= slope
            if need_bias:
                grad_bias.addmv_(grad.T, row_weight[rows, 0])
            grad = grad.to(terms.dtype)
            with torch.autocast(device.type, enabled=False):
                if need_hidden:
                    grad_hidden[rows] = (grad @ student_head.weight_VD).float() * row_weight[rows]
                if need_weight:
                    _add_outer(
                        grad_weight, grad, (hidden.float() * row_weight[rows]).to(terms.dtype)
                    )
        ctx.grads = grad_hidden, grad_weight, grad_bias
        ctx.dtypes = weight_VD.dtype, None if bias_V is None else bias_V.dtype
        ctx.mark_non_differentiable(*(t for t in (value_N, clipped_N) if t is not None))
        return (weight_N.to(device, torch.float32) * value_N).sum(), value_N, clipped_N

    @staticmethod
    def backward(ctx, grad_loss, *_):
        hidden, weight, bias = ctx.grads
        ctx.grads = None
        if hidden is not None:
            hidden = hidden.mul_(grad_loss)
        if weight is not None:
            weight = weight.mul_(grad_loss).to(ctx.dtypes[0])
        if bias is not None:
            bias = bias.mul_(grad_loss).to(ctx.dtypes[1])
        return hidden, weight, bias, *[None] * 7


def _log_softmax(logits, temperature, out):
    if temperature != 1:
        logits /= temperature
    return torch.log_softmax(logits, -1, out=out)


def _clipped(clip: float, student_logp, teacher_logp, spare):
    """As ``value_and_gradient``, for the forward KL clipped entry by entry, and the teacher's mass
    on clipped entries [N].

    value Σ_v min(T_v (log T_v − log S_v), κ), which may be negative; gradient S_k·Q_U − T_k·1[k ∈
    U] with U the entries that
    are not clipped and Q_U the teacher's mass on
                                                                                                    them.                                             [OPSD,
                                                                                                    arXiv
                                                                                                    2601.18734]
    """
    term = torch.sub(teacher_logp, student_logp, out=spare)
    teacher = teacher_logp.exp_()
    free = term.mul_(teacher) <= clip
    value = term.clamp_(max=clip).sum(-1)
    mass = teacher.mul_(free).sum(-1)
    return value, student_logp.exp_().mul_(mass[:, None]).sub_(teacher), 1 - mass


def _on_top(terms, student_logp, teacher_logp, work):
    """Log-probabilities [N, k + 1] of the teacher's k most likely tokens and of all others together
    (the tail), for the student and the teacher, and which tokens they are."""
    top_NK = teacher_logp.topk(terms.top_k, -1).indices
    sides = []
    for logp_NV in (student_logp, teacher_logp):
        tail = torch.logsumexp(
            work.copy_(logp_NV).scatter_(1, top_NK, -torch.inf), -1, keepdim=True
        )
        sides.append(torch.cat([logp_NV.gather(1, top_NK), tail], -1))
    return *sides, top_NK


def _value_and_gradient_on_top(terms, student_logp, teacher_logp, work):
    """As ``value_and_gradient``, on the buckets: a token in the tail has the share of the bucket's
    gradient that it has of the bucket's mass."""
    student, teacher, top_NK = _on_top(terms, student_logp, teacher_logp, work)
    share = student_logp.sub_(student[:, -1:]).exp_()
    value, gradient = value_and_gradient(
        terms.name,
        terms.beta,
        student,
        teacher,
        torch.empty_like(student),
        torch.empty_like(student),
    )
    return value, share.mul_(gradient[:, -1:]).scatter_(1, top_NK, gradient[:, :-1])


def _at_token(terms, student_logp, teacher_logp, token_N, sampler_logp_N):
    """As ``value_and_gradient``, from the realised token y alone.

    sampled        value log S(y) − log T(y), an unbiased estimate of KL(S‖T) for y ~ S; the policy
                   gradient's loss
                   −ρ·A·log S(y) with advantage A = log T(y) − log S(y), both ρ and A held fixed,
                   has the gradient ρ·(log S(y) − log T(y))·(1[k = y] − S_k), with ρ = S(y)/q(y)
                   where y was drawn from q (1 if unknown) [arXiv 2602.15260; MiniLLM, arXiv
                   2306.08543]
    cross-entropy  value −log S(y), gradient S_k − 1[k = y]                      [SeqKD, arXiv
                                                                                 1606.07947]
    """
    token_N1 = token_N[:, None]
    own = student_logp.gather(1, token_N1)
    if terms.taught_by == "text":
        value, factor = -own, -torch.ones_like(own)
    else:
        value = own - teacher_logp.gather(1, token_N1)
        factor = value if sampler_logp_N is None else value * (own - sampler_logp_N[:, None]).exp()
    gradient = student_logp.exp_().neg_()
    gradient.scatter_add_(1, token_N1, torch.ones_like(own))
    return value[:, 0], gradient.mul_(factor)


def _add_outer(total_VD, grad_NV, hidden_ND):
    """total += gradᵀ · hidden with float32 sums and no second [V, D] table."""
    if grad_NV.dtype == torch.float32:
        torch.addmm(total_VD, grad_NV.T, hidden_ND, out=total_VD)
        return
    for part, columns in zip(total_VD.split(1 << 14), grad_NV.split(1 << 14, -1)):
        part += columns.T @ hidden_ND


@torch.no_grad()
def statistics(
    terms: Terms,
    student_ND: torch.Tensor,
    student_head: Head,
    teacher_NE: torch.Tensor,
    teacher_head: Head,
    token_N: torch.Tensor,
    forward: bool = False,
) -> dict[str, torch.Tensor]:
    """Per-token facts without gradient, each [N] float32: ``divergence``, ``entropy`` of S (nats),
    the log-probability of the realised token ``token_N`` under each model (``student_logp``,
    ``teacher_logp``), and if asked for KL(T‖S), ``forward_kl``."""
    device, support = student_ND.device, len(student_head.weight_VD)
    names = ("divergence", "entropy", "student_logp", "teacher_logp") + (
        ("forward_kl",) if forward else ()
    )
    found = {
        name: torch.empty(len(student_ND), dtype=torch.float32, device=device) for name in names
    }
    four = math.ceil(support * 4 / 3)  # as many tables are alive, where ``chunk`` counts three
    size = max(1, min(terms.chunk(four, student_head.softcap is not None), len(student_ND)))
    tables = [torch.empty(size, support, device=device) for _ in range(4)]
    student_head, teacher_head = student_head.to(terms.dtype), teacher_head.to(terms.dtype)
    for start in range(0, len(student_ND), size):
        rows = slice(start, min(start + size, len(student_ND)))
        student_logp, teacher_logp, work, spare = (t[: rows.stop - rows.start] for t in tables)
        _log_softmax(student_head.logits(student_ND[rows], work), terms.temperature, student_logp)
        there = teacher_NE.device == device  # else its rows come over as logits
        logits = teacher_head.logits(teacher_NE[rows], work if there else None)
        _log_softmax(logits if there else work.copy_(logits), terms.temperature, teacher_logp)
        token = token_N[rows, None].to(device)
        found["student_logp"][rows], found["teacher_logp"][rows] = (
            t.gather(1, token)[:, 0] for t in (student_logp, teacher_logp)
        )
        student = torch.exp(student_logp, out=work)
        found["entropy"][rows] = torch.mul(student, student_logp, out=spare).sum(-1).neg_()
        if terms.partial(support):
            found["divergence"][rows] = per_token(
                terms.name, terms.beta, *_on_top(terms, student_logp, teacher_logp, spare)[:2]
            )
        elif terms.name != "reverse-kl":
            found["divergence"][rows] = per_token(
                terms.name, terms.beta, student_logp, teacher_logp
            )
        else:
            found["divergence"][rows] = (
                torch.sub(student_logp, teacher_logp, out=spare).mul_(student).sum(-1)
            )
        if forward:
            gap = torch.sub(teacher_logp, student_logp, out=spare)
            found["forward_kl"][rows] = gap.mul_(torch.exp(teacher_logp, out=work)).sum(-1)
    return found
