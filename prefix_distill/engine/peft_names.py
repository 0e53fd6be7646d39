"""Which names of layers peft accepts in a model of a given type."""

from types import ModuleType
from typing import Any

import torch

from ..errors import UserError


def import_peft() -> ModuleType:
    """Return the package peft. UserError: it is not installed."""
    try:
        import peft
    except ImportError:
        raise UserError(
            "LoRA adapters need the package peft; install the extra lora: "
            'pip install -e ".[lora]" in the checkout'
        ) from None
    return peft


class _Stub(torch.nn.Module):
    """A network of one linear layer with a given name and another network's config."""

    def __init__(self, config: Any, leaf: str):
        super().__init__()
        self.config = config
        self.add_module(leaf, torch.nn.Linear(2, 2, bias=False, device="cpu"))


def try_name(config: Any, leaf: str, way: str) -> str | None:
    """Return why peft refuses to adapt a layer called ``leaf``; None if it accepts it.

    ``way``: "module" if peft is to wrap the layer, "tensor" if it is to replace its weight.
    """
    peft = import_peft()
    stub = _Stub(config, leaf)
    chosen: dict[str, list[str]] = {"target_modules": [leaf]}
    if way == "tensor":
        chosen = {"target_modules": [], "target_parameters": [f"{leaf}.weight"]}
    try:
        with torch.random.fork_rng():
            peft.inject_adapter_in_model(peft.LoraConfig(r=1, **chosen), stub)
    except ValueError:
        model_type = getattr(config, "model_type", "?")
        return f"peft refuses layers called {leaf} in a model of type {model_type}"
    is_wrapped = isinstance(getattr(stub, leaf), peft.tuners.lora.Linear)
    if way == "module" and not is_wrapped:
        return f"peft takes {leaf} for the name of another tensor"
    return None
