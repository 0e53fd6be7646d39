"""What a token costs in FLOPs, counted while a network runs some tokens."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import Cache, PreTrainedConfig

from ..maths.flops import Shape
from .experts import fused_experts

if TYPE_CHECKING:
    from .models import Model

TOKENS = 16  # of the forward pass in which the rows of every matrix are counted


def widest_matrix(model: "Model") -> int:
    """Return the largest side of the decoder's matrices, in numbers per token."""
    widest = model.net.get_output_embeddings().weight.shape[1]
    for name, module in _decoder_modules(model):
        for p in fused_experts(name, module):
            widest = max(widest, *p.shape[1:])
        if _matrix_size(module):
            widest = max(widest, *_sides(module))
    return widest


@dataclass(kw_only=True)
class _Rows:
    """Rows that go through each matrix in a forward pass, by module name.

    A row of fused experts counts once for every expert that it takes.
    """

    names: dict[torch.nn.Module, str]
    rows: dict[str, float] = field(default_factory=dict)

    def note(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
        rows = tensors[0].numel() / tensors[0].shape[-1]
        if fused_experts(self.names[module], module):
            choices = [t for t in tensors if not t.is_floating_point()]
            rows *= choices[0].shape[-1] if choices else 1
        name = self.names[module]
        self.rows[name] = self.rows.get(name, 0.0) + rows


def read_shape(model: "Model", support: int | None = None) -> Shape:
    """Return what a token costs. ``support``: ids that the head computes logits for (None: all).

    The matrices of a real network are counted by the rows that they get in a forward pass, so that
    experts, layers that run twice and towers that do not run count as they do. A decoding step that
    gives a matrix more rows than tokens runs it on all cached tokens (multi-head latent attention).
    A network that cannot run is counted from its modules and its config.
    """
    sizes = dict(_matrices(model))
    runs, again, recurrent = _count_rows(model, sizes)
    trunk = adapted = expanded = 0.0
    for name, size in sizes.items():
        if ".lora_" in name:
            adapted += runs[name] * size
            continue
        trunk += runs[name] * size
        expanded += again[name] * size
    frozen = None
    if model.adapter_off:
        adapted = 0.0
    elif model.adapter is not None:
        frozen = round(trunk)
    rows, columns = model.net.get_output_embeddings().weight.shape
    return Shape(
        trunk=round(trunk + adapted),
        head=min(rows, support or rows) * columns,
        attention=attention_widths(model.config),
        frozen=frozen,
        expanded=round(expanded),
        recurrent=recurrent,
        not_counted=tuple(_find_uncounted(model, sizes, recurrent)),
        stretch=model.decoding.stretch,
    )


def _count_rows(
    model: "Model", sizes: dict[str, int]
) -> tuple[dict[str, float], dict[str, float], int]:
    """Return by module the rows per token, and the rows per cached token in a decoding step.

    The third value is the number of elements of the recurrent states.
    """
    nothing = dict.fromkeys(sizes, 0.0)
    try:
        prefilled, decoded, cache = _measure_rows(model, sizes)
    except Exception:  # shape-only tensors, or an architecture without a cache
        return nothing | _expected_rows(model, sizes), nothing, 0
    runs, again = dict(nothing), dict(nothing)
    for name, rows in prefilled.items():
        runs[name] = rows / TOKENS
    for name, rows in decoded.items():
        extra = rows - runs[name]
        # an expert of a list may get a token or not, but never all the cached ones
        if extra >= TOKENS and ".experts." not in f".{name}.":
            again[name] = extra / TOKENS
    return runs, again, _count_state(cache)


@torch.no_grad()
def _measure_rows(
    model: "Model", sizes: dict[str, int]
) -> tuple[dict[str, float], dict[str, float], Cache]:
    """Return the rows of every matrix in a prefill and in a decoding step, and the cache."""
    if any(p.is_meta or hasattr(p, "meta") for p in model.net.parameters()):
        raise ValueError("no numbers")
    if model.positions is not None and model.positions <= TOKENS:
        raise ValueError("too few positions")
    modules = {name: module for name, module in model.net.named_modules() if name in sizes}
    names = {module: name for name, module in modules.items()}
    ids_BT = (torch.arange(TOKENS + 1, device=model.device) % model.vocabulary)[None]
    mask_BT = torch.ones_like(ids_BT)
    found = []
    cache: Any = None
    for start, stop in ((0, TOKENS), (TOKENS, TOKENS + 1)):
        counter = _Rows(names=names)
        handles = [m.register_forward_pre_hook(counter.note, with_kwargs=True) for m in names]
        try:
            part_BT = ids_BT[:, start:stop]
            _, cache = model.trunk_cached(part_BT, mask_BT[:, :stop], cache)
        finally:
            for handle in handles:
                handle.remove()
        found.append(counter.rows)
    return found[0], found[1], cache


def _find_uncounted(model: "Model", sizes: dict[str, int], recurrent: int) -> list[str]:
    """Return the parts of the trunk that are not counted: classes of modules, or states.

    A module is one if it has a matrix of its own and is no linear layer, router or experts.
    """
    found = set()
    for name, module in _decoder_modules(model):
        if name in sizes or isinstance(module, torch.nn.Embedding):
            continue
        for parameter, p in module.named_parameters(name, recurse=False):
            if p.dim() > 1 and p.is_floating_point() and parameter not in model.unreached:
                found.add(type(module).__name__)
    kinds = getattr(model.config, "layer_types", None) or ()
    is_recurrent = getattr(model.net, "_is_stateful", False) or "linear_attention" in kinds
    if is_recurrent and not recurrent:
        found.add("recurrent states")
    return sorted(found)


def _count_state(cache: Cache) -> int:
    """Return the number of elements of the recurrent states in the cache of one row."""
    count = 0
    for layer in getattr(cache, "layers", ()):
        states = getattr(layer, "recurrent_states", None)
        if isinstance(states, dict):
            states = list(states.values())
        elif isinstance(states, torch.Tensor):
            states = [states]
        for state in states or ():
            if state is not None:
                count += state.numel()
    return count


def _expected_rows(model: "Model", sizes: dict[str, int]) -> dict[str, float]:
    """Return the rows per token that the config lets one expect: experts get a share."""
    config = model.config
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    chosen = getattr(config, "num_experts_per_tok", None) or experts
    runs = {}
    decoder = dict(_decoder_modules(model))
    for name in sizes:
        if name not in decoder:
            continue
        runs[name] = 1.0
        if fused_experts(name, decoder[name]):
            runs[name] = float(chosen or 1)
        elif ".experts." in f".{name}." and experts:
            runs[name] = chosen / experts
    return runs


def _decoder_modules(model: "Model") -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield the modules of the trunk with their names in the network."""
    root: torch.nn.Module = model.net if model.whole_net else model.net.get_decoder()
    inside = set(root.modules())
    head = set(model.net.get_output_embeddings().modules())
    for name, module in model.net.named_modules():
        if module in inside and module not in head:
            yield name, module


def _matrices(model: "Model") -> Iterator[tuple[str, int]]:
    """Yield the size of every matrix of the network by module; of fused experts, one expert's."""
    head = set(model.net.get_output_embeddings().modules())
    for name, module in model.net.named_modules():
        size = _matrix_size(module)
        for p in fused_experts(name, module):
            size += p[0].numel()
        if size and module not in head:
            yield name, size


def _matrix_size(module: torch.nn.Module) -> int:
    """Return the number of weights of a linear layer; 0 for another module."""
    if isinstance(module, torch.nn.Linear):
        # a quantized weight is packed, so its number of elements is smaller
        return int(module.in_features * module.out_features)
    # peft's wrappers have a property of this name
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    if weight is None or weight.dim() != 2 or isinstance(module, torch.nn.Embedding):
        return 0
    return weight.numel()  # transformers' Conv1D, or a router with a weight of its own


def _sides(module: torch.nn.Module) -> tuple[int, int]:
    if isinstance(module, torch.nn.Linear):
        return module.in_features, module.out_features
    weight: Any = module.weight
    return weight.shape[0], weight.shape[1]


def attention_widths(config: PreTrainedConfig) -> tuple[tuple[float, int | None], ...]:
    """Return width (heads × head size) and window (None: unlimited) of each layer's attention."""
    window = getattr(config, "sliding_window", None) or None
    kinds = getattr(config, "layer_types", None)
    layers: list[tuple[float, int | None]] = []
    for layer in range(config.num_hidden_layers):
        width = _attention_width(config, layer)
        # without layer types, a window applies to every layer
        if kinds and not _is_attention(kinds[layer]):
            layers.append((0, None))
        elif kinds and kinds[layer] != "sliding_attention":
            layers.append((width, None))
        else:
            layers.append((width, window))
    return tuple(layers)


def _is_attention(kind: str) -> bool:
    """Return whether a layer of this type in a config compares tokens with each other."""
    return kind != "linear_attention" and ("attention" in kind or kind == "hybrid")


def _attention_width(config: PreTrainedConfig, layer: int) -> float:
    """Return heads × head size of a layer; of different sizes of keys and values, their mean."""
    heads = _value_of_layer(getattr(config, "num_attention_heads", None), layer)
    if not heads:
        return 0
    values = getattr(config, "v_head_dim", None)
    nope = getattr(config, "qk_nope_head_dim", None)
    if values and nope is not None:
        return heads * (nope + (getattr(config, "qk_rope_head_dim", None) or 0) + values) / 2
    size = _value_of_layer(getattr(config, "head_dim", None), layer)
    return heads * (size or config.hidden_size // heads)


def _value_of_layer(value: Any, layer: int) -> Any:
    """Return a config's value for a layer, which has one value for all layers or one for each."""
    if isinstance(value, list | tuple):
        return value[layer] if layer < len(value) else value[-1]
    return value
