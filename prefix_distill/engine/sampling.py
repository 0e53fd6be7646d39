"""Sample responses with ``generate`` and a KV cache."""

from dataclasses import dataclass, field

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

from ..display import find_phase
from ..errors import UserError
from ..maths.flops import Shape
from ..maths.seeds import seed_of
from .batching import Reads
from .decoding import Decoding
from .decoding_loop import decode
from .device import Clock
from .free_memory import release_cache
from .meter import Meter
from .models import Model
from .processors import Race, RowProcessor, StepWatcher, Support
from .rope import split_lengths
from .transformers_names import name_generate_cache_argument, select_rows


@dataclass(frozen=True, kw_only=True)
class Request:
    """One response to sample: its prompt ids and the key that seeds it.

    A key is, for example, (step, prompt slot, sample).
    """

    ids: tuple[int, ...]
    key: tuple[object, ...]


@dataclass(frozen=True, kw_only=True)
class Response:
    """A sampled response: its ids, and whether an EOS token ended it.

    ``ids`` include the EOS token. ``logp``: the log-probability of each id when it was sampled, if
    the sampler records it. A response that reaches the length limit is not finished: its last id
    is an ordinary token.
    """

    ids: tuple[int, ...]
    finished: bool
    logp: tuple[float, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class GenerationCost:
    """Where the cost of sampling is recorded.

    ``shape``: what a token costs in FLOPs; None records none. ``prefill`` and ``decode``: the
    phases of the ledger; with ``timed`` the clock gets their seconds as well.
    """

    meter: Meter
    shape: Shape | None = None
    prefill: str = "student_prefill"
    decode: str = "student_decode"
    timed: bool = False

    @classmethod
    def in_phase(cls, meter: Meter, shape: Shape, phase: str) -> "GenerationCost":
        """Return a cost whose FLOPs all belong to one phase."""
        return cls(meter=meter, shape=shape, prefill=phase, decode=phase)

    def count(self, reads: list[Reads]) -> None:
        """Add the FLOPs of one batch: (prompt length, lengths of its responses) per prompt."""
        if self.shape is not None:
            self.meter.ledger.generation(
                self.shape, reads, prefill=self.prefill, decode=self.decode
            )


class PhaseTimer(LogitsProcessor):
    """Times prefill and decoding: prefill starts now and ends with the first logits."""

    def __init__(self, clock: Clock):
        self.clock = clock
        self.started = clock.now()
        self.prefilled: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.prefilled is None:
            self.prefilled = self.clock.now()
        return scores

    def stop(self, cost: GenerationCost) -> None:
        """Add the seconds of both phases to the clock; decoding ends now."""
        ended = self.clock.now()
        prefilled = ended if self.prefilled is None else self.prefilled
        self.clock.add(cost.prefill, prefilled - self.started)
        self.clock.add(cost.decode, ended - prefilled)


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How responses are sampled.

    Every field that shapes a sample is here; the model's own generation config is not used.
    ``eos``: ids that end a response; ``pad``: the padding id; ``support``: ids from here on are
    never sampled; ``temperature`` 0 is greedy; ``top_p`` 1 and ``top_k`` 0 are off; ``rows``: the
    most responses in one batch; ``record``: keep the log-probability of every sampled id under the
    warped and tempered logits.
    """

    eos: frozenset[int]
    pad: int
    support: int
    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    rows: int = 64
    record: bool = False

    @property
    def on_policy(self) -> bool:
        """Return whether samples follow the student's own distribution."""
        return self.temperature == 1 and self.top_p == 1 and self.top_k == 0

    def describe(self) -> dict[str, float]:
        """Return temperature, top-p and top-k as JSON values."""
        return {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}

    def race(self, keys: list[tuple[object, ...]], device: torch.device) -> RowProcessor | None:
        """Return the noise of every row; None if decoding is greedy."""
        if self.temperature == 0:
            return None
        generators = []
        for key in keys:
            generators.append(torch.Generator(device).manual_seed(seed_of(self.seed, *key)))
        return Race(generators, self.support, self.record)

    def processors(self, race: RowProcessor | None) -> LogitsProcessorList:
        """Return the logits processors in HF's order: temperature, top-k, top-p, then ``race``.

        ``race`` adds the sampling noise. Processors that change nothing are omitted.
        """
        steps = LogitsProcessorList()
        if race is None or self.top_k or self.top_p < 1:
            steps.append(Support(self.support))
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
def generate(
    model: Model,
    requests: list[Request],
    max_new_tokens: int,
    sampler: Sampler,
    cost: GenerationCost | None = None,
) -> list[Response]:
    """Sample up to ``max_new_tokens`` tokens for every request; return responses in its order.

    Rows are sorted by prompt length, rows with the same prompt together, and left-padded in batches
    of at most ``sampler.rows``, as far as ``model.decoding`` allows. A prompt of several rows is
    prefilled once if ``model.prefills_once``. ``cost`` records the FLOPs of every batch, and the
    seconds of prefill and decoding. A row that may pass the length at which RoPE changes is sampled
    alone. The open phase that counts answers advances.

    stopping.CutOff: a signal asked the run to stop, and this work may be cut off.
    """
    responses: dict[int, Response] = {}
    progress = find_phase("answers")
    for chosen in _batches(requests, model, rows=sampler.rows, tokens=max_new_tokens):
        batch = _Batch(
            model=model,
            requests=[requests[i] for i in chosen],
            sampler=sampler,
            watcher=StepWatcher(progress, len(chosen), max_new_tokens),
        )
        for i, response in zip(chosen, batch.decode(max_new_tokens, cost), strict=True):
            responses[i] = response
        batch.watcher.finish()
        if cost is not None:
            cost.count(_describe_reads(model, requests, {i: responses[i] for i in chosen}))
    return [responses[i] for i in range(len(requests))]


def _batches(requests: list[Request], model: Model, *, rows: int, tokens: int) -> list[list[int]]:
    """Return the indices of the requests of every batch of at most ``rows`` requests."""
    order = _order_by_prompt(requests)
    lengths = [len(requests[i].ids) + tokens for i in order]
    batches: list[list[int]] = []
    for positions, is_within in split_lengths(model.rope_switch, lengths):
        most = rows
        if not is_within:
            most = 1
        batches += _split([order[p] for p in positions], requests, most, decoding=model.decoding)
    return batches


def _split(
    order: list[int], requests: list[Request], most: int, *, decoding: Decoding
) -> list[list[int]]:
    """Return batches of at most ``most`` neighbours whose prompts may share a batch."""
    batches: list[list[int]] = []
    for i in order:
        is_open = batches and len(batches[-1]) < most
        first = batches[-1][0] if is_open else i
        if is_open and decoding.can_share(len(requests[first].ids), len(requests[i].ids)):
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def _order_by_prompt(requests: list[Request]) -> list[int]:
    """Return the indices of the requests by prompt length, equal prompts together."""
    first: dict[tuple[int, ...], int] = {}
    for i, request in enumerate(requests):
        first.setdefault(request.ids, i)

    def order(i: int) -> tuple[int, int, int]:
        ids = requests[i].ids
        return len(ids), first[ids], i

    return sorted(range(len(requests)), key=order)


def _describe_reads(
    model: Model, requests: list[Request], responses: dict[int, Response]
) -> list[Reads]:
    """Return (prompt length, lengths of its responses) for every prompt of a batch."""
    shortest = min(len(requests[i].ids) for i in responses)
    prefills_once = model.prefills_once and shortest > 1
    lengths: dict[object, Reads] = {}
    for i, response in responses.items():
        ids = requests[i].ids
        key: object = ids if prefills_once else i
        _, of_prompt = lengths.setdefault(key, (len(ids), []))
        of_prompt.append(len(response.ids))
    return list(lengths.values())


@dataclass(kw_only=True)
class _Batch:
    """One batch of rows during decoding.

    ``generate`` runs in stretches of ``model.decoding.stretch`` tokens; rows that have ended leave
    the batch between two stretches. ``alive``: the rows that are still decoded.
    """

    model: Model
    requests: list[Request]
    sampler: Sampler
    watcher: StepWatcher
    ids: list[list[int]] = field(default_factory=list)
    logp: list[list[float]] = field(default_factory=list)
    finished: set[int] = field(default_factory=set)

    def decode(self, max_new_tokens: int, cost: GenerationCost | None) -> list[Response]:
        """Prefill, then decode until every row has ended or reached ``max_new_tokens``."""
        self.ids = [[] for _ in self.requests]
        self.logp = [[] for _ in self.requests]
        ids_BT, mask_BT = self._left_padded()
        race = self.sampler.race([r.key for r in self.requests], self.model.device)
        timer = None
        if cost is not None and cost.timed:
            timer = PhaseTimer(cost.meter.clock)
        cache = self._shared_prefill(ids_BT, mask_BT)
        alive = list(range(len(self.requests)))
        done = 0
        while alive and done < max_new_tokens:
            release_cache(self.model.device)
            stretch = min(self.model.decoding.stretch or max_new_tokens, max_new_tokens - done)
            processors = self.sampler.processors(race)
            processors.insert(0, self.watcher)
            if timer is not None:
                processors.insert(0, timer)
            prompt = {
                "input_ids": ids_BT,
                "attention_mask": mask_BT,
                name_generate_cache_argument(): cache,
            }
            settings = self.sampler.settings(stretch)
            sequences_BT, cache = decode(self.model, prompt, config=settings, processors=processors)
            new_BT = sequences_BT[:, ids_BT.shape[1] :]
            if not new_BT.shape[1]:
                raise UserError(
                    f"model {self.model.name}: expected at least one new token from its generate "
                    "method, got none; use another model"
                )
            done += new_BT.shape[1]
            going = self._append(alive, new_BT, race)
            alive = [alive[row] for row in going]
            self.watcher.alive = len(alive)
            self.watcher.show()
            if not alive or done >= max_new_tokens:
                break
            ids_BT = sequences_BT
            mask_BT = torch.nn.functional.pad(mask_BT, (0, new_BT.shape[1]), value=1)
            if len(going) < len(new_BT):
                kept = torch.tensor(going, device=self.model.device)
                ids_BT = ids_BT[kept]
                mask_BT = mask_BT[kept]
                select_rows(cache, kept)
                if race is not None:
                    race.keep(going)
        if timer is not None and cost is not None:
            timer.stop(cost)
        return self._responses(race)

    def _append(
        self, alive: list[int], new_BT: torch.Tensor, race: RowProcessor | None
    ) -> list[int]:
        """Add a stretch of tokens to the rows; return which of them have not ended."""
        lengths, ended = find_ends(new_BT, self.sampler.eos)
        for row, tokens, length in zip(alive, new_BT.tolist(), lengths, strict=True):
            self.ids[row] += tokens[:length]
        if race is not None and race.record:
            for row, logp, length in zip(alive, race.take_recorded(), lengths, strict=True):
                self.logp[row] += logp[:length]
        self.finished.update(row for row, has_ended in zip(alive, ended, strict=True) if has_ended)
        return [i for i, has_ended in enumerate(ended) if not has_ended]

    def _responses(self, race: RowProcessor | None) -> list[Response]:
        """Return the response of every row."""
        responses = []
        for row, ids in enumerate(self.ids):
            logp = None
            if race is not None and race.record:
                logp = tuple(self.logp[row])
            responses.append(Response(ids=tuple(ids), finished=row in self.finished, logp=logp))
        return responses

    def _left_padded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (ids [B, T], mask [B, T]) of the prompts, left-padded."""
        width = max(len(r.ids) for r in self.requests)
        ids, mask = [], []
        for r in self.requests:
            padding = width - len(r.ids)
            ids.append([self.sampler.pad] * padding + list(r.ids))
            mask.append([0] * padding + [1] * len(r.ids))
        device = self.model.device
        return torch.tensor(ids).to(device), torch.tensor(mask).to(device)

    def _shared_prefill(self, ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> Cache | None:
        """Return the KV cache of all prompts without their last tokens; each prompt runs once.

        None (``generate`` prefills) if nothing would be saved or the model does not allow it.
        """
        prompts = [r.ids for r in self.requests]
        distinct = list(dict.fromkeys(prompts))
        if not self.model.prefills_once or len(distinct) == len(prompts) or len(distinct[0]) < 2:
            return None
        rows = [prompts.index(ids) for ids in distinct]
        _, cache = self.model.trunk_cached(ids_BT[rows, :-1], mask_BT[rows, :-1])
        which = torch.tensor([distinct.index(ids) for ids in prompts], device=ids_BT.device)
        select_rows(cache, which)
        return cache


def find_ends(ids_BT: torch.Tensor, eos: frozenset[int]) -> tuple[list[int], list[bool]]:
    """Return the tokens of every row up to its first EOS token, and whether it has one.

    The only place that decides where a response ends.
    """
    is_eos_BT = torch.isin(ids_BT, torch.tensor(sorted(eos), device=ids_BT.device))
    ended_B = is_eos_BT.any(1)
    first_B = is_eos_BT.int().argmax(1) + 1  # argmax returns the first of equal values
    lengths_B = first_B.masked_fill(~ended_B, ids_BT.shape[1])
    return lengths_B.tolist(), ended_B.tolist()
