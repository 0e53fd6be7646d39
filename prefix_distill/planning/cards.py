"""Find the cards (GPUs) that a planned run fits."""

import math
from dataclasses import replace

from ..config import Adapter, Config
from ..errors import UserError
from .case import Case
from .forecast import Pair

# GB (10⁹ bytes, as cards are sold; their drivers leave about this many GiB less a few per cent)
CARDS = (16, 24, 48, 80)
# GB of a card that are not for tensors: CUDA context, libraries' workspaces, the allocator's
# rounding
RESERVED = 1.0
LORA = Adapter(rank=64)  # what the cards' LoRA columns stand for where the config has none


def fit_cards(pair: Pair, config: Config, case: Case, notes: list[str]) -> list[dict]:
    """Return how the run fits the known cards: full training or LoRA, each with and without
    gradient checkpointing.

    ``fits``: whether the config's micro-batch fits. ``micro_batch``: the estimated largest that
    fits, linear between two forecasts; None if not even one rollout fits. ``set_by``: the phase
    with the most memory. A note is added to ``notes`` for each method that cannot be forecast.
    """
    rollouts = config.train.batch_size * config.rollout.samples
    sizes = sorted({1, min(rollouts, config.train.micro_batch_size)})
    found = []
    for adapter in (None, config.adapter if config.adapter.rank else LORA):
        for recomputes in (False, True):
            settled = replace(case, adapter=adapter, recomputes=recomputes)
            try:
                forecasts = [pair.forecast(replace(settled, micro=m)) for m in sizes]
            except UserError as error:
                method = "LoRA" if adapter else "all weights"
                more = ", gradient checkpointing" if recomputes else ""
                notes.append(f"{method}{more}: not forecast ({error})")
                continue
            totals = [forecast["total"] for forecast in forecasts]
            for card in CARDS:
                free = (card - RESERVED) * 1e9
                found.append(
                    {
                        "card_gb": card,
                        "method": f"LoRA of rank {adapter.rank}" if adapter else "all weights",
                        "gradient_checkpointing": recomputes,
                        "fits": totals[-1] <= free,
                        "total": totals[-1],
                        "set_by": forecasts[-1]["set_by"],
                        "micro_batch": _find_largest(sizes, totals, free, rollouts),
                    }
                )
    return found


def _find_largest(sizes: list[int], totals: list[int], free: float, rollouts: int) -> int | None:
    """Return the largest micro-batch of up to ``rollouts`` that fits in ``free`` bytes, or None.
    ``totals``: the bytes of ``sizes``."""
    if totals[0] > free:
        return None
    slope = (totals[-1] - totals[0]) / (sizes[-1] - sizes[0]) if len(sizes) > 1 else 0.0
    if not slope:
        return rollouts
    return min(rollouts, math.floor(1 + (free - totals[0]) / slope))
