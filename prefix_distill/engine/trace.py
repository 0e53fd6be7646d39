"""Name the first tensor of a network that differs between two computations of the same tokens.

The checks that refuse a model say how much its states differ; this finds the module that shows why.
It runs only where a model is refused.
"""

import contextlib
import traceback
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import Module
from transformers import PreTrainedModel

from ..errors import first_line
from .models import Model
from .text_ids import make_row

# (module, "input" or "output", its call within the pass) → first row, [tokens, …], in float32
Pass = dict[tuple[str, str, int], torch.Tensor]
SMALLEST = 1e-6  # norm of a token's values below which they count as zero
ORIGIN = 0.25  # a change grows on its way to the last layer
FEW_TOKENS = 8
LONGEST_REASON = 160  # characters of an exception


@contextlib.contextmanager
def recording(net: PreTrainedModel, keep: int | None = None) -> Iterator[list[Pass]]:
    """Record the tensors of every forward pass inside the ``with`` block, of the first row.

    A pass begins when a module is called from outside the network with ``input_ids``. Tensors
    without an axis of its tokens are left out. ``keep``: the last tokens that are kept.
    """
    recorder = _Recorder(net, keep)
    handles = []
    for module in net.modules():
        handles.append(module.register_forward_pre_hook(recorder.enter, with_kwargs=True))
        handles.append(module.register_forward_hook(recorder.leave))
    try:
        yield recorder.passes
    finally:
        for handle in handles:
            handle.remove()


class _Recorder:
    """The hooks of ``recording``. ``depth``: the modules that are running."""

    def __init__(self, net: PreTrainedModel, keep: int | None):
        self.names = {module: name or type(net).__name__ for name, module in net.named_modules()}
        self.width = getattr(net.config.get_text_config(decoder=True), "hidden_size", None)
        self.keep = keep
        self.passes: list[Pass] = []
        self.calls: Counter[str] = Counter()
        self.depth = 0
        self.rows = self.tokens = 0

    def enter(self, module: Module, inputs: Any, named: dict[str, Any]) -> None:
        """Record the inputs of a module that starts."""
        if self.depth == 0:
            ids_BT = named.get("input_ids")
            self.rows = self.tokens = 0
            if ids_BT is not None and ids_BT.dim() == 2:
                self.rows, self.tokens = ids_BT.shape
            self.calls.clear()
            self.passes.append({})
        self.depth += 1
        self.calls[self.names[module]] += 1
        self._note(module, "input", (inputs, named))

    def leave(self, module: Module, _: Any, output: Any) -> None:
        """Record the outputs of a module that ends."""
        self.depth -= 1
        self._note(module, "output", output)

    def _note(self, module: Module, side: str, value: Any) -> None:
        name = self.names[module]
        for tensor in _find_tensors(value):
            row = self._first_row(tensor)
            if row is not None:
                if self.keep is not None:
                    row = row[-self.keep :]
                copied = row.detach().to(torch.float32, copy=True)
                self.passes[-1].setdefault((name, side, self.calls[name]), copied)

    def _first_row(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Return the values of the first row of the batch, one per token; None without tokens."""
        if tensor.dim() < 2 or not tensor.is_floating_point() or not self.tokens:
            return None
        if tensor.shape[:2] == (self.rows, self.tokens):
            return tensor[0]
        if tensor.shape[:2] == (self.tokens, self.rows):
            return tensor[:, 0]
        if len(tensor) == self.rows * self.tokens:
            return tensor[: self.tokens]
        if tensor.dim() == 3 and tensor.shape[::2] == (self.rows, self.width):
            return tensor[0, -self.tokens :]  # some networks put states of their own before a text
        return None


def _find_tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in tuples, lists and dictionaries."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _find_tensors(tuple(value.values()))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _find_tensors(item)


def join(passes: list[Pass]) -> Pass:
    """Return the passes over the parts of a text as one pass over the text."""
    joined: Pass = {}
    if not passes:
        return joined  # the network was not called
    for key in passes[0]:
        parts = [part[key] for part in passes if key in part]
        shapes = {part.shape[1:] for part in parts}
        if len(parts) == len(passes) and len(shapes) == 1:
            joined[key] = torch.cat(parts)
    return joined


def name_difference(
    model: Model, before: Pass, after: Pass, *, allowed: float, tokens: slice = slice(None)
) -> str | None:
    """Return a clause on the first tensor that changes; None: no tensor does.

    ``allowed``: the largest change of the last states, as a share of their norm; a tensor changes
    by more than ORIGIN of it. Of all tokens the largest change counts, in half precision the
    upper quartile, because rounding may send single tokens to other experts.
    """
    for key, values in before.items():
        if key in after and after[key].shape == values.shape:
            change = _measure_change(model, values[tokens], after[key][tokens])
            if not change <= ORIGIN * allowed:
                name, side, _ = key
                return (
                    f"the first tensor that differs is the {side} of {name}, by {change:.2g} of "
                    "its norm"
                )
    return None


@torch.no_grad()
def name_noise(model: Model, *, allowed: float = 0.0) -> str:
    """Return a clause on the first tensor that changes from one pass to the next, or nothing."""
    passes = []
    for _ in range(2):
        with recording(model.net) as recorded:
            model.read_logits(make_row(model, FEW_TOKENS))
        passes.append(join(recorded))
    where = name_difference(model, *passes, allowed=allowed)
    if where is None:
        return ""
    return f"; {where}"


def _measure_change(model: Model, before: torch.Tensor, after: torch.Tensor) -> float:
    difference = torch.where(before == after, 0.0, after - before)
    size_T = before.reshape(len(before), -1).norm(dim=-1)
    change_T = difference.reshape(len(before), -1).norm(dim=-1) / size_T.clamp_min(SMALLEST)
    if model.is_full_precision:
        return change_T.max().item()
    return change_T.quantile(0.75).item()


def describe_failure(net: Module, error: Exception) -> str:
    """Return an exception's first line after the innermost module of ``net`` that was running.

    An object that this module called, such as a cache, is named as well.
    """
    reason = first_line(error).split(": [")[0][:LONGEST_REASON] or type(error).__name__
    names = {module: name or type(net).__name__ for name, module in net.named_modules()}
    places: list[str] = []
    for frame, _ in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if isinstance(owner, Module) and owner in names:
            places = [names[owner]]
        elif owner is not None and len(places) == 1:
            places.append(type(owner).__name__)
    if not places or reason.startswith(places[0]):
        return reason
    return f"{', '.join(places)}: {reason}"


@torch.no_grad()
def describe_logits(net: Any) -> str:
    """Return a clause on the module that computes a network's logits from a few token ids."""
    ids_BT = torch.arange(FEW_TOKENS, device=net.device)[None]
    try:
        with recording(net) as passes:
            logits_TV = net(input_ids=ids_BT, use_cache=False).logits[0]
    except Exception as error:  # a network may raise anything
        return f"token ids alone give no logits ({describe_failure(net, error)})"
    for (name, side, _), values in passes[0].items():
        is_inside = name != type(net).__name__
        if is_inside and side == "output" and torch.equal(values, logits_TV.float()):
            return f"its logits are the output of {name}"
    return "no module of it gives its logits"
