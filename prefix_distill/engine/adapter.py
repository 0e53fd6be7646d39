"""LoRA adapters through peft: the student's weights are frozen, and only low-rank updates of its
matrices are trained.

W x + (α/r)·B A x,   A [r, in] random, B [out, r] zero, both float32

Source: LoRA, arXiv 2106.09685, eq. 3.
"""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .. import config as configuration
from ..maths.seeds import seed_of
from .peft_names import import_peft
from .targets import Targets

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

FULL_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NAME = "default"  # peft's name of a single adapter


def attach(
    net: PreTrainedModel, settings: configuration.Adapter, targets: Targets, *, seed: int, base: str
) -> "PeftModel":
    """Add a new adapter to the targets in ``net`` and return peft's wrapper of ``net``.

    Only the adapter is trained. ``settings``: the ``adapter`` section; ``base``: the base model
    that the adapter's files name. A depends on ``seed`` only.
    """
    if settings.rank is None:
        raise ValueError("adapter.rank is None: set a rank to attach an adapter")
    peft = import_peft()
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha or 2 * settings.rank,
        target_modules=targets.modules,
        target_parameters=targets.tensors or None,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(seed, "adapter"))
        wrapper = peft.get_peft_model(net, config)
    wrapper.peft_config[NAME].base_model_name_or_path = base
    return wrapper


@contextlib.contextmanager
def disable(net: torch.nn.Module) -> Iterator[None]:
    """Run ``net`` without its adapter inside the ``with`` block."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in net.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def adapted_layers(net: torch.nn.Module) -> "dict[str, BaseTunerLayer]":
    """Return the adapter's layers by the name of the weight in the network without adapter.

    A module that lies at two places has two names.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = {}
    for name, module in net.named_modules(remove_duplicate=False):
        if isinstance(module, BaseTunerLayer):
            layers[_plain_name(f"{name}.{tensor_of(module)}")] = module
    return layers


def tensor_of(layer: "BaseTunerLayer") -> str:
    """Return the name of the parameter that an adapter's layer changes, in its module."""
    return getattr(layer, "parameter_name", None) or "weight"


def _plain_name(name: str) -> str:
    """Return the name that a tensor has in the network without adapter."""
    # the layers of several tensors of one module lie inside each other
    return ".".join(part for part in name.split(".") if part != "base_layer")


def find_packed(net: torch.nn.Module) -> str | None:
    """Return the first adapted weight whose numbers are packed, so that no ΔW can be added to it.

    A quantized weight means something only together with its scales. None: there is none.
    """
    for name, layer in adapted_layers(net).items():
        weight = getattr(layer.get_base_layer(), tensor_of(layer))
        if weight.dtype not in FULL_DTYPES:
            return f"{name} ({str(weight.dtype)[6:]})"
    return None


@torch.no_grad()
def merge_tensor(layer: "BaseTunerLayer") -> torch.Tensor:
    """Return W + (α/r)·B A of one layer, in W's dtype."""
    weight = getattr(layer.get_base_layer(), tensor_of(layer)).detach()
    return (weight.float() + read_delta(layer).float()).to(weight.dtype)


def read_delta(layer: "BaseTunerLayer") -> torch.Tensor:
    """Return (α/r)·B A of one layer."""
    delta: torch.Tensor = layer.get_delta_weight(NAME)  # type: ignore[attr-defined]  # every LoRA layer has this method
    return delta


def merge_weights(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the state dict of an equal network without adapter; ``net`` does not change.

    Of tied weights, only the ones whose module has an adapter change.
    """
    layers = adapted_layers(net)
    state = {}
    for full_name, tensor in net.state_dict().items():
        if ".lora_" in full_name:
            continue
        name = _plain_name(full_name)
        state[name] = tensor
        if name in layers:
            state[name] = merge_tensor(layers[name])
    return state


@contextlib.contextmanager
def without_layers(net: torch.nn.Module) -> Iterator[None]:
    """Put the network's own layers in place of the adapter's inside the ``with`` block.

    Transformers asks a network for the shapes of its parameters when it saves some experts.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    replaced: list[tuple[torch.nn.Module, str, BaseTunerLayer]] = []
    for parent in net.modules():
        for name, child in parent.named_children():
            if isinstance(child, BaseTunerLayer):
                replaced.append((parent, name, child))
    for parent, name, layer in replaced:
        setattr(parent, name, layer.get_base_layer())
    try:
        yield
    finally:
        for parent, name, layer in replaced:
            setattr(parent, name, layer)


@contextlib.contextmanager
def saved_as_untied(net: PreTrainedModel, state: dict[str, torch.Tensor]) -> Iterator[None]:
    """Let the config say that the head has its own weight, if that is so in ``state``.

    An adapter on a tied embedding changes the embedding only.
    """
    configs: list[PreTrainedConfig] = []
    if not _is_tied(net, state):
        configs = tied_configs(net)
    for config in configs:
        config.tie_word_embeddings = False
    try:
        yield
    finally:
        for config in configs:
            config.tie_word_embeddings = True


def _is_tied(net: PreTrainedModel, state: dict[str, torch.Tensor]) -> bool:
    """Return whether embedding and head are one tensor in a state dict of ``net``."""
    tensors = []
    for name, module in net.named_modules():
        if module in (net.get_input_embeddings(), net.get_output_embeddings()):
            tensors.append(state[_plain_name(f"{name}.weight")])
    return all(tensor.data_ptr() == tensors[0].data_ptr() for tensor in tensors)


def tied_configs(net: PreTrainedModel) -> list[PreTrainedConfig]:
    """Return the configs, of the model and of its text part, that tie the head to the embedding."""
    configs = [net.config]
    text = net.config.get_text_config(decoder=True)
    if text is not net.config:
        configs.append(text)
    return [config for config in configs if getattr(config, "tie_word_embeddings", False)]
