"""Logits processors that choose the sampled tokens."""

import torch
from transformers import LogitsProcessor

from ..display import Phase
from . import stopping


class RowProcessor(LogitsProcessor):
    """A logits processor that chooses every row's token; with ``record`` it keeps its log p."""

    record = False

    def keep(self, rows: list[int]) -> None:
        """Continue with these rows alone."""
        raise NotImplementedError

    def take_recorded(self) -> list[list[float]]:
        """Return the recorded log-probabilities of every row, and forget them."""
        raise NotImplementedError


class Race(RowProcessor):
    """Softmax sampling under greedy decoding, by an exponential race.

    argmax_v (log p_v − log e_v) with e_v ~ Exp(1) is distributed as p (the Gumbel-max trick). Each
    row samples its own e, one value per vocabulary entry and position, with a generator seeded by
    (seed, key). A sample therefore depends on (seed, step, prompt, sample, position) alone:
    batching, padding and restarts cannot change it. It is exact up to the uniforms, which lie on a
    grid of 2⁻²⁴: a token with p below about 1e-8 is never sampled. Ids from ``support`` on (padding
    rows of the head) are never sampled. With ``record``, ``taken`` collects log p of the sampled
    ids, a tensor [rows] per position.
    """

    def __init__(self, generators: list[torch.Generator], support: int, record: bool):
        self.generators = generators
        self.support = support
        self.record = record
        self.taken: list[torch.Tensor] = []

    def keep(self, rows: list[int]) -> None:
        """Continue with these rows alone."""
        self.generators = [self.generators[row] for row in rows]

    def take_recorded(self) -> list[list[float]]:
        """Return the recorded log-probabilities of every row, and forget them."""
        recorded: list[list[float]] = torch.stack(self.taken, 1).tolist()
        self.taken.clear()
        return recorded

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        race = torch.empty(len(scores), self.support, dtype=torch.float32, device=scores.device)
        for row, generator in zip(race, self.generators, strict=True):
            row.uniform_(generator=generator)
        logp = None
        if self.record:
            logp = scores[:, : self.support].float().log_softmax(-1)
        # e = −log(1 − u). The u lie on a grid of 2⁻²⁴ in [0, 1); e = 0 stands for its mean below
        # one grid step.
        scores[:, : self.support] -= race.neg_().log1p_().neg_().clamp_(min=2.0**-25).log_()
        scores[:, self.support :] = -torch.inf
        if logp is not None:
            self.taken.append(logp.gather(1, scores.argmax(-1, keepdim=True))[:, 0])
        return scores


class Support(LogitsProcessor):
    """Excludes padding rows of the head, which have no token, before other warpers see them."""

    def __init__(self, support: int):
        self.support = support

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, self.support :] = -torch.inf
        return scores


class StepWatcher(LogitsProcessor):
    """Counts the tokens that a batch has decoded, and leaves it if the run is asked to stop.

    ``progress``: the phase that counts the answers; ``tokens``: the longest answer.
    """

    def __init__(self, progress: Phase, rows: int, tokens: int):
        self.progress = progress
        self.before = progress.done
        self.rows = self.alive = rows
        self.tokens = tokens
        self.decoded = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        stopping.look()
        self.decoded += 1
        self.show()
        return scores

    def finish(self) -> None:
        """Count all rows as answers."""
        self.alive = 0
        self.show()

    def show(self) -> None:
        """Count the rows that have ended as answers, and the others in part."""
        ended = (self.rows - self.alive) * self.progress.ranks
        self.progress.set(self.before + ended, self.alive * self.decoded / self.tokens)
