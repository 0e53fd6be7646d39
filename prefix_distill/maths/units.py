"""Units of text that two tokenizers share, and their scores under both models' heads.

``simct`` defines the axes and the formulas.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .divergence import Head, Terms

TABLES = 6  # vocabulary-sized float32 tables that are alive at once


@dataclass(frozen=True, kw_only=True)
class Support:
    """O on the models' devices: ids [O + e] with the EOS tokens last, which are one event.

    ``common``: tokens before them; ``raw``: compare as ``simct-released``.
    """

    student: Tensor
    teacher: Tensor
    common: int
    raw: bool

    @property
    def columns(self) -> int:
        """Return the columns of a table of scores: the shared tokens and EOS."""
        return self.common + 1


@dataclass(frozen=True, kw_only=True)
class Units:
    """The taught units of a micro-batch as rows of both models' hidden states.

    The rows are in the order of ``scoring.hidden_rows``. Pairs are for (student, teacher).
    ``first``: the row that predicts a unit's first token, [U]; ``token``: that token, [U].
    ``exact``, ``spans``: the units of each kind. Of the tokens in spans, [K]: ``row``, ``span``
    (0 … len(spans) − 1) and ``id``.
    """

    first: tuple[Tensor, Tensor]
    exact: Tensor
    spans: Tensor
    row: tuple[Tensor, Tensor]
    span: tuple[Tensor, Tensor]
    id: tuple[Tensor, Tensor]
    token: tuple[Tensor, Tensor]

    def tokens_at(
        self, side: int, part: Tensor, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return row, span and id of some tokens in spans."""
        rows, spans, ids = self.row[side][part], self.span[side][part], self.id[side][part]
        return rows.to(device), spans.to(device), ids.to(device)

    def span_sizes(self, side: int, device: torch.device) -> Tensor:
        """Return the number of tokens in each span, [P]."""
        return torch.bincount(self.span[side], minlength=len(self.spans)).to(device)


def rows_per_chunk(terms: Terms, columns: int) -> int:
    """Return the rows per chunk: as many as fit into ``memory_bytes``."""
    return max(1, int(terms.memory_bytes / (4 * columns * TABLES)))


def rows_at(hidden: Tensor, rows: Tensor) -> Tensor:
    """Return the given rows of hidden states; ``rows`` may be on another device."""
    return hidden[rows.to(hidden.device)]


def events_of(scores: Tensor, support: Support) -> tuple[Tensor, Tensor]:
    """Return scores [., O + e] as [., O + 1], with EOS as one event, and each id's share of it."""
    tokens, ends = scores[:, : support.common], scores[:, support.common :]
    end = torch.logsumexp(ends, -1, keepdim=True)
    return torch.cat([tokens, end], 1), torch.softmax(ends, -1)


@torch.no_grad()
def span_scores(  # noqa: PLR0913  the operands of one formula
    terms: Terms, support: Support, head: Head, hidden: Tensor, units: Units, side: int
) -> Tensor:
    """Return the mean score of each span's own tokens under a model, [P]; ``side``: 0 is the
    student."""
    device = hidden.device
    total = torch.zeros(len(units.spans), device=device)
    for part in torch.arange(len(units.row[side])).split(
        rows_per_chunk(terms, len(head.weight_VD))
    ):
        rows, spans, ids = units.tokens_at(side, part, device)
        logits = head.logits(hidden[rows]).div_(terms.temperature)
        scores = logits.gather(1, ids[:, None])[:, 0]
        if not support.raw:
            scores = scores - torch.logsumexp(logits, -1)
        total.index_add_(0, spans, scores)
    return total / units.span_sizes(side, device)
