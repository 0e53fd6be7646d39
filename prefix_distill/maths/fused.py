"""The weighted divergence, fused with both output heads and computed in chunks of rows.

Axes as in ``divergence``: N taught tokens, D and E the models' widths, V the shared support.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .divergence import Head, Terms, per_token, value_and_gradient
from .estimators import at_token, clipped, on_top, value_and_gradient_on_top


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
    """Return Σ_n weight_n · D(S_n, T_n), the values D_n [N], and the clipped mass [N].

    The values are detached, in nats. The clipped mass is the teacher's mass on clipped entries,
    None without a clip. S = softmax(student logits / temperature), T likewise.

    The forward pass also computes the gradients to the hidden rows, the head's weight and its bias,
    from closed forms. So no [N, V] table outlives its chunk, and nothing is projected again. The
    teacher and a frozen head get no gradient.

    If the student's head has ``gradient_VD``, the forward pass adds the gradient of its weight
    there. It is right for a caller that differentiates this sum itself, and no function of it.

    ``weight_N``: already normalized, for example divided by the taught tokens of the whole step.
    ``token_N``: the realized tokens, for the sampled estimator and the cross-entropy.
    ``sampler_logp_N``: their log-probability when they were sampled, for the sampled estimator.

    ValueError: ``token_N`` is None for the sampled estimator or the cross-entropy.

    Source: losses of arXiv 2306.13649 and 2602.15260; the fusion is ours.
    """
    teacher_rows = None
    if teacher_NE is not None:
        teacher_rows = teacher_NE.detach()
    result: tuple[Tensor, Tensor, Tensor | None] = _Weighted.apply(  # type: ignore[no-untyped-call]  # torch leaves apply unannotated
        student_ND,
        differentiated_weight(student_head),
        student_head.bias_V,
        weight_N,
        teacher_rows,
        student_head,
        teacher_head,
        terms,
        token_N,
        sampler_logp_N,
    )
    return result


class _Tables:
    """The float32 work tables [rows, V] of one chunk, all overwritten in place.

    ``spare``: None unless the divergence needs it; ``slope``: None unless the head has a soft-cap.
    """

    def __init__(
        self,
        work: Tensor,
        student_logp: Tensor,
        teacher_logp: Tensor,
        spare: Tensor | None = None,
        slope: Tensor | None = None,
    ) -> None:
        self.work, self.student_logp, self.teacher_logp = work, student_logp, teacher_logp
        self.spare, self.slope = spare, slope

    @classmethod
    def allocate(cls, terms: Terms, head: Head, like: Tensor) -> "_Tables":
        """Allocate the tables that ``terms`` and the student's head need, for a whole chunk.

        ``like``: the student's hidden rows, which give the device and the largest number of rows.
        """
        support = len(head.weight_VD)
        rows = max(1, min(terms.rows_per_chunk(support, head.softcap is not None), len(like)))
        make = partial(torch.empty, rows, support, device=like.device)
        tables = cls(make(), make(), make())
        if terms.needs_two_spares:
            tables.spare = make()
        if head.softcap is not None:
            tables.slope = make()
        return tables

    def first(self, rows: int) -> "_Tables":
        """Return the first ``rows`` rows of every table, for a last chunk that may be shorter."""
        tables = _Tables(self.work[:rows], self.student_logp[:rows], self.teacher_logp[:rows])
        if self.spare is not None:
            tables.spare = self.spare[:rows]
        if self.slope is not None:
            tables.slope = self.slope[:rows]
        return tables


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
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        weight_N = weight_N.to(student_ND.device, torch.float32)
        grad_hidden = None
        if needs_hidden:
            grad_hidden = torch.zeros_like(student_ND)
        one_pass = _Pass(
            terms=terms,
            student_ND=student_ND,
            student_head=student_head.to(terms.dtype),
            teacher_NE=teacher_NE,
            teacher_head=teacher_head.to(terms.dtype),
            token_N=token_N,
            sampler_logp_N=sampler_logp_N,
            row_weight=weight_N[:, None] * (student_head.scale / terms.temperature),
            grad_hidden=grad_hidden,
            grad_weight=start_weight_gradient(student_head, needs_weight),
            grad_bias=float32_zeros(bias_V, needs_bias),
        )
        value_N, clipped_N = one_pass.run()
        grad_weight = one_pass.grad_weight if needs_weight else None
        ctx.grads = one_pass.grad_hidden, grad_weight, one_pass.grad_bias
        ctx.dtypes = weight_VD.dtype, getattr(bias_V, "dtype", None)
        ctx.mark_non_differentiable(*(t for t in (value_N, clipped_N) if t is not None))
        return (weight_N * value_N).sum(), value_N, clipped_N

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        return *scale_gradients(ctx, grad_outputs[0]), *[None] * 7


@dataclass(frozen=True, kw_only=True)
class _Pass:
    """The operands of one forward pass, and the gradients that it fills; None: not needed.

    ``row_weight`` [N, 1]: the weights times scale/temperature of the student's head.
    """

    terms: Terms
    student_ND: Tensor
    student_head: Head
    teacher_NE: Tensor | None
    teacher_head: Head
    token_N: Tensor | None
    sampler_logp_N: Tensor | None
    row_weight: Tensor
    grad_hidden: Tensor | None
    grad_weight: Tensor | None
    grad_bias: Tensor | None

    @property
    def needs_gradient(self) -> bool:
        gradients = self.grad_hidden, self.grad_weight, self.grad_bias
        return any(gradient is not None for gradient in gradients)

    def run(self) -> tuple[Tensor, Tensor | None]:
        """Return the values [N], and with a clip the teacher's mass on clipped entries [N]."""
        count, terms = len(self.student_ND), self.terms
        value_N = torch.empty(count, dtype=torch.float32, device=self.student_ND.device)
        clipped_N = None
        if terms.clip is not None:
            clipped_N = torch.empty_like(value_N)
        buffers = _Tables.allocate(terms, self.student_head, self.student_ND)
        size = len(buffers.work)
        for start in range(0, count, size):
            rows = slice(start, min(start + size, count))
            tables = buffers.first(rows.stop - start)
            hidden = self.student_ND[rows].to(terms.dtype)
            slope = self._read(rows, hidden, tables)
            if clipped_N is None or terms.by_token:
                value_N[rows], grad = self._compare(rows, tables)
            else:
                value_N[rows], grad, clipped_N[rows] = clipped(
                    terms, tables.student_logp, tables.teacher_logp, work=tables.work
                )
            if not self.needs_gradient:
                continue
            if slope is not None:
                grad *= slope
            self._add_gradients(rows, hidden, grad)
        return value_N, clipped_N

    def _read(self, rows: slice, hidden: Tensor, tables: _Tables) -> Tensor | None:
        """Write both models' log-probabilities into ``tables``; return the soft-cap's slope."""
        logits = self.student_head.logits(hidden, tables.work)
        slope = self.student_head.slope(logits, tables.slope)
        _log_softmax(logits, self.terms.temperature, tables.student_logp)
        if self.teacher_NE is not None:
            teacher_rows = self.teacher_NE[rows]
            _read_teacher(
                self.terms,
                self.teacher_head,
                hidden_NE=teacher_rows,
                work=tables.work,
                out=tables.teacher_logp,
            )
        return slope

    def _compare(self, rows: slice, tables: _Tables) -> tuple[Tensor, Tensor]:
        """Return the values [n] of a chunk and their gradient [n, V] to logits/temperature."""
        terms, work = self.terms, tables.work
        if terms.by_token:
            if self.token_N is None:
                raise ValueError(
                    "the sampled estimator and the cross-entropy need the realized tokens: pass "
                    "token_N"
                )
            token = self.token_N[rows].to(work.device)
            sampler_logp = None
            if self.sampler_logp_N is not None:
                sampler_logp = self.sampler_logp_N[rows].to(work.device)
            return at_token(
                terms,
                tables.student_logp,
                tables.teacher_logp,
                token_N=token,
                sampler_logp_N=sampler_logp,
            )
        top_k = terms.top(work.shape[1])
        if top_k is not None:
            return value_and_gradient_on_top(
                terms,
                top_k,
                student_logp=tables.student_logp,
                teacher_logp=tables.teacher_logp,
                work=work,
            )
        return value_and_gradient(
            terms, tables.student_logp, tables.teacher_logp, spare=work, spare_too=tables.spare
        )

    def _add_gradients(self, rows: slice, hidden: Tensor, grad: Tensor) -> None:
        """Add a chunk's gradients; ``grad``: to the logits before soft-cap and scale."""
        row_weight = self.row_weight[rows]
        if self.grad_bias is not None:
            self.grad_bias.addmv_(grad.T, row_weight[:, 0])
        grad = grad.to(self.terms.dtype)
        with torch.autocast(grad.device.type, enabled=False):
            if self.grad_hidden is not None:
                # in place and without a name, so that no second table [n, D] lives on
                self.grad_hidden[rows] = (
                    (grad @ self.student_head.weight_VD).float().mul_(row_weight)
                )
            if self.grad_weight is not None:
                weighted_hidden = (hidden.float() * row_weight).to(self.terms.dtype)
                _add_outer(self.grad_weight, grad, weighted_hidden)


