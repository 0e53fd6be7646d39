"""Fingerprints of a model: its config, its tokenizer and its weights.

The weights are read where they lie, after loading. So one rule covers hub ids, folders, GGUF files,
adapters with their base, and built-in models, and no file is read a second time. The digest needs
one pass of integer arithmetic over each tensor, on its own device, which is exact everywhere.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from transformers.utils import cached_file

from . import adapter_files
from .folders import ADAPTER, locate
from .models import Model

CHUNK = 1 << 22  # elements that are summed at once
# the integer type that reads a tensor's bits, by bytes of an element
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# keys of config.json that say where it comes from, or in which dtype to load
ORIGIN = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")


def fingerprint_model(model: Model, name: str) -> dict:
    """Return the digests of a model's config, tokenizer and weights.

    ``name``: the name it was loaded by. A new LoRA adapter is left out, so that this is the
    fingerprint of its base.
    """
    vocabulary = sorted(model.tokenizer.get_vocab().items())
    return {
        "config": digest_json([_read_config(model, name), sorted(model.eos)]),
        "tokenizer": digest_json(vocabulary),
        "weights": digest_weights(model.net),
    }


def digest_json(tree: object) -> str:
    """Return a digest of JSON values."""
    text = json.dumps(tree, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _read_config(model: Model, name: str) -> dict:
    """Return the config as its file has it, which does not depend on transformers' version.

    A GGUF file has none: then it is the network's own, without default values.
    """
    folder, extra = locate(name)
    if extra == ADAPTER:
        return _read_config(model, adapter_files.read_base(Path(folder)))
    config = None
    if "gguf_file" not in extra:
        file = cached_file(folder, "config.json", local_files_only=True)
        if file is not None:
            config = json.loads(Path(file).read_text(encoding="utf-8"))
    if config is None:
        config = model.net.config.to_diff_dict()
        config.pop("quantization_config", None)
    return {key: value for key, value in config.items() if key not in ORIGIN}


@torch.no_grad()
def digest_weights(net: torch.nn.Module) -> dict[str, str]:
    """Return dtype → digest of all parameters and persistent buffers, without a LoRA adapter.

    One digest is of the weights in their own dtype. Of a float32 network there is another one of
    its weights in bfloat16, because a resumed run may load them in the other dtype. Every change of
    a single tensor changes the first digest.
    """
    own = str(getattr(net, "dtype", torch.float32)).removeprefix("torch.")
    digests: dict[str, dict[str, list[int]]] = {own: {}}
    if own == "float32":
        digests["bfloat16"] = {}
    for name, tensor in _stored_tensors(net):
        for dtype, sums in digests.items():
            value = tensor
            if dtype != own and tensor.is_floating_point():
                value = tensor.to(torch.bfloat16)
            sums[name] = [*value.shape, *_sum_bits(value)]
    return {dtype: digest_json(sums) for dtype, sums in digests.items()}


def _sum_bits(tensor: torch.Tensor) -> list[int]:
    """Return a weighted sum of each chunk's bits, read as integers, modulo 2^64.

    The weights are odd and distinct. An odd number has an inverse modulo 2^64, so a change of one
    element changes the sum; distinct weights show that elements changed places.
    """
    bits = tensor.detach().contiguous().flatten().view(BITS[tensor.element_size()])
    weights = torch.arange(1, 2 * min(CHUNK, len(bits)) + 1, 2, device=bits.device)
    sums = []
    for chunk in bits.split(CHUNK):
        sums.append((chunk.to(torch.int64) * weights[: len(chunk)]).sum())
    if not sums:
        return []
    return torch.stack(sums).tolist()


def _stored_tensors(net: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name and value of each parameter and persistent buffer once, without an adapter's.

    A tensor that lies on disk (meta) is read from there.
    """
    seen: set[int] = set()
    for path, module in net.named_modules():
        if ".lora_" in f".{path}":
            continue
        for name, tensor in _own_tensors(module):
            if ".lora_" in f".{name}" or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            full_name = f"{path}.{name}".lstrip(".").replace(".base_layer.", ".")
            yield full_name, _materialize(module, name, tensor)


def _own_tensors(module: torch.nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    """Yield the parameters and persistent buffers of a module itself."""
    yield from module.named_parameters(recurse=False)
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield name, buffer


def _materialize(module: torch.nn.Module, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return the value of a tensor that accelerate may have moved to main memory or disk."""
    hook = getattr(module, "_hf_hook", None)
    stored = getattr(hook, "weights_map", None)
    if not tensor.is_meta or stored is None:
        return tensor
    return stored[name]
