"""Find the flags with which a run fits a card, and the time that it then takes.

The rule: no gradient checkpointing if a micro-batch of ENOUGH rollouts fits without it, because it
repeats the forward pass; smaller micro-batches leave a GPU idle, which costs more. Then the most
generation rows, because they save decoding steps, and the largest micro-batch. Rows and micro-batch
do not compete, because generation and training run one after another. LoRA is proposed only where
all weights do not fit.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..config import Adapter, Config, flag
from ..errors import UserError
from .case import Case
from .forecast import Forecaster
from .gpus import Card
from .timing import Workload, estimate_run

LORA = Adapter(rank=64)  # the adapter that is proposed if the config has none
ANCHOR = 4  # rows or rollouts of the second forecast through which a line goes
MARGIN = 0.1  # a line may be this much above the forecast; candidates in this band are forecast
ENOUGH = 4  # rollouts of a micro-batch
RULE = (
    "The flags are chosen in this order: no gradient checkpointing, unless the micro-batch would "
    f"be below {ENOUGH}; the most generation rows; the largest micro-batch. LoRA is added only "
    "where all weights do not fit."
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
    rollouts = len(case.prompts) * case.samples
    enough = min(ENOUGH, rollouts)
    adapters = [case.adapter]
    if case.adapter is None:
        adapters.append(LORA)
    for adapter in adapters:
        fitting: list[Case] = []
        for recomputes in sorted({case.recomputes, True}):
            method = replace(case, adapter=adapter, recomputes=recomputes, micro_batch=rollouts)
            found = fit_sizes(forecaster, method, free)
            if found is not None:
                fitting.append(found)
                if found.micro_batch >= enough:
                    return found
        if fitting:
            return max(fitting, key=operator.attrgetter("micro_batch"))
    return None


def fit_sizes(
    forecaster: Forecaster, most: Case, free: float, fields: Sequence[str] = ("rows", "micro_batch")
) -> Case | None:
    """Return ``most`` with the largest sizes that fit: each its own, half of it, a quarter, ….

    ``fields``: which of the two sizes may become smaller. The other one may be too large: it is
    halved when memory runs out, and does not compete with these. None if not even sizes of 1 fit.
    """
    fewest = smallest(most)
    if forecaster.forecast(fewest)["total"] > free:
        return None
    found = most
    for field in fields:
        size = _largest(forecaster, fewest, field, most=getattr(most, field), free=free)
        found = resize(found, field, size)
    return found


def _largest(forecaster: Forecaster, fewest: Case, field: str, *, most: int, free: float) -> int:
    """Return the largest of ``most``, its half, its quarter … that fits; ``fewest`` fits.

    A line through two small forecasts says where to begin, because large ones take seconds; a
    forecast of each candidate decides.
    """
    size = _extrapolate(forecaster, fewest, field, most=most, free=free)
    while size > 1 and forecaster.forecast(resize(fewest, field, size))["total"] > free:
        size //= 2
    return max(1, size)


def _extrapolate(
    forecaster: Forecaster, fewest: Case, field: str, *, most: int, free: float
) -> int:
    """Return the largest of ``most``, its half … at which no phase is above ``free`` on its line.

    The line goes through the forecasts of 1 and of ANCHOR. It ends where all rollouts are together.
    """
    low = forecaster.forecast(fewest)
    if most <= ANCHOR:
        return most
    high = forecaster.forecast(resize(fewest, field, ANCHOR))
    together = max(len(fewest.prompts) * fewest.samples, fewest.answers)
    beside = free - sum(low["weights"].values())
    size = most
    while size > ANCHOR:
        expected = 0.0
        for phase, first in low["phases"].items():
            slope = (high["phases"][phase] - first) / (ANCHOR - 1)
            expected = max(expected, first + slope * (min(size, together) - 1))
        if expected * (1 - MARGIN) <= beside:
            return size
        size //= 2
    return size


def smallest(case: Case) -> Case:
    """Return ``case`` with rows and a micro-batch of 1."""
    return replace(case, rows=1, micro_batch=1)


def resize(case: Case, field: str, size: int) -> Case:
    """Return ``case`` with another number of ``rows`` or another ``micro_batch``."""
    if field == "rows":
        return replace(case, rows=size)
    return replace(case, micro_batch=size)


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