def scale_gradients(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients that the forward pass stored in ``ctx.grads``, times ``grad_loss``.

    They are the gradients to the hidden rows, the head's weight and its bias; the last two get the
    dtypes in ``ctx.dtypes``. ``ctx`` drops its references, so each is freed as soon as possible.
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


def differentiated_weight(head: Head) -> Tensor:
    """Return the head's weight, detached if its gradient has a table to be added to."""
    if head.gradient_VD is None:
        return head.weight_VD
    return head.weight_VD.detach()


def start_weight_gradient(head: Head, needed: bool) -> Tensor | None:
    """Return the float32 table [V, D] that the gradient of the head's weight is added to.

    None: autograd does not need it, and the head has no table for it.
    """
    if head.gradient_VD is not None:
        return head.gradient_VD
    return float32_zeros(head.weight_VD, needed)


def float32_zeros(like: Tensor | None, needed: bool) -> Tensor | None:
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


def _log_softmax(logits: Tensor, temperature: float, out: Tensor) -> Tensor:
    """Write the log-probabilities at ``temperature`` into ``out``; overwrite ``logits``."""
    if temperature != 1:
        logits /= temperature
    return torch.log_softmax(logits, -1, out=out)


def _add_outer(total_VD: Tensor, grad_NV: Tensor, hidden_ND: Tensor) -> None:
    """Add gradᵀ · hidden to ``total_VD`` with float32 sums and without a second [V, D] table."""
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
    """Return facts of every token without gradient, each [N] in float32, in nats.

    ``divergence``: that of ``terms``; ``entropy``: that of S; ``student_logp``, ``teacher_logp``:
    the log-probability of the realized token ``token_N``; ``forward_kl``: KL(T‖S), with
    ``forward``.
    """
    count, device, support = len(student_ND), student_ND.device, len(student_head.weight_VD)
    names = ["divergence", "entropy", "student_logp", "teacher_logp"]
    if forward:
        names.append("forward_kl")
    facts = {name: torch.empty(count, dtype=torch.float32, device=device) for name in names}
    # four tables are alive here, where ``rows_per_chunk`` counts three
    four = math.ceil(support * 4 / 3)
    size = max(1, min(terms.rows_per_chunk(four, student_head.softcap is not None), count))
    tables = [torch.empty(size, support, device=device) for _ in range(4)]
    student_head, teacher_head = student_head.to(terms.dtype), teacher_head.to(terms.dtype)
    for start in range(0, count, size):
        rows = slice(start, min(start + size, count))
        student_logp, teacher_logp, work, spare = (t[: rows.stop - start] for t in tables)
        _log_softmax(student_head.logits(student_ND[rows], work), terms.temperature, student_logp)
        _read_teacher(terms, teacher_head, hidden_NE=teacher_NE[rows], work=work, out=teacher_logp)
        token = token_N[rows, None].to(device)
        facts["student_logp"][rows] = student_logp.gather(1, token)[:, 0]
        facts["teacher_logp"][rows] = teacher_logp.gather(1, token)[:, 0]
        student = torch.exp(student_logp, out=work)
        facts["entropy"][rows] = torch.mul(student, student_logp, out=spare).sum(-1).neg_()
        top_k = terms.top(support)
        if top_k is not None:
            buckets = on_top(top_k, student_logp, teacher_logp, work=spare)
            facts["divergence"][rows] = per_token(terms, buckets[0], buckets[1])
        elif terms.name == "reverse-kl":  # in the tables that exist
            gap = torch.sub(student_logp, teacher_logp, out=spare)
            facts["divergence"][rows] = gap.mul_(student).sum(-1)
        else:
            facts["divergence"][rows] = per_token(terms, student_logp, teacher_logp)
        if forward:
            gap = torch.sub(teacher_logp, student_logp, out=spare)
            facts["forward_kl"][rows] = gap.mul_(torch.exp(teacher_logp, out=work)).sum(-1)
    return facts
