"""The weighted divergence, fused with both output heads and computed in chunks of rows."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .divergence import Head, Terms, per_token, value_and_gradient


def weighted(  # noqa: PLR0913  the operands of one formula
    terms: Terms,
    student_ND: Tensor,
    student_head: Head,
    teacher_NE: Tensor | None,
    teacher_head: Head,
    weight_N: Tensor,
    token_N: Tensor | None = None,
    sampler_logp_N: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Σ_n weight_n · D(S_n, T_n) with its gradient, the detached values D_n [N] (nats), and with a
    clip the teacher's mass on clipped entries [N].

    S = softmax(student logits / temperature), T likewise; ``weight_N`` is already divided (by the
    taught tokens of the whole update, say) and is not renormalised. The gradient to the hidden
    rows, the head's weight and its bias is computed in the same pass from closed forms, so no [N,
    V] table outlives its chunk and nothing is projected again. No gradient reaches the teacher. A
    frozen head gets none computed. ``token_N``: the realised tokens, for the sampled estimator and
    the cross-entropy; ``sampler_logp_N``: their log-probability where they were drawn, for the
    former's ratio.

    ValueError: ``token_N`` is None for the sampled estimator or the cross-entropy.

    Source: losses of arXiv 2306.13649 and 2602.15260; the fusion is ours.
    """
    result: tuple[Tensor, Tensor, Tensor | None] = _Weighted.apply(  # type: ignore[no-untyped-call]  # torch leaves apply unannotated
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
    return result


@dataclass(frozen=True)
class _Tables:
    """The float32 work tables [rows, V] of one chunk, all overwritten in place.

    Only the JSD uses ``spare``; only a soft-cap uses ``slope``.
    """

    work: Tensor
    student_logp: Tensor
    teacher_logp: Tensor
    spare: Tensor | None
    slope: Tensor | None

    @classmethod
    def allocate(
        cls, rows: int, support: int, jsd: bool, softcap: bool, device: torch.device
    ) -> "_Tables":
        """Allocate the tables that the divergence and the student's head need."""
        make = partial(torch.empty, rows, support, device=device)
        return cls(make(), make(), make(), make() if jsd else None, make() if softcap else None)

    def first(self, rows: int) -> "_Tables":
        """Return the first ``rows`` rows of every table, for a last chunk that may be shorter."""
        return _Tables(
            self.work[:rows],
            self.student_logp[:rows],
            self.teacher_logp[:rows],
            None if self.spare is None else self.spare[:rows],
            None if self.slope is None else self.slope[:rows],
        )


class _Weighted(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913  autograd takes each operand as its own argument
        ctx: Any,  # holds arbitrary attributes
        student_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        weight_N: Tensor,
        teacher_NE: Tensor | None,
        student_head: Head,
        teacher_head: Head,
        terms: Terms,
        token_N: Tensor | None,
        sampler_logp_N: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        device, support, cap = student_ND.device, len(weight_VD), student_head.softcap
        grad_hidden = torch.zeros_like(student_ND) if need_hidden else None
        grad_weight = _float32_zeros(weight_VD, need_weight)
        grad_bias = _float32_zeros(bias_V, need_bias)
        student_head, teacher_head = student_head.to(terms.dtype), teacher_head.to(terms.dtype)
        row_weight = weight_N[:, None].to(device, torch.float32) * (
            student_head.scale / terms.temperature
        )
        value_N = torch.empty(len(student_ND), dtype=torch.float32, device=device)
        clipped_N = None if terms.clip is None else torch.empty_like(value_N)
        size = max(1, min(terms.chunk(support, cap is not None), len(student_ND)))
        buffers = _Tables.allocate(size, support, terms.needs_two_spares, cap is not None, device)
        for start in range(0, len(student_ND), size):
            rows = slice(start, start + size)
            hidden = student_ND[rows].to(terms.dtype)
            tables = buffers.first(len(hidden))
            logits = student_head.logits(hidden, tables.work)
            slope = student_head.slope(logits, tables.slope)
            _log_softmax(logits, terms.temperature, tables.student_logp)
            if teacher_NE is not None:
                _read_teacher(
                    terms, teacher_head, teacher_NE[rows], tables.work, tables.teacher_logp
                )
            if clipped_N is None or terms.by_token:
                value_N[rows], grad = _compare(terms, tables, rows, token_N, sampler_logp_N)
            else:
                value_N[rows], grad, clipped_N[rows] = _clipped(terms, tables)
            if not (need_hidden or need_weight or need_bias):
                continue
            if slope is not None:
                grad *= slope
            if grad_bias is not None:
                grad_bias.addmv_(grad.T, row_weight[rows, 0])
            grad = grad.to(terms.dtype)
            with torch.autocast(device.type, enabled=False):
                if grad_hidden is not None:
                    grad_hidden[rows] = (grad @ student_head.weight_VD).float() * row_weight[rows]
                if grad_weight is not None:
                    _add_outer(
                        grad_weight, grad, (hidden.float() * row_weight[rows]).to(terms.dtype)
                    )
        ctx.grads = grad_hidden, grad_weight, grad_bias
        ctx.dtypes = weight_VD.dtype, None if bias_V is None else bias_V.dtype
        ctx.mark_non_differentiable(*(t for t in (value_N, clipped_N) if t is not None))
        return (weight_N.to(device, torch.float32) * value_N).sum(), value_N, clipped_N

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        return *scale_gradients(ctx, grad_outputs[0]), *[None] * 7


def scale_gradients(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients that the forward pass left in ``ctx.grads``, times ``grad_loss``.

    They are those to the hidden rows, the head's weight and its bias; the last two take the dtypes
    in ``ctx.dtypes``. ``ctx`` gives its references up, so that each is freed as soon as possible.
    """
    hidden, weight, bias = ctx.grads
    ctx.grads = None
    if hidden is not None:
        hidden = hidden.mul_(grad_loss)
    if weight is not None:
        weight = weight.mul_(grad_loss).to(ctx.dtypes[0])
    if bias is not None:
        bias = bias.mul_(grad_loss).to(ctx.dtypes[1])
    return hidden, weight, bias


def _float32_zeros(like: Tensor | None, needed: bool) -> Tensor | None:
    """Return float32 zeros of the same shape for a gradient, or None if it is not needed."""
    if like is None or not needed:
        return None
    return torch.zeros_like(like, dtype=torch.float32)


def _read_teacher(terms: Terms, head: Head, hidden_NE: Tensor, work: Tensor, out: Tensor) -> None:
    """Write the teacher's log-probabilities [N, V] into ``out``.

    If the teacher is on another device, its head runs there and the logits are copied.
    """
    if hidden_NE.device == work.device:
        logits = head.logits(hidden_NE, work)
    else:
        logits = work.copy_(head.logits(hidden_NE))
    _log_softmax(logits, terms.temperature, out)


def _compare(
    terms: Terms,
    tables: _Tables,
    rows: slice,
    token_N: Tensor | None,
    sampler_logp_N: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the values [N] of a chunk and their gradient [N, V] to the student's
    logits/temperature.

    ``rows``: the chunk's slice of ``token_N`` and ``sampler_logp_N``.
    """
    student_logp, teacher_logp, work = tables.student_logp, tables.teacher_logp, tables.work
    if terms.by_token:
        if token_N is None:
            raise ValueError(
                "the sampled estimator and the cross-entropy need the realised tokens: pass token_N"
            )
        token = token_N[rows].to(work.device)
        drawn = None if sampler_logp_N is None else sampler_logp_N[rows].to(work.device)
        return _at_token(terms, student_logp, teacher_logp, token, drawn)
    if (top_k := terms.top(work.shape[1])) is not None:
        return _value_and_gradient_on_top(terms, top_k, student_logp, teacher_logp, work)
    return value_and_gradient(terms, student_logp, teacher_logp, work, tables.spare)


def _log_softmax(logits: Tensor, temperature: float, out: Tensor) -> Tensor:
    """Write the log-probabilities at ``temperature`` into ``out``; overwrite ``logits``."""
    if temperature != 1:
        logits /= temperature
    return torch.log_softmax(logits, -1, out=out)


def _clipped(terms: Terms, tables: _Tables) -> tuple[Tensor, Tensor, Tensor]:
    """As ``value_and_gradient``, for the forward KL clipped entry by entry, and the teacher's mass
    on clipped entries [N].

    value Σ_v min(T_v (log T_v − log S_v), κ), which may be negative; gradient
    S_k·Q_U − T_k·1[k ∈ U] with U the entries that are not clipped and Q_U the teacher's mass on
    them. Source: OPSD, arXiv 2601.18734.
    """
    clip = math.inf if terms.clip is None else terms.clip
    student_logp, teacher_logp = tables.student_logp, tables.teacher_logp
    term = torch.sub(teacher_logp, student_logp, out=tables.work)
    teacher = teacher_logp.exp_()
    free = term.mul_(teacher) <= clip
    value = term.clamp_(max=clip).sum(-1)
    mass = teacher.mul_(free).sum(-1)
    return value, student_logp.exp_().mul_(mass[:, None]).sub_(teacher), 1 - mass


def _on_top(
    top_k: int, student_logp: Tensor, teacher_logp: Tensor, work: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities [N, k + 1] of the teacher's k most likely tokens and of all others together
    (the tail), for the student and the teacher, and which tokens they are."""
    top_NK = teacher_logp.topk(top_k, -1).indices
    student, teacher = (_bucketed(logp, top_NK, work) for logp in (student_logp, teacher_logp))
    return student, teacher, top_NK


def _bucketed(logp_NV: Tensor, top_NK: Tensor, work: Tensor) -> Tensor:
    """Return the log-probabilities [N, k + 1] of the tokens ``top_NK`` and of the tail."""
    others = work.copy_(logp_NV).scatter_(1, top_NK, -torch.inf)
    tail = torch.logsumexp(others, -1, keepdim=True)
    return torch.cat([logp_NV.gather(1, top_NK), tail], -1)


def _value_and_gradient_on_top(
    terms: Terms, top_k: int, student_logp: Tensor, teacher_logp: Tensor, work: Tensor
) -> tuple[Tensor, Tensor]:
    """As ``value_and_gradient``, on the buckets: a token in the tail has the share of the bucket's
    gradient that it has of the bucket's mass."""
    student, teacher, top_NK = _on_top(top_k, student_logp, teacher_logp, work)
    share = student_logp.sub_(student[:, -1:]).exp_()
    spare, spare_too = torch.empty_like(student), torch.empty_like(student)
    value, gradient = value_and_gradient(terms, student, teacher, spare, spare_too)
    return value, share.mul_(gradient[:, -1:]).scatter_(1, top_NK, gradient[:, :-1])


def _at_token(
    terms: Terms,
    student_logp: Tensor,
    teacher_logp: Tensor,
    token_N: Tensor,
    sampler_logp_N: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As ``value_and_gradient``, from the realised token y alone.

    sampled        value log S(y) − log T(y), an unbiased estimate of KL(S‖T) for y ~ S. The policy
                   gradient's loss −ρ·A·log S(y) with advantage A = log T(y) − log S(y), both ρ and
                   A held fixed, has the gradient ρ·(log S(y) − log T(y))·(1[k = y] − S_k), with
                   ρ = S(y)/q(y) where y was drawn from q (1 if unknown). Source: arXiv 2602.15260;
                   MiniLLM, arXiv 2306.08543.
    cross-entropy  value −log S(y), gradient S_k − 1[k = y]. Source: SeqKD, arXiv 1606.07947.
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


def _add_outer(total_VD: Tensor, grad_NV: Tensor, hidden_ND: Tensor) -> None:
    """total += gradᵀ · hidden with float32 sums and no second [V, D] table."""
    if grad_NV.dtype == torch.float32:
        torch.addmm(total_VD, grad_NV.T, hidden_ND, out=total_VD)
        return
    parts, columns_of_parts = total_VD.split(1 << 14), grad_NV.split(1 << 14, -1)
    for part, columns in zip(parts, columns_of_parts, strict=True):
        part += columns.T @ hidden_ND


@torch.no_grad()
def statistics(  # noqa: PLR0913  the operands of one formula
    terms: Terms,
    student_ND: Tensor,
    student_head: Head,
    teacher_NE: Tensor,
    teacher_head: Head,
    token_N: Tensor,
    forward: bool = False,
) -> dict[str, Tensor]:
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
    top_k = terms.top(support)
    four = math.ceil(support * 4 / 3)  # as many tables are alive, where ``chunk`` counts three
    size = max(1, min(terms.chunk(four, student_head.softcap is not None), len(student_ND)))
    tables = [torch.empty(size, support, device=device) for _ in range(4)]
    student_head, teacher_head = student_head.to(terms.dtype), teacher_head.to(terms.dtype)
    for start in range(0, len(student_ND), size):
        rows = slice(start, min(start + size, len(student_ND)))
        student_logp, teacher_logp, work, spare = (t[: rows.stop - rows.start] for t in tables)
        _log_softmax(student_head.logits(student_ND[rows], work), terms.temperature, student_logp)
        _read_teacher(terms, teacher_head, teacher_NE[rows], work, teacher_logp)
        token = token_N[rows, None].to(device)
        found["student_logp"][rows], found["teacher_logp"][rows] = (
            t.gather(1, token)[:, 0] for t in (student_logp, teacher_logp)
        )
        student = torch.exp(student_logp, out=work)
        found["entropy"][rows] = torch.mul(student, student_logp, out=spare).sum(-1).neg_()
        if top_k is not None:
            found["divergence"][rows] = per_token(
                terms, *_on_top(top_k, student_logp, teacher_logp, spare)[:2]
            )
        elif terms.name != "reverse-kl":
            found["divergence"][rows] = per_token(terms, student_logp, teacher_logp)
        else:
            found["divergence"][rows] = (
                torch.sub(student_logp, teacher_logp, out=spare).mul_(student).sum(-1)
            )
        if forward:
            gap = torch.sub(teacher_logp, student_logp, out=spare)
            found["forward_kl"][rows] = gap.mul_(torch.exp(teacher_logp, out=work)).sum(-1)
    return found
