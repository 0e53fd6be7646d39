"""Find the flags with which a run fits a card, and the time that it then takes.

The rule: no gradient checkpointing if the run fits without it, because it repeats the forward pass;
then the most generation rows, because they save decoding steps; then the largest micro-batch. Rows
and micro-batch do not compete, because generation and training run one after another. LoRA is
proposed only where all weights do not fit.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..config import Adapter, Config, flag
from ..errors import UserError
from .case import Case
from .forecast import Forecaster
from .gpus import Card
from .timing import Workload, estimate_run

LORA = Adapter(rank=64)  # the adapter that is proposed if the config has none
RULE = (
    "flags that fit: no gradient checkpointing where possible, then the most generation rows (up "
    "to --generation-rows), then the largest micro-batch; LoRA only where nothing else fits"
)


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A run that is planned. ``cases``: its case on a card with bfloat16, and on one without."""

    work: Workload
    forecaster: Forecaster
    cases: tuple[Case, Case]


def fit_card(planned: Planned, card: Card) -> dict:
    """Return how a run fits a card: ``flags``, ``total`` bytes, ``seconds``; None if it does not.

    UserError: the memory cannot be forecast.
    """
    case = planned.cases[0]
    if not card.has_bfloat16:
        case = planned.cases[1]
    dtype = str(case.dtype).removeprefix("torch.")
    row = {
        "card": card.name,
        "memory_gb": card.memory,
        "bandwidth_gb_s": card.bandwidth,
        "tflops": card.rate(dtype),
        "dtype": dtype,
    }
    found = search(planned.forecaster, case, card.usable)
    if found is None:
        return {**row, "fits": False, "flags": None, "total": None, "seconds": None, "phases": None}
    forecast = planned.forecaster.forecast(found)
    # A gradient is a float32 number for every trained parameter.
    phases = estimate_run(planned.work, found, card, trained=forecast["gradients"] / 4)
    seconds = None
    if phases is not None:
        seconds = sum(phases.values())
    return {
        **row,
        "fits": True,
        "flags": list_flags(planned.work.config, found),
        "total": forecast["total"],
        "seconds": seconds,
        "phases": phases,
    }


def search(forecaster: Forecaster, case: Case, free: float) -> Case | None:
    """Return the first case by the rule of this module that needs at most ``free`` bytes."""
    for method in _methods(case):
        rows = _largest(
            forecaster, replace(method, micro_batch=1), "rows", most=case.rows, free=free
        )
        if rows is None:
            continue
        rollouts = len(case.prompts) * case.samples
        single_row = replace(method, rows=1)
        micro_batch = _largest(forecaster, single_row, "micro_batch", most=rollouts, free=free)
        if micro_batch is not None:
            return replace(method, rows=rows, micro_batch=micro_batch)
    return None


def _methods(case: Case) -> Iterator[Case]:
    """Yield the methods of training by preference."""
    adapters = [case.adapter]
    if case.adapter is None:
        adapters.append(LORA)
    for adapter in adapters:
        for recomputes in (False, True):
            if recomputes or not case.recomputes:
                yield replace(case, adapter=adapter, recomputes=recomputes)


def _largest(
    forecaster: Forecaster, case: Case, field: str, *, most: int, free: float
) -> int | None:
    """Return the largest of ``most``, its half, its quarter … that fits; None if 1 does not."""
    size = most
    while size:
        if forecaster.forecast(replace(case, **{field: size}))["total"] <= free:
            return size
        size //= 2
    return None


def list_flags(config: Config, case: Case) -> list[str]:
    """Return the flags that turn ``config`` into ``case``, and those of both sizes."""
    flags = []
    if case.adapter is not None and config.adapter.rank is None:
        flags += [flag("adapter.rank"), str(case.adapter.rank)]
    if case.recomputes:
        flags.append(flag("train.gradient_checkpointing"))
    flags += [flag("rollout.rows"), str(case.rows)]
    flags += [flag("train.micro_batch_size"), str(case.micro_batch)]
    return flags


def fit_all(planned: Planned, cards: tuple[Card, ...], notes: list[str]) -> list[dict]:
    """Return how the run fits each card; a forecast that is not possible becomes a note."""
    rows = []
    for card in cards:
        try:
            rows.append(fit_card(planned, card))
        except UserError as error:
            notes.append(f"{card.name}: no forecast ({error})")
    return rows
