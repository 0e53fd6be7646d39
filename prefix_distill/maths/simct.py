"""The divergence on units of text, for two models with different tokenizers: fused with both output
heads, in chunks.

Axes: N rows of the student, M rows of the teacher, U units, V and W the vocabularies, O the shared
support: pairs of tokens with the same bytes and end-of-sequence. All logarithms are natural; all
values are nats.

    unit of one token on each side   scores of a model = its log p(o | prefix), o ∈ O
    any other unit (span)            the same where the span begins, and one more: the span itself,
                                     (1/n) Σ log p(token | its prefix) over the model's own n
                                     tokens of it
    q = softmax(scores) ;  loss of a unit = D(q_S, q_T), the teacher's scores held fixed

``strict`` has units of the first kind only. ``simct-released`` has raw logits in place of log p, as
the authors' code.

Source: SimCT, arXiv 2605.07711; the fusion is ours. On units of the first kind the rest of both
vocabularies cancels, so only the rows of O of both heads are read.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .divergence import Head, Terms, per_token, value_and_gradient
from .formulas import forward_kl
from .fused import scale_gradients
from .units import Support, Units, chunk, events_of, rows_at, span_scores

__all__ = ["Support", "Units", "chunk", "statistics", "weighted"]


def weighted(  # noqa: PLR0913  the operands of one formula
    terms: Terms,
    shared: Support,
    of: Units,
    student_ND: Tensor,
    student_head: Head,
    teacher_ME: Tensor,
    teacher_head: Head,
    weight_U: Tensor,
) -> tuple[Tensor, Tensor, None]:
    """Σ_u weight_u · D(q_S, q_T) with its gradient, and the detached values D_u [U], nats.

    As ``fused.weighted``: closed forms in the forward pass, ``weight_U`` is divided already,
    no gradient reaches the teacher. No table of rows × vocabulary outlives its chunk. The tokens of
    spans are projected twice by the student, as a span's score needs all of them before its
    gradient is known.
    """
    result: tuple[Tensor, Tensor, None] = _Weighted.apply(  # type: ignore[no-untyped-call]  # torch leaves apply unannotated
        student_ND,
        student_head.weight_VD,
        student_head.bias_V,
        weight_U,
        teacher_ME.detach(),
        student_head,
        teacher_head,
        terms,
        shared,
        of,
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
        shared: Support,
        of: Units,
    ) -> tuple[Tensor, Tensor, None]:
        device = student_ND.device
        into = _Gradients(ctx.needs_input_grad[:3], student_ND, student_head, terms)
        weight_U = weight_U.to(device, torch.float32)
        update = _Pass(
            terms=terms,
            shared=shared,
            of=of,
            student_ND=student_ND,
            teacher_ME=teacher_ME,
            ours=student_head.to(terms.dtype),
            theirs=teacher_head.to(terms.dtype),
            weight_U=weight_U,
            value_U=torch.zeros(len(weight_U), device=device),
            into=into,
        )
        update.teach_exact_units()
        if len(of.spans):
            update.teach_span_tokens(update.teach_spans())

        ctx.grads, ctx.dtypes = (
            into.found,
            (weight_VD.dtype, None if bias_V is None else bias_V.dtype),
        )
        ctx.mark_non_differentiable(update.value_U)
        return (weight_U * update.value_U).sum(), update.value_U, None

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        return *scale_gradients(ctx, grad_outputs[0]), *[None] * 7


@dataclass(frozen=True, kw_only=True)
class _Pass:
    """The operands of one forward pass, and the values and gradients that it fills."""

    terms: Terms
    shared: Support
    of: Units
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
        return chunk(self.terms, max(len(self.ours.weight_VD), len(self.theirs.weight_VD)))

    def teach_exact_units(self) -> None:
        """Compare the units of one token per side, using both heads' rows in O."""
        terms, shared, of = self.terms, self.shared, self.of
        few_ours, few_theirs = _rows(self.ours, shared.student), _rows(self.theirs, shared.teacher)
        for part in of.exact.split(chunk(terms, shared.columns)):
            rows = of.first[0][part].to(self.device)
            logits = few_ours.logits(self.student_ND[rows]).div_(terms.temperature)
            student_logp, share = events_of(logits, shared)
            teacher_logp = events_of(
                few_theirs.logits(rows_at(self.teacher_ME, of.first[1][part])).div_(
                    terms.temperature
                ),
                shared,
            )[0].to(self.device)
            self.value_U[part], gradient = _compare(terms, student_logp, teacher_logp)
            self.into.add(
                rows,
                _spread(gradient, share, shared),
                logits,
                self.weight_U[part.to(self.device)],
                shared.student,
            )

    def teach_spans(self) -> Tensor:
        """Compare the spans at their first tokens.

        Return the gradient [P] to each span's score, divided by the span's number of student
        tokens.
        """
        terms, shared, of, device = self.terms, self.shared, self.of, self.device
        student_P = span_scores(terms, shared, self.ours, self.student_ND, of, 0)
        teacher_P = span_scores(terms, shared, self.theirs, self.teacher_ME, of, 1).to(device)
        size_P = torch.bincount(of.span[0], minlength=len(of.spans)).to(device)
        pull_P = torch.zeros(len(of.spans), device=device)
        for part in torch.arange(len(of.spans)).split(self.rows):
            which = of.spans[part]
            rows = of.first[0][which].to(device)
            logits = self.ours.logits(self.student_ND[rows]).div_(terms.temperature)
            base = logits if shared.raw else torch.log_softmax(logits, -1)
            student_scores, share = events_of(base[:, shared.student], shared)
            there = self.theirs.logits(rows_at(self.teacher_ME, of.first[1][which])).div_(
                terms.temperature
            )
            teacher_base = there if shared.raw else torch.log_softmax(there, -1)
            teacher_scores = events_of(teacher_base[:, shared.teacher], shared)[0].to(device)
            self.value_U[which], gradient = _compare(
                terms,
                torch.cat([student_scores, student_P[part, None].to(device)], 1),
                torch.cat([teacher_scores, teacher_P[part, None]], 1),
            )
            pull_P[part] = gradient[:, -1]
            table = torch.zeros_like(logits).index_add_(
                1, shared.student, _spread(gradient[:, :-1], share, shared)
            )
            if not shared.raw:
                table -= base.exp() * table.sum(-1, keepdim=True)
            self.into.add(rows, table, logits, self.weight_U[which.to(device)])
        return pull_P / size_P

    def teach_span_tokens(self, pull_P: Tensor) -> None:
        """Add the gradients of the spans' scores to the tokens of the spans.

        ``pull_P``: the result of ``teach_spans``.
        """
        terms, shared, of, device = self.terms, self.shared, self.of, self.device
        for part in torch.arange(len(of.row[0])).split(self.rows):
            rows, spans, ids = (x[0][part].to(device) for x in (of.row, of.span, of.id))
            logits = self.ours.logits(self.student_ND[rows]).div_(terms.temperature)
            table = torch.zeros_like(logits) if shared.raw else torch.softmax(logits, -1).neg_()
            table.scatter_add_(1, ids[:, None], torch.ones_like(ids, dtype=torch.float32)[:, None])
            self.into.add(
                rows,
                table.mul_(pull_P[spans, None]),
                logits,
                self.weight_U[of.spans.to(device)[spans]],
            )


