"""Units of text that two tokenizers share, and how both models' heads score them.

``simct`` defines the axes and the formulas.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .divergence import Head, Terms

TABLES = 6  # vocabulary-sized float32 tables that are alive at once


@dataclass(frozen=True)
class Support:
    """O on the models' devices: ids [O + e], end-of-sequence last (all its ids are one event).
    ``raw``: simct-released."""

    student: Tensor
    teacher: Tensor
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

    first: tuple[Tensor, Tensor]
    exact: Tensor
    spans: Tensor
    row: tuple[Tensor, Tensor]
    span: tuple[Tensor, Tensor]
    id: tuple[Tensor, Tensor]
    token: tuple[Tensor, Tensor]


def chunk(terms: Terms, columns: int) -> int:
    """Rows per chunk: as many as ``memory_bytes`` holds of what is alive at once."""
    return max(1, int(terms.memory_bytes / (4 * columns * TABLES)))


def rows_at(hidden: Tensor, rows: Tensor) -> Tensor:
    """Return the given rows of hidden states; ``rows`` may be on another device."""
    return hidden[rows.to(hidden.device)]


def events_of(scores: Tensor, shared: Support) -> tuple[Tensor, Tensor]:
    """Scores [., O + e] → [., O + 1], the end-of-sequence ids as one event, and the share [., e]
    of it that each id has."""
    ends = scores[:, shared.common :]
    return torch.cat(
        [scores[:, : shared.common], torch.logsumexp(ends, -1, keepdim=True)], 1
    ), torch.softmax(ends, -1)


@torch.no_grad()
def span_scores(  # noqa: PLR0913  the operands of one formula
    terms: Terms, shared: Support, head: Head, hidden: Tensor, of: Units, side: int
) -> Tensor:
    """Mean score of each span's own tokens under a model, [P]."""
    device = hidden.device
    total = torch.zeros(len(of.spans), device=device)
    for part in torch.arange(len(of.row[side])).split(chunk(terms, len(head.weight_VD))):
        rows, spans, ids = (x[side][part].to(device) for x in (of.row, of.span, of.id))
        logits = head.logits(hidden[rows]).div_(terms.temperature)
        scores = logits.gather(1, ids[:, None])[:, 0]
        total.index_add_(0, spans, scores if shared.raw else scores - torch.logsumexp(logits, -1))
    return total / torch.bincount(of.span[side], minlength=len(of.spans)).to(device)
