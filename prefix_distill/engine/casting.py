"""Give a network another dtype, as loading it in that dtype would."""

import copy
import itertools
import re
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedConfig, PreTrainedModel

if TYPE_CHECKING:
    from .transformers_names import CausalLM


def cast(net: PreTrainedModel, dtype: torch.dtype) -> None:
    """Change the dtype of a network's tensors, in place, as ``from_pretrained`` would.

    What the architecture computes in float32 stays in float32: the frequencies of RoPE, and the
    routers of some mixtures of experts. ``Module.to`` rounds both. With frequencies in bfloat16,
    the angles at position 500 are off by up to 1 rad.
    """
    dtypes = _dtypes_at_load(net, dtype)
    with torch.no_grad():
        for name, tensor in itertools.chain(net.named_parameters(), net.named_buffers()):
            plain = name.replace(".base_layer", "")  # of peft's wrapper
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(dtypes.get(plain, dtype))


def copy_in(net: "CausalLM", dtype: torch.dtype) -> "CausalLM":
    """Return a copy of a network in another dtype, with the dtypes of ``cast``.

    A tensor that keeps its dtype is not copied: both networks have it. Tied tensors stay tied, and
    what trains in ``net`` trains in the copy.
    """
    dtypes = _dtypes_at_load(net, dtype)
    tensors: dict[int, torch.Tensor] = {}  # what deepcopy uses instead of its own copy, by id
    for name, tensor in itertools.chain(net.named_parameters(), net.named_buffers()):
        copied = tensor
        if tensor.is_floating_point():
            copied = tensor.detach().to(dtypes.get(name, dtype))
        if copied.dtype == tensor.dtype:
            copied = tensor
        elif isinstance(tensor, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, tensor.requires_grad)
        tensors[id(tensor)] = copied
    return copy.deepcopy(net, tensors)


def cast_state(
    net: PreTrainedModel, state: dict[str, torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Return a state dict of ``net`` in another dtype; tensors that share memory still do.

    The dtypes are those of ``cast``.
    """
    dtypes = _dtypes_at_load(net, dtype)
    copies: dict[tuple[int, torch.dtype], torch.Tensor] = {}
    converted = {}
    for name, tensor in state.items():
        converted[name] = tensor
        if tensor.is_floating_point():
            target = dtypes.get(name, dtype)
            key = (tensor.data_ptr(), target)
            if key not in copies or copies[key].shape != tensor.shape:
                copies[key] = tensor.to(target)
            converted[name] = copies[key]
    return converted


def _dtypes_at_load(net: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return the dtypes of parameters and buffers in a network that is loaded in ``dtype``."""
    config = copy.deepcopy(net.config)
    _set_dtype(config, dtype)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            template = type(net)(config)
    finally:
        torch.set_default_dtype(before)
    kept = _name_kept(template, dtype)
    dtypes = {}
    for name, tensor in itertools.chain(template.named_parameters(), template.named_buffers()):
        dtypes[name] = tensor.dtype
        if kept is not None and kept.search(name):
            dtypes[name] = torch.float32
    return dtypes


def _set_dtype(config: PreTrainedConfig, dtype: torch.dtype) -> None:
    """Set the dtype of a config and of the configs inside it."""
    config.dtype = dtype
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None:
            _set_dtype(part, dtype)


def _name_kept(net: PreTrainedModel, dtype: torch.dtype) -> re.Pattern[str] | None:
    """Return a pattern of the names that load in float32; None if there are none."""
    names = []
    if dtype == torch.float16:
        names += list(getattr(net, "_keep_in_fp32_modules", None) or ())
    if dtype in (torch.float16, torch.bfloat16):
        names += list(getattr(net, "_keep_in_fp32_modules_strict", None) or ())
    if not names:
        return None
    return re.compile("|".join(name.replace("*", ".*") for name in names))
