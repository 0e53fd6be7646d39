"""The decoding loop that ``generate`` runs, and what it needs of a network."""

import contextlib
import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    Cache,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
)

from .decoder import LARGE_WEIGHT
from .experts import fused_experts
from .kv_buffer import buffer_layers
from .models import Model
from .module_step import ModuleStep, crosses_window, record_step
from .processors import choose_tokens
from .transformers_names import name_generate_cache_argument, read_cache

if TYPE_CHECKING:
    from .transformers_names import CausalLM

# what a network must have from the library for the lean loop
METHODS = (
    "generate",
    "prepare_inputs_for_generation",
    "_sample",
    "_update_model_kwargs_for_generation",
)
NAMES = {"use_cache", "logits_to_keep"}  # arguments of the network that do not change
WORTHWHILE = 2  # fewest steps after the first for which it is recorded


class PlainLoopNeeded(Exception):
    """A network needs more for each token than the lean loop does; the text says what."""


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """What a loop returns: all ids, with those of the prompts, and the KV cache."""

    sequences: torch.Tensor
    cache: Cache


class LeanLoop:
    """Decodes like ``generate`` without sampling, and does less for every token.

    It is given to ``generate`` as ``custom_generate``, which prepares the inputs, the KV cache and
    the logits processors. The first step goes through the network. If it consists of calls of
    modules alone, the others repeat these calls (`module_step`); otherwise ``reasons`` gets why
    not, and all steps go through the network. Every id and logit is that of the plain loop.
    """

    def __init__(self, reasons: set[str]):
        self.reasons = reasons

    def __call__(self, net: "CausalLM", input_ids: torch.Tensor, **prepared: Any) -> Decoded:
        """Return what ``generate``'s own loop returns. PlainLoopNeeded: nothing has run."""
        config = prepared.pop("generation_config")
        processors = prepared.pop("logits_processor")
        prepared.pop("stopping_criteria")  # the length, and EOS ids
        steps = _Steps.begin(net, prepared, config.max_length - input_ids.shape[1])
        eos = torch.tensor(config.eos_token_id, device=input_ids.device)
        ended_B = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        width = input_ids.shape[1]
        ids_BT = torch.nn.functional.pad(input_ids, (0, steps.left))
        logits_BV = steps.prefill(input_ids)
        while True:
            scores_BV = logits_BV.to(copy=True, dtype=torch.float32, device=input_ids.device)
            del logits_BV
            for process in processors:
                scores_BV = process(ids_BT[:, :width], scores_BV)
            tokens_B = choose_tokens(scores_BV).masked_fill_(ended_B, config.pad_token_id)
            ids_BT[:, width] = tokens_B
            width += 1
            steps.left -= 1
            ended_B |= torch.isin(tokens_B, eos)
            if not steps.left or ended_B.all():
                break
            logits_BV = steps.run(tokens_B[:, None])
        if steps.reason is not None:
            self.reasons.add(steps.reason)
        return Decoded(sequences=ids_BT[:, :width], cache=steps.cache)


