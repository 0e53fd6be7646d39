"""Test the buffered layers of the KV cache against those of transformers."""

import copy
import random

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, StaticCache

from prefix_distill.engine.kv_buffer import ROOM, BufferedLayer, buffer_layers
from prefix_distill.engine.transformers_names import select_rows

LAYERS, HEADS, WIDTH = 2, 8, 64  # some tokens of some rows are enough for a buffer
CONFIG = LlamaConfig(num_hidden_layers=LAYERS)


def append(cache: DynamicCache, states: list[torch.Tensor]) -> list[torch.Tensor]:
    """Add keys and values to every layer; return what attention gets."""
    given = []
    for i in range(LAYERS):
        given += cache.update(states[2 * i], states[2 * i + 1], i)
    return given


def random_states(rows: int, tokens: int) -> list[torch.Tensor]:
    return [torch.randn(rows, HEADS, tokens, WIDTH) for _ in range(2 * LAYERS)]


def used_bytes(cache: DynamicCache) -> int:
    storages = {}
    for layer in cache.layers:
        for states in (layer.keys, layer.values):
            storages[states.untyped_storage().data_ptr()] = states.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("seed", range(8))
def test_a_buffered_cache_holds_what_a_dynamic_cache_holds(seed):
    """Compare both after any operations: tokens, several tokens, selected rows, removed tokens."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    expected, cache = DynamicCache(config=CONFIG), DynamicCache(config=CONFIG)
    rows = 3
    for _ in range(120):
        if rng.random() < 0.1:
            buffer_layers(cache, expected.get_seq_length() + rng.randint(0, 50))
        action = rng.choice(["token"] * 12 + ["tokens", "rows", "repeat", "crop", "copy"])
        if action == "rows":
            kept = torch.tensor([rng.randrange(rows) for _ in range(rng.randint(1, 4))])
            rows = len(kept)
            select_rows(expected, kept)
            select_rows(cache, kept)
        elif action == "repeat" and rows < 8:
            rows *= 2
            expected.batch_repeat_interleave(2)
            cache.batch_repeat_interleave(2)
        elif action == "crop" and expected.get_seq_length() > 4:
            expected.crop(-2)
            cache.crop(-2)
        elif action == "copy":
            cache = copy.deepcopy(cache)
        else:
            states = random_states(rows, 5 if action == "tokens" else 1)
            for ours, theirs in zip(append(cache, states), append(expected, states), strict=True):
                assert torch.equal(ours, theirs)
        assert cache.get_seq_length() == expected.get_seq_length()
    for ours, theirs in zip(cache.layers, expected.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys)


def test_earlier_views_keep_their_tokens():
    cache = DynamicCache(config=CONFIG)
    append(cache, random_states(2, 3))
    buffer_layers(cache, 40)
    views = []
    for _ in range(20):
        given = append(cache, random_states(2, 1))
        views.append((given, [states.clone() for states in given]))
    for given, copies in views:
        for states, before in zip(given, copies, strict=True):
            assert torch.equal(states, before)


def test_buffers_never_exceed_the_final_length_and_are_freed_with_their_rows():
    cache, limit = DynamicCache(config=CONFIG), 90
    append(cache, random_states(8, 10))
    token = 2 * LAYERS * HEADS * WIDTH * 4  # bytes
    assert used_bytes(cache) == 8 * 10 * token
    buffer_layers(cache, limit)
    addresses = set()
    for length in range(11, limit + 1):
        append(cache, random_states(8, 1))
        assert used_bytes(cache) <= 8 * min(limit, length + ROOM) * token
        addresses.add(cache.layers[0].keys.data_ptr())
    assert len(addresses) <= 1 + (limit - 10) // ROOM
    assert used_bytes(cache) == 8 * limit * token
    select_rows(cache, torch.tensor([1, 3]))
    assert used_bytes(cache) == 2 * limit * token


def test_other_caches_remain_as_they_are():
    static = StaticCache(config=CONFIG, max_cache_len=8)
    kinds = [type(layer) for layer in static.layers]
    buffer_layers(static, 8)
    assert [type(layer) for layer in static.layers] == kinds
    mixed = LlamaConfig(num_hidden_layers=2, sliding_window=4)
    mixed.layer_types = ["sliding_attention", "full_attention"]
    cache = DynamicCache(config=mixed)
    buffer_layers(cache, 8)
    assert [isinstance(layer, BufferedLayer) for layer in cache.layers] == [False, True]
