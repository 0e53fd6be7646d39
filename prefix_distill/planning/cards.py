"""Find the GPUs that a planned run fits."""

import math
from dataclasses import replace

from ..config import Adapter, Config
from ..errors import UserError
from .case import Case, choose_adapter
from .fitting import LORA
from .forecast import Forecaster
from .gpus import RESERVED

# GB (10⁹ bytes, as GPUs are sold; drivers leave about this many GiB less a few percent)
CARDS = (16, 24, 48, 80)


def fit_cards(forecaster: Forecaster, config: Config, case: Case, notes: list[str]) -> list[dict]:
    """Return how the run fits each GPU: all weights or LoRA, each with and without checkpointing.

    ``fits``: whether the config's micro-batch fits; ``micro_batch``: an estimate of the largest
    that fits, linear between two forecasts; None if not even one rollout fits; ``set_by``: the
    phase with the most memory. A method that cannot be forecast adds a note to ``notes``.
    """
    adapter = choose_adapter(config) or LORA
    rollouts = config.train.batch_size * config.rollout.samples
    case = replace(case, micro_batch=min(rollouts, case.micro_batch))
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
    """Return one row per GPU for one method of training."""
    single = forecaster.forecast(replace(case, micro_batch=1))["total"]
    forecast = forecaster.forecast(case)
    total = forecast["total"]
    rows = []
    for card in CARDS:
        free = (card - RESERVED) * 1e9
        micro_batch = None
        if single <= free:
            # Bytes are taken as linear between one rollout and the config's micro-batch.
            bytes_per_rollout = (total - single) / max(1, case.micro_batch - 1)
            micro_batch = _count_fitting(free - single, bytes_per_rollout, rollouts)
        row = {
            "card_gb": card,
            "method": describe_adapter(case.adapter),
            "gradient_checkpointing": case.recomputes,
            "fits": total <= free,
            "total": total,
            "set_by": forecast["set_by"],
            "micro_batch": micro_batch,
        }
        rows.append(row)
    return rows


def _count_fitting(free: float, bytes_per_rollout: float, most: int) -> int:
    """Return how many of up to ``most`` rollouts fit, if ``free`` bytes are left beside one."""
    if not bytes_per_rollout:
        return most
    return min(most, math.floor(1 + free / bytes_per_rollout))
