"""Ghosts: shape-only tensors. The training code runs on them and their storage is counted."""

import copy
import functools
import math
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch._meta_registrations  # shapes of operations that have no meta kernel in C++
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedConfig

from ..engine.adapter import attach
from ..engine.classes import choose_class
from ..engine.models import Model, with_checkpointing
from ..engine.output_layer import contains_head, name_outside_decoder
from ..engine.targets import find_targets
from .case import Network

FULL_DEPTH = 3  # networks of up to this many layers are measured whole
INDEXED = (
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
    torch.ops.aten._index_put_impl_.default,
)
POINTWISE = (
    torch.ops.aten.mul.Tensor,
    torch.ops.aten.add.Tensor,
    torch.ops.aten.sub.Tensor,
    torch.ops.aten.div.Tensor,
    torch.ops.aten.neg.default,
    torch.ops.aten.rsqrt.default,
    torch.ops.aten.pow.Tensor_Scalar,
    torch.ops.aten.silu.default,
)


class Ghost(torch.Tensor):
    """A float tensor on the CPU without numbers; ``meta`` has its shape and stands for its storage.

    An operation on ghosts returns ghosts.
    """

    meta: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # torch's idiom to disable it

    @staticmethod
    def __new__(cls, meta: torch.Tensor):
        ghost = torch.Tensor._make_wrapper_subclass(
            cls,
            meta.shape,
            meta.stride(),
            meta.storage_offset(),
            dtype=meta.dtype,
            device=torch.device("cpu"),
        )
        ghost.meta = meta
        return ghost

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub declares it disabled
        cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        with StorageCounter():
            return function(*args, **(kwargs or {}))


