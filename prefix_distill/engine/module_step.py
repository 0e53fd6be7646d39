"""Repeat a decoding step by calling the modules of a decoder one after the other.

The network's own step builds masks, reads its config and packs outputs again for every token. Of a
small network this takes longer than the modules.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import Module
from transformers import Cache, PreTrainedConfig

if TYPE_CHECKING:
    from .transformers_names import CausalLM

TOKEN, POSITION, MASK, CACHE = range(4)  # the values that every step begins with
# names of sizes in a config at whose multiples masks may change
WINDOW = re.compile("(window|window_size|window_len|chunk_size|block_size|local_attention)$")


@dataclass(frozen=True, kw_only=True)
class Call:
    """A call of a module. Its inputs and outputs are indices into the values of a step.

    ``parts``: (key of the output, index of that part) for a tuple or list.
    """

    module: Module
    inputs: tuple[int, ...]
    named: tuple[tuple[str, int], ...]
    output: int
    parts: tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class ModuleStep:
    """The calls of a decoding step, in order, and the values that do not change between steps.

    ``masks``: (index of the value, layer of the cache that gives the length of the mask), cut from
    ``visible_BT``, the tokens that are no padding.
    """

    calls: tuple[Call, ...]
    values: tuple[Any, ...]
    masks: tuple[tuple[int, int], ...]
    visible_BT: torch.Tensor
    logits: int

    def run(self, given: tuple[Any, ...]) -> torch.Tensor:
        """Return the logits of a step. ``given``: token, position, mask and cache."""
        values = list(self.values)
        values[: len(given)] = given
        for index, layer in self.masks:
            values[index] = _cut_mask(self.visible_BT, given[CACHE], layer)
        for call in self.calls:
            named = {name: values[index] for name, index in call.named}
            output = call.module(*[values[index] for index in call.inputs], **named)
            values[call.output] = output
            for key, index in call.parts:
                values[index] = output[key]
        return values[self.logits]


def _cut_mask(visible_BT: torch.Tensor, cache: Cache, layer: int) -> torch.Tensor:
    """Return the attention mask [B, 1, 1, K] of one token for a layer of the cache."""
    length, offset = cache.get_mask_sizes(1, layer)
    return visible_BT[:, None, None, offset : offset + length].contiguous()


class _Recorder:
    """Records the calls of a step, and where each of their inputs comes from.

    ``values``: all objects seen, which keeps their addresses from being used again; ``copies``: the
    tensors as they were, so that a change in place between two modules is noticed. ``obstacle``:
    why the calls do not make the step; the recording ends there, and the step goes on.
    """

    def __init__(self, given: tuple[Any, ...], visible_BT: torch.Tensor):
        self.visible_BT = visible_BT
        self.layers: dict[Module, int] = {}
        self.values: list[Any] = []
        self.copies: dict[int, torch.Tensor] = {}
        self.index: dict[object, int] = {}
        self.masks: list[tuple[int, int]] = []
        self.calls: list[Call] = []
        self.started: list[tuple[tuple[int, ...], tuple[tuple[str, int], ...]]] = []
        self.obstacle: str | None = None
        for value in given:
            self.add(value)

    def add(self, value: Any) -> int:
        """Return the index of a new value."""
        index = len(self.values)
        self.values.append(value)
        if isinstance(value, torch.Tensor):
            self.copies[index] = value.clone()
        self.index[_identify(value)] = index
        return index

    def enter(self, module: Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Find the inputs of a module that starts."""
        if self.obstacle is not None:
            return
        try:
            positional = tuple(self.find(module, value) for value in inputs)
            by_name = tuple((name, self.find(module, value)) for name, value in named.items())
        except _UnknownOrigin as error:
            self.obstacle = str(error)
        else:
            self.started.append((positional, by_name))

    def leave(self, module: Module, _: Any, __: Any, output: Any) -> None:
        """Record the call of a module that ends."""
        if self.obstacle is not None:
            return
        inputs, named = self.started.pop()
        index = self.add(output)
        parts = []
        if isinstance(output, tuple | list):
            parts = [(key, self.add(part)) for key, part in enumerate(output)]
        self.calls.append(
            Call(module=module, inputs=inputs, named=named, output=index, parts=tuple(parts))
        )

    def find(self, receiver: Module, value: Any) -> int:
        """Return the index of a value that a module gets or returns."""
        index = self.index.get(_identify(value))
        if index is not None and index in self.copies:
            if torch.equal(value, self.copies[index]):
                return index
            raise _UnknownOrigin(f"{type(receiver).__name__} gets a tensor changed in place")
        if index is not None:
            return index
        if value is None or isinstance(value, bool | str):
            return self.add(value)
        if self._is_mask(receiver, value):
            self.masks.append((len(self.values), self.layers[receiver]))
            return self.add(value)
        raise _UnknownOrigin(f"{type(receiver).__name__} gets values computed between its modules")

    def _is_mask(self, receiver: Module, value: Any) -> bool:
        """Return whether a value is the mask that `_cut_mask` gives for a layer."""
        if not isinstance(value, torch.Tensor) or value.dtype != torch.bool:
            return False
        if receiver not in self.layers or value.dim() != 4:
            return False
        expected = _cut_mask(self.visible_BT, self.values[CACHE], self.layers[receiver])
        return torch.equal(value, expected)


