"""A layer of the KV cache that writes new tokens into a buffer instead of copying the cache."""

from typing import Any

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

ROOM = 32  # tokens for which a full buffer grows
SMALL = 1 << 15  # fewest elements of keys for which a copy costs more than a view


class _Buffer:
    """A buffer for ``capacity`` tokens; ``view`` shows those that it holds."""

    def __init__(self, states: torch.Tensor, capacity: int):
        *batch, self.length, width = states.shape
        self.buffer = states.new_empty(*batch, capacity, width)
        self.view = self.buffer.narrow(-2, 0, self.length)
        self.view.copy_(states)
        free = self.buffer.narrow(-2, self.length, capacity - self.length)
        self.free = list(reversed(free.split(1, -2)))

    def append(self, token: torch.Tensor) -> torch.Tensor:
        """Write a token behind the others; return the longer view."""
        self.free.pop().copy_(token)
        self.length += 1
        self.view = self.buffer.narrow(-2, 0, self.length)
        return self.view


class BufferedLayer(DynamicLayer):
    """A DynamicLayer whose ``keys`` and ``values`` are views of buffers with room for more tokens.

    DynamicLayer copies all its tokens for every new one; here it is written behind them. After any
    other change, such as a selection of rows, the next token makes new buffers. ``limit``: the
    length that the layer will have in the end, beyond which no buffer grows. The layer must not be
    used where a gradient is needed, because it writes in place.
    """

    def __init__(self, layer: DynamicLayer):
        super().__init__()
        self.__dict__.update(vars(layer))
        self.limit = 0
        self.buffers: tuple[_Buffer, _Buffer] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add tokens; return the keys and values of all tokens."""
        if key_states.shape[-2] != 1 or not self._make_room(key_states.dtype):
            self.buffers = None
        if self.buffers is None:
            return super().update(key_states, value_states, *args, **kwargs)
        keys, values = self.buffers
        self.keys = keys.append(key_states)
        self.values = values.append(value_states)
        return self.keys, self.values

    def _make_room(self, dtype: torch.dtype) -> bool:
        """Provide buffers with room for a token; return whether that is possible."""
        if self.buffers is not None and self.buffers[0].free:
            keys, values = self.buffers
            if keys.view is self.keys and values.view is self.values:
                return True
        if self.keys is None or self.values is None or self.keys.dtype != dtype:
            return False
        if self.keys.numel() < SMALL:
            return False
        length = self.get_seq_length()
        capacity = max(length + 1, min(length + ROOM, self.limit))
        self.buffers = None  # each pair of old tensors is freed before the next one is copied
        keys = _Buffer(self.keys, capacity)
        self.keys = keys.view
        values = _Buffer(self.values, capacity)
        self.values = values.view
        self.buffers = keys, values
        return True

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Select rows, and free the buffers."""
        self.buffers = None
        super().reorder_cache(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Select rows, and free the buffers."""
        self.buffers = None
        super().batch_select_indices(indices)


def buffer_layers(cache: Cache, limit: int) -> None:
    """Let the full-attention layers of a DynamicCache write into buffers, up to ``limit`` tokens.

    Other caches, and layers with a window or a state, remain as they are.
    """
    if type(cache) is not DynamicCache or cache.offloading:
        return
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[i] = layer = BufferedLayer(layer)
        if isinstance(layer, BufferedLayer):
            layer.limit = limit
