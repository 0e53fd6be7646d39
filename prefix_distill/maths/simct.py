"""The divergence on units of text, for two models with different tokenizers: fused with both output
heads, in chunks.

Axes: N rows of the student, M rows of the teacher, U units, V and W the vocabularies, O the shared
support: pairs of tokens with the same bytes and end-of-sequence. All logarithms are natural; all
values are nats.

    unit of one token on each side   scores of a model = its log p(o | prefix), o ∈ O
    any other unit (span)            the same where the span begins, and one more: the span itself,
                                     (1/n) Σ log p(token | its
                                     prefix) over the model's own n tokens of it
    q = softmax(scores) ;  loss of a unit = D(q_S, q_T), the teacher's scores held fixed

``strict`` has units of the first kind only. ``simct-released`` has raw logits in place of log p, as
the authors' code.

Source: SimCT, arXiv 2605.07711; the fusion is ours. On units of the first kind the rest of both
vocabularies cancels, so only the rows of O of both heads are read.
"""

from dataclasses import dataclass, replace

import torch

from .divergence import Head, Terms, per_token, value_and_gradient

TABLES = 6  # vocabulary-sized float32 tables that are alive at once


@dataclass(frozen=True)
class Support:
    """O on the models' devices: ids [O + e], end-of-sequence last (all its ids are one event).
    ``raw``: simct-released."""

    student: torch.Tensor
    teacher: torch.Tensor
    common: int
    raw: bool

    @property
    def columns(self) -> int:
        """Columns of a table of scores: the shared tokens and end-of-sequence."""
        return self.common + 1


@dataclass(frozen=True)
class Units:
    """The taught units of a micro-batch as rows of both models' hidden states, in the order of
    ``scoring.hidden_rows``.

    ``first``: the row that predicts a unit's first token, [U] for each side; ``exact``, ``spans``:
    which units are which. The tokens of the spans, [K]: their ``row``, the ``span`` they are part
    of (0 … len(spans) − 1) and their id, for each side. ``token``: the first token of every unit,
    [U].
    """

    first: tuple[torch.Tensor, torch.Tensor]
    exact: torch.Tensor
    spans: torch.Tensor
    row: tuple[torch.Tensor, torch.Tensor]
    span: tuple[torch.Tensor, torch.Tensor]
    id: tuple[torch.Tensor, torch.Tensor]
    token: tuple[torch.Tensor, torch.Tensor]


