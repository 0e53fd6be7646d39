"""Quantize a model's weights and place them on devices."""

import logging
from typing import Literal

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig

from .device import memory_free


def make_quantization(quantize: str, dtype: torch.dtype | Literal["auto"]) -> BitsAndBytesConfig:
    """Return the bitsandbytes config for linear layers in ``nf4`` or ``int8``."""
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # it says at every layer that it casts
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
    """Which part of the network goes where: accelerate's plan, with the head on ``device``,
    whose weights the loss reads itself."""
    from accelerate import infer_auto_device_map

    logging.getLogger("accelerate").setLevel(
        logging.ERROR
    )  # that some weights are on disk is what was asked for
    with torch.device("meta"):
        net = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code
        )
    net.tie_weights()
    head = net.get_output_embeddings()
    gpu = device.type == "cuda"
    own = device.index or 0 if gpu else device.type
    limits = dict.fromkeys(
        range(torch.cuda.device_count()) if gpu else [own], limit
    )  # in this order they are filled
    limits.setdefault("cpu", (memory_free(torch.device("cpu")) or 1 << 40) // 2)
    limits[own] = max(0, limits[own] - head.weight.nbytes)
    found = infer_auto_device_map(
        net, limits, no_split_module_classes=list(net._no_split_modules or ()), dtype=dtype
    )
    for name, module in list(net.named_modules()):  # the head, and what is tied to it
        if any(p is head.weight for p in module.parameters(recurse=False)):
            _apart(found, net, name)
            found[name] = own
    return found


def _apart(places: dict, net: torch.nn.Module, name: str) -> None:
    """Gives the module ``name`` an entry of its own in a device map: what holds it is replaced
    by its parts."""
    while name not in places:
        holder = max(
            (key for key in places if not key or f"{name}.".startswith(f"{key}.")), key=len
        )
        place, inside = places.pop(holder), net.get_submodule(holder)
        parts = [
            part
            for part, _ in (
                *inside.named_children(),
                *inside.named_parameters(recurse=False),
                *inside.named_buffers(recurse=False),
            )
        ]
        places |= {f"{holder}.{part}".lstrip("."): place for part in parts}
