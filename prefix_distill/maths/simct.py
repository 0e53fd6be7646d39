"""The divergence on units of text for different tokenizers, fused with both heads, in chunks.

Axes: N rows of the student, M rows of the teacher, U units, V and W the vocabularies, O the common
support: pairs of tokens with the same bytes, and EOS. All logarithms are natural; all values are
nats.

    exact unit: one token per side   scores of a model = its log p(o | prefix), o ∈ O
    span: any other unit             the same at the span's first token, and one more: the span
                                     itself, (1/n) Σ log p(token | its prefix) over the model's own
                                     n tokens of it
    q = softmax(scores) ;  loss of a unit = D(q_S, q_T), the teacher's scores held fixed

``strict`` has exact units only. ``simct-released`` takes raw logits in place of log p, as the
authors' code does.

Source: SimCT, arXiv 2605.07711; the fusion is ours. On exact units the rest of both vocabularies
cancels, so only the rows of O of both heads are used.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .divergence import Head, Terms, per_token, value_and_gradient
from .formulas import forward_kl
from .fused import (
    differentiated_weight,
    float32_zeros,
    scale_gradients,
    start_weight_gradient,
)
from .units import Support, Units, events_of, rows_at, rows_per_chunk, span_scores

__all__ = ["Support", "Units", "rows_per_chunk", "statistics", "weighted"]


def weighted(  # noqa: PLR0913  the operands of one formula
    terms: Terms,
    support: Support,
    units: Units,
    student_ND: Tensor,
    student_head: Head,
    teacher_ME: Tensor,
    teacher_head: Head,
    weight_U: Tensor,
) -> tuple[Tensor, Tensor, None]:
    """Return Σ_u weight_u · D(q_S, q_T), the detached values D_u [U] in nats, and None.

    As in ``fused.weighted``, the forward pass computes the gradients from closed forms, and no
    table of rows × vocabulary outlives its chunk. ``weight_U`` is already normalized, and the
    teacher gets no gradient. The student's head projects the tokens of spans twice, because the
    gradient of a span's score needs all of them.
    """
    result: tuple[Tensor, Tensor, None] = _Weighted.apply(  # type: ignore[no-untyped-call]  # torch leaves apply unannotated
        student_ND,
        differentiated_weight(student_head),
        student_head.bias_V,
        weight_U,
        teacher_ME.detach(),
        student_head,
        teacher_head,
        terms,
        support,
        units,
    )
    return result


class _Weighted(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913  autograd takes each operand as its own argument
        ctx: Any,  # holds arbitrary attributes
        student_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        weight_U: Tensor,
        teacher_ME: Tensor,
        student_head: Head,
        teacher_head: Head,
        terms: Terms,
        support: Support,
        units: Units,
    ) -> tuple[Tensor, Tensor, None]:
        device = student_ND.device
        needs = ctx.needs_input_grad[:3]
        into = _Gradients(needs=needs, hidden_ND=student_ND, head=student_head, terms=terms)
        weight_U = weight_U.to(device, torch.float32)
        one_pass = _Pass(
            terms=terms,
            support=support,
            units=units,
            student_ND=student_ND,
            teacher_ME=teacher_ME,
            ours=student_head.to(terms.dtype),
            theirs=teacher_head.to(terms.dtype),
            weight_U=weight_U,
            value_U=torch.zeros(len(weight_U), device=device),
            into=into,
        )
        one_pass.compare_exact_units()
        if len(units.spans):
            span_gradient_P = one_pass.compare_spans()
            one_pass.add_span_tokens(span_gradient_P)

        grad_weight = into.weight if needs[1] else None
        ctx.grads = into.hidden, grad_weight, into.bias
        ctx.dtypes = weight_VD.dtype, getattr(bias_V, "dtype", None)
        ctx.mark_non_differentiable(one_pass.value_U)
        return (weight_U * one_pass.value_U).sum(), one_pass.value_U, None

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        return *scale_gradients(ctx, grad_outputs[0]), *[None] * 7


@dataclass(frozen=True, kw_only=True)
class _Pass:
    """The operands of one forward pass, and the values and gradients that it fills."""

    terms: Terms
    support: Support
    units: Units
    student_ND: Tensor
    teacher_ME: Tensor
    ours: Head
    theirs: Head
    weight_U: Tensor
    value_U: Tensor
    into: "_Gradients"

    @property
    def device(self) -> torch.device:
        return self.student_ND.device

    @property
    def rows(self) -> int:
        """Return the rows per chunk of full-vocabulary logits."""
        return rows_per_chunk(self.terms, max(len(self.ours.weight_VD), len(self.theirs.weight_VD)))

    def compare_exact_units(self) -> None:
        """Compare the units of one token per side, using both heads' rows in O."""
        terms, support, units = self.terms, self.support, self.units
        ours, theirs = _rows(self.ours, support.student), _rows(self.theirs, support.teacher)
        for part in units.exact.split(rows_per_chunk(terms, support.columns)):
            rows = units.first[0][part].to(self.device)
            logits = ours.logits(self.student_ND[rows]).div_(terms.temperature)
            student_logp, share = events_of(logits, support)
            there = theirs.logits(rows_at(self.teacher_ME, units.first[1][part]))
            teacher_logp, _ = events_of(there.div_(terms.temperature), support)
            value, gradient = _compare(terms, student_logp, teacher_logp.to(self.device))
            self.value_U[part] = value
            weight = self.weight_U[part.to(self.device)]
            table = _spread(gradient, share, support)
            self.into.add(rows, table, logits, weight=weight, ids=support.student)

    def compare_spans(self) -> Tensor:
        """Compare the spans at their first tokens.

        Return the gradient [P] to each span's score, divided by the span's number of student
        tokens.
        """
        terms, support, units, device = self.terms, self.support, self.units, self.device
        student_P = span_scores(
            terms, support, head=self.ours, hidden=self.student_ND, units=units, side=0
        )
        teacher_P = span_scores(
            terms, support, head=self.theirs, hidden=self.teacher_ME, units=units, side=1
        ).to(device)
        span_gradient_P = torch.zeros(len(units.spans), device=device)
        for part in torch.arange(len(units.spans)).split(self.rows):
            which = units.spans[part]
            rows = units.first[0][which].to(device)
            logits = self.ours.logits(self.student_ND[rows]).div_(terms.temperature)
            base = self._base(logits)
            student_scores, share = events_of(base[:, support.student], support)
            there = self.theirs.logits(rows_at(self.teacher_ME, units.first[1][which]))
            teacher_base = self._base(there.div_(terms.temperature))
            teacher_scores, _ = events_of(teacher_base[:, support.teacher], support)
            value, gradient = _compare(
                terms,
                torch.cat([student_scores, student_P[part, None].to(device)], 1),
                torch.cat([teacher_scores.to(device), teacher_P[part, None]], 1),
            )
            self.value_U[which] = value
            span_gradient_P[part] = gradient[:, -1]
            spread = _spread(gradient[:, :-1], share, support)
            table = torch.zeros_like(logits).index_add_(1, support.student, spread)
            if not support.raw:
                table -= base.exp() * table.sum(-1, keepdim=True)
            self.into.add(rows, table, logits, weight=self.weight_U[which.to(device)])
        return span_gradient_P / units.span_sizes(0, device)

    def _base(self, logits: Tensor) -> Tensor:
        """Return what the scores are based on: log p, or the logits themselves."""
        if self.support.raw:
            return logits
        return torch.log_softmax(logits, -1)

    def add_span_tokens(self, span_gradient_P: Tensor) -> None:
        """Add the gradients of the spans' scores to the tokens of the spans.

        ``span_gradient_P``: the result of ``compare_spans``.
        """
        units, device = self.units, self.device
        weight_P = self.weight_U[units.spans.to(device)]
        for part in torch.arange(len(units.row[0])).split(self.rows):
            rows, spans, ids = units.tokens_at(0, part, device)
            logits = self.ours.logits(self.student_ND[rows]).div_(self.terms.temperature)
            if self.support.raw:
                table = torch.zeros_like(logits)
            else:
                table = torch.softmax(logits, -1).neg_()
            one = torch.ones(len(ids), 1, device=device)
            table.scatter_add_(1, ids[:, None], one)
            self.into.add(
                rows, table.mul_(span_gradient_P[spans, None]), logits, weight=weight_P[spans]
            )


