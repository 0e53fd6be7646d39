"""Find the expert matrices of mixtures of experts."""

import torch
from torch.nn import Parameter


def fused_experts(name: str, module: torch.nn.Module) -> list[Parameter]:
    """Return a module's expert matrices [experts, in, out]; none for another module."""
    while name.endswith(".base_layer"):  # peft wraps the module once for each of its parameters
        name = name.removesuffix(".base_layer")
    if not name.endswith("experts"):
        return []
    return [p for p in module.parameters(recurse=False) if p.dim() == 3]
