"""Forward passes of both models over rollouts: one hidden row per model and compared token.

This module holds the only causal shift in the code.
"""

from dataclasses import dataclass, replace

import torch

from ..maths import fused, simct
from ..maths.divergence import Terms
from ..maths.flops import Ledger
from . import stopping
from .batching import micro_batches, reads
from .free_memory import release_cache
from .models import Model
from .pair import Pair
from .ranks import Place
from .rollout import Rollout, Side, student_sides, teacher_sides
from .rope import split_lengths
from .transformers_names import select_rows
from .units import units_of

# probability of the student's first token under the teacher, below which prompts may not match
LOW_FIRST_TOKEN_PROBABILITY = 0.01

# (slot, sample) → statistic → position → nats
TokenFacts = dict[tuple[int, int], dict[str, dict[int, float]]]


def hidden_rows(model: Model, sides: list[Side]) -> torch.Tensor:
    """Return the hidden rows [N, D] that predict the compared tokens, side by side in order.

    The row of response token t is the hidden state at position t − 1: the causal shift. A prompt
    of several responses runs once if the model allows it. Its KV cache is then repeated for them,
    and its gradients add up. Rows longer than the length at which RoPE changes run apart, each with
    its own prompt: the longest row of a batch chooses the factors of all.
    """
    release_cache(model.device)
    lengths = [len(side.prompt) + len(side.read) for side in sides]
    rows: dict[int, torch.Tensor] = {}
    for indices, is_within in split_lengths(model.rope_switch, lengths):
        chosen = model if is_within else replace(model, shares_prompts=False)
        hidden_ND = _compute_rows(chosen, [sides[i] for i in indices])
        if len(indices) == len(sides):
            return hidden_ND
        sizes = [len(sides[i].rows) for i in indices]
        rows |= zip(indices, hidden_ND.split(sizes), strict=True)
    return torch.cat([rows[i] for i in range(len(sides))])


def _compute_rows(model: Model, sides: list[Side]) -> torch.Tensor:
    """Return the hidden rows of sides that may share a batch."""
    prompts = [side.prompt for side in sides]
    responses = [side.read for side in sides]
    if model.encodes_prompt_once and len(set(prompts)) < len(prompts):
        hidden_BTD = _run_after_shared_prompts(model, prompts, responses)
        first = [0] * len(prompts)
    else:
        ids_BT = right_padded([p + r for p, r in zip(prompts, responses, strict=True)])
        hidden_BTD = model.trunk(to_device(ids_BT, model.device))
        first = [len(p) - 1 for p in prompts]
    compared_BT = torch.zeros(hidden_BTD.shape[:2], dtype=torch.bool)
    for row, start, side in zip(compared_BT, first, sides, strict=True):
        row[start + torch.tensor(side.rows, dtype=torch.long)] = True
    return hidden_BTD[to_device(compared_BT, model.device)]


def _run_after_shared_prompts(
    model: Model, prompts: list[tuple[int, ...]], responses: list[tuple[int, ...]]
) -> torch.Tensor:
    """Return hidden states [B, 1 + T, D]: the prompt's last one, then those of the response.

    Every distinct prompt runs once. Prompts are padded on the left and responses on the right,
    so that no padding lies between them and sliding windows count correctly. Outputs at padded
    positions are never used.
    """
    distinct = list(dict.fromkeys(prompts))
    width = max(map(len, distinct))
    ids_UT = torch.tensor([(0,) * (width - len(p)) + p for p in distinct])
    mask_UT = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in distinct])
    ids_UT = to_device(ids_UT, model.device)
    mask_UT = to_device(mask_UT, model.device)
    which_B = to_device(torch.tensor([distinct.index(p) for p in prompts]), model.device)
    hidden_UTD, cache = model.trunk_cached(ids_UT, mask_UT)
    last_B1D = hidden_UTD[which_B, -1:]
    ids_BT = to_device(right_padded(responses), model.device)
    if not ids_BT.shape[1]:
        return last_B1D
    select_rows(cache, which_B)
    mask_BT = torch.cat([mask_UT[which_B], torch.ones_like(ids_BT)], 1)
    response_BTD, _ = model.trunk_cached(ids_BT, mask_BT, cache)
    return torch.cat([last_B1D, response_BTD], 1)