@dataclass(kw_only=True)
class _Steps:
    """The forward passes of a batch, one for each new token.

    ``named``: the arguments of the network that do not change. ``mask_BT`` also covers the tokens
    to come; None: no row has padding. ``left``: the tokens to come. ``step``: how later steps run
    by modules, once a step of the network has shown it. ``reason``: why they do not.
    """

    net: "CausalLM"
    named: dict[str, Any]
    cache: Cache
    mask_BT: torch.Tensor | None
    position_BT: torch.Tensor | None
    left: int
    width: int = 0
    step: ModuleStep | None = None
    reason: str | None = None
    is_settled: bool = False

    @classmethod
    def begin(cls, net: "CausalLM", prepared: dict[str, Any], left: int) -> "_Steps":
        """Return the steps of a batch with the inputs that ``generate`` has prepared."""
        named = dict(prepared)
        cache_name = name_generate_cache_argument()
        cache = named.get(cache_name)
        mask_BT = named.pop("attention_mask", None)
        position_BT = named.pop("position_ids", None)
        unknown = sorted(named.keys() - NAMES - {cache_name})
        if unknown:
            raise PlainLoopNeeded(f"{type(net).__name__} takes {', '.join(unknown)}")
        if type(cache) is not DynamicCache:
            raise PlainLoopNeeded(f"{type(net).__name__} does not use a DynamicCache")
        if position_BT is not None and position_BT.dim() != 2:
            raise PlainLoopNeeded(f"{type(net).__name__} has positions of several dimensions")
        return cls(
            net=net,
            named=named,
            cache=cache,
            mask_BT=mask_BT,
            position_BT=position_BT,
            left=left,
        )

    def prefill(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """Run the tokens that the cache does not hold; return the logits of the last ones."""
        self.width = ids_BT.shape[1]
        buffer_layers(self.cache, self.width + self.left)
        missing = None
        if not all(self.cache.is_linear):
            missing = self.width - self.cache.get_seq_length()
        inputs = self.net.prepare_inputs_for_generation(
            ids_BT,
            next_sequence_length=missing,
            is_first_iteration=True,
            **self._arguments(self.mask_BT, self.position_BT),
        )
        logits_BV = self.net(**inputs, return_dict=True).logits[:, -1]
        if self.mask_BT is not None:
            self.mask_BT = torch.nn.functional.pad(self.mask_BT, (0, self.left), value=1)
        if self.position_BT is not None:
            self.position_BT = self.position_BT[:, -1:]
        return logits_BV

    def run(self, token_B1: torch.Tensor) -> torch.Tensor:
        """Return the logits after one more token of every row."""
        self.width += 1
        mask_BT = None
        if self.mask_BT is not None:
            mask_BT = self.mask_BT[:, : self.width]
        if self.position_BT is not None:
            self.position_BT = self.position_BT + 1
        given = (token_B1, self.position_BT, mask_BT, self.cache)
        if self.step is not None:
            return self.step.run(given)[:, -1]
        inputs = self._arguments(mask_BT, self.position_BT)
        inputs |= {"input_ids": token_B1, "return_dict": True}
        if self.is_settled:
            return self.net(**inputs).logits[:, -1]
        return self._record(inputs, given)[:, -1]

    def _arguments(
        self, mask_BT: torch.Tensor | None, position_BT: torch.Tensor | None
    ) -> dict[str, Any]:
        """Return the arguments of a forward pass, without the ids."""
        arguments = dict(self.named)
        if mask_BT is not None:
            arguments["attention_mask"] = mask_BT
        if position_BT is not None:
            arguments["position_ids"] = position_BT
        return arguments

    def _record(self, inputs: dict[str, Any], given: tuple[Any, ...]) -> torch.Tensor:
        """Run a step of the network, and find out whether later ones can run by modules."""
        self.is_settled = True
        end = self.width + self.left
        config = self.net.config.get_text_config(decoder=True)
        if self.left < WORTHWHILE or crosses_window(config, self.width - 1, end):
            return self.net(**inputs).logits
        rows = len(given[0])
        visible_BT = torch.ones(rows, end, dtype=torch.bool, device=given[0].device)
        if self.mask_BT is not None:
            visible_BT[:, : self.mask_BT.shape[1]] = self.mask_BT.bool()
        logits, step = record_step(self.net, inputs, given=given, visible_BT=visible_BT)
        if isinstance(step, str):
            self.reason = step
        else:
            self.step = step
        return logits


@functools.cache
def find_obstacle(kind: Any) -> str | None:
    """Return why networks of a class are decoded by the plain loop; None: they need not be."""
    for function, name in (
        (GenerationMixin.generate, "custom_generate"),
        (GenerationMixin.prepare_inputs_for_generation, "next_sequence_length"),
        (Cache.get_mask_sizes, "query_length"),
    ):
        if name not in inspect.signature(function).parameters:
            return f"{function.__name__} of this transformers has no argument {name}"
    for name in METHODS:
        if getattr(kind, name, None) is not getattr(GenerationMixin, name):
            return f"{kind.__name__} has its own {name.strip('_')}"
    if "cache_position" in inspect.signature(kind.forward).parameters:
        return f"{kind.__name__} takes cache_position"
    return None


def choose_loop(net: "CausalLM", reasons: set[str]) -> LeanLoop | None:
    """Return the loop that decodes a network; None: ``generate``'s own, and why in ``reasons``."""
    kind: Any = type(net)
    obstacle = find_obstacle(kind)
    if obstacle is None and _switches_experts(net):
        obstacle = "generate computes experts in another way while it decodes on a GPU"
    if obstacle is None:
        return LeanLoop(reasons)
    reasons.add(obstacle)
    return None


def _switches_experts(net: "CausalLM") -> bool:
    """Return whether ``generate`` may compute experts in another way for single tokens."""
    if net.device.type == "cpu":
        return False
    return any(fused_experts(name, module) for name, module in net.named_modules())


def describe_steps(name: str, model: Model) -> list[str]:
    """Return why every token of a model takes a step of its network, as notes; none if not so."""
    notes = []
    for reason in sorted(model.plain_because):
        notes.append(f"{name} samples every token with its network's own step: {reason}")
    return notes


def decode(
    model: Model,
    prompt: dict[str, Any],
    *,
    config: GenerationConfig,
    processors: LogitsProcessorList,
) -> tuple[torch.Tensor, Cache]:
    """Decode a batch by ``generate``; return all ids [B, T] and the KV cache after them.

    ``prompt``: ids, mask and cache, by the names of ``generate``. ``model.decoding.loop`` says
    which loop runs; the plain one replaces the lean one where that does not suffice.
    """
    net = model.net
    named = prompt | {"generation_config": config, "logits_processor": processors}
    loop = None
    if model.decoding.loop == "lean":
        loop = choose_loop(net, model.plain_because)
    model.forget_state()
    with model.adapter_context(), contiguous_head_input(net.get_output_embeddings()):
        if loop is not None:
            try:
                out = net.generate(**named, custom_generate=loop)
            except PlainLoopNeeded as error:
                model.plain_because.add(str(error))
                out = net.generate(**named)
        else:
            out = net.generate(**named)
    return out.sequences, read_cache(out)


@contextlib.contextmanager
def contiguous_head_input(head: torch.nn.Module) -> Iterator[None]:
    """Let a large output layer get contiguous rows.

    The last row of every prompt is a slice with gaps. For such an input torch expands the weights
    of a linear layer to one copy per row. Of a small layer the copies cost nothing, and float32
    keeps its rounding.
    """
    if sum(p.numel() for p in head.parameters()) < LARGE_WEIGHT:
        yield
        return

    def close_gaps(_: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(value.contiguous() for value in inputs)

    hook = head.register_forward_pre_hook(close_gaps)
    try:
        yield
    finally:
        hook.remove()
