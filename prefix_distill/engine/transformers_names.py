"""Names in transformers that differ between versions 5.0 and 6.

During version 5 the KV cache's name changed from ``past_key_values`` to ``cache``, and gradient
checkpointing became activation checkpointing. This module checks signatures and attributes, not
version numbers: code that comes with a model may be older than the library.
"""

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Self, cast

import torch
from transformers import Cache, GenerationMixin, PreTrainedModel

if TYPE_CHECKING:

    class CausalLM(PreTrainedModel, GenerationMixin):
        """The return type of ``AutoModelForCausalLM``; the library has no public name for it."""

        def to(self, *args: torch.device | torch.dtype) -> Self: ...  # type: ignore[override]  # functools.wraps hides the type


CACHE_NAMES = ("cache", "past_key_values")  # newer first: if both work, the older one warns


def name_cache_argument(function: Callable) -> str:
    """Return the name of ``function``'s argument for the KV cache.

    A function without either name forwards its arguments, so this returns ``generate``'s name.
    """
    parameters = inspect.signature(function).parameters
    for name in CACHE_NAMES:
        if name in parameters:
            return name
    return name_generate_cache_argument()


def name_generate_cache_argument(
    prepare: Callable = GenerationMixin.prepare_inputs_for_generation,
) -> str:
    """Return the name of ``generate``'s argument for the KV cache.

    The signature of ``generate`` lists no model arguments, so this inspects the library's
    ``prepare``, which receives them.
    """
    parameters = inspect.signature(prepare).parameters
    if "cache" in parameters:
        return "cache"
    return "past_key_values"


def read_cache(output: object) -> Cache:
    """Return the KV cache in the output of ``forward`` or ``generate``."""
    for name in CACHE_NAMES:
        if hasattr(output, name):
            return getattr(output, name)
    raise AttributeError(f"{type(output).__name__} has none of {', '.join(CACHE_NAMES)}")


def select_rows(cache: Cache, rows: torch.Tensor) -> None:
    """Keep or repeat the ``rows`` of a KV cache, by index.

    Recurrent states, and the caches of some models, have no ``batch_select_indices``.
    """
    cache.reorder_cache(cast("torch.LongTensor", rows))


def enable_checkpointing(net: PreTrainedModel) -> None:
    """Turn on gradient checkpointing; raise ValueError if the architecture does not support it."""
    settings = {"use_reentrant": False}  # reentrant mode needs inputs that require a gradient
    if hasattr(net, "activation_checkpointing_enable"):
        net.activation_checkpointing_enable(settings)
    else:
        net.gradient_checkpointing_enable(settings)