class _Gradients:
    """The gradients to hidden rows, head and bias, summed chunk by chunk; None: not needed."""

    def __init__(
        self, needs: tuple[bool, bool, bool], hidden_ND: Tensor, head: Head, terms: Terms
    ) -> None:
        self.hidden_ND, self.head, self.terms = hidden_ND, head, terms
        self.weight_VD = head.weight_VD.detach().to(terms.dtype)
        self.hidden = float32_zeros(hidden_ND, needs[0])
        self.weight = start_weight_gradient(head, needs[1])
        self.bias = float32_zeros(head.bias_V, needs[2])

    def add(
        self,
        rows: Tensor,
        table: Tensor,
        logits: Tensor,
        weight: Tensor,
        ids: Tensor | None = None,
    ) -> None:
        """Add the gradients of some units.

        ``table``: gradient of a unit's value to its tempered ``logits``, [rows, V], or on the
        columns ``ids`` alone.
        """
        if self.hidden is None and self.weight is None and self.bias is None:
            return
        temperature, dtype = self.terms.temperature, self.terms.dtype
        if self.head.softcap is not None:  # d softcap·tanh(z/softcap) / dz
            table = table * (1 - (logits * (temperature / self.head.softcap)).square())
        table = (table * (weight[:, None] * (self.head.scale / temperature))).to(dtype)
        with torch.autocast(table.device.type, enabled=False):
            if self.hidden is not None:
                head_rows = self.weight_VD
                if ids is not None:
                    head_rows = head_rows[ids]
                self.hidden.index_add_(0, rows, (table @ head_rows).float())
            if self.weight is not None:
                added = (table.T @ self.hidden_ND[rows].to(dtype)).float()
                _add_at(self.weight, ids, added)
            if self.bias is not None:
                _add_at(self.bias, ids, table.float().sum(0))


