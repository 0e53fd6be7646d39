"""MemoryLimits: how many rollouts fit in memory at once, halved when memory runs out."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch

from ..config import Config
from ..display import find_phase
from ..errors import MemoryShortage, ignore
from .device import is_out_of_memory
from .meter import Meter
from .models import Model
from .ranks import Place
from .rollout import Rollout
from .sampling import GenerationCost, Request, Response, Sampler, generate
from .scoring import Scorer, TokenFacts

T = TypeVar("T")

MICRO_BATCH = "micro_batch_size"
ROWS = "rows"
SMALLEST = {MICRO_BATCH: "one rollout per pass", ROWS: "one answer per batch"}
# what helps when the smallest piece of work does not fit, with the flags of each command
Remedies = dict[str, str]
RUN_REMEDIES: Remedies = {
    MICRO_BATCH: (
        "use --gradient-checkpointing, a lower --head-memory-mb, shorter answers (--prefix, "
        "--max-new-tokens) or a smaller model"
    ),
    ROWS: (
        "use shorter answers (--prefix, --max-new-tokens), shorter prompts (--max-prompt-tokens) "
        "or a smaller model"
    ),
}
PROBE_REMEDIES: Remedies = {
    MICRO_BATCH: (
        "use a lower --head-memory-mb, shorter answers (--max-new-tokens), shorter prompts "
        "(--max-prompt-tokens) or a smaller model"
    ),
    ROWS: (
        "use shorter answers (--max-new-tokens), shorter prompts (--max-prompt-tokens) or a "
        "smaller model"
    ),
}
EVAL_REMEDIES: Remedies = {ROWS: "use shorter answers (--max-new-tokens) or a smaller model"}
FLAGS = {MICRO_BATCH: "--micro-batch-size", ROWS: "--generation-rows"}


class BatchSizes(NamedTuple):
    """How many rollouts a rank handles at once, in training and in generation."""

    micro_batch_size: int
    rows: int


USUAL = BatchSizes(micro_batch_size=8, rows=64)  # of --micro-batch-size and --generation-rows auto


def read_batch_sizes(config: Config) -> BatchSizes:
    """Return the sizes that a config gives; ``auto`` is the usual size."""
    return BatchSizes(
        micro_batch_size=config.train.micro_batch_size or USUAL.micro_batch_size,
        rows=config.rollout.rows or USUAL.rows,
    )


class MemoryLimits:
    """How many rollouts a rank handles at once, in training and in generation.

    When a device runs out of memory, ``fit`` and ``attempt`` halve the limit and repeat the work.
    The result stays the same, because no number depends on how rollouts are batched.
    ``micro_batch_size``: rollouts in one forward and backward pass; ``rows``: responses sampled
    together; ``lowered``: the limits that were halved, which a checkpoint keeps; ``report``: called
    with one line whenever a limit is halved; ``remedies``: the advice if a limit of 1 is too much.
    """

    def __init__(self, place: Place, config: Config):
        self.place = place
        self.micro_batch_size, self.rows = read_batch_sizes(config)
        self.lowered: dict[str, int] = {}
        self.report: Callable[[str], None] = ignore
        self.remedies = RUN_REMEDIES

    def restore(self, lowered: dict[str, int]) -> None:
        """Apply the limits that a checkpoint kept, where they are below the current ones."""
        for limit, size in lowered.items():
            self._set(limit, min(size, getattr(self, limit)))

    def fit(self, limit: str, meter: Meter, work: Callable[[Meter], T]) -> T:
        """Return ``work(meter)`` of this rank; halve ``limit`` until the work fits.

        MemoryShortage: the limit is 1 and memory still runs out.
        """
        while True:
            attempt = meter.attempt()
            try:
                result = work(attempt)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            else:
                meter.accept(attempt)
                return result
            # After the except block, so that the traceback no longer holds the tensors.
            meter.reject(attempt)
            self.halve(limit)

    def attempt(self, meter: Meter, work: Callable[[Meter], T]) -> T | None:
        """Return ``work(meter)`` if it fits on every rank.

        If any rank runs out of memory, return None and halve the micro-batch on all ranks.
        """
        attempt = meter.attempt()
        result: T | None = None
        fits = True
        try:
            result = work(attempt)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            fits = False
        if all(self.place.gather(fits)):
            meter.accept(attempt)
            return result
        del result  # frees its tensors before memory is asked for again
        meter.reject(attempt)
        self.halve(MICRO_BATCH)
        return None

    def sample(
        self,
        model: Model,
        requests: list[Request],
        max_new_tokens: int,
        sampler: Sampler,
        cost: GenerationCost,
    ) -> list[Response]:
        """Return the responses of ``generate``; halve ``rows`` until a batch fits."""

        progress = find_phase("answers")
        before = progress.done

        def sample(meter: Meter) -> list[Response]:
            progress.set(before)  # again, if memory ran out
            fitting = dataclasses.replace(sampler, rows=self.rows)
            counted = dataclasses.replace(cost, meter=meter)
            return generate(
                model, requests, max_new_tokens=max_new_tokens, sampler=fitting, cost=counted
            )

        return self.fit(ROWS, cost.meter, sample)

    def measure(
        self, scorer: Scorer, rollouts: list[Rollout], meter: Meter, phase: str
    ) -> TokenFacts:
        """Return the statistics of ``Scorer.measure``; halve the micro-batch until it fits."""

        def measure(meter: Meter) -> TokenFacts:
            return scorer.measure(rollouts, self.micro_batch_size, ledger=meter.ledger, phase=phase)

        return self.fit(MICRO_BATCH, meter, measure)

    def halve(self, limit: str) -> None:
        """Halve a limit, report it and release cached memory. MemoryShortage: it is 1."""
        device = self.place.device
        size = getattr(self, limit)
        if size == 1:
            raise MemoryShortage(
                f"rank {self.place.rank}: {device} is out of memory even with {SMALLEST[limit]}; "
                f"{self.remedies[limit]}"
            )
        self._set(limit, size // 2)
        self.report(
            f"rank {self.place.rank}: {device} ran out of memory; {FLAGS[limit]} was lowered from "
            f"{size} to {size // 2}, which does not change the result"
        )
        if device.type in ("cuda", "mps"):
            getattr(torch, device.type).empty_cache()

    def _set(self, limit: str, size: int) -> None:
        setattr(self, limit, size)
        self.lowered[limit] = size
