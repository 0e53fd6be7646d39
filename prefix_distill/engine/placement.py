"""Quantize a model's weights and place them on devices."""

import logging
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig

from .device import read_free_memory

TERABYTE = 1 << 40


@dataclass(frozen=True, kw_only=True)
class Storage:
    """How the weights of a loaded model are stored.

    ``quantize``: ``nf4`` or ``int8`` for the linear layers except the head (bitsandbytes).
    ``spread``: bytes of each GPU (without a GPU: of main memory) that the weights may fill. Layers
    that do not fit stay in main memory or on disk and are copied when needed (accelerate).
    """

    quantize: str = "none"
    spread: int | None = None

    @property
    def package(self) -> str | None:
        """Return the extra of this package that it needs, or None."""
        if self.quantize != "none":
            return "quantize"
        if self.spread is not None:
            return "spread"
        return None


PLAIN = Storage()  # the weights as they are, on one device


def make_quantization(quantize: str, dtype: torch.dtype | Literal["auto"]) -> BitsAndBytesConfig:
    """Return the bitsandbytes config for linear layers in ``nf4`` or ``int8``."""
    # otherwise every layer logs that it casts its input
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def plan_spread(
    config: PreTrainedConfig,
    device: torch.device,
    dtype: torch.dtype | Literal["auto"],
    limit: int,
    trust_remote_code: bool,
) -> dict[str, int | str]:
    """Return accelerate's device map with at most ``limit`` bytes on each device.

    The head lies on ``device``, because the loss uses its weights directly.
    """
    from accelerate import infer_auto_device_map

    # otherwise it warns that some weights are on disk, which was requested
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    with torch.device("meta"):
        net = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code
        )
    net.tie_weights()
    head = net.get_output_embeddings()
    home, limits = _device_limits(device, limit)
    limits[home] = max(0, limits[home] - head.weight.nbytes)
    device_map = infer_auto_device_map(
        net, limits, no_split_module_classes=list(net._no_split_modules or ()), dtype=dtype
    )
    for name, module in list(net.named_modules()):
        # also the embedding, if it is tied to the head
        if any(p is head.weight for p in module.parameters(recurse=False)):
            _split_holder(device_map, net, name)
            device_map[name] = home
    return device_map


def _device_limits(device: torch.device, limit: int) -> tuple[int | str, dict[int | str, int]]:
    """Return ``device`` in accelerate's names, and the bytes of each device in filling order."""
    home: int | str = device.type
    limits: dict[int | str, int] = {}
    if device.type == "cuda":
        home = device.index or 0
        for index in range(torch.cuda.device_count()):
            limits[index] = limit
    else:
        limits[home] = limit
    limits.setdefault("cpu", (read_free_memory(torch.device("cpu")) or TERABYTE) // 2)
    return home, limits


def _split_holder(device_map: dict, net: torch.nn.Module, name: str) -> None:
    """Give the module ``name`` its own entry in a device map.

    Each entry that contains the module is replaced by entries for its parts.
    """
    while name not in device_map:
        holders = [key for key in device_map if not key or f"{name}.".startswith(f"{key}.")]
        holder = max(holders, key=len)
        device = device_map.pop(holder)
        module = net.get_submodule(holder)
        for part, _ in (
            *module.named_children(),
            *module.named_parameters(recurse=False),
            *module.named_buffers(recurse=False),
        ):
            device_map[f"{holder}.{part}".lstrip(".")] = device
