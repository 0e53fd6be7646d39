"""A layer of the KV cache that writes new tokens into a buffer instead of copying the cache."""

import weakref
from typing import Any

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

ROOM = 32  # tokens for which a full buffer grows


class BufferedLayer(DynamicLayer):
    """A DynamicLayer whose ``keys`` and ``values`` are views of buffers with room for more tokens.

    DynamicLayer copies all its tokens for every new one. Here a new token is written behind the
    view, and the view grows. The layer refers to its buffers through its views alone: what replaces
    them (selected rows, cropped tokens) also frees the buffers, and the next token makes new ones.
    ``limit``: the length that the layer will have in the end, beyond which no buffer grows. With a
    gradient the layer must not be used, because it writes in place.
    """

    def __init__(self, layer: DynamicLayer):
        super().__init__()
        self.__dict__.update(vars(layer))
        self.limit = 0
        self.grown: list[weakref.ref[torch.Tensor]] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add tokens; return the keys and values of all tokens."""
        keys, values = self.keys, self.values
        if keys is None or values is None or not self._fits(keys, key_states):
            return super().update(key_states, value_states, *args, **kwargs)
        if not self._has_room():
            length = keys.shape[-2]
            self.capacity = max(length + 1, min(length + ROOM, self.limit))
            self.keys = keys = _move_to_buffer(keys, self.capacity)
            self.values = values = _move_to_buffer(values, self.capacity)
        self.keys = keys = _append(keys, key_states)
        self.values = values = _append(values, value_states)
        self.grown = [weakref.ref(keys), weakref.ref(values)]
        return keys, values

    def _fits(self, keys: torch.Tensor, token: torch.Tensor) -> bool:
        """Return whether one token is added to others of its dtype."""
        return token.shape[-2] == 1 and keys.dtype == token.dtype and self.get_seq_length() > 0

    def _has_room(self) -> bool:
        """Return whether both views are those that the layer made, and their buffers not full."""
        if not self.grown or self.get_seq_length() >= self.capacity:
            return False
        keys, values = self.grown
        return keys() is self.keys and values() is self.values


def _move_to_buffer(states: torch.Tensor, capacity: int) -> torch.Tensor:
    """Return a copy of the states as a view of a buffer for ``capacity`` tokens."""
    *batch, length, width = states.shape
    view = states.new_empty(*batch, capacity, width).narrow(-2, 0, length)
    return view.copy_(states)


def _append(view: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """Write a token behind the view into its buffer; return the longer view."""
    *batch, length, width = view.shape
    longer = view.as_strided((*batch, length + 1, width), view.stride())
    longer.narrow(-2, length, 1).copy_(token)
    return longer


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
