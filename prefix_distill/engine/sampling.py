"""Sample responses with plain ``generate`` and a KV cache."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from transformers import (
    Cache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..maths.flops import STRETCH
from ..maths.seeds import seed_of
from .device import Clock
from .models import Model
from .transformers_names import name_generate_cache_argument, read_cache

Reads = tuple[int, list[int]]  # tokens: length of a prompt, lengths of its responses


@dataclass(frozen=True)
class Request:
    """One row to sample: its prompt ids and the key that seeds it, e.g. (step, prompt slot,
    sample)."""

    ids: tuple[int, ...]
    key: tuple


@dataclass(frozen=True)
class Response:
    """What was sampled: response ids (EOS included if it was sampled), whether EOS ended it, and
    the log-probability of each id where it was drawn, if the sampler records it.

    A row cut at the cap is not finished: its last id is an ordinary taught token, never taken for
    EOS.
    """

    ids: tuple[int, ...]
    finished: bool
    logp: tuple[float, ...] | None = None


class _Race(LogitsProcessor):
    """Exact softmax sampling under greedy decoding, by an exponential race.

    argmax_v (log p_v − log e_v), e_v ~ Exp(1), is distributed as p (the Gumbel-max trick). Each row
    draws its own e from a generator seeded by (seed, key), one vocabulary-sized draw per position,
    so a draw depends on (seed, step, prompt, sample, position) and on nothing else: batching,
    padding and restarts cannot change it. Ids from ``support`` on (padding rows of the head) are
    never drawn. With ``record``, ``taken`` collects log p of what was drawn, a tensor [rows] a
    position.
    """

    def __init__(
        self, keys: list[tuple], seed: int, support: int, device: torch.device, record: bool = False
    ):
        self.generators = [torch.Generator(device).manual_seed(seed_of(seed, *key)) for key in keys]
        self.support, self.record = support, record
        self.taken: list[torch.Tensor] = []

    def keep(self, rows: list[int]) -> None:
        """Only these rows go on."""
        self.generators = [self.generators[row] for row in rows]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        race = torch.empty(len(scores), self.support, dtype=torch.float32, device=scores.device)
        for row, generator in zip(race, self.generators, strict=True):
            row.uniform_(generator=generator)
        logp = scores[:, : self.support].float().log_softmax(-1) if self.record else None
        # e = −log(1 − u). The u lie on a grid of 2⁻²⁴ in [0, 1); e = 0 stands for its mean below
        # one grid step
        scores[:, : self.support] -= race.neg_().log1p_().neg_().clamp_(min=2.0**-25).log_()
        scores[:, self.support :] = -torch.inf
        if logp is not None:
            self.taken.append(logp.gather(1, scores.argmax(-1, keepdim=True))[:, 0])
        return scores


class _Support(LogitsProcessor):
    """Padding rows of the head have no token: they are never sampled (the race sees to it where
    it comes first)."""

    def __init__(self, support: int):
        self.support = support

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, self.support :] = -torch.inf
        return scores


class _Split(LogitsProcessor):
    """Times prefill and decoding: prefill starts now and ends with the first logits."""

    def __init__(self, clock: Clock):
        self.clock, self.started = clock, clock.now()
        self.prefilled: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.prefilled is None:
            self.prefilled = self.clock.now()
        return scores

    def book(self) -> None:
        """Add the seconds of both phases to the clock; decoding ends now."""
        ended = self.clock.now()
        prefilled = ended if self.prefilled is None else self.prefilled
        self.clock.add("student_prefill", prefilled - self.started)
        self.clock.add("student_decode", ended - prefilled)


@dataclass(frozen=True)
class Sampler:
    """How responses are drawn. Every field that shapes a sample is here; the model's own
    generation config has no say."""

    eos: frozenset[int]
    pad: int
    support: int
    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    rows: int = 64
    record: bool = (
        False  # keep the log-probability of every draw, as the warped and tempered logits give it
    )

    @property
    def on_policy(self) -> bool:
        """Do samples follow the student's own distribution?"""
        return self.temperature == 1 and self.top_p == 1 and self.top_k == 0

    def race(self, keys: list[tuple], device: torch.device) -> _Race | None:
        """The rows' own noise; None when nothing is drawn."""
        return (
            None
            if self.temperature == 0
            else _Race(keys, self.seed, self.support, device, self.record)
        )

    def processors(self, race: _Race | None) -> LogitsProcessorList:
        """What shapes the logits, in HF's order: temperature, top-k, top-p, then the race; only
        what is needed."""
        steps = LogitsProcessorList()
        if race is None or self.top_k or self.top_p < 1:
            steps.append(_Support(self.support))
        if race is None:
            return steps
        if self.temperature != 1:
            steps.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k:
            steps.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            steps.append(TopPLogitsWarper(self.top_p))
        steps.append(race)
        return steps

    def settings(self, tokens: int) -> GenerationConfig:
        """Return the generation config for at most ``tokens`` new tokens per row."""
        return GenerationConfig(
            max_new_tokens=tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            eos_token_id=sorted(self.eos),
            pad_token_id=self.pad,
            return_dict_in_generate=True,
        )