class StorageCounter(TorchDispatchMode):
    """Turn new float tensors into ghosts and count the bytes of new storages while they live.

    Tensors of whole numbers stay real. The storages of ``known`` tensors are not counted. ``live``:
    bytes that are held now.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.references: dict[int, weakref.ref] = {}
        self.live = 0
        self.peak = 0
        self.known = {storage_of(t)._cdata for t in known}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # A meta tensor cannot tell how many elements a mask selects, but masks are real.
        if function in INDEXED:
            args = (args[0], _masks_to_positions(args[1]), *args[2:])
        operands: list[torch.Tensor] = []
        _map_tensors(operands.append, (args, kwargs))
        # by the id of their meta tensor
        ghosts = {id(t.meta): t for t in operands if isinstance(t, Ghost)}
        result = None
        # An operation with a ghost among its operands runs on meta tensors.
        if ghosts:
            args, kwargs = _map_tensors(_to_meta, (args, kwargs))
            if "device" in kwargs:
                kwargs["device"] = "meta"
            if function in POINTWISE and not kwargs:
                result = _apply_pointwise(args)
        if result is None:
            result = function(*args, **kwargs)
        return _map_tensors(functools.partial(self._count, ghosts), result)

    def _count(self, ghosts: dict[int, Ghost], t: torch.Tensor) -> torch.Tensor:
        """Return a result as a ghost if it is a float tensor, and count its storage if it is new.

        A result that is one of the operands is returned as the ghost that it was.
        """
        if id(t) in ghosts:
            return ghosts[id(t)]
        if ghosts or t.is_floating_point():
            t = Ghost(_to_meta(t))
        # Views share a storage, which counts once; the weak reference tells when it is freed.
        storage = storage_of(t)
        key, size = storage._cdata, storage.nbytes()
        if key not in self.references and key not in self.known:
            self.references[key] = weakref.ref(storage, functools.partial(self._release, key, size))
            self.live += size
            self.peak = max(self.peak, self.live)
        return t

    def _release(self, key: int, size: int, _reference: weakref.ref) -> None:
        del self.references[key]
        self.live -= size

    def take_peak(self) -> int:
        """Return the peak since the last call."""
        peak = self.peak
        self.peak = self.live
        return peak


def storage_of(t: torch.Tensor) -> torch.UntypedStorage:
    """Return the storage of a tensor or ghost."""
    if isinstance(t, Ghost):
        return t.meta.untyped_storage()
    return t.untyped_storage()


def _map_tensors(work: Callable, tree: Any) -> Any:
    """Return ``tree`` with every tensor t replaced by ``work(t)``."""
    if isinstance(tree, torch.Tensor):
        return work(tree)
    if isinstance(tree, tuple | list):
        return type(tree)([_map_tensors(work, part) for part in tree])
    if isinstance(tree, dict):
        return {key: _map_tensors(work, part) for key, part in tree.items()}
    return tree


def _to_meta(t: torch.Tensor) -> torch.Tensor:
    if isinstance(t, Ghost):
        return t.meta
    if t.is_meta:
        return t
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def _masks_to_positions(indices: Iterable[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Replace masks by the positions that they select."""
    positions: list[torch.Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool:
            positions.extend(index.nonzero(as_tuple=True))
        else:
            positions.append(index)
    return positions


def _apply_pointwise(args: tuple) -> torch.Tensor | None:
    """Return the result of a pointwise function of one or two operands, as a meta tensor.

    The meta kernels of these functions are written in Python and take a hundred times as long.
    None: neither operand has the shape of the result.
    """
    tensors = [t for t in args if isinstance(t, torch.Tensor)]
    largest = max(tensors, key=torch.Tensor.numel)
    if torch.broadcast_shapes(*[t.shape for t in tensors]) != largest.shape:
        return None
    dtype = largest.dtype
    if len(args) > 1:
        dtype = torch.result_type(*args[:2])
    return torch.empty_like(largest, dtype=dtype)


def make_ghost(shape: Iterable[int], dtype: torch.dtype = torch.float32) -> Ghost:
    """Return a float tensor without numbers."""
    return Ghost(torch.empty(tuple(shape), dtype=dtype, device="meta"))


def sketch(
    name: str, config: PreTrainedConfig, settings: Network, layers: int | None = None
) -> Model:
    """Return the network that ``config`` describes, made of ghosts.

    ``layers``: only the first layers; None is all. Adapters are in float32. UserError: the
    architecture has no gradient checkpointing, or no module that the adapter asks for.
    """
    from transformers import GenerationConfig

    if layers is not None:
        config = _shorten(config, layers)
    wrapper = None
    with torch.device("meta"):
        net = choose_class(name, config).from_config(config)
        net = net.to(settings.dtype).eval().requires_grad_(False)
        if settings.adapter is not None:
            ids_BT = torch.zeros(1, 8, dtype=torch.long)  # any ids: a ghost computes no numbers
            targets = find_targets(net, settings.adapter.targets, ids_BT)
            wrapper = attach(net, settings.adapter, targets, seed=0, base=name)
    _replace_by_ghosts(net)
    model = Model(
        name=name,
        net=net,
        tokenizer=None,  # type: ignore[arg-type]  # a sketch needs no tokenizer
        generation_config=GenerationConfig(),
        eos=frozenset(),
        shares_prompts=True,
        adapter=wrapper,
        whole_net=contains_head(net),
        unreached=name_outside_decoder(net),
    )
    if settings.recomputes:
        return with_checkpointing(model)
    return model


def _replace_by_ghosts(net: torch.nn.Module) -> None:
    """Replace the parameters and buffers of a network by ghosts; tied ones stay tied."""
    # Ghosts are looked up by id, and the id of a freed tensor is used again.
    originals = [*net.parameters(), *net.buffers()]
    ghosts: dict[int, torch.Tensor] = {id(t): _as_ghost(t) for t in originals}
    for module in net.modules():
        by_name: list[dict[str, Any]] = [module._parameters, module._buffers]
        for tensors in by_name:
            for name, t in tensors.items():
                if t is not None:
                    tensors[name] = ghosts[id(t)]


def _as_ghost(t: torch.Tensor) -> torch.Tensor:
    ghost = Ghost(t.detach())
    if not isinstance(t, torch.nn.Parameter):
        return ghost
    # torch.nn.Parameter detaches the tensor; the counter makes the result a ghost again.
    with StorageCounter():
        return torch.nn.Parameter(ghost, t.requires_grad)


def _shorten(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """Return a copy of ``config`` with only the first ``layers`` layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config(decoder=True)
    for key, pattern in _layer_patterns(text).items():
        setattr(text, key, pattern[:layers])
    text.num_hidden_layers = layers
    return config


def _layer_patterns(text: PreTrainedConfig) -> dict[str, list]:
    """Return the settings that have one value per layer."""
    patterns = {}
    for key, value in vars(text).items():
        if isinstance(value, list) and len(value) == text.num_hidden_layers:
            patterns[key] = value
    return patterns


def choose_depths(config: PreTrainedConfig) -> tuple[int, ...]:
    """Return the numbers of layers at which a network is measured.

    Two small depths if its layers repeat, so that bytes are linear in the depth; else its own.
    """
    text = config.get_text_config(decoder=True)
    depth = text.num_hidden_layers
    period = _layer_period(text)
    # Both depths leave a whole number of periods to extrapolate.
    first = depth % period + period
    # Layers that differ from the rest only at the beginning have no period.
    irregular = getattr(text, "first_k_dense_replace", 0) or getattr(text, "mlp_only_layers", None)
    if irregular or depth <= FULL_DEPTH or first + period > max(FULL_DEPTH, depth - 1):
        return (depth,)
    return first, first + period


def _layer_period(text: PreTrainedConfig) -> int:
    """Return after how many layers the kinds of layers repeat."""
    patterns = list(_layer_patterns(text).values())
    period = 1
    while any(pattern[period:] != pattern[:-period] for pattern in patterns):
        period += 1
    return math.lcm(period, getattr(text, "decoder_sparse_step", None) or 1)
