"""Rotary embeddings that depend on the length of the longest row of a batch.

With longrope, transformers uses one set of factors up to a length and another beyond it, for all
rows of a batch. Dynamic RoPE changes beyond the model's positions alone, which no row exceeds.
"""

from transformers import PreTrainedConfig


def find_switch(config: PreTrainedConfig) -> int | None:
    """Return the most tokens of a row with longrope's first factors; None without longrope."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)]
    for parameters in nested or [rope]:
        kind = parameters.get("rope_type", parameters.get("type"))
        if kind == "longrope":
            length = parameters.get("original_max_position_embeddings")
            length = length or getattr(config, "original_max_position_embeddings", None)
            return length or config.max_position_embeddings
    return None


def split_lengths(switch: int | None, lengths: list[int]) -> list[tuple[list[int], bool]]:
    """Return the indices of the rows up to the switch (True) and of those beyond it (False)."""
    within, beyond = [], []
    for i, length in enumerate(lengths):
        if switch is None or length <= switch:
            within.append(i)
        else:
            beyond.append(i)
    return [(indices, flag) for indices, flag in ((within, True), (beyond, False)) if indices]
