"""Logits processors that choose the sampled tokens."""

import torch
from transformers import LogitsProcessor

from ..display import Phase
from ..maths.flops import STRETCH
from . import stopping

AHEAD = 1 << 15  # most random numbers that are drawn for several positions at once


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
    ids, a tensor [rows] per position. ``ahead``: uniform numbers [positions, rows, support] of the
    next positions.
    """

    def __init__(self, generators: list[torch.Generator], support: int, record: bool):
        self.generators = generators
        self.support = support
        self.record = record
        self.taken: list[torch.Tensor] = []
        self.ahead: list[torch.Tensor] = []

    def keep(self, rows: list[int]) -> None:
        """Continue with these rows alone."""
        self.generators = [self.generators[row] for row in rows]
        self.ahead = [uniform[rows] for uniform in self.ahead]

    def take_recorded(self) -> list[list[float]]:
        """Return the recorded log-probabilities of every row, and forget them."""
        recorded: list[list[float]] = torch.stack(self.taken, 1).tolist()
        self.taken.clear()
        return recorded

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        logp = None
        if self.record:
            logp = scores[:, : self.support].float().log_softmax(-1)
        scores[:, : self.support] -= self._next_noise(scores.device)
        scores[:, self.support :] = -torch.inf
        if logp is not None:
            self.taken.append(logp.gather(1, choose_tokens(scores)[:, None])[:, 0])
        return scores

    def _next_noise(self, device: torch.device) -> torch.Tensor:
        """Return log e [rows, support] of the next position."""
        if not self.ahead:
            self.ahead = self._draw(device)
        uniform = self.ahead.pop()
        # e = −log(1 − u). The u lie on a grid of 2⁻²⁴ in [0, 1); e = 0 stands for its mean below
        # one grid step.
        return uniform.neg_().log1p_().neg_().clamp_(min=2.0**-25).log_()

    def _draw(self, device: torch.device) -> list[torch.Tensor]:
        """Return u [rows, support] of one position, or of several small ones, the last one first.

        A generator of the CPU gives the same numbers in one call and in several; a GPU's does not.
        """
        rows = len(self.generators)
        positions = 1
        if device.type == "cpu":
            positions = max(1, min(STRETCH, AHEAD // (rows * self.support)))
        drawn = torch.empty(rows, positions, self.support, dtype=torch.float32, device=device)
        for row, generator in zip(drawn, self.generators, strict=True):
            row.uniform_(generator=generator)
        return list(reversed(drawn.transpose(0, 1).contiguous().unbind()))


def choose_tokens(scores_BV: torch.Tensor) -> torch.Tensor:
    """Return the id of the largest score of every row; of equal ones the first.

    On a CPU, numpy's argmax is several times faster than torch's.
    """
    if scores_BV.device.type == "cpu":
        return torch.from_numpy(scores_BV.numpy().argmax(-1))
    return scores_BV.argmax(-1)


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