class _Gradients:
    """Adds up the gradients to hidden rows, head and bias, chunk by chunk."""

    def __init__(
        self, needs: tuple[bool, bool, bool], hidden_ND: Tensor, head: Head, terms: Terms
    ) -> None:
        self.hidden_ND, self.head, self.terms = hidden_ND, head, terms
        self.weight_VD = head.weight_VD.detach().to(terms.dtype)
        self.found = tuple(
            torch.zeros_like(t, dtype=torch.float32) if need and t is not None else None
            for need, t in zip(needs, (hidden_ND, head.weight_VD, head.bias_V), strict=True)
        )

    def add(
        self,
        rows: Tensor,
        table: Tensor,
        logits: Tensor,
        weight: Tensor,
        ids: Tensor | None = None,
    ) -> None:
        """``table``: gradient of a unit's value to its tempered ``logits``, [rows, V], or on the
        columns ``ids`` alone."""
        hidden, head_weight, bias = self.found
        if hidden is None and head_weight is None and bias is None:
            return
        if self.head.softcap is not None:  # d softcap·tanh(z/softcap) / dz
            table = table * (1 - (logits * (self.terms.temperature / self.head.softcap)).square())
        table = (table * (weight[:, None] * (self.head.scale / self.terms.temperature))).to(
            self.terms.dtype
        )
        with torch.autocast(table.device.type, enabled=False):
            if hidden is not None:
                hidden.index_add_(
                    0,
                    rows,
                    (table @ (self.weight_VD if ids is None else self.weight_VD[ids])).float(),
                )
            if head_weight is not None:
                added = (table.T @ self.hidden_ND[rows].to(self.terms.dtype)).float()
                _add_at(head_weight, ids, added)
            if bias is not None:
                added = table.float().sum(0)
                _add_at(bias, ids, added)


def _add_at(total: Tensor, ids: Tensor | None, added: Tensor) -> None:
    """Add ``added`` to the rows ``ids`` of ``total``; None: to all rows."""
    if ids is None:
        total.add_(added)
    else:
        total.index_add_(0, ids, added)