class _UnknownOrigin(Exception):
    """A module gets a value that neither a module has made nor a step begins with."""


def _identify(value: Any) -> object:
    """Return a key of an object: of a tensor what it shows, so that equal views have one key."""
    if isinstance(value, torch.Tensor):
        return value.data_ptr(), value.shape, value.dtype
    return id(value)


def record_step(
    net: "CausalLM", inputs: dict[str, Any], *, given: tuple[Any, ...], visible_BT: torch.Tensor
) -> tuple[torch.Tensor, ModuleStep | str]:
    """Run a step of the network; return its logits, and the same step by modules or what hinders.

    The modules are those directly in the decoder, such as the embedding and the layers, and the
    output layer. ``inputs``: the arguments of the network; ``given``: token, position, mask and
    cache among them.
    """
    decoder = net.get_decoder()
    head = net.get_output_embeddings()
    recorder = _Recorder(given, visible_BT)
    modules = [head]
    for child in decoder.children():
        if isinstance(child, torch.nn.ModuleList):
            recorder.layers.update((layer, i) for i, layer in enumerate(child))
            modules += child
        elif child is not head:
            modules.append(child)
    for module in _around(net, decoder):
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            recorder.obstacle = f"{type(module).__name__} has a hook"
    hooks = []
    for module in modules:
        hooks.append(module.register_forward_pre_hook(recorder.enter, with_kwargs=True))
        hooks.append(module.register_forward_hook(recorder.leave, with_kwargs=True))
    try:
        logits = net(**inputs).logits
    finally:
        for hook in hooks:
            hook.remove()
    if recorder.obstacle is not None:
        return logits, recorder.obstacle
    try:
        index = recorder.find(net, logits)
    except _UnknownOrigin:
        return logits, f"{type(net).__name__} computes with the logits of its output layer"
    return logits, _make_step(recorder, index)


def _make_step(recorder: _Recorder, logits: int) -> ModuleStep:
    """Return the recorded step without the tensors that its modules make."""
    values = list(recorder.values)
    for call in recorder.calls:
        for index in (call.output, *[part for _, part in call.parts]):
            values[index] = None
    return ModuleStep(
        calls=tuple(recorder.calls),
        values=tuple(values),
        masks=tuple(recorder.masks),
        visible_BT=recorder.visible_BT,
        logits=logits,
    )


def _around(net: Module, decoder: Module) -> Iterator[Module]:
    """Yield the network, the decoder, and the modules between them."""
    yield net
    if net is decoder:
        return
    for child in net.children():
        if any(module is decoder for module in child.modules()):
            yield from _around(child, decoder)


def crosses_window(config: PreTrainedConfig, start: int, end: int) -> bool:
    """Return whether a window of attention ends between two lengths, so that masks change."""
    for name, size in vars(config).items():
        if type(size) is not int or size < 1 or not WINDOW.search(name):
            continue
        if start // size != end // size:
            return True
    return False
