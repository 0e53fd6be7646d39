"""The names that the installed transformers uses where versions 5.0 to 6 differ.

During version 5 the KV cache's name changed from ``past_key_values`` to ``cache``, and gradient
checkpointing became activation checkpointing. Signatures and attributes decide, not version
numbers: code that comes with a model may be older than the library.
"""

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Self

from transformers import Cache, GenerationMixin, PreTrainedModel

if TYPE_CHECKING:
    import torch

    class CausalLM(PreTrainedModel, GenerationMixin):
        """What ``AutoModelForCausalLM`` makes; the library has no public name for it."""

        def to(self, *args: torch.device | torch.dtype) -> Self: ...  # type: ignore[override]  # its own type is lost in functools.wraps


CACHE_NAMES = ("cache", "past_key_values")  # the newer first: where both work, the older one warns


def name_cache_argument(function: Callable) -> str:
    """Return the name of the argument by which ``function`` takes a KV cache.

    A function that lists neither name passes its arguments on; it gets the name for ``generate``.
    """
    parameters = inspect.signature(function).parameters
    for name in CACHE_NAMES:
        if name in parameters:
            return name
    return name_generate_cache_argument()


def name_generate_cache_argument(
    prepare: Callable = GenerationMixin.prepare_inputs_for_generation,
) -> str:
    """Return the name of the argument by which ``generate`` takes a KV cache.

    ``generate`` lists no model arguments. The library's ``prepare``, which receives them from it,
    lists the cache.
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


def enable_checkpointing(net: PreTrainedModel) -> None:
    """Turn on gradient checkpointing in ``net``; ValueError where its architecture has none."""
    settings = {"use_reentrant": False}  # re-entrant checkpointing needs inputs with a gradient
    if hasattr(net, "activation_checkpointing_enable"):
        net.activation_checkpointing_enable(settings)
    else:
        net.gradient_checkpointing_enable(settings)