def _rows(head: Head, ids: Tensor) -> Head:
    """The head on some ids only."""
    return replace(
        head,
        weight_VD=head.weight_VD[ids],
        bias_V=None if head.bias_V is None else head.bias_V[ids],
    )


def _spread(gradient: Tensor, share: Tensor, shared: Support) -> Tensor:
    """A gradient to events [., O + 1] → to ids [., O + e]."""
    return torch.cat([gradient[:, : shared.common], gradient[:, shared.common :] * share], 1)


def _compare(terms: Terms, student_scores: Tensor, teacher_scores: Tensor) -> tuple[Tensor, Tensor]:
    """D(q_S, q_T) per row and its gradient to the student's scores."""
    student_logq, teacher_logq = (
        torch.log_softmax(student_scores, -1),
        torch.log_softmax(teacher_scores, -1),
    )
    spare, spare_too = torch.empty_like(student_logq), torch.empty_like(student_logq)
    return value_and_gradient(terms, student_logq, teacher_logq, spare, spare_too)


@dataclass(frozen=True, kw_only=True)
class _Side:
    """One model's operands of ``statistics``, and the mean scores [P] of the spans' own tokens:
    log-probabilities (``span_logp``) and what the loss compares (``span_score``)."""

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
    shared: Support,
    of: Units,
    student_ND: Tensor,
    student_head: Head,
    teacher_ME: Tensor,
    teacher_head: Head,
    forward: bool = False,
) -> dict[str, Tensor]:
    """As ``fused.statistics``, per unit, each [U] float32: ``divergence`` and ``entropy`` on
    the unit's support, the score of the text of the unit under each model (mean log-probability of
    its tokens: ``student_logp``, ``teacher_logp``), each model's mass on O where the unit begins
    (``student_mass``, ``teacher_mass``), and if asked for KL(q_T‖q_S), ``forward_kl``."""
    device = student_ND.device
    plain = replace(shared, raw=False)
    heads = student_head.to(terms.dtype), teacher_head.to(terms.dtype)
    sides = []
    for side, (head, hidden) in enumerate(zip(heads, (student_ND, teacher_ME), strict=True)):
        span_logp = span_scores(terms, plain, head, hidden, of, side).to(device)
        span_score = span_logp
        if shared.raw:
            span_score = span_scores(terms, shared, head, hidden, of, side).to(device)
        sides.append(
            _Side(
                head=head,
                hidden=hidden,
                ids=(shared.student, shared.teacher)[side],
                first=of.first[side],
                token=of.token[side],
                span_logp=span_logp,
                span_score=span_score,
            )
        )
    count = len(of.token[0])
    span_of = torch.full((count,), -1, dtype=torch.long)
    span_of[of.spans] = torch.arange(len(of.spans))
    names = ["divergence", "entropy"]
    names += ["student_logp", "teacher_logp", "student_mass", "teacher_mass"]
    if forward:
        names.append("forward_kl")
    found = {name: torch.empty(count, dtype=torch.float32, device=device) for name in names}
    for part in torch.arange(count).split(chunk(terms, max(len(head.weight_VD) for head in heads))):
        tables = []
        for name, model in zip(("student", "teacher"), sides, strict=True):
            mass, token, scores = _read_units(terms, shared, model, part, span_of[part])
            found[f"{name}_mass"][part] = mass
            found[f"{name}_logp"][part] = token
            tables.append(scores)
        student, teacher = tables
        found["entropy"][part] = -(student.exp() * student).sum(-1)
        found["divergence"][part] = per_token(terms, student, teacher)
        if forward:
            found["forward_kl"][part] = forward_kl(student, teacher)
    return found


def _read_units(
    terms: Terms, shared: Support, side: _Side, part: Tensor, span: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a model's mass on O [u], the text's score [u] and log q [u, O + 1 and the span] for
    the units ``part``; ``span``: the span number of each unit, −1 for none."""
    device = side.span_logp.device
    is_span = (span >= 0).to(device)
    logits = side.head.logits(rows_at(side.hidden, side.first[part])).div_(terms.temperature)
    logp = torch.log_softmax(logits, -1)
    token = logp.gather(1, side.token[part, None].to(logp.device))[:, 0].to(device)
    events = events_of(logp[:, side.ids], shared)[0].to(device)
    mass = torch.logsumexp(events, -1).exp()
    if shared.raw:
        raw_events = events_of(logits[:, side.ids], shared)[0].to(device)
        events = torch.where(is_span[:, None], raw_events, events)
    if len(side.span_logp):
        at = span.clamp(min=0).to(device)
        token = torch.where(is_span, side.span_logp[at], token)
        own = torch.where(is_span, side.span_score[at], -torch.inf)
        events = torch.cat([events, own[:, None]], 1)
    # exact units have no span entry; its −inf would give 0·∞
    return mass, token, torch.log_softmax(events, -1).clamp_(min=-1e30)
