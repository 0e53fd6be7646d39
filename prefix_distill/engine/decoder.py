"""The network that samples: the student's own, or a copy of it that decodes faster."""

import copy
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from . import packing
from .casting import cast
from .models import Model

if TYPE_CHECKING:
    from .transformers_names import CausalLM

FEW_ROWS = 64  # most input rows for which _ColumnsFirst computes W·xᵀ
LARGE_WEIGHT = 1 << 16  # fewest weight elements for which it replaces a linear layer


class _ColumnsFirst(torch.nn.Linear):
    """A linear layer that computes W·xᵀ for few input rows, as in a decoding step.

    For x·Wᵀ, the CPU's float32 matmul first re-packs all weights, which costs more than the product
    of a few rows. The ``naive`` arm of ``tests/benchmarks/rollout.py`` measures the difference.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, -2)
        if not 1 < len(rows) <= FEW_ROWS:
            return super().forward(x)
        out = (self.weight @ rows.T).T.contiguous().view(*x.shape[:-1], -1)
        if self.bias is None:
            return out
        return out + self.bias


def make_decoder(model: Model, dtype: torch.dtype) -> Model:
    """Return a model that samples like ``model`` and decodes faster.

    If no weight is in ``dtype``, this is a copy in ``dtype``: with float32 weights, autocast would
    cast every weight for every token. On a CPU, it has the same parameters in faster linear
    layers. Otherwise it is ``model`` itself.
    """
    if model.home is not None or getattr(model.net, "is_quantized", False):
        return model
    model.forget_state()  # tensors with a graph cannot be copied
    net = model.net
    if dtype not in {p.dtype for p in net.parameters()}:
        net = copy.deepcopy(net).requires_grad_(False)
        cast(net, dtype)
    kind = _choose_linear(model.device, dtype)
    if kind is not None:
        net = _with_faster_linears(net, kind)
    if net is model.net:
        return model
    return replace(model, net=net)


def _choose_linear(device: torch.device, dtype: torch.dtype) -> type[torch.nn.Linear] | None:
    """Return the kind of linear layers that decodes faster on a device; None: torch's own."""
    if device.type != "cpu":
        return None
    if dtype == torch.float32:
        return _ColumnsFirst
    if packs_weights(device, dtype):
        return packing.PackedLinear
    return None


def describe_linears(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Return why a decoder on a CPU keeps torch's own linear layers, as a note; none otherwise."""
    if device.type != "cpu" or _choose_linear(device, dtype) is not None:
        return []
    return [f"sampling packs the weights again for every token: {packing.find_obstacle(dtype)}"]


def packs_weights(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether a decoder keeps its weights in the layout of the CPU's matmul as well."""
    if device.type != "cpu" or dtype == torch.float32:
        return False
    return packing.find_obstacle(dtype) is None


def _with_faster_linears(net: "CausalLM", kind: type[torch.nn.Linear]) -> "CausalLM":
    """Return a network with the same tensors, whose large linear layers are of another kind."""
    same_tensors = {id(t): t for t in [*net.parameters(), *net.buffers()]}
    faster = copy.deepcopy(net, same_tensors)
    for parent in list(faster.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not torch.nn.Linear or child.weight.numel() < LARGE_WEIGHT:
                continue
            linear = kind(
                child.in_features, child.out_features, child.bias is not None, device="meta"
            )
            linear.weight = child.weight
            linear.bias = child.bias
            setattr(parent, name, linear)
    return faster