@torch.inference_mode()
def generate(  # noqa: PLR0913  sampling arguments and two optional callbacks
    model: Model,
    requests: list[Request],
    cap: int,
    sampler: Sampler,
    spent: Callable[[list[Reads]], None] | None = None,
    clock: Clock | None = None,
) -> list[Response]:
    """Samples up to ``cap`` tokens for every request, in the order given.

    Rows are sorted by prompt length, rows with the same prompt together, and left-padded in calls
    of at most ``sampler.rows``. A prompt of several rows is prefilled once if
    ``model.shares_prompts``. ``spent(reads)`` is told, call by call, what was run
    (``Ledger.generation``); ``clock`` gets the seconds of both phases.
    """
    responses: dict[int, Response] = {}
    first: dict[tuple[int, ...], int] = {}
    for i, request in enumerate(requests):
        first.setdefault(request.ids, i)
    order = sorted(
        range(len(requests)), key=lambda i: (len(requests[i].ids), first[requests[i].ids], i)
    )
    for start in range(0, len(order), sampler.rows):
        chosen = order[start : start + sampler.rows]
        batch = [requests[i] for i in chosen]
        shared = model.shares_prompts and len(batch[0].ids) > 1
        reads: dict[tuple[int, ...] | int, Reads] = {}
        for i, response in zip(chosen, _call(model, batch, cap, sampler, clock), strict=True):
            responses[i] = response
            ids = requests[i].ids
            reads.setdefault(ids if shared else i, (len(ids), []))[1].append(len(response.ids))
        if spent is not None:
            spent(list(reads.values()))
    return [responses[i] for i in range(len(requests))]


def _call(
    model: Model, batch: list[Request], cap: int, sampler: Sampler, clock: Clock | None
) -> list[Response]:
    """One batch: prefill, then stretches of ``generate`` between which rows that have ended
    leave it."""
    ids_BT, mask_BT = _left_padded(batch, sampler.pad, model.device)
    race = sampler.race([r.key for r in batch], model.device)
    split = _Split(clock) if clock is not None else None
    cache = _shared_prefill(model, batch, ids_BT, mask_BT)
    drawn: list[list[int]] = [[] for _ in batch]
    chances: list[list[float]] = [[] for _ in batch]
    alive = list(range(len(batch)))
    while alive and len(drawn[alive[0]]) < cap:
        settings = sampler.settings(min(STRETCH, cap - len(drawn[alive[0]])))
        processors = sampler.processors(race)
        if split is not None:
            processors.insert(0, split)
        cache_argument = {name_generate_cache_argument(): cache}
        with model.form():
            out = model.net.generate(
                input_ids=ids_BT,
                attention_mask=mask_BT,
                generation_config=settings,
                logits_processor=processors,
                **cache_argument,
            )
        new = out.sequences[:, ids_BT.shape[1] :].tolist()
        going = [row for row, tokens in enumerate(new) if not sampler.eos.intersection(tokens)]
        for row, tokens in zip(alive, new, strict=True):
            drawn[row] += tokens
        if race is not None and race.record:
            for row, taken in zip(alive, torch.stack(race.taken, 1).tolist(), strict=True):
                chances[row] += taken
            race.taken.clear()
        alive, cache = [alive[row] for row in going], read_cache(out)
        ids_BT, mask_BT = (
            out.sequences,
            torch.cat([mask_BT, mask_BT.new_ones(len(mask_BT), len(new[0]))], 1),
        )
        if alive and len(going) < len(new):
            kept = torch.tensor(going, device=model.device)
            ids_BT, mask_BT = ids_BT[kept], mask_BT[kept]
            cache.batch_select_indices(kept)
            if race is not None:
                race.keep(going)
    if split is not None:
        split.book()
    ended = [_until_eos(row, sampler.eos) for row in drawn]
    if race is None or not race.record:
        return ended
    return [
        replace(r, logp=tuple(chance[: len(r.ids)]))
        for r, chance in zip(ended, chances, strict=True)
    ]


def _left_padded(
    batch: list[Request], pad: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (ids [B, T], mask [B, T]) of the prompts, left-padded with ``pad``."""
    width = max(len(r.ids) for r in batch)
    ids_BT = torch.tensor([[pad] * (width - len(r.ids)) + list(r.ids) for r in batch])
    mask_BT = torch.tensor([[0] * (width - len(r.ids)) + [1] * len(r.ids) for r in batch])
    return ids_BT.to(device), mask_BT.to(device)


def _shared_prefill(
    model: Model, batch: list[Request], ids_BT: torch.Tensor, mask_BT: torch.Tensor
) -> Cache | None:
    """The KV cache of all prompts but for their last tokens, every distinct prompt read once; None
    (``generate`` prefills) where nothing would be saved or the model does not allow it."""
    distinct = list(dict.fromkeys(r.ids for r in batch))
    if not model.shares_prompts or len(distinct) == len(batch) or len(distinct[0]) < 2:
        return None
    rows = [next(i for i, r in enumerate(batch) if r.ids == ids) for ids in distinct]
    _, cache = model.trunk_cached(ids_BT[rows, :-1], mask_BT[rows, :-1])
    cache.batch_select_indices(
        torch.tensor([distinct.index(r.ids) for r in batch], device=ids_BT.device)
    )
    return cache


def _until_eos(row: list[int], eos: frozenset[int]) -> Response:
    """Cuts after the first EOS, by position; the only place that decides where a response ends."""
    for position, token in enumerate(row):
        if token in eos:
            return Response(tuple(row[: position + 1]), True)
    return Response(tuple(row), False)
