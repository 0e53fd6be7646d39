"""Student + prompts + prefix length → rollouts: plain HF ``generate`` with a KV cache, stopped at the prefix or at EOS."""

from dataclasses import dataclass

import torch
from transformers import (
    GenerationConfig, LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper,
)

from .runtime import Clock, seed_of


@dataclass(frozen=True)
class Request:
    """One row to sample: its prompt ids and the key that seeds it, e.g. (step, prompt slot, sample)."""

    ids: tuple[int, ...]
    key: tuple


@dataclass(frozen=True)
class Response:
    """What was sampled: response ids (EOS included if it was sampled) and whether EOS ended it.

    A row cut at the cap is not finished: its last id is an ordinary taught token, never taken for EOS.
    """

    ids: tuple[int, ...]
    finished: bool


@dataclass(frozen=True)
class Rollout:
    """A sampled response between both models' prompts, with its place in the update.

    ``prompt``: slot of the prompt in the update's global batch; ``sample``: 0 … G − 1. ``teacher_ids`` are the response
    in the teacher's tokens (the same ids while the tokenizers match).
    """

    prompt: int
    sample: int
    student_prompt: tuple[int, ...]
    teacher_prompt: tuple[int, ...]
    ids: tuple[int, ...]
    teacher_ids: tuple[int, ...]
    finished: bool


class _Race(LogitsProcessor):
    """Exact softmax sampling under greedy decoding, by an exponential race.

    argmax_v (log p_v − log e_v), e_v ~ Exp(1), is distributed as p (the Gumbel-max trick). Each row draws its own e from a
    generator seeded by (seed, key), one vocabulary-sized draw per position, so a draw depends on (seed, step, prompt,
    sample, position) and on nothing else: batching, padding and restarts cannot change it. Ids from ``support`` on
    (padding rows of the head) are never drawn.
    """

    def __init__(self, keys: list[tuple], seed: int, support: int, device: torch.device):
        self.generators = [torch.Generator(device).manual_seed(seed_of(seed, *key)) for key in keys]
        self.support = support

    def __call__(self, input_ids, scores):
        race = torch.empty(len(scores), self.support, dtype=torch.float32, device=scores.device)
        for row, generator in zip(race, self.generators):
            row.exponential_(generator=generator)
        # float32 draws lie on a grid of 2⁻²⁴; a draw of exactly 0 stands for its mean below one grid step
        scores[:, : self.support] -= race.clamp_(min=2.0**-25).log_()
        scores[:, self.support:] = -torch.inf
        return scores


class _Support(LogitsProcessor):
    """Padding rows of the head have no token: they are never sampled."""

    def __init__(self, support: int):
        self.support = support

    def __call__(self, input_ids, scores):
        scores[:, self.support:] = -torch.inf
        return scores


class _Split(LogitsProcessor):
    """Notes when the first logits arrive: the end of the prefill."""

    def __init__(self, clock: Clock):
        self.clock, self.prefilled = clock, None

    def __call__(self, input_ids, scores):
        if self.prefilled is None:
            self.prefilled = self.clock.now()
        return scores


@dataclass(frozen=True)
class Sampler:
    """How responses are drawn. Every field that shapes a sample is here; the model's own generation config has no say."""

    eos: frozenset[int]
    pad: int
    support: int
    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    rows: int = 64

    @property
    def on_policy(self) -> bool:
        """Do samples follow the student's own distribution?"""
        return self.temperature == 1 and self.top_p == 1 and self.top_k == 0

    def processors(self, keys: list[tuple], device: torch.device) -> LogitsProcessorList:
        """Support, then temperature, top-k and top-p as HF orders them, then the race (none at temperature 0)."""
        steps = LogitsProcessorList([_Support(self.support)])
        if self.temperature == 0:
            return steps
        if self.temperature != 1:
            steps.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k:
            steps.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            steps.append(TopPLogitsWarper(self.top_p))
        steps.append(_Race(keys, self.seed, self.support, device))
        return steps


@torch.no_grad()
def generate(net, requests: list[Request], cap: int, sampler: Sampler, spent=None,
             clock: Clock | None = None) -> list[Response]:
    """Samples up to ``cap`` tokens for every request, in the order given.

    Rows are sorted by prompt length and left-padded in calls of at most ``sampler.rows``. ``spent(prompt_lengths,
    response_lengths)`` is told, call by call, what was run, for the ledger; ``clock`` gets the seconds of both phases.
    """
    responses: list[Response | None] = [None] * len(requests)
    order = sorted(range(len(requests)), key=lambda i: (len(requests[i].ids), i))
    for start in range(0, len(order), sampler.rows):
        chosen = order[start : start + sampler.rows]
        batch = [requests[i] for i in chosen]
        for i, response in zip(chosen, _call(net, batch, cap, sampler, clock)):
            responses[i] = response
        if spent is not None:
            spent([len(r.ids) for r in batch], [len(responses[i].ids) for i in chosen])
    return responses


def _call(net, batch: list[Request], cap: int, sampler: Sampler, clock: Clock | None) -> list[Response]:
    width = max(len(r.ids) for r in batch)
    ids_BT = torch.tensor([[sampler.pad] * (width - len(r.ids)) + list(r.ids) for r in batch])
    mask_BT = torch.tensor([[0] * (width - len(r.ids)) + [1] * len(r.ids) for r in batch])
    settings = GenerationConfig(
        max_new_tokens=cap, do_sample=False, num_beams=1, use_cache=True, eos_token_id=sorted(sampler.eos),
        pad_token_id=sampler.pad,
    )
    processors = sampler.processors([r.key for r in batch], net.device)
    if clock is not None:
        processors.insert(0, split := _Split(clock))
        start = clock.now()
    sequences = net.generate(
        input_ids=ids_BT.to(net.device), attention_mask=mask_BT.to(net.device), generation_config=settings,
        logits_processor=processors,
    )
    if clock is not None:
        clock.add("student_prefill", split.prefilled - start)
        clock.add("student_decode", clock.now() - split.prefilled)
    return [_until_eos(row, sampler.eos) for row in sequences[:, width:].tolist()]


def _until_eos(row: list[int], eos: frozenset[int]) -> Response:
    """Cuts after the first EOS, by position; the only place that decides where a response ends."""
    for position, token in enumerate(row):
        if token in eos:
            return Response(tuple(row[: position + 1]), True)
    return Response(tuple(row), False)
