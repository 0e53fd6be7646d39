"""Shape-only tensors: the training code runs on them and their storage is counted."""

import copy
import math
import weakref
from collections.abc import Callable

import torch
import torch._meta_registrations  # shapes of what has no meta kernel in C++
from torch.utils._python_dispatch import TorchDispatchMode

from ..config import Adapter
from ..engine.adapter import attach
from ..engine.models import Model, recompute

FULL_DEPTH = 3  # up to so many layers a network is measured whole
PLACED = (
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
    """A float tensor of the CPU without its numbers: ``meta`` has its shape, and stands for its
    storage."""

    meta: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # torch's idiom to disable it

    @staticmethod
    def __new__(cls, meta: torch.Tensor):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            meta.shape,
            meta.stride(),
            meta.storage_offset(),
            dtype=meta.dtype,
            device=torch.device("cpu"),
        )
        made.meta = meta
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):  # type: ignore[override]  # torch's stub declares it disabled
        with Live():
            return function(*args, **(kwargs or {}))


class Live(TorchDispatchMode):
    """Inside it every float tensor is a ghost, whole numbers are real, and the bytes of the
    storages that are made are counted while they live. ``known``: what was there before and stays.
    """

    def __init__(self, known=()):
        super().__init__()
        self.alive, self.now, self.peak = {}, 0, 0
        self.known = {storage_of(t)._cdata for t in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in PLACED:
            args = (args[0], _places(args[1]), *args[2:])
        ghosts: dict[int, Ghost] = {}
        _each(
            (args, kwargs),
            lambda t: ghosts.update({id(t.meta): t}) if isinstance(t, Ghost) else None,
        )
        if ghosts:
            args, kwargs = _each((args, kwargs), _meta)
            if kwargs and "device" in kwargs:
                kwargs["device"] = "meta"
        found = _pointwise(args) if ghosts and function in POINTWISE and not kwargs else None
        return _each(
            function(*args, **(kwargs or {})) if found is None else found,
            lambda t: self._seen(t, ghosts),
        )

    def _seen(self, t, ghosts):
        if id(t) in ghosts:
            return ghosts[id(t)]
        if ghosts or t.is_floating_point():
            t = Ghost(t if t.is_meta else _meta(t))
        storage = storage_of(t)
        key, size = storage._cdata, storage.nbytes()
        if key not in self.alive and key not in self.known:
            self.alive[key] = weakref.ref(storage, lambda _: self._gone(key, size))
            self.now += size
            self.peak = max(self.peak, self.now)
        return t

    def _gone(self, key: int, size: int) -> None:
        del self.alive[key]
        self.now -= size

    def highest(self) -> int:
        """The peak since this was last asked."""
        peak, self.peak = self.peak, self.now
        return peak


def storage_of(t: torch.Tensor):
    return (t.meta if isinstance(t, Ghost) else t).untyped_storage()


def _each(tree, work: Callable):
    """``tree`` with ``work(tensor)`` for every tensor in it."""
    if isinstance(tree, torch.Tensor):
        return work(tree)
    if isinstance(tree, (tuple, list)):
        return type(tree)([_each(t, work) for t in tree])
    return {key: _each(t, work) for key, t in tree.items()} if isinstance(tree, dict) else tree


def _meta(t: torch.Tensor) -> torch.Tensor:
    return (
        t.meta
        if isinstance(t, Ghost)
        else torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
    )


def _places(indices):
    """Masks as the places that they name: how many they are is known, as they are real."""
    return [
        part
        for i in indices
        for part in (i.nonzero(as_tuple=True) if i is not None and i.dtype == torch.bool else (i,))
    ]


def _pointwise(args) -> torch.Tensor | None:
    """What a function of one or two operands makes of them number by number (its meta kernel, in
    Python, takes a hundred times as long); None where neither operand has the result's shape."""
    tensors = [t for t in args if isinstance(t, torch.Tensor)]
    largest = max(tensors, key=torch.Tensor.numel)
    if torch.broadcast_shapes(*(t.shape for t in tensors)) != largest.shape:
        return None
    return torch.empty_like(
        largest, dtype=torch.result_type(*args[:2]) if len(args) > 1 else largest.dtype
    )


def ghost(shape, dtype: torch.dtype = torch.float32) -> Ghost:
    """A float tensor without numbers."""
    return Ghost(torch.empty(shape, dtype=dtype, device="meta"))


def sketch(  # noqa: PLR0913  a config and five independent settings of its network
    name: str,
    config,
    dtype: torch.dtype,
    layers: int | None = None,
    adapter: Adapter | None = None,
    recomputes: bool = False,
) -> Model:
    """The network that ``config`` describes, of its first ``layers`` layers, weights in
    ``dtype``, adapters in float32; of ghosts."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    if layers is not None:
        config = shortened(config, layers)
    with torch.device("meta"):
        net = AutoModelForCausalLM.from_config(config).to(dtype).eval().requires_grad_(False)
        wrapper = None if adapter is None else attach(net, adapter, 0, name)
    made: dict[int, torch.Tensor] = {}
    first = [
        *net.parameters(),
        *net.buffers(),
    ]  # they stay until all are replaced: a freed one's id would come again
    for module in net.modules():
        for tensors in (module._parameters, module._buffers):
            for key, t in tensors.items():
                if t is not None and id(t) not in made:
                    made[id(t)] = Ghost(t.detach())
                    if isinstance(t, torch.nn.Parameter):
                        with Live():
                            made[id(t)] = torch.nn.Parameter(made[id(t)], t.requires_grad)
                if t is not None:
                    tensors[key] = made[id(t)]
    del first
    model = Model(
        name,
        net,
        None,  # type: ignore[arg-type]  # a sketch needs no tokenizer
        GenerationConfig(),
        frozenset(),
        shares_prompts=True,
        adapter=wrapper,
    )
    return recompute(model) if recomputes else model


def shortened(config, layers: int):
    """A copy of ``config`` with only the first ``layers`` layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config(decoder=True)
    depth = text.num_hidden_layers
    for key, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == depth:
            setattr(text, key, value[:layers])
    text.num_hidden_layers = layers
    return config


def depths(config) -> tuple[int, ...]:
    """At which depths a network is measured: two, where the rest of it repeats what lies between
    them; else its own."""
    text = config.get_text_config(decoder=True)
    depth = text.num_hidden_layers
    patterns = [v for v in vars(text).values() if isinstance(v, list) and len(v) == depth]
    period = next(
        p
        for p in range(1, depth + 1)
        if all(v[i] == v[i % p] for v in patterns for i in range(depth))
    )
    period = math.lcm(period, getattr(text, "decoder_sparse_step", None) or 1)
    first = depth % period + period
    if (
        getattr(text, "first_k_dense_replace", 0)
        or getattr(text, "mlp_only_layers", None)
        or first + period > max(FULL_DEPTH, depth - 1)
    ):
        return (depth,)
    return (first, first + period) if depth > FULL_DEPTH else (depth,)
