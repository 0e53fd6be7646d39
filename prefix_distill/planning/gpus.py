"""Cards that people own: memory, memory bandwidth and matmul rate, as their makers state them."""

import math
from dataclasses import dataclass, replace

from ..errors import UserError, nearest

# the share of unified memory that Apple's GPU may use: an assumption
UNIFIED_SHARE = 0.75
# GB (10⁹ bytes) of a GPU that hold no tensors: CUDA context, workspaces, rounding by the allocator
RESERVED = 1.0
MOST = 600  # GB; a larger number is a name with a typo


@dataclass(frozen=True, kw_only=True)
class Card:
    """A card. ``memory``: GB (10⁹ bytes); ``bandwidth``: GB/s of its memory.

    ``rates``: dense matmul rate in TFLOP/s by dtype, with sums in float32; a dtype that is missing
    is not supported or not chosen by --dtype auto. ``bandwidth`` None: only the size is known.
    ``is_unified``: the memory is shared with the CPU. ``sustained``: TFLOP/s that a run reaches on
    it, if they are known.
    """

    name: str
    memory: float
    bandwidth: float | None = None
    rates: tuple[tuple[str, float], ...] = ()
    is_unified: bool = False
    sustained: float | None = None

    @property
    def usable(self) -> float:
        """Return the bytes that tensors can fill."""
        if self.is_unified:
            return self.memory * UNIFIED_SHARE * 1e9
        return (self.memory - RESERVED) * 1e9

    @property
    def has_bfloat16(self) -> bool:
        """Return whether --dtype auto chooses bfloat16; a card known by its size alone has it."""
        return not self.rates or "bfloat16" in dict(self.rates)

    def rate(self, dtype: str) -> float | None:
        """Return the matmul rate in TFLOP/s, or None if it is not known."""
        return dict(self.rates).get(dtype)


def _nvidia(name: str, memory: float, bandwidth: float, *, half: float, single: float) -> Card:
    """Return an NVIDIA card from Ampere on, which multiplies bfloat16 as fast as float16."""
    rates = (("bfloat16", half), ("float16", half), ("float32", single))
    return Card(name=name, memory=memory, bandwidth=bandwidth, rates=rates)


def _older(name: str, memory: float, bandwidth: float, *, half: float, single: float) -> Card:
    """Return an NVIDIA card before Ampere, which has no bfloat16."""
    rates = (("float16", half), ("float32", single))
    return Card(name=name, memory=memory, bandwidth=bandwidth, rates=rates)


def _apple(name: str, memory: float, bandwidth: float, *, single: float) -> Card:
    """Return an Apple GPU. Its matmul rate is an estimate, because Apple states none."""
    rates = (("float16", single), ("float32", single))
    return Card(name=name, memory=memory, bandwidth=bandwidth, rates=rates, is_unified=True)


# From the data sheets. Of a chip sold with several memories, a usual one; NAME:GB names another.
CARDS = {
    card.name: card
    for card in (
        _older("p100", 16, 732, half=18.7, single=9.3),
        _older("v100", 16, 900, half=125, single=15.7),
        _older("v100-32", 32, 900, half=125, single=15.7),
        _older("t4", 16, 320, half=65, single=8.1),
        _nvidia("3060", 12, 360, half=25.6, single=12.7),
        _nvidia("3090", 24, 936, half=71, single=35.6),
        _nvidia("4060ti-16", 16, 288, half=44, single=22.1),
        _nvidia("4070", 12, 504, half=58, single=29.1),
        _nvidia("4080", 16, 717, half=97.5, single=48.7),
        _nvidia("4090", 24, 1008, half=165, single=82.6),
        _nvidia("5090", 32, 1792, half=210, single=105),
        _nvidia("a10", 24, 600, half=125, single=31.2),
        _nvidia("l4", 24, 300, half=121, single=30.3),
        _nvidia("a6000", 48, 768, half=155, single=38.7),
        _nvidia("l40s", 48, 864, half=362, single=91.6),
        _nvidia("a100", 40, 1555, half=312, single=19.5),
        _nvidia("a100-80", 80, 2039, half=312, single=19.5),
        _nvidia("h100", 80, 3350, half=989, single=67),
        _nvidia("h200", 141, 4800, half=989, single=67),
        _apple("m1", 16, 68, single=2.6),
        _apple("m2", 16, 100, single=3.6),
        _apple("m3", 16, 100, single=3.5),
        _apple("m3-max", 64, 400, single=14),
        _apple("m4-max", 64, 546, single=18),
    )
}
SIZES = tuple(Card(name=f"{size} GB", memory=size) for size in (8, 12, 16, 24, 40, 80))


def check_speed(tflops: float | None, measure: bool, from_run: object) -> None:
    """Raise UserError if the speed of --device-tflops is not above 0, or has two sources."""
    if tflops is not None and not 0 < tflops < math.inf:
        raise UserError(
            f"--device-tflops {tflops:g}: expected a number above 0, such as 100; change it"
        )
    if (tflops is not None) + measure + (from_run is not None) > 1:
        raise UserError(
            "--device-tflops, --measure, --from-run: expected one of them, got several; keep one"
        )


def read_cards(text: str | None, sustained: float | None = None) -> tuple[Card, ...]:
    """Return the cards of --card: names, NAME:GB, or GB, comma-separated; common sizes for None.

    ``sustained``: their TFLOP/s, as --device-tflops states them. UserError: a card is not known.
    """
    if text is None:
        return SIZES
    cards = [_read_card(part.strip().lower()) for part in text.split(",")]
    return tuple(replace(card, sustained=sustained) for card in cards)


def _read_card(text: str) -> Card:
    """Return one card of --card."""
    size = _read_size(text)
    if size is not None and text not in CARDS:  # 4090 is a name
        return Card(name=f"{size:g} GB", memory=size)
    name, colon, memory = text.partition(":")
    name = name.strip().removeprefix("rtx").strip(" -")
    size = _read_size(memory)
    if name not in CARDS or (colon and size is None):
        near = nearest(name, CARDS)
        advice = f"use one of {', '.join(CARDS)}"
        if near is not None:
            advice = f"did you mean {near}? Or {advice}"
        raise UserError(
            f"--card {text}: expected a card, NAME:GB or a number of GB above {RESERVED:g}, "
            f"up to {MOST}; {advice}"
        )
    if size is None:
        return CARDS[name]
    return replace(CARDS[name], name=f"{name}:{size:g}", memory=size)


def _read_size(text: str) -> float | None:
    """Return a number of GB, or None if the text is none that leaves room for tensors."""
    try:
        size = float(text)
    except ValueError:
        return None
    if RESERVED < size <= MOST:
        return size
    return None