def right_padded(rows: list[tuple[int, ...]]) -> torch.Tensor:
    """Return ids [B, T] on the CPU, with zeros to the right of short rows."""
    width = max(map(len, rows))
    ids_BT = torch.zeros(len(rows), width, dtype=torch.long)
    for padded, row in zip(ids_BT, rows, strict=True):
        padded[: len(row)] = torch.tensor(row, dtype=torch.long)
    return ids_BT


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a copy on ``device``; on CUDA without waiting for it."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def tokens(rollouts: list[Rollout]) -> torch.Tensor:
    """Return the ids [N] of the taught tokens, in the order of ``hidden_rows``."""
    return torch.tensor([r.ids[t] for r in rollouts for t in r.taught])


@dataclass(frozen=True, kw_only=True)
class ForwardPass:
    """Hidden rows of both models for all taught tokens of ``rollouts``, in their order.

    ``student_ND`` keeps its graph, so that the loss can reuse it after tokens are selected.
    """

    rollouts: list[Rollout]
    student_ND: torch.Tensor
    teacher_NE: torch.Tensor

    def select(self, kept: list[Rollout]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rows of the tokens taught in ``kept``, the same rollouts in the same order."""
        return (
            _select_rows(self.student_ND, student_sides(self.rollouts), student_sides(kept)),
            _select_rows(self.teacher_NE, teacher_sides(self.rollouts), teacher_sides(kept)),
        )


def _select_rows(hidden: torch.Tensor, before: list[Side], after: list[Side]) -> torch.Tensor:
    """Return one model's rows of ``hidden`` for the tokens compared in ``after``."""
    chosen: list[int] = []
    start = 0
    for old, new in zip(before, after, strict=True):
        index = {t: start + i for i, t in enumerate(old.rows)}
        chosen += [index[t] for t in new.rows]
        start += len(index)
    return hidden[to_device(torch.tensor(chosen, dtype=torch.long), hidden.device)]


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """Runs both models over rollouts and measures their tokens.

    ``terms``: the divergence and its precision; ``forward_kl``: measure the forward KL as well.
    """

    pair: Pair
    terms: Terms
    place: Place
    forward_kl: bool = False

    @classmethod
    def reverse_kl(
        cls, pair: Pair, place: Place, memory_bytes: int = Terms.memory_bytes
    ) -> "Scorer":
        """Return a scorer of the reverse KL at temperature 1, the held-out measure of every run."""
        terms = Terms(name="reverse-kl", dtype=place.head_dtype, memory_bytes=memory_bytes)
        return cls(pair=pair, terms=terms, place=place)

    def student_rows(self, rollouts: list[Rollout]) -> torch.Tensor:
        """Return the student's hidden rows [N, D]."""
        with self.place.autocast(self.pair.student.device):
            return hidden_rows(self.pair.student, student_sides(rollouts))

    @torch.no_grad()
    def teacher_rows(self, rollouts: list[Rollout]) -> torch.Tensor:
        """Return the teacher's hidden rows [N, E], without gradient."""
        with self.place.autocast(self.pair.teacher.device):
            return hidden_rows(self.pair.teacher, teacher_sides(rollouts))

    @torch.no_grad()
    def statistics(self, rows: ForwardPass) -> TokenFacts:
        """Return the statistics of the taught tokens; across tokenizers, of the taught units.

        See ``fused.statistics`` and ``simct.statistics``.
        """
        pair = self.pair
        student_ND = rows.student_ND.detach()
        if pair.shared_support is None:
            values = fused.statistics(
                self.terms,
                student_ND=student_ND,
                student_head=pair.student.head(),
                teacher_NE=rows.teacher_NE,
                teacher_head=pair.teacher.head(),
                token_N=tokens(rows.rollouts),
                forward=self.forward_kl,
            )
        else:
            values = simct.statistics(
                self.terms,
                support=pair.shared_support,
                units=units_of(rows.rollouts),
                student_ND=student_ND,
                student_head=pair.student.head(),
                teacher_ME=rows.teacher_NE,
                teacher_head=pair.teacher.head(),
                forward=self.forward_kl,
            )
        return by_position(rows.rollouts, values)

    @torch.no_grad()
    def measure(
        self, rollouts: list[Rollout], size: int, ledger: Ledger | None = None, phase: str = ""
    ) -> TokenFacts:
        """Run both models over this rank's rollouts, ``size`` at a time, and measure the tokens.

        The FLOPs of both forward passes are added to ``phase`` of ``ledger``.
        """
        facts: TokenFacts = {}
        for group in micro_batches(rollouts, size, self.pair.student.encodes_prompt_once):
            stopping.look()
            student_ND = self.student_rows(group)
            teacher_NE = self.teacher_rows(group)
            facts |= self.statistics(
                ForwardPass(rollouts=group, student_ND=student_ND, teacher_NE=teacher_NE)
            )
            if ledger is not None:
                count_forward_passes(ledger, phase, self.pair, rollouts=group)
        return facts


def by_position(rollouts: list[Rollout], values: dict[str, torch.Tensor]) -> TokenFacts:
    """Return the statistics [N] of all taught tokens by rollout, name and position."""
    lengths = [len(r.taught) for r in rollouts]
    facts: TokenFacts = {r.key: {} for r in rollouts}
    for name, value_N in values.items():
        for r, part in zip(rollouts, value_N.split(lengths), strict=True):
            facts[r.key][name] = dict(zip(r.taught, part.tolist(), strict=True))
    return facts


def student_head_rows(pair: Pair, rollouts: list[Rollout]) -> float:
    """Return the rows that the student's head projects once for the loss.

    The unit is a row of the whole vocabulary, which the FLOP ledger counts. Across tokenizers an
    exact unit is projected on the shared tokens alone; a span on the whole vocabulary.
    """
    if pair.shared_support is None:
        return sum(len(r.taught) for r in rollouts)
    exact_rows = _exact_units(rollouts) * len(pair.shared_support.student) / pair.student.vocabulary
    sizes = [u.size for r in rollouts for u in r.taught_units if not u.exact]
    return exact_rows + len(sizes) + sum(sizes)


def teacher_head_rows(pair: Pair, rollouts: list[Rollout]) -> float:
    """Return the rows that the teacher's head projects once for the loss."""
    if pair.shared_support is None:
        return sum(len(r.taught) for r in rollouts)
    exact_rows = _exact_units(rollouts) * len(pair.shared_support.teacher) / pair.teacher.vocabulary
    sizes = [u.teacher_size for r in rollouts for u in r.taught_units if not u.exact]
    return exact_rows + len(sizes) + sum(sizes)


def _exact_units(rollouts: list[Rollout]) -> int:
    return sum(u.exact for r in rollouts for u in r.taught_units)


def statistics_rows(pair: Pair, rollouts: list[Rollout]) -> tuple[float, float]:
    """Return the rows that both heads project for statistics: (student, teacher).

    Statistics need the whole vocabulary of every compared token.
    """
    if pair.shared_support is None:
        count = sum(len(r.taught) for r in rollouts)
        return count, count
    spans = [u for r in rollouts for u in r.taught_units if not u.exact]
    exact = _exact_units(rollouts) + len(spans)
    return exact + sum(u.size for u in spans), exact + sum(u.teacher_size for u in spans)


def count_forward_passes(ledger: Ledger, phase: str, pair: Pair, rollouts: list[Rollout]) -> None:
    """Add one forward pass of both models to ``phase``, with their heads, as statistics need."""
    student, teacher = statistics_rows(pair, rollouts)
    student_reads = reads(student_sides(rollouts), pair.student.encodes_prompt_once)
    teacher_reads = reads(teacher_sides(rollouts), pair.teacher.encodes_prompt_once)
    ledger.forward(phase, pair.student_shape, student_reads, taught=student)
    ledger.forward(phase, pair.teacher_shape, teacher_reads, taught=teacher)