def weighted(
    terms: Terms,
    shared: Support,
    of: Units,
    student_ND: torch.Tensor,
    student_head: Head,
    teacher_ME: torch.Tensor,
    teacher_head: Head,
    weight_U: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, None]:
    """Σ_u weight_u · D(q_S, q_T) with its gradient, and the detached values D_u [U], nats.

    As ``divergence.weighted``: closed forms in the forward pass, ``weight_U`` is divided already,
    no gradient reaches the teacher. No table of rows × vocabulary outlives its chunk. The tokens of
    spans are projected twice by the student, as a span's score needs all of them before its
    gradient is known.
    """
    return _Weighted.apply(
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


class _Weighted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        student_ND,
        weight_VD,
        bias_V,
        weight_U,
        teacher_ME,
        student_head,
        teacher_head,
        terms,
        shared,
        of,
    ):
        device = student_ND.device
        into = _Gradients(ctx.needs_input_grad[:3], student_ND, student_head, terms)
        weight_U = weight_U.to(device, torch.float32)
        value_U = torch.zeros(len(weight_U), device=device)
        ours, theirs = student_head.to(terms.dtype), teacher_head.to(terms.dtype)

        few_ours, few_theirs = _rows(ours, shared.student), _rows(theirs, shared.teacher)
        for part in of.exact.split(chunk(terms, shared.columns)):
            rows = of.first[0][part].to(device)
            logits = few_ours.logits(student_ND[rows]).div_(terms.temperature)
            student_logp, share = _events(logits, shared)
            teacher_logp = _events(
                few_theirs.logits(_at(teacher_ME, of.first[1][part])).div_(terms.temperature),
                shared,
            )[0].to(device)
            value_U[part], gradient = _compare(terms, student_logp, teacher_logp)
            into.add(
                rows,
                _spread(gradient, share, shared),
                logits,
                weight_U[part.to(device)],
                shared.student,
            )

        if len(of.spans):
            student_P = _span_scores(terms, shared, ours, student_ND, of, 0)
            teacher_P = _span_scores(terms, shared, theirs, teacher_ME, of, 1).to(device)
            size_P = torch.bincount(of.span[0], minlength=len(of.spans)).to(device)
            pull_P = torch.zeros(len(of.spans), device=device)
            places = torch.arange(len(of.spans))
            step = chunk(terms, max(len(ours.weight_VD), len(theirs.weight_VD)))
            for part in places.split(step):
                which = of.spans[part]
                rows = of.first[0][which].to(device)
                logits = ours.logits(student_ND[rows]).div_(terms.temperature)
                base = logits if shared.raw else torch.log_softmax(logits, -1)
                student_scores, share = _events(base[:, shared.student], shared)
                there = theirs.logits(_at(teacher_ME, of.first[1][which])).div_(terms.temperature)
                teacher_base = there if shared.raw else torch.log_softmax(there, -1)
                teacher_scores = _events(teacher_base[:, shared.teacher], shared)[0].to(device)
                value_U[which], gradient = _compare(
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
                into.add(rows, table, logits, weight_U[which.to(device)])
            pull_P = pull_P / size_P
            for part in torch.arange(len(of.row[0])).split(step):
                rows, spans, ids = (x[0][part].to(device) for x in (of.row, of.span, of.id))
                logits = ours.logits(student_ND[rows]).div_(terms.temperature)
                table = torch.zeros_like(logits) if shared.raw else torch.softmax(logits, -1).neg_()
                table.scatter_add_(
                    1, ids[:, None], torch.ones_like(ids, dtype=torch.float32)[:, None]
                )
                into.add(
                    rows,
                    table.mul_(pull_P[spans, None]),
                    logits,
                    weight_U[of.spans.to(device)[spans]],
                )

        ctx.grads, ctx.dtypes = (
            into.found,
            (weight_VD.dtype, None if bias_V is None else bias_V.dtype),
        )
        ctx.mark_non_differentiable(value_U)
        return (weight_U * value_U).sum(), value_U, None

    @staticmethod
    def backward(ctx, grad_loss, *_):
        hidden, weight, bias = ctx.grads
        ctx.grads = None
        return (
            hidden if hidden is None else hidden.mul_(grad_loss),
            weight if weight is None else weight.mul_(grad_loss).to(ctx.dtypes[0]),
            bias if bias is None else bias.mul_(grad_loss).to(ctx.dtypes[1]),
            *[None] * 7,
        )


class _Gradients:
    """Adds up the gradients to hidden rows, head and bias, chunk by chunk."""

    def __init__(self, needs, hidden_ND: torch.Tensor, head: Head, terms: Terms):
        self.hidden_ND, self.head, self.terms = hidden_ND, head, terms
        self.weight_VD = head.weight_VD.detach().to(terms.dtype)
        self.found = tuple(
            torch.zeros_like(t, dtype=torch.float32) if need else None
            for need, t in zip(needs, (hidden_ND, head.weight_VD, head.bias_V))
        )

    def add(self, rows, table, logits, weight, ids=None) -> None:
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
                head_weight.add_(added) if ids is None else head_weight.index_add_(0, ids, added)
            if bias is not None:
                added = table.float().sum(0)
                bias.add_(added) if ids is None else bias.index_add_(0, ids, added)


def chunk(terms: Terms, columns: int) -> int:
    """Rows per chunk: as many as ``memory_bytes`` holds of what is alive at once."""
    return max(1, int(terms.memory_bytes / (4 * columns * TABLES)))


def _at(hidden, rows):
    return hidden[rows.to(hidden.device)]


def _rows(head: Head, ids: torch.Tensor) -> Head:
    """The head on some ids only."""
    return replace(
        head,
        weight_VD=head.weight_VD[ids],
        bias_V=None if head.bias_V is None else head.bias_V[ids],
    )


def _events(scores: torch.Tensor, shared: Support) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores [., O + e] → [., O + 1], the end-of-sequence ids as one event, and the share [., e]
    of it that each id has."""
    ends = scores[:, shared.common :]
    return torch.cat(
        [scores[:, : shared.common], torch.logsumexp(ends, -1, keepdim=True)], 1
    ), torch.softmax(ends, -1)


def _spread(gradient: torch.Tensor, share: torch.Tensor, shared: Support) -> torch.Tensor:
    """A gradient to events [., O + 1] → to ids [., O + e]."""
    return torch.cat([gradient[:, : shared.common], gradient[:, shared.common :] * share], 1)


def _compare(terms: Terms, student_scores, teacher_scores):
    """D(q_S, q_T) per row and its gradient to the student's scores."""
    student_logq, teacher_logq = (
        torch.log_softmax(student_scores, -1),
        torch.log_softmax(teacher_scores, -1),
    )
    spare = (torch.empty_like(student_logq) for _ in range(2))
    return value_and_gradient(terms.name, terms.beta, student_logq, teacher_logq, *spare)


@torch.no_grad()
def _span_scores(
    terms: Terms, shared: Support, head: Head, hidden, of: Units, side: int
) -> torch.Tensor:
    """Mean score of each span's own tokens under a model, [P]."""
    device = hidden.device
    total = torch.zeros(len(of.spans), device=device)
    for part in torch.arange(len(of.row[side])).split(chunk(terms, len(head.weight_VD))):
        rows, spans, ids = (x[side][part].to(device) for x in (of.row, of.span, of.id))
        logits = head.logits(hidden[rows]).div_(terms.temperature)
        scores = logits.gather(1, ids[:, None])[:, 0]
        total.index_add_(0, spans, scores if shared.raw else scores - torch.logsumexp(logits, -1))
    return total / torch.bincount(of.span[side], minlength=len(of.spans)).to(device)


@torch.no_grad()
def statistics(
    terms: Terms,
    shared: Support,
    of: Units,
    student_ND: torch.Tensor,
    student_head: Head,
    teacher_ME: torch.Tensor,
    teacher_head: Head,
    forward: bool = False,
) -> dict[str, torch.Tensor]:
    """As ``divergence.statistics``, per unit, each [U] float32: ``divergence`` and ``entropy`` on
    the unit's support, the score of the text of the unit under each model (mean log-probability of
    its tokens: ``student_logp``, ``teacher_logp``), each model's mass on O where the unit begins
    (``student_mass``, ``teacher_mass``), and if asked for KL(q_T‖q_S), ``forward_kl``."""
    device, raw = student_ND.device, shared.raw
    plain = replace(shared, raw=False)
    heads, hiddens = (
        (student_head.to(terms.dtype), teacher_head.to(terms.dtype)),
        (student_ND, teacher_ME),
    )
    ids = (shared.student, shared.teacher)
    count = len(of.token[0])
    place = torch.full((count,), -1, dtype=torch.long)
    place[of.spans] = torch.arange(len(of.spans))
    spans = [
        _span_scores(terms, plain, head, hidden, of, side).to(device)
        for side, (head, hidden) in enumerate(zip(heads, hiddens))
    ]
    scored = (
        [
            _span_scores(terms, shared, head, hidden, of, side).to(device)
            for side, (head, hidden) in enumerate(zip(heads, hiddens))
        ]
        if raw
        else spans
    )
    names = (
        "divergence",
        "entropy",
        "student_logp",
        "teacher_logp",
        "student_mass",
        "teacher_mass",
    ) + (("forward_kl",) if forward else ())
    found = {name: torch.empty(count, dtype=torch.float32, device=device) for name in names}
    for part in torch.arange(count).split(chunk(terms, max(len(head.weight_VD) for head in heads))):
        is_span = (place[part] >= 0).to(device)
        tables = []
        for side, name in enumerate(("student", "teacher")):
            logits = (
                heads[side].logits(_at(hiddens[side], of.first[side][part])).div_(terms.temperature)
            )
            logp = torch.log_softmax(logits, -1)
            token = logp.gather(1, of.token[side][part, None].to(logp.device))[:, 0].to(device)
            events = _events(logp[:, ids[side]], shared)[0].to(device)
            found[f"{name}_mass"][part] = torch.logsumexp(events, -1).exp()
            if raw:
                events = torch.where(
                    is_span[:, None], _events(logits[:, ids[side]], shared)[0].to(device), events
                )
            if len(of.spans):
                at = place[part].clamp(min=0).to(device)
                token = torch.where(is_span, spans[side][at], token)
                own = torch.where(is_span, scored[side][at], -torch.inf)
                events = torch.cat([events, own[:, None]], 1)
            found[f"{name}_logp"][part] = token
            tables.append(
                torch.log_softmax(events, -1).clamp_(min=-1e30)
            )  # a unit that is no span has no such entry
        student, teacher = tables
        found["entropy"][part] = -(student.exp() * student).sum(-1)
        found["divergence"][part] = per_token(terms.name, terms.beta, student, teacher)
        if forward:
            found["forward_kl"][part] = per_token("forward-kl", None, student, teacher)
    return found