def _add_at(total: Tensor, ids: Tensor | None, added: Tensor) -> None:
    """Add ``added`` to the rows ``ids`` of ``total``; None: to all rows."""
    if ids is None:
        total.add_(added)
    else:
        total.index_add_(0, ids, added)


def _rows(head: Head, ids: Tensor) -> Head:
    """Return the head on some ids only."""
    bias = head.bias_V
    if bias is not None:
        bias = bias[ids]
    return replace(head, weight_VD=head.weight_VD[ids], bias_V=bias)


def _spread(gradient: Tensor, share: Tensor, support: Support) -> Tensor:
    """Return a gradient to events [., O + 1] as one to ids [., O + e]."""
    tokens, end = gradient[:, : support.common], gradient[:, support.common :]
    return torch.cat([tokens, end * share], 1)


def _compare(terms: Terms, student_scores: Tensor, teacher_scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return D(q_S, q_T) per row and its gradient to the student's scores."""
    student_logq = torch.log_softmax(student_scores, -1)
    teacher_logq = torch.log_softmax(teacher_scores, -1)
    spare, spare_too = torch.empty_like(student_logq), torch.empty_like(student_logq)
    return value_and_gradient(terms, student_logq, teacher_logq, spare=spare, spare_too=spare_too)


@dataclass(frozen=True, kw_only=True)
class _Side:
    """One model's operands of ``statistics``.

    ``span_logp`` [P]: the mean log-probability of each span's tokens; ``span_score`` [P]: the mean
    score that the loss compares.
    """

    head: Head
    hidden: Tensor
    ids: Tensor
    first: Tensor
    token: Tensor
    span_logp: Tensor
    span_score: Tensor


@torch.no_grad()
def statistics(  # noqa: PLR0913  the operands of one formula
    terms: Terms,
    support: Support,
    units: Units,
    student_ND: Tensor,
    student_head: Head,
    teacher_ME: Tensor,
    teacher_head: Head,
    forward: bool = False,
) -> dict[str, Tensor]:
    """Return facts of every unit without gradient, each [U] in float32.

    ``divergence``, ``entropy``: on the unit's support; ``student_logp``, ``teacher_logp``: the mean
    log-probability of the unit's tokens; ``student_mass``, ``teacher_mass``: each model's mass on O
    at the unit's first token; ``forward_kl``: KL(q_T‖q_S), with ``forward``.
    """
    device = student_ND.device
    plain = replace(support, raw=False)
    heads = student_head.to(terms.dtype), teacher_head.to(terms.dtype)
    sides = []
    for side, (head, hidden) in enumerate(zip(heads, (student_ND, teacher_ME), strict=True)):
        score = partial(span_scores, terms, head=head, hidden=hidden, units=units, side=side)
        span_logp = score(plain).to(device)
        span_score = span_logp
        if support.raw:
            span_score = score(support).to(device)
        sides.append(
            _Side(
                head=head,
                hidden=hidden,
                ids=(support.student, support.teacher)[side],
                first=units.first[side],
                token=units.token[side],
                span_logp=span_logp,
                span_score=span_score,
            )
        )
    count = len(units.token[0])
    span_of = torch.full((count,), -1, dtype=torch.long)
    span_of[units.spans] = torch.arange(len(units.spans))
    names = ["divergence", "entropy"]
    names += ["student_logp", "teacher_logp", "student_mass", "teacher_mass"]
    if forward:
        names.append("forward_kl")
    facts = {name: torch.empty(count, dtype=torch.float32, device=device) for name in names}
    size = rows_per_chunk(terms, max(len(head.weight_VD) for head in heads))
    for part in torch.arange(count).split(size):
        tables = []
        for name, model in zip(("student", "teacher"), sides, strict=True):
            mass, token, scores = _read_units(terms, support, model, part=part, span=span_of[part])
            facts[f"{name}_mass"][part] = mass
            facts[f"{name}_logp"][part] = token
            tables.append(scores)
        student, teacher = tables
        facts["entropy"][part] = -(student.exp() * student).sum(-1)
        facts["divergence"][part] = per_token(terms, student, teacher)
        if forward:
            facts["forward_kl"][part] = forward_kl(student, teacher)
    return facts


def _read_units(
    terms: Terms, support: Support, side: _Side, part: Tensor, span: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a model's mass on O [u], the text's score [u] and log q [u, O + 1 and the span].

    ``part``: the units; ``span``: the span number of each of them, −1 for none.
    """
    device = side.span_logp.device
    is_span = (span >= 0).to(device)
    logits = side.head.logits(rows_at(side.hidden, side.first[part])).div_(terms.temperature)
    logp = torch.log_softmax(logits, -1)
    token = logp.gather(1, side.token[part, None].to(logp.device))[:, 0].to(device)
    events = events_of(logp[:, side.ids], support)[0].to(device)
    mass = torch.logsumexp(events, -1).exp()
    if support.raw:
        raw_events = events_of(logits[:, side.ids], support)[0].to(device)
        events = torch.where(is_span[:, None], raw_events, events)
    if len(side.span_logp):
        at = span.clamp(min=0).to(device)
        token = torch.where(is_span, side.span_logp[at], token)
        span_score = torch.where(is_span, side.span_score[at], -torch.inf)
        events = torch.cat([events, span_score[:, None]], 1)
    # exact units have no span entry; its −inf would give 0·∞
    return mass, token, torch.log_softmax(events, -1).clamp_(min=-1e30)
