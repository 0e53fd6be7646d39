"""What a token costs in FLOPs, read from a network's modules."""

from typing import TYPE_CHECKING

import torch
from torch.nn import Parameter
from transformers import PreTrainedConfig

from ..maths.flops import Shape

if TYPE_CHECKING:
    from .models import Model


def fused_experts(name: str, module: torch.nn.Module) -> list[Parameter]:
    """Return a module's expert matrices [experts, in, out]; none for another module."""
    if not name.endswith("experts"):
        return []
    return [p for p in module.parameters(recurse=False) if p.dim() == 3]


def read_shape(model: "Model", support: int | None = None) -> Shape:
    """Return the shape that the FLOP count needs, from the model's modules and config.

    ``support``: number of ids that the head computes logits for (None: all).
    """
    config = model.config
    share = 1.0
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if experts:
        share = getattr(config, "num_experts_per_tok", experts) / experts
    trunk = adapted = 0.0
    for name, module in model.net.get_decoder().named_modules():
        size = _matrix_size(module)
        if ".lora_" in name:
            adapted += size
        elif ".experts." in f".{name}.":
            trunk += share * size
        else:
            trunk += size
        trunk += share * sum(p.numel() for p in fused_experts(name, module))
    frozen = None
    if model.adapter_off:
        adapted = 0.0
    elif model.adapter is not None:
        frozen = round(trunk)
    rows, columns = model.net.get_output_embeddings().weight.shape
    head = min(rows, support or rows) * columns
    return Shape(
        trunk=round(trunk + adapted), head=head, attention=_attention_shape(config), frozen=frozen
    )


def _matrix_size(module: torch.nn.Module) -> int:
    """Return the number of weights of a linear layer; 0 for another module."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, torch.nn.Linear):
        # a quantized weight is packed, so its number of elements is smaller
        return module.in_features * module.out_features
    if isinstance(module, Conv1D):
        return module.weight.numel()
    return 0


def _attention_shape(config: PreTrainedConfig) -> tuple[tuple[int, int | None], ...]:
    """Return width (heads × head size) and window (None: unlimited) of each layer's attention."""
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    width = heads * head_size
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if not kinds:  # without layer types, a window applies to every layer
        return ((width, window or None),) * config.num_hidden_layers
    layers = []
    for kind in kinds:
        if kind == "sliding_attention":
            layers.append((width, window))
        else:
            layers.append((width, None))
    return tuple(layers)
