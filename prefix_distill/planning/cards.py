"""Find the cards (GPUs) that a planned run fits."""

import math
from dataclasses import replace

from ..config import Adapter, Config
from ..errors import UserError
from .case import Case
from .forecast import Forecaster

# GB (10⁹ bytes, as cards are sold; drivers leave about this many GiB less a few per cent)
CARDS = (16, 24, 48, 80)
# GB of a card that hold no tensors: CUDA context, workspaces of libraries, rounding by the
# allocator
RESERVED = 1.0
LORA = Adapter(rank=64)  # the adapter of the LoRA rows if the config has none


def fit_cards(forecaster: Forecaster, config: Config, case: Case, notes: list[str]) -> list[dict]:
    """Return how the run fits each card: all weights or LoRA, each with and without checkpointing.

    ``fits``: whether the config's micro-batch fits; ``micro_batch``: an estimate of the largest
    that fits, linear between two forecasts; None if not even one rollout fits; ``set_by``: the
    phase with the most memory. A method that cannot be forecast adds a note to ``notes``.
    """
    adapter = LORA
    if config.adapter.rank:
        adapter = config.adapter
    rollouts = config.train.batch_size * config.rollout.samples
    case = replace(case, micro_batch=min(rollouts, config.train.micro_batch_size))
    rows = []
    for adapted in (replace(case, adapter=None), replace(case, adapter=adapter)):
        for recomputes in (False, True):
            method = replace(adapted, recomputes=recomputes)
            try:
                rows += _fit_method(forecaster, method, rollouts)
            except UserError as error:
                notes.append(f"{describe_method(method)}: no forecast ({error})")
    return rows


def describe_method(case: Case) -> str:
    """Return what trains, and whether gradient checkpointing is on."""
    name = describe_adapter(case.adapter)
    if case.recomputes:
        return f"{name}, gradient checkpointing"
    return name


def describe_adapter(adapter: Adapter | None) -> str:
    """Return what trains: all weights, or LoRA of some rank."""
    if adapter is None or not adapter.rank:
        return "all weights"
    return f"LoRA of rank {adapter.rank}"


def _fit_method(forecaster: Forecaster, case: Case, rollouts: int) -> list[dict]:
    """Return one row per card for one method of training."""
    sizes = sorted({1, case.micro_batch})
    forecasts = [forecaster.forecast(replace(case, micro_batch=size)) for size in sizes]
    bytes_by_size = {}
    for size, forecast in zip(sizes, forecasts, strict=True):
        bytes_by_size[size] = forecast["total"]
    total = forecasts[-1]["total"]
    rows = []
    for card in CARDS:
        free = (card - RESERVED) * 1e9
        row = {
            "card_gb": card,
            "method": describe_adapter(case.adapter),
            "gradient_checkpointing": case.recomputes,
            "fits": total <= free,
            "total": total,
            "set_by": forecasts[-1]["set_by"],
            "micro_batch": _find_largest(bytes_by_size, free, rollouts),
        }
        rows.append(row)
    return rows


def _find_largest(bytes_by_size: dict[int, int], free: float, rollouts: int) -> int | None:
    """Return the largest micro-batch of up to ``rollouts`` that fits in ``free`` bytes, or None.

    ``bytes_by_size``: the bytes of a micro-batch of 1, and of a larger one if there is one.
    """
    smallest = bytes_by_size[1]
    if smallest > free:
        return None
    size, largest = max(bytes_by_size.items())
    if largest == smallest:
        return rollouts
    slope = (largest - smallest) / (size - 1)
    return min(rollouts, math.floor(1 + (free - smallest) / slope))
